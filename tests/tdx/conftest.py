"""A TD on a host: module, Secure EPT, memory, and a machine above it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from guest.clock import CostTable, VirtualClock
from guest.machine import Machine
from guest.memory import AccessKind, PhysicalMemory
from guest.ranges import RangeSet
from guest.registers import Registers
from guest.trace import Trace
from tdx.backing import Backing
from tdx.events import SeamCall, TdCall, TdExit
from tdx.module import TdConfig, TdxModule
from tdx.sept import SecureEpt
from tdx.vmm import Host
from tools.pipeline import Boot, BootConfig

COSTS = CostTable(tdcall=1_000, tdvmcall=30_000, zero_4k=7, td_exit=500_000, seamcall=11_000_000)
"""Costs that can be told apart in a sum."""


@dataclass
class SingleStep:
    """The platform with every run of TDCALLs made one at a time, as the guest's own loop would."""

    platform: TdxModule

    def admit(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        return self.platform.admit(gpa, size, kind)

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        return self.platform.cpuid(leaf, subleaf)

    def tdcall(self, regs: Registers) -> None:
        self.platform.tdcall(regs)

    def tdcall_run(self, regs: Registers, step: int, count: int) -> int:
        leaf, rcx = regs.rax, regs.rcx
        for done in range(count):
            regs.rax, regs.rcx = leaf, rcx + done * step
            self.platform.tdcall(regs)
            if regs.rax != 0:
                return done
        return count


@dataclass
class Td:
    """The parts of a TD that a test looks at."""

    physical: PhysicalMemory
    sept: SecureEpt
    host: Host
    trace: Trace
    clock: VirtualClock
    module: TdxModule
    machine: Machine

    def events(self, kind: type) -> list:
        """The events of one class, in order."""
        return [record.event for record in self.trace.records if isinstance(record.event, kind)]

    def calls(self) -> Counter[tuple[str, int]]:
        """Number of TDCALLs by leaf and status."""
        out: Counter[tuple[str, int]] = Counter()
        for event in self.events(TdCall):
            out[event.leaf, event.status] += event.count
        return out

    def seamcalls(self) -> Counter[tuple[str, int]]:
        """Number of SEAMCALLs by leaf and status."""
        out: Counter[tuple[str, int]] = Counter()
        for event in self.events(SeamCall):
            out[event.leaf, event.status] += event.count
        return out

    def exits(self) -> Counter[int]:
        """Number of TD exits by the level of what the host added."""
        out: Counter[int] = Counter()
        for event in self.events(TdExit):
            out[event.level] += event.count
        return out

    def states(self, start: int, end: int) -> list[tuple[int, int, str, int]]:
        """Secure EPT of a range: (start, end, state, level)."""
        return [(low, high, entry.state.name, entry.level) for low, high, entry in self.sept.runs(start, end)]


def build_td(
    ram: tuple[tuple[int, int], ...] = ((0, 1 << 24),), *, page_level: int | Backing = 1, single_step: bool = False,
    gpaw: int = 52, sept_ve_disable: bool = True, vcpus: int = 1, running: bool = True,
    no_rbp_mod: bool = False,
) -> Td:  # fmt: skip
    config = TdConfig(gpaw, sept_ve_disable, vcpus, no_rbp_mod=no_rbp_mod)
    physical, sept, clock = PhysicalMemory(), SecureEpt(gpaw), VirtualClock()
    trace = Trace(clock)
    trace.stage = "test"
    host = Host(physical, sept, trace, clock, COSTS, RangeSet(ram), page_level, config.shared_mask)
    module = TdxModule(physical, sept, host, trace, clock, COSTS, config)
    platform = SingleStep(module) if single_step else module
    machine = Machine.build(physical, platform, trace, clock)
    sept.on_revoke.append(lambda start, end: machine.memory.flush())
    td = Td(physical, sept, host, trace, clock, module, machine)
    if running:
        host.finalize()
        trace.records.clear()
        clock.ns = 0
    return td


def vmcall(td: Td, **regs: int) -> Registers:
    """One TDG.VP.VMCALL that exposes R10 to R15; returns the registers."""
    found = Registers(rax=0, rcx=0xFC00, **regs)
    td.module.tdcall(found)
    assert (found.rax, found.rcx) == (0, 0xFC00)
    return found


@pytest.fixture(scope="session")
def make_td() -> Callable[..., Td]:
    """A function that makes a TD with ``ram``, by default 16 MiB from 0 on, nothing of which is backed yet; it runs."""
    return build_td


@pytest.fixture
def module() -> TdxModule:
    """The module of a TD."""
    platform = Boot(BootConfig(b"")).machine.platform
    assert isinstance(platform, TdxModule)
    return platform


@pytest.fixture
def td() -> Td:
    """A TD with 16 MiB of RAM, backed by 2 MiB pages."""
    return build_td()
