"""Leaves that read and write metadata: TDG.VM.RD and WR, TDG.VP.RD and WR, TDG.SYS.RD and RDALL.

Source: Intel TDX Module 1.5, Metadata Access; TDX_1.5.01, tdg_vm_rd_wr.c, tdg_vp_rd_wr.c, tdg_sys_rd.c,
tdg_sys_rdall.c, md_dump_list().
"""

from __future__ import annotations

import struct

from guest.registers import Registers
from guest.units import PAGE_SIZE
from tdx.metadata import NULL_FIELD_ID, Fields
from tdx.status import (
    TDX_METADATA_FIELD_ID_INCORRECT,
    TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT,
    TDX_OPERAND_INVALID,
    TDX_SUCCESS,
    OperandId,
)
from tdx.td import Td

_LIST_HEADER = struct.Struct("<HHI")
"""Size of the list in bytes, number of sequences, reserved."""


def vm_rd(td: Td, regs: Registers) -> int:
    """TDG.VM.RD, version 0."""
    if regs.rcx:
        regs.r8 = 0
        return TDX_OPERAND_INVALID | OperandId.RCX
    status, regs.r8 = td.metadata.td.read(regs.rdx)
    return status


def vm_rd_v1(td: Td, regs: Registers) -> int:
    """TDG.VM.RD, version 1."""
    return _read_and_step(td.metadata.td, regs, check_rcx=True)


def vm_wr(td: Td, regs: Registers) -> int:
    """TDG.VM.WR."""
    return _write(td.metadata.td, regs)


def vp_rd(td: Td, regs: Registers) -> int:
    """TDG.VP.RD."""
    return _read_and_step(td.metadata.vp, regs, check_rcx=True)


def vp_wr(td: Td, regs: Registers) -> int:
    """TDG.VP.WR."""
    return _write(td.metadata.vp, regs)


def sys_rd(td: Td, regs: Registers) -> int:
    """TDG.SYS.RD."""
    return _read_and_step(td.metadata.sys, regs, check_rcx=False)


def sys_rdall(td: Td, regs: Registers) -> int:
    """TDG.SYS.RDALL: all fields fit into one list."""
    gpa, first, regs.r8 = regs.rdx, regs.r8, NULL_FIELD_ID
    if not td.operands.is_valid(gpa, PAGE_SIZE):
        return TDX_OPERAND_INVALID | OperandId.RDX
    if first != NULL_FIELD_ID and not td.metadata.sys.has(first):
        return TDX_METADATA_FIELD_ID_INCORRECT
    sequences = [struct.pack(f"<{1 + len(v)}Q", header, *v) for header, v in td.metadata.sys.sequences(first)]
    body = b"".join(sequences)
    td.operands.write(gpa, _LIST_HEADER.pack(_LIST_HEADER.size + len(body), len(sequences), 0) + body)
    return TDX_SUCCESS


def _read_and_step(fields: Fields, regs: Registers, *, check_rcx: bool) -> int:
    """Read the field of RDX into R8; RDX becomes the next one. A null RDX gives only the first one."""
    field_id, regs.rdx, regs.r8 = regs.rdx, NULL_FIELD_ID, 0
    if check_rcx and regs.rcx:
        return TDX_OPERAND_INVALID | OperandId.RCX
    if field_id == NULL_FIELD_ID:
        regs.rdx = fields.next_id(NULL_FIELD_ID)
        return TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT
    status, regs.r8 = fields.read(field_id)
    if status == TDX_SUCCESS:
        regs.rdx = fields.next_id(field_id)
    return status


def _write(fields: Fields, regs: Registers) -> int:
    value, regs.r8 = regs.r8, 0
    if regs.rcx:
        return TDX_OPERAND_INVALID | OperandId.RCX
    status, regs.r8 = fields.write(regs.rdx, value, regs.r9)
    return status
