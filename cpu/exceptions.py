"""Delivering exceptions through the guest's IDT, as the processor does (SDM volume 3, 6.14)."""

from __future__ import annotations

import struct
from typing import Protocol

from cpu.binding import RSP, CpuState

WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21})
NAMES = {0: "#DE", 1: "#DB", 3: "#BP", 6: "#UD", 7: "#NM", 8: "#DF", 13: "#GP", 14: "#PF", 16: "#MF", 20: "#VE"}

_GATE = struct.Struct("<HHBBHI4x")
_INTERRUPT_GATE = 0xE
_TSS_RSP0, _TSS_IST1 = 0x04, 0x24
_RFLAGS_IF = 1 << 9
_RFLAGS_CLEARED = 1 << 8 | 1 << 14 | 1 << 16 | 1 << 17  # TF, NT, RF, VM
_CODE_64_FLAGS = 0x00AF_9B00
"""Descriptor bits of a present 64-bit code segment of ring 0."""


class LinearMemory(Protocol):
    """Guest memory by linear address, as the processor's own accesses see it."""

    def read(self, linear: int, size: int) -> bytes: ...

    def write(self, linear: int, data: bytes) -> None: ...


def deliver(state: CpuState, memory: LinearMemory, vector: int, rflags: int, error_code: int | None) -> None:
    """Enter the handler of ``vector``: switch stacks if the gate or the ring asks for it, push the frame.

    ``rflags`` are the flags at the exception; RIP is where the frame will return to. ``error_code`` is pushed
    unless it is None.
    """
    offset_low, selector, ist, kind, offset_middle, offset_high = _GATE.unpack(
        memory.read(state.table_base("idt") + vector * _GATE.size, _GATE.size)
    )
    stack = state.regs[RSP]
    if ist & 7:
        stack = _tss_pointer(state, memory, _TSS_IST1 + 8 * ((ist & 7) - 1))
    elif state.cpl:
        stack = _tss_pointer(state, memory, _TSS_RSP0)
    frame = [state.rip, state.segment("cs")[0], rflags, state.regs[RSP], state.segment("ss")[0]]
    if error_code is not None:
        frame.insert(0, error_code)
    stack = (stack & ~0xF) - 8 * len(frame)
    memory.write(stack, struct.pack(f"<{len(frame)}Q", *frame))
    if state.cpl:
        state.set_segment("ss", 0, 0, 0, 0)
        state.cpl = 0
    state.set_segment("cs", selector, 0, 0xFFFF_FFFF, _CODE_64_FLAGS)
    state.regs[RSP] = stack
    state.rflags &= ~_RFLAGS_CLEARED
    if kind & 0xF == _INTERRUPT_GATE:
        state.rflags &= ~_RFLAGS_IF
    state.rip = offset_high << 32 | offset_middle << 16 | offset_low
    state.forget_exception()


def _tss_pointer(state: CpuState, memory: LinearMemory, offset: int) -> int:
    return int.from_bytes(memory.read(state.table_base("tr") + offset, 8), "little")
