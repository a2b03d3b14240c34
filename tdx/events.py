"""What the TDX module and the host put into the trace."""

from __future__ import annotations

from dataclasses import dataclass

from guest.trace import Event


@dataclass(frozen=True, slots=True)
class TdCall(Event):
    """``count`` executions of one TDCALL leaf with the same status.

    ``rcx`` is the first call's operand; of an accept, it grows by the page size from call to call.
    """

    leaf: str
    rcx: int
    status: int
    count: int


@dataclass(frozen=True, slots=True)
class TdVmCall(Event):
    """One TDG.VP.VMCALL as the host saw and answered it."""

    sub_function: str
    r12: int
    r13: int
    status: int


@dataclass(frozen=True, slots=True)
class TdExit(Event):
    """``count`` TD exits by EPT violation, after each of which the host backed the page at ``gpa`` and on.

    ``level`` is the size of the pages that the host added: 0 = 4 KiB, 1 = 2 MiB.
    """

    gpa: int
    level: int
    count: int


@dataclass(frozen=True, slots=True)
class PageAdd(Event):
    """The host added ``[start, end)`` with its contents while it built the TD (TDH.MEM.PAGE.ADD)."""

    start: int
    end: int
    what: str
