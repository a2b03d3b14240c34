"""What happened, in order: typed events with the stage and the virtual time at which they happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from guest.clock import VirtualClock


@dataclass(frozen=True, slots=True)
class Event:
    """Base class of all events. An event's name is its class name."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def as_dict(self) -> dict[str, object]:
        """The event's fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class StageBegin(Event):
    """A stage was entered; its name is the record's stage."""


@dataclass(frozen=True, slots=True)
class StageEnd(Event):
    """A stage handed over to the next one."""


@dataclass(frozen=True, slots=True)
class Print(Event):
    """A line that the stage put out: on the console before the kernel runs, into the log afterwards."""

    text: str


@dataclass(frozen=True, slots=True)
class Note(Event):
    """A fact that the real stage would not print but that its reader wants: a choice, a size, an address."""

    text: str


@dataclass(frozen=True, slots=True)
class ServiceCall(Event):
    """A call through a function pointer of the firmware: arguments as passed, status as returned."""

    service: str
    args: tuple[int, ...]
    status: int


class Record(NamedTuple):
    """An event with its number, stage and virtual time in nanoseconds."""

    number: int
    stage: str
    ns: int
    event: Event


def _itself(event: Event) -> Event:
    return event


class Trace:
    """The list that everything appends to.

    ``watchers`` are called with each record right after it was added; a debugger stops there.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.stage = "none"
        self._records: list[Record] = []
        self._later: list[tuple[str, int, Callable[..., Event], tuple[Any, ...]]] = []
        self.watchers: list[Callable[[Record], None]] = []

    @property
    def count(self) -> int:
        """Number of events so far, which is also the number of the next one."""
        return len(self._records) + len(self._later)

    @property
    def records(self) -> list[Record]:
        """All events so far, with number, stage and time."""
        later, self._later = self._later, []
        for stage, ns, kind, values in later:
            self._records.append(Record(len(self._records), stage, ns, kind(*values)))
        return self._records

    def add(self, event: Event) -> None:
        """Append ``event`` under the current stage and time."""
        if not self.watchers:
            self._later.append((self.stage, self._clock.ns, _itself, (event,)))
            return
        records = self.records
        record = Record(len(records), self.stage, self._clock.ns, event)
        records.append(record)
        for watcher in self.watchers:
            watcher(record)

    def add_later(self, kind: type[Event], *values: Any) -> None:
        """Append the event ``kind(*values)``, which is made when somebody looks: for what happens a million times."""
        if self.watchers:
            self.add(kind(*values))
        else:
            self._later.append((self.stage, self._clock.ns, kind, values))
