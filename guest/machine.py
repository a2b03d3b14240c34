"""The machine that a stage runs on, and what any platform below it must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from guest.clock import VirtualClock
from guest.entropy import Chance, Entropy
from guest.errors import GuestPanic
from guest.gates import CallGates
from guest.memory import Gate, GuestMemory, PhysicalMemory
from guest.registers import Registers
from guest.trace import Note, Print, Trace


class Platform(Gate, Protocol):
    """What lies under the guest: it admits memory accesses and answers CPUID and TDCALL."""

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""
        ...

    def tdcall(self, regs: Registers) -> None:
        """Execute one TDCALL: inputs and outputs in ``regs``, completion status in RAX."""
        ...

    def tdcall_run(self, regs: Registers, step: int, count: int) -> int:
        """Execute TDCALL up to ``count`` times, RCX growing by ``step``, while it succeeds.

        Returns the number of calls that succeeded. If it is below ``count``, one more call was made and RAX
        has its status. The result is that of the loop in the guest, at the cost of a range.
        """
        ...


class CallerMemory(Protocol):
    """Memory at the addresses that the caller of a service uses: an operating system's are virtual."""

    def read(self, address: int, size: int, /) -> bytes:
        """The ``size`` bytes at ``address``."""
        ...

    def write(self, address: int, data: bytes, /) -> None:
        """Store ``data`` at ``address``."""
        ...


@dataclass(slots=True)
class Machine:
    """All that a stage gets: memory behind the gate, registers, call gates, CPU instructions, trace, clock, chance."""

    memory: GuestMemory
    regs: Registers
    gates: CallGates
    platform: Platform
    trace: Trace
    clock: VirtualClock
    entropy: Chance
    caller: CallerMemory
    """Memory as whoever calls a service sees it."""

    @classmethod
    def build(
        cls, physical: PhysicalMemory, platform: Platform, trace: Trace, clock: VirtualClock, seed: int = 0
    ) -> Machine:
        """A machine whose memory is ``physical`` behind the gate of ``platform``; ``seed`` decides its chance."""
        memory = GuestMemory(physical, platform, trace)
        return cls(memory, Registers(), CallGates(trace), platform, trace, clock, Entropy(clock, seed), memory)

    def call(self, address: int, *args: int) -> int:
        """Call the firmware service at ``address``; returns its EFI_STATUS."""
        return self.gates.call(address, *args)

    def print(self, text: str) -> None:
        """Put a line out, as the stage's own console or log would."""
        self.trace.add(Print(text))

    def note(self, text: str) -> None:
        """Record a fact for the reader of the trace."""
        self.trace.add(Note(text))

    def panic(self, text: str) -> GuestPanic:
        """The exception to raise when the stage stops with ``text``; the text is put out first."""
        self.print(text)
        return GuestPanic(self.trace.stage, text)
