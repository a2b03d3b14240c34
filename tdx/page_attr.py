"""Leaves about the attributes of a private page: TDG.MEM.PAGE.ATTR.RD and WR.

Attributes are permissions of L2 VMs. This TD has none, so that all sets are 0 and nothing can be written but that;
what is left is the walk: the size of the page, and whether it is PENDING.
Source: Intel TDX Module 1.5, TDG.MEM.PAGE.ATTR.RD, WR; TDX_1.5.01, tdg_mem_page_attr_rd.c, tdg_mem_page_attr_wr.c.
"""

from __future__ import annotations

from typing import Literal

from guest.registers import Registers
from guest.units import PAGE_SIZE, round_down
from tdx.sept import (
    ACCESSIBLE_STATES,
    LEVEL_1G,
    LEVEL_4K,
    LEVEL_SIZE,
    TABLE_STATES,
    SeptEntry,
    SeptState,
)
from tdx.status import TDX_OPERAND_BUSY, TDX_OPERAND_INVALID, TDX_PAGE_SIZE_MISMATCH, TDX_SUCCESS, OperandId
from tdx.td import Td
from tdx.td_exit import MAX_EXITS, EptViolation, unresolved

_PENDING = 1 << 62
_SETS = 4
"""Sets of 16 bits each: the TD itself (L1), then three L2 VMs."""
_READABLE = ACCESSIBLE_STATES | {SeptState.PENDING}
_WRITABLE = frozenset({SeptState.MAPPED, SeptState.PENDING})
_INVALID_RCX = TDX_OPERAND_INVALID | OperandId.RCX
_BUSY_RCX = TDX_OPERAND_BUSY | OperandId.RCX


def mem_page_attr_rd(td: Td, regs: Registers) -> int:
    """TDG.MEM.PAGE.ATTR.RD. Bits 11:0 of RCX are not looked at. A page that is blocked or absent exits to the host."""
    gpa, regs.rcx, regs.rdx = regs.rcx, 0, 0
    if not td.operands.is_valid(gpa, 1):
        return _INVALID_RCX
    gpa = round_down(gpa, PAGE_SIZE)
    exits = 0
    while True:
        entry = td.sept.walk(gpa, LEVEL_4K)[2]
        if _is_locked(td, gpa, entry):
            return _BUSY_RCX
        if entry.state in _READABLE:
            break
        exits += 1
        _exit(td, gpa, "read", entry, exits)
    regs.rcx = round_down(gpa, LEVEL_SIZE[entry.level]) | entry.level | _pending(entry)
    return TDX_SUCCESS


def mem_page_attr_wr(td: Td, regs: Registers) -> int:
    """TDG.MEM.PAGE.ATTR.WR. A page that is larger, blocked or absent exits to the host."""
    rcx, attributes, flags = regs.rcx, regs.rdx, regs.r8
    regs.rcx = regs.rdx = 0
    for shift in range(0, 16 * _SETS, 16):
        for operand, register in ((attributes, OperandId.RDX), (flags, OperandId.R8)):
            if operand >> shift & 0xFFFF:
                return TDX_OPERAND_INVALID | register
    gpa, level = rcx & ~0xFFF, rcx & 7
    if rcx & 0xFF8 or level > LEVEL_1G or not td.operands.is_valid(gpa, LEVEL_SIZE[level]):
        return _INVALID_RCX
    exits = 0
    while True:
        entry = td.sept.walk(gpa, level)[2]
        if entry.level == level and _is_locked(td, gpa, entry):
            return _BUSY_RCX
        if entry.level == level and entry.state in TABLE_STATES:
            return TDX_PAGE_SIZE_MISMATCH | level
        if entry.level == level and entry.state in _WRITABLE:
            break
        exits += 1
        _exit(td, gpa, "write", entry, exits, level)
    regs.rcx = rcx | _pending(entry)
    return TDX_SUCCESS


def _pending(entry: SeptEntry) -> int:
    return _PENDING if entry.state is SeptState.PENDING else 0


def _is_locked(td: Td, gpa: int, entry: SeptEntry) -> bool:
    return td.sept.unlocked(round_down(gpa, LEVEL_SIZE[entry.level]), entry.level, 1) == 0


def _exit(td: Td, gpa: int, kind: Literal["read", "write"], entry: SeptEntry, exits: int, level: int = 0) -> None:
    """Leave to the host; the leaf begins anew when the guest comes back."""
    if exits > MAX_EXITS:
        raise unresolved(td.host.trace.stage, gpa, LEVEL_SIZE[level], kind, entry.state.name)
    td.host.ept_violation(EptViolation(gpa, kind, entry))
