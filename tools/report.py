"""What a boot did, stage by stage, counted from its trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from guest.trace import Record, StageBegin
from tdx.events import PageAdd, SeamCall, TdCall, TdExit, TdVmCall
from tdx.leaves import Leaf
from tdx.sept import LEVEL_SIZE
from tdx.status import TDX_SUCCESS, status_name

ACCEPT = Leaf.TDG_MEM_PAGE_ACCEPT.spec_name


@dataclass(slots=True)
class StageSummary:
    """Counts of one stage: bytes that the host added and that the guest accepted, calls, exits, time.

    ``tdcalls`` counts every TDCALL by completion status; ``td_exits`` are the exits by EPT violation; ``seamcalls``
    counts the host's calls by leaf.
    """

    stage: str
    added_bytes: int = 0
    accepted_bytes: int = 0
    tdcalls: Counter[str] = field(default_factory=Counter)
    tdvmcalls: int = 0
    td_exits: int = 0
    seamcalls: Counter[str] = field(default_factory=Counter)
    begin_ns: int = 0
    end_ns: int = 0

    @property
    def ns(self) -> int:
        """Virtual nanoseconds that the stage took, up to its last event if it did not end."""
        return self.end_ns - self.begin_ns

    def count(self, record: Record) -> None:
        """Take one event into account."""
        self.end_ns = record.ns
        match record.event:
            case TdCall(leaf, rcx, status, count):
                self.tdcalls[status_name(status)] += count
                if leaf == ACCEPT and status == TDX_SUCCESS:
                    self.accepted_bytes += count * LEVEL_SIZE[rcx & 7]
            case TdVmCall():
                self.tdvmcalls += 1
            case TdExit(count=count):
                self.td_exits += count
            case SeamCall(leaf, count=count):
                self.seamcalls[leaf] += count
            case PageAdd(start, end):
                self.added_bytes += end - start
            case StageBegin():
                self.begin_ns = record.ns


def summarize(records: Iterable[Record]) -> list[StageSummary]:
    """The summary of each stage that was entered, in order."""
    stages: dict[str, StageSummary] = {}
    for record in records:
        stages.setdefault(record.stage, StageSummary(record.stage)).count(record)
    return list(stages.values())
