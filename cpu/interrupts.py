"""When interrupts enter the guest, and how time passes for it: executed code takes time, and HLT waits for the timer.

An instruction takes a fixed time, so that the same code meets its interrupts at the same instruction in every run.
"""

from __future__ import annotations

from collections.abc import Callable

from cpu.apic import LocalApic
from cpu.binding import CpuState
from cpu.counter import NEVER, InstructionCounter
from guest.machine import Machine

INSTRUCTIONS_PER_NS = 2
"""A processor of 2 GHz with one instruction a cycle."""
_RFLAGS_IF = 1 << 9


class Interrupts:
    """The local APIC of a vCPU, with what leads from it into the guest.

    ``enter`` is called between two basic blocks with the vector of an interrupt that the guest takes. Until
    :meth:`start`, code takes no time and no interrupt comes.
    """

    def __init__(self, machine: Machine, state: CpuState, enter: Callable[[int], None], tsc_start: int) -> None:
        self._machine, self._clock, self._state, self._enter = machine, machine.clock, state, enter
        self.apic = LocalApic(machine.clock, tsc_start)
        self.delivered: dict[int, int] = {}
        """Number of interrupts so far by vector."""
        self._counter: InstructionCounter | None = None
        self._counted = 0
        self._event = NEVER

    def start(self, counter: InstructionCounter) -> None:
        """Let the instructions that ``counter`` counts take time, and interrupts come."""
        self._counter, self._counted = counter, counter.count
        counter.attend(self._on_attention)
        self._update()

    @property
    def started(self) -> bool:
        return self._counter is not None

    def pass_time(self, ns: int = 0) -> None:
        """Bring the clock up to the code that has run, and let ``ns`` more go by."""
        if self._counter is not None:
            passed = (self._counter.count - self._counted) // INSTRUCTIONS_PER_NS
            self._counted += passed * INSTRUCTIONS_PER_NS
            ns += passed
        self._clock.advance(ns)
        if self._clock.ns >= self._event:
            self._update()

    def rdmsr(self, index: int) -> int | None:
        """Read a register of the APIC; None if it refuses."""
        self.pass_time()
        return self.apic.rdmsr(index)

    def wrmsr(self, index: int, value: int) -> bool:
        """Write a register of the APIC; False if it refuses."""
        self.pass_time()
        done = self.apic.wrmsr(index, value)
        self._update()
        return done

    def wait(self) -> None:
        """Let time pass until there is an interrupt to take. If none can come, that is the guest's end."""
        self.pass_time()
        self.apic.expire()
        event = self.apic.next_event()
        if self.apic.pending() is None and event is not None:
            self._clock.advance(event - self._clock.ns)
            self.apic.expire()
        if self.apic.pending() is None:
            raise self._machine.panic(f"halted at {self._state.rip:#x} with no timer set: nothing can wake it")
        self._update()

    def halt(self) -> None:
        """HLT: wait for an interrupt and take it. RIP is behind the instruction."""
        if not self._state.rflags & _RFLAGS_IF:
            raise self._machine.panic(f"halted at {self._state.rip:#x} with interrupts blocked")
        self._state.in_shadow = False
        self.wait()
        self._take()

    def _take(self) -> bool:
        vector = self.apic.pending()
        if vector is None or not self._state.rflags & _RFLAGS_IF or self._state.in_shadow:
            return False
        self.apic.acknowledge(vector)
        self.delivered[vector] = self.delivered.get(vector, 0) + 1
        self._enter(vector)
        self._update()
        return True

    def _on_attention(self) -> bool:
        """Between two blocks: True if the guest now goes on elsewhere."""
        self.pass_time()
        self._update()
        return self._take()

    def _update(self) -> None:
        """Say when to look again: at the timer's next event, or as soon as the guest takes interrupts."""
        self.apic.expire()
        event = self.apic.next_event()
        self._event = NEVER if event is None else event
        if self._counter is not None:
            left = NEVER if event is None else max(0, event - self._clock.ns) * INSTRUCTIONS_PER_NS
            self._counter.look(left, with_interrupts_on=self.apic.pending() is not None)
