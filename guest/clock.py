"""Virtual time. Nothing reads a real clock: the time of a boot is the sum of what its operations cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CostTable:
    """Nanoseconds per operation.

    Rows marked *published* have a public figure behind them, the others are estimates: nobody has published
    the cost of one TDG.MEM.PAGE.ACCEPT. Compare boots with each other; do not take the sum for a forecast.
    """

    tdcall: int = 650
    """TDCALL that stays in the TDX module. Published: CPUID inside the module, 646 ns (TUM-DSE CVM_eval)."""
    tdvmcall: int = 3_850
    """TDG.VP.VMCALL, host and back. Published: CPUID by #VE and TDVMCALL, 3.85 us (TUM-DSE CVM_eval)."""
    zero_4k: int = 200
    """Zeroing of one accepted 4 KiB page. Estimate: 20 GB/s."""
    td_exit: int = 1_850
    """TD exit and re-entry. Published, with one SEAMCALL, 2.5 us: 90 GiB in 60 s at 4 KiB (LKML, Shutemov, 2024)."""
    seamcall: int = 650
    """SEAMCALL of the host while the TD can run. Estimate: as a TDCALL that stays in the TDX module."""


@dataclass(slots=True)
class VirtualClock:
    """Nanoseconds since the virtual machine was created."""

    ns: int = 0

    def advance(self, ns: int) -> None:
        """Let ``ns`` nanoseconds pass."""
        self.ns += ns
