"""A TD exit by EPT violation: what the host is told of it.

Source: Intel TDX Module 1.5, TDH.VP.ENTER output after an asynchronous TD exit; src/td_transitions/td_exit.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from guest.errors import MemoryFault
from guest.registers import Registers
from guest.units import PAGE_SIZE
from tdx.seamcall import permissions
from tdx.sept import SeptEntry, SeptState

EXIT_REASON_EPT_VIOLATION = 48
MAX_EXITS = 16
"""Exits of one instruction in a row after which we say that the host will not resolve its fault."""


class ExtendedType(IntEnum):
    """Extended exit qualification, bits 3:0."""

    NONE = 0
    ACCEPT = 1
    PENDING_EPT_VIOLATION = 6


@dataclass(frozen=True, slots=True)
class EptViolation:
    """A fault at ``gpa``: ``entry`` is where the walk ended, ``level`` the level that an accept asked for."""

    gpa: int
    kind: Literal["read", "write", "accept"]
    entry: SeptEntry
    level: int = 0

    @property
    def extended_type(self) -> ExtendedType:
        """Why the module, and not the processor, knows more."""
        if self.kind == "accept":
            return ExtendedType.ACCEPT
        pending = self.entry.state is SeptState.PENDING
        return ExtendedType.PENDING_EPT_VIOLATION if pending else ExtendedType.NONE

    @property
    def qualification(self) -> int:
        """Exit qualification: 0 read, 1 write, 5:3 what the entry permits."""
        return (1 if self.kind == "read" else 2) | permissions(self.entry.state) << 3

    @property
    def extended_qualification(self) -> int:
        """3:0 type; of an accept 34:32 level asked for, 37:35 level reached, 45:38 public state, 46 leaf."""
        if self.kind != "accept":
            return self.extended_type
        entry = self.entry
        info = self.level | entry.level << 3 | entry.state.public << 6 | entry.is_leaf << 14
        return info << 32 | self.extended_type

    def registers(self) -> Registers:
        """The registers that the host gets from TDH.VP.ENTER."""
        return Registers(
            rax=EXIT_REASON_EPT_VIOLATION, rcx=self.qualification, rdx=self.extended_qualification,
            r8=self.gpa - self.gpa % PAGE_SIZE,
        )  # fmt: skip


def unresolved(stage: str, gpa: int, size: int, kind: str, state: str) -> MemoryFault:
    """The end of a guest whose host lets it fault at the same place for ever."""
    end = f"EPT violation, {MAX_EXITS} TD exits; the host does not resolve it"
    return MemoryFault(stage=stage, gpa=gpa, start=gpa, size=size, kind=kind, state=state, end=end)
