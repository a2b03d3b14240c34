"""MSRs of a TD: those that the module lets the guest use; all others raise #VE.

An MSR of a feature that this TD has not gives #GP in a real TD; here it raises #VE, and the host refuses it, which
the guest turns into the same #GP. Source: Intel TDX Module 1.5, MSR virtualization; TDX_1.5.01, msr_config_lookup.c.
"""

from __future__ import annotations

_READ_WRITE = (
    range(0x48, 0x4A),  # SPEC_CTRL, PRED_CMD
    range(0x10B, 0x10C),  # FLUSH_CMD
    range(0x174, 0x177),  # SYSENTER_CS, _ESP, _EIP
    range(0x1D9, 0x1DA),  # DEBUGCTL
    range(0x277, 0x278),  # PAT
    range(0x600, 0x601),  # DS_AREA
    range(0x808, 0x80D),  # x2APIC: TPR, PPR, EOI
    range(0x80E, 0x80F),
    range(0x810, 0x828),  # x2APIC: ISR, TMR, IRR
    range(0x83F, 0x840),  # x2APIC: SELF_IPI
    range(0xDA0, 0xDA1),  # XSS
    range(0x1B01, 0x1B02),  # UARCH_MISC_CTL
    range(0xC000_0080, 0xC000_0083),  # EFER, STAR, LSTAR
    range(0xC000_0084, 0xC000_0085),  # FMASK
    range(0xC000_0100, 0xC000_0104),  # FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX
)
_READ_ONLY = (
    range(0x10, 0x11),  # TIME_STAMP_COUNTER
    range(0xBC, 0xBE),  # MISC_PACKAGE_CTLS, XAPIC_DISABLE_STATUS
    range(0x10A, 0x10B),  # ARCH_CAPABILITIES
    range(0x1A0, 0x1A1),  # MISC_ENABLE
    range(0xC80, 0xC81),  # DEBUG_INTERFACE
)
NATIVE_WRITES = _READ_WRITE
"""MSRs that WRMSR writes without #VE."""
NATIVE_READS = _READ_WRITE + _READ_ONLY
"""MSRs that RDMSR reads without #VE."""


def msr_is_native(index: int, ranges: tuple[range, ...]) -> bool:
    """Whether ``ranges``, one of the two above, has the MSR. The host can then not do it: it does not see its value."""
    return any(index in native for native in ranges)
