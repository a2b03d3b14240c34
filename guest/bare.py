"""A platform without a TDX module: every page is there, CPUID is a table, and nobody answers a TDCALL."""

from __future__ import annotations

from collections.abc import Mapping

from guest.memory import AccessKind
from guest.registers import Registers
from guest.units import PHYSICAL_ADDRESS_END

CpuidTable = Mapping[int, tuple[int, int, int, int]]
"""EAX, EBX, ECX, EDX by leaf."""


class BareMetal:
    """Admits every access. A leaf that is not in ``leaves`` reads as zero."""

    def __init__(self, leaves: CpuidTable | None = None) -> None:
        self._leaves = leaves or {}

    def admit(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        """All of memory."""
        return 0, PHYSICAL_ADDRESS_END

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""
        return self._leaves.get(leaf, (0, 0, 0, 0))

    def tdcall(self, regs: Registers) -> None:
        """A guest that is no TD has no TDCALL."""
        raise ValueError("TDCALL: this guest is no TD")

    def tdcall_run(self, regs: Registers, step: int, count: int) -> int:
        """As :meth:`tdcall`."""
        raise ValueError("TDCALL: this guest is no TD")
