"""The acceptance sanitizer: it watches a guest and names each rule about accepted memory that the guest breaks.

It keeps a record of its own of what the guest ever accepted. Secure EPT is no proof: a page that the host removed and
added again is PENDING, and its second accept succeeds and replaces the guest's data by zeros without any error.
What a rule compares is in the trace, so nothing is asked of the module and a range costs one look.
Source: Linux, Documentation/arch/x86/tdx.rst; Intel TDX Module 1.5, TDG.MEM.PAGE.ACCEPT.
"""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum

from guest.errors import MemoryFault, Violation
from guest.ranges import RangeSet
from guest.trace import Record, Trace
from guest.units import PAGE_SIZE, round_down
from tdx.events import Finding, PageAdd, TdCall, TdVmCall
from tdx.leaves import Leaf, SubFunction, VmCallStatus
from tdx.sept import LEVEL_SIZE
from tdx.status import TDX_PAGE_ALREADY_ACCEPTED, TDX_SUCCESS, status_name

_ACCEPT = Leaf.TDG_MEM_PAGE_ACCEPT.spec_name
_MAP_GPA = SubFunction.MapGPA.spec_name


class AcceptanceRule(StrEnum):
    """What a guest must not do."""

    REPLAY = "replay attack: page accepted twice"
    """The second accept succeeded: the host had put a new page there."""
    AGAIN = "accept of accepted memory"
    """The module refused it: the page is still the one that was accepted."""
    NO_RAM = "accept outside RAM"
    SHARED = "accept of shared memory"
    """The guest made it shared by MapGPA, and has not made it private again."""
    ACCESS = "access to unaccepted memory"
    """A page that the guest never accepted. One that the host took away is no fault of the guest's."""
    BIT_CLEAR = "bitmap says accepted, memory never was"
    BIT_SET = "bitmap says unaccepted, memory was accepted"
    HANDOVER = "handover in unaccepted memory"
    """A stage leaves there what the next one will read."""
    HANDOVER_NO_RAM = "handover outside RAM"
    HANDOVER_BROKEN = "handover that cannot be followed"


class Sanitizer:
    """The sanitizer of one TD with ``ram``. If it is ``strict``, a finding ends the boot with ``Violation`` at once.

    Else it reads the trace when somebody asks, so that a guest that makes a million calls is not held up.
    """

    def __init__(self, trace: Trace, ram: RangeSet, shared_mask: int, strict: bool = False) -> None:
        self._trace, self._ram, self._shared_mask, self._strict = trace, ram, shared_mask, strict
        self.accepted = RangeSet()
        """What was accepted or added with contents, and not made shared since; what the host took away too."""
        self.shared = RangeSet()
        self._findings: list[Record] = []
        self._seen = 0
        if strict:
            trace.watchers.append(self._look)

    @property
    def findings(self) -> list[Record]:
        """All findings so far."""
        self.catch_up()
        return self._findings

    def catch_up(self) -> None:
        """Look at all events up to now."""
        records = self._trace.records
        while self._seen < len(records) and not self._strict:
            record = records[self._seen]
            self._seen += 1
            self._look(record)

    def report(self, rule: AcceptanceRule, start: int, end: int, found: str, expected: str, cause: int = -1) -> None:
        """Put a finding about event ``cause`` into the trace, by default about the last one."""
        number = self._trace.count
        finding = Finding(rule.value, cause if cause >= 0 else number - 1, start, end, found, expected)
        self._trace.add(finding)
        self._findings.append(self._trace.records[number])
        if self._strict:
            raise Violation(self._trace.stage, rule.value, finding.text)

    def fault(self, fault: MemoryFault) -> None:
        """The guest died of an access or an accept: was it its own fault? The death itself stays what it was."""
        self.catch_up()
        page = round_down(fault.gpa, PAGE_SIZE)
        if page in self.accepted or page & self._shared_mask:
            return
        rule, expected = AcceptanceRule.ACCESS, "memory that the guest accepted"
        if fault.kind == "accept":
            if page in self._ram:
                return  # the host does not back what it promised
            rule, expected = AcceptanceRule.NO_RAM, "RAM"
        with suppress(Violation):
            self.report(rule, page, page + PAGE_SIZE, fault.state, expected)

    def _look(self, record: Record) -> None:
        event = record.event
        if isinstance(event, TdCall):
            if event.leaf == _ACCEPT:
                self._accept(record.number, event.rcx, event.status, event.count)
        elif isinstance(event, TdVmCall):
            if event.sub_function == _MAP_GPA and event.status == VmCallStatus.SUCCESS:
                self._map_gpa(event.r12, event.r13)
        elif isinstance(event, PageAdd):
            self.accepted.add(event.start, event.end)

    def _map_gpa(self, gpa: int, size: int) -> None:
        """Memory that was shared is accepted anew when it becomes private: its contents were the host's."""
        start, end = gpa & ~self._shared_mask, (gpa & ~self._shared_mask) + size
        if gpa & self._shared_mask:
            self.shared.add(start, end)
            self.accepted.remove(start, end)
        else:
            self.shared.remove(start, end)

    def _accept(self, number: int, rcx: int, status: int, count: int) -> None:
        name = status & ~0xFFFF_FFFF
        if name not in (TDX_SUCCESS, TDX_PAGE_ALREADY_ACCEPTED):
            return
        start = rcx & ~0xFFF
        end = start + count * LEVEL_SIZE[rcx & 7]
        done = name == TDX_SUCCESS
        text = "the accept succeeded" if done else status_name(status)
        if self.accepted.overlaps(start, end):
            rule = AcceptanceRule.REPLAY if done else AcceptanceRule.AGAIN
            for low, high in list(self.accepted.within(start, end)):
                self.report(rule, low, high, f"accepted before, {text}", "one accept of a page in its life", number)
        if self.shared.overlaps(start, end):
            expected = "MapGPA to private before the accept"
            for low, high in list(self.shared.within(start, end)):
                self.report(AcceptanceRule.SHARED, low, high, f"shared, {text}", expected, number)
        if done:
            self.accepted.add(start, end)
