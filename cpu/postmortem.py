"""What there is to see when real code stopped: registers, who called, exceptions, the last events.

The layout follows the kernel's own reports (arch/x86/kernel/dumpstack.c), so that readers of those find their way.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice

from cpu.binding import CpuState
from cpu.exceptions import NAMES
from cpu.symbols import Symbols
from cpu.vcpu import Vcpu
from guest.errors import BootError, MemoryFault
from guest.registers import Registers
from guest.trace import Record, Trace
from guest.units import SZ_1M, round_up

LAST_EVENTS = 20
_CALLERS = 24
_THREAD_SIZE = SZ_1M >> 6
"""16 KiB: a kernel stack ends at a multiple of its size (arch/x86/include/asm/page_64_types.h)."""

_ROWS = (
    ("rax", "rbx", "rcx"),
    ("rdx", "rsi", "rdi"),
    ("rbp", "r8", "r9"),
    ("r10", "r11", "r12"),
    ("r13", "r14", "r15"),
)


def report(vcpu: Vcpu, trace: Trace, symbols: Symbols, death: BootError | None = None) -> list[str]:
    """The lines of a report on a processor that has stopped, of ``death`` if it died. Nothing is changed."""
    return [
        *_fault(vcpu, symbols, death),
        *_registers(vcpu.registers(), vcpu.state, symbols),
        "Call Trace:",
        *_call_trace(vcpu, symbols),
        f"Exceptions: {_exceptions(vcpu.exceptions)}",
        f"Last events of {trace.count}:",
        *(_event(record) for record in trace.records[-LAST_EVENTS:]),
    ]


def _fault(vcpu: Vcpu, symbols: Symbols, death: BootError | None) -> Iterator[str]:
    """What was touched, by which instruction, and what was wrong with it, in one line."""
    if isinstance(death, MemoryFault):
        rip = vcpu.registers().rip
        where = symbols.name(rip)
        name = "" if where == f"{rip:#x}" else f" ({where})"
        yield f"BUG: {death.kind} of {death.size} bytes at {death.gpa:#x} by RIP {rip:#x}{name}: page is {death.state}"


def _registers(regs: Registers, state: CpuState, symbols: Symbols) -> Iterator[str]:
    values = regs.as_dict()
    yield f"RIP: {state.segment('cs')[0]:04x}:{symbols.name(regs.rip)}"
    yield f"RSP: {state.segment('ss')[0]:04x}:{regs.rsp:016x}"
    for row in _ROWS:
        yield " ".join(
            f"{name.upper() if name[1:].isalpha() else f'R{name[1:]:0>2}'}: {values[name]:016x}" for name in row
        )
    yield f"CR0: {state.cr[0]:016x} CR2: {state.cr[2]:016x} CR3: {regs.cr3:016x} CR4: {state.cr[4]:016x}"


def guess_callers(vcpu: Vcpu, symbols: Symbols) -> Iterator[int]:
    """What looks like return addresses between the stack pointer and the stack's end, innermost first."""
    stack = vcpu.registers().rsp & ~7
    data = vcpu.peek(stack, round_up(stack + 1, _THREAD_SIZE) - stack)
    return (word for (word,) in struct.iter_unpack("<Q", data) if symbols.is_text(word))


def _call_trace(vcpu: Vcpu, symbols: Symbols) -> list[str]:
    """Callers as guesses, with a ``?``."""
    guesses = [f" ? {symbols.name(word)}" for word in islice(guess_callers(vcpu, symbols), _CALLERS)]
    return guesses or [" no return address found"]


def _exceptions(counts: dict[int, int]) -> str:
    return ", ".join(f"{NAMES.get(vector, f'#{vector}')} {count}" for vector, count in sorted(counts.items())) or "none"


def _event(record: Record) -> str:
    fields = (f"{name}={_value(value)}" for name, value in record.event.as_dict().items())
    return " ".join([f" {record.number} {record.stage}: {record.event.name}", *fields])


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_value(each) for each in value)})"
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
