"""Instructions that a guest has the host do for it: CPUID, HLT, I/O, MSRs, MMIO (TDG.VP.VMCALL).

Sources: Intel Guest-Host Communication Interface, chapter 3; arch/x86/kvm/vmx/tdx.c (6.16), handle_tdvmcall().
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from guest.registers import Registers
from guest.units import U32_MAX
from tdx.cpuid import host_cpuid
from tdx.leaves import SubFunction, VmCallStatus
from tdx.msr import NATIVE_READS, NATIVE_WRITES, msr_is_native

_PORTS = 1 << 16
_KEPT_MSRS = {
    0x3A: 1,  # FEAT_CTL: locked
    0x8B: 1 << 32,  # UCODE_REV
    0x140: 0,  # MISC_FEATURES_ENABLES
    0x179: 0,  # MCG_CAP: no banks
    0x17A: 0,  # MCG_STATUS
}
"""MSRs that Linux 6.12 asks the host for; KVM emulates them (tdx_has_emulated_msr())."""
_FATAL_ERROR_TEXT = ("r14", "r15", "rbx", "rdi", "rsi", "r8", "r9", "rdx")


class Ports(Protocol):
    """What lies at the I/O ports."""

    def read(self, port: int, size: int) -> int:
        """Value of an IN of ``size`` bytes."""
        ...

    def write(self, port: int, size: int, value: int) -> None:
        """Effect of an OUT of ``size`` bytes."""
        ...


class NoPorts:
    """A bus without devices: it reads as all ones."""

    def read(self, port: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, port: int, size: int, value: int) -> None:
        pass


class Apic(Protocol):
    """The host's part of a vCPU's local APIC: its timer, and the registers that the processor does not virtualise."""

    def rdmsr(self, index: int) -> int | None:
        """Value of a register, None if it has no such register."""
        ...

    def wrmsr(self, index: int, value: int) -> bool:
        """Write a register; False if it refuses."""
        ...

    def wait(self) -> None:
        """Let time pass until an interrupt is there for the guest."""
        ...


class NoApic:
    """No local APIC: HLT returns at once, a wake-up that nothing caused."""

    def rdmsr(self, index: int) -> int | None:
        return None

    def wrmsr(self, index: int, value: int) -> bool:
        return False

    def wait(self) -> None:
        pass


@dataclass(slots=True)
class Instructions:
    """A host's answers. ``msrs`` are the MSRs that it keeps for the guest, by index; ``apic`` has more or refuses."""

    ports: Ports = field(default_factory=NoPorts)
    apic: Apic = field(default_factory=NoApic)
    msrs: dict[int, int] = field(default_factory=_KEPT_MSRS.copy)

    def answer(self, regs: Registers) -> VmCallStatus | None:
        """Do the instruction that R11 names, with results in ``regs``: its status, None if R11 names none."""
        match regs.r11:
            case SubFunction.Instruction_CPUID:
                return self._cpuid(regs)
            case SubFunction.Instruction_HLT:
                return self._hlt(regs)
            case SubFunction.Instruction_IO:
                return self._io(regs)
            case SubFunction.Instruction_RDMSR:
                return self._rdmsr(regs)
            case SubFunction.Instruction_WRMSR:
                return self._wrmsr(regs)
            case SubFunction.RequestMMIO:
                return _mmio(regs)
        return None

    def _cpuid(self, regs: Registers) -> VmCallStatus:
        leaf = host_cpuid(regs.r12 & U32_MAX)
        regs.r12, regs.r13, regs.r14, regs.r15 = leaf
        return VmCallStatus.SUCCESS

    def _io(self, regs: Registers) -> VmCallStatus:
        size, direction, port = regs.r12, regs.r13, regs.r14
        if size not in (1, 2, 4) or direction > 1 or port >= _PORTS:
            return VmCallStatus.INVALID_OPERAND
        mask = (1 << 8 * size) - 1
        if direction:
            self.ports.write(port, size, regs.r15 & mask)
        else:
            regs.r11 = self.ports.read(port, size) & mask
        return VmCallStatus.SUCCESS

    def _hlt(self, regs: Registers) -> VmCallStatus:
        """R12 tells that interrupts are blocked; then there is nothing to wait for."""
        if not regs.r12:
            self.apic.wait()
        return VmCallStatus.SUCCESS

    def _rdmsr(self, regs: Registers) -> VmCallStatus:
        if msr_is_native(regs.r12, NATIVE_READS):
            return VmCallStatus.INVALID_OPERAND
        value = self.msrs[regs.r12] if regs.r12 in self.msrs else self.apic.rdmsr(regs.r12)
        if value is None:
            return VmCallStatus.INVALID_OPERAND
        regs.r11 = value
        return VmCallStatus.SUCCESS

    def _wrmsr(self, regs: Registers) -> VmCallStatus:
        if regs.r12 in self.msrs:
            self.msrs[regs.r12] = regs.r13
        elif msr_is_native(regs.r12, NATIVE_WRITES) or not self.apic.wrmsr(regs.r12, regs.r13):
            return VmCallStatus.INVALID_OPERAND
        return VmCallStatus.SUCCESS


def _mmio(regs: Registers) -> VmCallStatus:
    """RequestMMIO: there is no device in memory, so a read gives all ones and a write is lost."""
    if regs.r12 not in (1, 2, 4, 8) or regs.r13 > 1:
        return VmCallStatus.INVALID_OPERAND
    if regs.r13 == 0:
        regs.r11 = (1 << 8 * regs.r12) - 1
    return VmCallStatus.SUCCESS


def last_words(regs: Registers) -> str | None:
    """What the guest ends with, if this call ends it: ReportFatalError, or HLT that no interrupt can end."""
    if regs.r11 == SubFunction.Instruction_HLT and regs.r12:
        return "halted with interrupts blocked"
    if regs.r11 != SubFunction.ReportFatalError:
        return None
    data = b"".join(getattr(regs, name).to_bytes(8, "little") for name in _FATAL_ERROR_TEXT)
    text = data.split(b"\0", 1)[0].decode("ascii", errors="replace")
    return f"ReportFatalError {regs.r12:#x}: {text}"
