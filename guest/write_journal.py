"""Who wrote which bytes of guest memory: in which stage, before which event, by which function.

A boot keeps such a journal only if it is asked to. Its entries are ranges; a byte's author is that of the last range
that holds it. Contents that the host brought and pages that the TDX module zeroed have authors too.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from types import CodeType
from typing import NamedTuple

from guest.ranges import TOP, RangeMap
from guest.trace import Trace

_OWN_PACKAGE = "guest."


class Write(NamedTuple):
    """``[start, end)`` was written by ``author`` in ``stage``; the next event was number ``event``."""

    event: int
    stage: str
    author: str
    start: int
    end: int

    @property
    def text(self) -> str:
        """Stage, function, and number of the event that came next."""
        return f"{self.stage} {self.author} #{self.event}"


class WriteJournal:
    """All writes since it was made, in order.

    An author is the innermost function on the call stack, as ``bootstub.exit_boot.ExitBoot._record_memmap``, that
    belongs neither to this package nor to one of the modules ``helpers``, which write for others.
    """

    def __init__(self, trace: Trace, helpers: Collection[str] = ()) -> None:
        self._trace, self._helpers = trace, frozenset(helpers)
        self._names: dict[CodeType, str] = {}
        self.writes: list[Write] = []

    def record(self, start: int, end: int) -> None:
        """``[start, end)`` is being written by whoever called."""
        self.record_as(self._author(), start, end)

    def record_as(self, author: str, start: int, end: int) -> None:
        """The same, for an author that is no function of ours."""
        if start == end:
            return
        write = Write(self._trace.count, self._trace.stage, author, start, end)
        last = self.writes[-1] if self.writes else None
        if last is not None and last[:3] == write[:3] and last.end == start:
            self.writes[-1] = last._replace(end=end)
        else:
            self.writes.append(write)

    def _author(self) -> str:
        """The name of the function that wants the bytes written."""
        frame = sys._getframe(2)
        while True:
            name = self._names.get(frame.f_code)
            if name is None:
                name = self._names[frame.f_code] = self._name(frame.f_globals["__name__"], frame.f_code)
            if name or frame.f_back is None:
                return name
            frame = frame.f_back

    def _name(self, module: str, code: CodeType) -> str:
        """What to call a function; empty if it writes for others."""
        if module.startswith(_OWN_PACKAGE) or module in self._helpers:
            return ""
        return ".".join([module, *(part for part in code.co_qualname.split(".") if not part.startswith("<"))])


def authors(
    writes: Iterable[Write], start: int, end: int, up_to: int | None = None
) -> Iterator[tuple[int, int, Write | None]]:
    """Runs ``(start, end, write)`` of ``[start, end)`` with what each was written by last; None: by nobody.

    Writes behind event number ``up_to`` do not count. The end is cut at 2^64.
    """
    start, end = min(start, TOP), min(end, TOP)
    last: RangeMap[Write | None] = RangeMap(None)
    for write in writes:
        if write.start < end and start < write.end and (up_to is None or write.event <= up_to):
            last.assign(max(write.start, start), min(write.end, end), write)
    return last.runs(start, end)
