"""Leaves about the virtual processor: TDG.VP.INFO, TDG.VP.VEINFO.GET, TDG.VP.CPUIDVE.SET, TDG.VP.VMCALL.

Source: Intel TDX Module 1.5, TDG.VP.*; TDX_1.5.01, tdg_vp_*.c.
"""

from __future__ import annotations

from functools import lru_cache

from guest.registers import Registers
from tdx.status import TDX_NO_VALID_VE_INFO, TDX_OPERAND_INVALID, TDX_SUCCESS, OperandId
from tdx.td import Td

_CPUIDVE_SUPERVISOR, _CPUIDVE_USER = 1 << 0, 1 << 1
_RBP = 5
_VMCALL_REGISTERS = {2: "rdx", 3: "rbx", _RBP: "rbp", 6: "rsi", 7: "rdi"} | {n: f"r{n}" for n in range(8, 16)}
_VMCALL_MASK_FORBIDDEN = ~0xFFFF_FFFF | 1 << OperandId.RAX | 1 << OperandId.RCX | 1 << OperandId.RSP


def vp_info(td: Td, regs: Registers) -> int:
    """TDG.VP.INFO."""
    config = td.config
    regs.rcx, regs.rdx = config.gpaw, config.attributes
    regs.r8, regs.r9 = config.vcpus << 32 | config.vcpus, 0
    regs.r10, regs.r11 = 1, 0
    return TDX_SUCCESS


def vp_veinfo_get(td: Td, regs: Registers) -> int:
    """TDG.VP.VEINFO.GET: what the last #VE was about, once."""
    info, td.ve_info = td.ve_info, None
    if info is None:
        regs.rcx = regs.rdx = regs.r8 = regs.r9 = regs.r10 = 0
        return TDX_NO_VALID_VE_INFO
    regs.rcx, regs.rdx = info.exit_reason, info.exit_qualification
    regs.r8, regs.r9, regs.r10 = info.gla, info.gpa, info.instruction_length
    return TDX_SUCCESS


def vp_cpuidve_set(td: Td, regs: Registers) -> int:
    """TDG.VP.CPUIDVE.SET: every CPUID raises #VE, or none that the module answers."""
    if regs.rcx & ~(_CPUIDVE_SUPERVISOR | _CPUIDVE_USER):
        return TDX_OPERAND_INVALID | OperandId.RCX
    td.metadata.cpuid_supervisor_ve.value = int(bool(regs.rcx & _CPUIDVE_SUPERVISOR))
    td.metadata.cpuid_user_ve.value = int(bool(regs.rcx & _CPUIDVE_USER))
    return TDX_SUCCESS


def vp_vmcall(td: Td, regs: Registers) -> int:
    """TDG.VP.VMCALL: the host sees the registers that RCX exposes, and may change only those."""
    mask = regs.rcx
    if mask & _VMCALL_MASK_FORBIDDEN or (td.config.no_rbp_mod and mask >> _RBP & 1):
        return TDX_OPERAND_INVALID | OperandId.RCX
    exposed, seen = _exposed(mask), Registers()
    for name in exposed:
        setattr(seen, name, getattr(regs, name))
    td.host.tdvmcall(seen)
    for name in exposed:
        setattr(regs, name, getattr(seen, name))
    return TDX_SUCCESS


@lru_cache
def _exposed(mask: int) -> tuple[str, ...]:
    """The registers of a mask: a guest uses few different ones."""
    return tuple(name for bit, name in _VMCALL_REGISTERS.items() if mask >> bit & 1)
