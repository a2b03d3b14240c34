"""The TDX module as the guest meets it: called with registers, it answers with registers.

It knows Secure EPT and the host, and nothing of Linux. Source: Intel TDX Module 1.5, TDG.* leaf functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guest.clock import CostTable, VirtualClock
from guest.memory import AccessKind, PhysicalMemory
from guest.registers import Registers
from guest.trace import Trace
from tdx.access import Access
from tdx.cpuid import host_cpuid, native_leaf, td_cpuid
from tdx.events import TdCall
from tdx.leaves import Leaf
from tdx.metadata import ATTRIBUTES_SEPT_VE_DISABLE, CONFIG_FLAGS_FLEXIBLE_PENDING_VE, CONFIG_FLAGS_GPAW, Metadata
from tdx.page_accept import PageAccept
from tdx.sept import SecureEpt
from tdx.status import (
    OPERAND_ID_RAX,
    OPERAND_ID_RCX,
    TDX_NO_VALID_VE_INFO,
    TDX_OPERAND_INVALID,
    TDX_SUCCESS,
)
from tdx.ve import VECTOR_DF, VECTOR_VE, VeInfo
from tdx.vmm import Host

_VMCALL_REGISTERS = {2: "rdx", 3: "rbx", 5: "rbp", 6: "rsi", 7: "rdi"} | {n: f"r{n}" for n in range(8, 16)}
_VMCALL_MASK_FORBIDDEN = ~0xFFFF_FFFF | 1 << 0 | 1 << 1 | 1 << 4  # above 31; RAX, RCX, RSP


@dataclass(frozen=True, slots=True)
class TdConfig:
    """What the host fixed when it created the TD.

    ``gpaw`` is the guest physical address width, 48 or 52; its highest bit is the shared bit.
    ``sept_ve_disable``: a touch of unaccepted memory exits to the host; if False, it raises #VE in the guest.
    ``flexible_pending_ve``: the guest may change that (KVM up to 6.16 does not let it).
    """

    gpaw: int = 52
    sept_ve_disable: bool = True
    vcpus: int = 1
    flexible_pending_ve: bool = False

    @property
    def shared_mask(self) -> int:
        return 1 << (self.gpaw - 1)

    @property
    def attributes(self) -> int:
        return ATTRIBUTES_SEPT_VE_DISABLE if self.sept_ve_disable else 0

    @property
    def config_flags(self) -> int:
        gpaw = CONFIG_FLAGS_GPAW if self.gpaw == 52 else 0
        return gpaw | (CONFIG_FLAGS_FLEXIBLE_PENDING_VE if self.flexible_pending_ve else 0)


class TdxModule:
    """The platform under a TD: gate of its memory, CPUID, TDCALL."""

    def __init__(
        self, physical: PhysicalMemory, sept: SecureEpt, host: Host, trace: Trace, clock: VirtualClock,
        costs: CostTable, config: TdConfig,
    ) -> None:  # fmt: skip
        self._physical, self._sept, self._host = physical, sept, host
        self._trace, self._clock, self._costs = trace, clock, costs
        self._config = config
        self.page_accept = PageAccept(physical, sept, host, trace, clock, costs, config.shared_mask)
        self._cpuid = td_cpuid(config.gpaw)
        self._metadata = Metadata(config.attributes, config.config_flags)
        self._access = Access(sept, host, trace, config.gpaw, self._metadata)
        self._ve_info: VeInfo | None = None
        self._leaves: dict[int, Callable[[Registers], int]] = {
            Leaf.TDG_VP_VMCALL: self._vp_vmcall,
            Leaf.TDG_VP_INFO: self._vp_info,
            Leaf.TDG_VP_VEINFO_GET: self._vp_veinfo_get,
            Leaf.TDG_VM_RD: self._vm_rd,
            Leaf.TDG_VM_WR: self._vm_wr,
        }

    def admit(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        """The run around an access that the guest may use so; what it may not is fatal to the guest, or #VE."""
        return self._access.admit(gpa, size, kind)

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """The module's answer, or the host's where the module has none."""
        return native_leaf(self._cpuid, leaf, subleaf) or host_cpuid(leaf)

    def cpuid_is_native(self, leaf: int, subleaf: int) -> bool:
        """Whether the module itself answers; if not, the instruction raises #VE in a real TD."""
        return native_leaf(self._cpuid, leaf, subleaf) is not None

    def inject_ve(self, info: VeInfo) -> int:
        """Keep ``info`` for TDG.VP.VEINFO.GET; returns the vector to raise in the guest.

        That is #VE, or #DF while the guest has not read what an earlier #VE was about, which then stays.
        """
        if self._ve_info is not None:
            return VECTOR_DF
        self._ve_info = info
        return VECTOR_VE

    def tdcall(self, regs: Registers) -> None:
        """Execute one TDCALL. RAX has the leaf (bits 15:0) and version; it returns the completion status."""
        if regs.rax == Leaf.TDG_MEM_PAGE_ACCEPT:
            self.tdcall_run(regs, 0, 1)
            return
        rcx, selector = regs.rcx, regs.rax
        self._clock.advance(self._costs.tdcall)
        leaf = self._leaves.get(selector)
        regs.rax = TDX_OPERAND_INVALID | OPERAND_ID_RAX if leaf is None else leaf(regs)
        name = f"leaf {selector:#x}" if leaf is None else Leaf(selector).spec_name
        self._trace.add(TdCall(name, rcx, regs.rax, 1))

    def tdcall_run(self, regs: Registers, step: int, count: int) -> int:
        """TDCALL up to ``count`` times with RCX growing by ``step``, while it succeeds; see ``Platform``."""
        return self.page_accept.tdcall_run(regs, step, count)

    def _vp_info(self, regs: Registers) -> int:
        """TDG.VP.INFO."""
        regs.rcx, regs.rdx = self._config.gpaw, self._config.attributes
        regs.r8, regs.r9 = self._config.vcpus << 32 | self._config.vcpus, 0
        regs.r10, regs.r11 = 1, 0
        return TDX_SUCCESS

    def _vp_veinfo_get(self, regs: Registers) -> int:
        """TDG.VP.VEINFO.GET: what the last #VE was about, once."""
        info, self._ve_info = self._ve_info, None
        if info is None:
            regs.rcx = regs.rdx = regs.r8 = regs.r9 = regs.r10 = 0
            return TDX_NO_VALID_VE_INFO
        regs.rcx, regs.rdx = info.exit_reason, info.exit_qualification
        regs.r8, regs.r9, regs.r10 = info.gla, info.gpa, info.instruction_length
        return TDX_SUCCESS

    def _vm_rd(self, regs: Registers) -> int:
        """TDG.VM.RD, version 0."""
        if regs.rcx != 0:
            regs.r8 = 0
            return TDX_OPERAND_INVALID | OPERAND_ID_RCX
        status, regs.r8 = self._metadata.read(regs.rdx)
        return status

    def _vm_wr(self, regs: Registers) -> int:
        """TDG.VM.WR."""
        if regs.rcx != 0:
            regs.r8 = 0
            return TDX_OPERAND_INVALID | OPERAND_ID_RCX
        status, regs.r8 = self._metadata.write(regs.rdx, regs.r8, regs.r9)
        return status

    def _vp_vmcall(self, regs: Registers) -> int:
        """TDG.VP.VMCALL: the host sees the registers that RCX exposes, and may change only those."""
        mask = regs.rcx
        if mask & _VMCALL_MASK_FORBIDDEN:
            return TDX_OPERAND_INVALID | OPERAND_ID_RCX
        exposed = [name for bit, name in _VMCALL_REGISTERS.items() if mask >> bit & 1]
        seen = Registers(**{name: getattr(regs, name) for name in exposed})
        self._host.tdvmcall(seen)
        for name in exposed:
            setattr(regs, name, getattr(seen, name))
        return TDX_SUCCESS
