"""The TDX module as the guest meets it: called with registers, it answers with registers.

It knows Secure EPT and the host, and nothing of Linux. What a leaf takes and gives stands in ``tdx.leaves``; what it
does, in the file of its concept. Source: Intel TDX Module 1.5, TDG.* leaf functions; tdx_td_dispatcher.c.
"""

from __future__ import annotations

from collections.abc import Callable

from guest.clock import CostTable, VirtualClock
from guest.memory import AccessKind, PhysicalMemory
from guest.registers import Registers
from guest.trace import Trace
from tdx import metadata_access, page_attr, report, vcpu
from tdx.access import Access
from tdx.config import TdConfig
from tdx.cpuid import host_cpuid, native_leaf, td_cpuid
from tdx.events import TdCall
from tdx.leaves import Leaf
from tdx.measurement import Measurement
from tdx.metadata import Metadata
from tdx.operands import Operands
from tdx.page_accept import PageAccept
from tdx.sept import SecureEpt
from tdx.status import OPERAND_ID_RAX, TDX_OPERAND_INVALID
from tdx.td import Td
from tdx.ve import VECTOR_DF, VECTOR_VE, VeInfo
from tdx.vmm import Host

__all__ = ["TdConfig", "TdxModule"]

_ACCEPT = int(Leaf.TDG_MEM_PAGE_ACCEPT)

_VERSION_1 = 1 << 16
_LEAVES: dict[int, Callable[[Td, Registers], int]] = {
    Leaf.TDG_VP_VMCALL: vcpu.vp_vmcall,
    Leaf.TDG_VP_INFO: vcpu.vp_info,
    Leaf.TDG_MR_RTMR_EXTEND: report.mr_rtmr_extend,
    Leaf.TDG_VP_VEINFO_GET: vcpu.vp_veinfo_get,
    Leaf.TDG_MR_REPORT: report.mr_report,
    Leaf.TDG_VP_CPUIDVE_SET: vcpu.vp_cpuidve_set,
    Leaf.TDG_VM_RD: metadata_access.vm_rd,
    Leaf.TDG_VM_RD | _VERSION_1: metadata_access.vm_rd_v1,
    Leaf.TDG_VM_WR: metadata_access.vm_wr,
    Leaf.TDG_VP_RD: metadata_access.vp_rd,
    Leaf.TDG_VP_WR: metadata_access.vp_wr,
    Leaf.TDG_SYS_RD: metadata_access.sys_rd,
    Leaf.TDG_SYS_RDALL: metadata_access.sys_rdall,
    Leaf.TDG_MR_VERIFYREPORT: report.mr_verifyreport,
    Leaf.TDG_MEM_PAGE_ATTR_RD: page_attr.mem_page_attr_rd,
    Leaf.TDG_MEM_PAGE_ATTR_WR: page_attr.mem_page_attr_wr,
}
"""By leaf (bits 15:0) and version (23:16). Any other selector, TDG.MEM.PAGE.ACCEPT aside, is refused.

Not there, as in a module without these features: TDG.SERVTD.*, and TDG.VP.ENTER, INVEPT and INVVPID for L2 VMs.
"""


class TdxModule:
    """The platform under a TD: gate of its memory, CPUID, TDCALL."""

    def __init__(
        self, physical: PhysicalMemory, sept: SecureEpt, host: Host, trace: Trace, clock: VirtualClock,
        costs: CostTable, config: TdConfig,
    ) -> None:  # fmt: skip
        self._trace, self._clock, self._costs = trace, clock, costs
        self.page_accept = PageAccept(physical, sept, host, trace, clock, costs, config.shared_mask)
        self._cpuid = td_cpuid(config.gpaw)
        metadata = Metadata(config, host.seam.measurement)
        self._access = Access(sept, host, trace, config.gpaw, metadata)
        operands = Operands(physical, self._access, config)
        self._td = Td(config, sept, host, metadata, host.seam.measurement, operands)

    @property
    def measurement(self) -> Measurement:
        """The TD's measurement registers."""
        return self._td.measurement

    def admit(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        """The run around an access that the guest may use so; what it may not is fatal to the guest, or #VE."""
        return self._access.admit(gpa, size, kind)

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """The module's answer, or the host's where the module has none or the guest does not want it."""
        native = native_leaf(self._cpuid, leaf, subleaf) if self.cpuid_is_native(leaf, subleaf) else None
        return native or host_cpuid(leaf)

    def cpuid_is_native(self, leaf: int, subleaf: int, cpl: int = 0) -> bool:
        """Whether the module itself answers; if not, the instruction raises #VE in a real TD."""
        return native_leaf(self._cpuid, leaf, subleaf) is not None and not self._td.metadata.raises_ve_on_cpuid(cpl)

    def inject_ve(self, info: VeInfo) -> int:
        """Keep ``info`` for TDG.VP.VEINFO.GET; returns the vector to raise in the guest.

        That is #VE, or #DF while the guest has not read what an earlier #VE was about, which then stays.
        """
        if self._td.ve_info is not None:
            return VECTOR_DF
        self._td.ve_info = info
        return VECTOR_VE

    def tdcall(self, regs: Registers) -> None:
        """Execute one TDCALL. RAX has the leaf (bits 15:0) and version; it returns the completion status."""
        if regs.rax == _ACCEPT:
            if not self.page_accept.tdcall(regs):
                self.tdcall_run(regs, 0, 1)
            return
        rcx, selector = regs.rcx, regs.rax
        self._clock.advance(self._costs.tdcall)
        leaf = _LEAVES.get(selector)
        regs.rax = TDX_OPERAND_INVALID | OPERAND_ID_RAX if leaf is None else leaf(self._td, regs)
        name = f"leaf {selector:#x}" if leaf is None else Leaf(selector & 0xFFFF).spec_name
        self._trace.add(TdCall(name, rcx, regs.rax, 1))

    def tdcall_run(self, regs: Registers, step: int, count: int) -> int:
        """TDCALL up to ``count`` times with RCX growing by ``step``, while it succeeds; see ``Platform``."""
        return self.page_accept.tdcall_run(regs, step, count)
