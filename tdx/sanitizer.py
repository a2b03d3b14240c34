"""The acceptance sanitizer: it watches a guest and names each rule about accepted memory that the guest breaks.

It keeps a record of its own of what the guest ever accepted. Secure EPT is no proof: a page that the host removed and
added again is PENDING, and its second accept succeeds and replaces the guest's data by zeros without any error.
What a rule compares is in the trace, so nothing is asked of the module and a range costs one look.
Source: Linux, Documentation/arch/x86/tdx.rst; Intel TDX Module 1.5, TDG.MEM.PAGE.ACCEPT.
"""

from __future__ import annotations

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


class Sanitizer:
    """The sanitizer of one TD with ``ram``. If it is ``strict``, a finding ends the boot with ``Violation``."""

    def __init__(self, trace: Trace, ram: RangeSet, shared_mask: int, strict: bool = False) -> None:
        self._trace, self._ram, self._shared_mask, self._strict = trace, ram, shared_mask, strict
        self.accepted = RangeSet()
        """What was accepted or added with contents, and not made shared since; what the host took away too."""
        self.shared = RangeSet()
        self.findings: list[Record] = []
        trace.watchers.append(self._watch)

    def report(self, rule: AcceptanceRule, start: int, end: int, found: str, expected: str) -> None:
        """Put a finding about the last event into the trace."""
        cause = self._trace.count - 1
        finding = Finding(rule.value, cause, start, end, found, expected)
        self._trace.add(finding)
        self.findings.append(self._trace.records[cause + 1])
        if self._strict:
            raise Violation(self._trace.stage, rule.value, finding.text)

    def fault(self, fault: MemoryFault) -> None:
        """The guest died of an access or an accept: was it its own fault? The death itself stays what it was."""
        page = round_down(fault.gpa, PAGE_SIZE)
        if page in self.accepted or page & self._shared_mask:
            return
        strict, self._strict = self._strict, False
        rule = AcceptanceRule.ACCESS
        if fault.kind == "accept":
            if page in self._ram:
                return  # the host does not back what it promised
            rule = AcceptanceRule.NO_RAM
        expected = "RAM" if rule is AcceptanceRule.NO_RAM else "memory that the guest accepted"
        self.report(rule, page, page + PAGE_SIZE, fault.state, expected)
        self._strict = strict

    def _watch(self, record: Record) -> None:
        event = record.event
        if isinstance(event, TdCall):
            if event.leaf == _ACCEPT:
                self._accept(event.rcx, event.status, event.count)
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

    def _accept(self, rcx: int, status: int, count: int) -> None:
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
                self.report(rule, low, high, f"accepted before, {text}", "one accept of a page in its life")
        if self.shared.overlaps(start, end):
            for low, high in list(self.shared.within(start, end)):
                self.report(AcceptanceRule.SHARED, low, high, f"shared, {text}", "MapGPA to private before the accept")
        if done:
            self.accepted.add(start, end)
