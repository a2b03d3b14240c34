"""Guest memory behind a gate that notes what it is asked and refuses what it is told to refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from guest.clock import VirtualClock
from guest.errors import MemoryFault
from guest.memory import AccessKind, GuestMemory, PhysicalMemory
from guest.trace import Trace

EVERYWHERE = (0, 1 << 52)


@dataclass
class FakeGate:
    """Admits what lies inside ``run`` and notes every question."""

    run: tuple[int, int] = EVERYWHERE
    asked: list[tuple[int, int, str]] = field(default_factory=list)

    def admit(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        self.asked.append((gpa, size, kind))
        if self.run[0] <= gpa and gpa + size <= self.run[1]:
            return self.run
        raise MemoryFault(stage="test", gpa=gpa, start=gpa, size=size, kind=kind, state="refused", end="by the gate")


@dataclass
class Bench:
    """A memory and what it is made of."""

    physical: PhysicalMemory
    gate: FakeGate
    trace: Trace
    memory: GuestMemory


def build_bench(run: tuple[int, int] = EVERYWHERE) -> Bench:
    physical, gate, trace = PhysicalMemory(), FakeGate(run), Trace(VirtualClock())
    return Bench(physical, gate, trace, GuestMemory(physical, gate, trace))


@pytest.fixture(scope="session")
def make_bench() -> Callable[..., Bench]:
    """A function that makes a memory whose gate admits ``run``, by default everything."""
    return build_bench


@pytest.fixture
def bench() -> Bench:
    """A memory whose gate admits everything."""
    return build_bench()
