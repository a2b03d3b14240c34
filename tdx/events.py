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
    """``count`` TD exits by EPT violation at ``gpa`` and the pages behind it; what the host did about it follows.

    ``level`` is the size of the pages that the host deals in: 0 = 4 KiB, 1 = 2 MiB.
    """

    gpa: int
    level: int
    count: int


@dataclass(frozen=True, slots=True)
class AcceptInterrupted(Event):
    """An interrupt came while the 2 MiB page at ``gpa`` was accepted; ``progress`` of its 4 KiB pieces are zero."""

    gpa: int
    progress: int


@dataclass(frozen=True, slots=True)
class SeamCall(Event):
    """``count`` calls of one SEAMCALL leaf by the host, with the same status.

    ``rcx`` is the first call's operand; it grows by the page size from call to call.
    """

    leaf: str
    rcx: int
    status: int
    count: int


@dataclass(frozen=True, slots=True)
class PageAdd(Event):
    """The host added ``[start, end)`` with its contents while it built the TD (TDH.MEM.PAGE.ADD)."""

    start: int
    end: int
    what: str


@dataclass(frozen=True, slots=True)
class FaultInjected(Event):
    """A fault of ``kind`` (faults.py) met the call that follows; ``gpa`` is its page, or the sub-function if none."""

    kind: str
    gpa: int

    @property
    def text(self) -> str:
        """The fault in one line."""
        return f"fault {self.kind} at {self.gpa:#x}"


@dataclass(frozen=True, slots=True)
class Finding(Event):
    """The guest broke ``rule`` (sanitizer.py) with event ``cause``: found and expected at ``[start, end)``."""

    rule: str
    cause: int
    start: int
    end: int
    found: str
    expected: str

    @property
    def text(self) -> str:
        """The finding in one line, but for the stage, which its record has."""
        where = f"{self.rule} at [{self.start:#x}, {self.end:#x})"
        return f"event #{self.cause}: {where}: found {self.found}, expected {self.expected}"
