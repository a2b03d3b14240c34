"""A guest that is no TD: all its RAM is there from the start, and nothing below it knows of acceptance.

The same guest memory lies under it, with every page of RAM mapped; what is no RAM still ends the guest.
"""

from __future__ import annotations

from guest.errors import GuestPanic
from guest.memory import AccessKind
from guest.registers import Registers
from guest.trace import Trace
from tdx.module import TdxModule

_MAX_LEAF = 0x20
"""CPUID's highest basic leaf where there is no leaf 0x21 to say IntelTDX."""
_TDX_LEAF = 0x21


class NoTdx:
    """The platform under a guest without TDX."""

    def __init__(self, below: TdxModule, trace: Trace) -> None:
        self._below, self._trace = below, trace

    def admit(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        """The run around an access that the guest may make."""
        return self._below.admit(gpa, size, kind)

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """CPUID without TDX."""
        if leaf == _TDX_LEAF:
            return 0, 0, 0, 0
        eax, ebx, ecx, edx = self._below.cpuid(leaf, subleaf)
        return (_MAX_LEAF if leaf == 0 else eax), ebx, ecx, edx

    def tdcall(self, regs: Registers) -> None:
        """TDCALL outside a TD raises #UD."""
        raise GuestPanic(self._trace.stage, "invalid opcode: TDCALL outside a TD")

    def tdcall_run(self, regs: Registers, step: int, count: int) -> int:
        """The same, at the first call."""
        self.tdcall(regs)
        return 0
