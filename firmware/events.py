"""Events, timers and task priority levels: who is told of what, and when.

A notification function runs as soon as the task priority level is below its own. Those of an image are reached by
their address, where a call gate must be: the firmware does not call back into machine code.
Source: UEFI 2.10, section 7.1; edk2 MdeModulePkg/Core/Dxe/Event for what the specification leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from uuid import UUID

from firmware.efi_types import guid_bytes
from guest.machine import Machine

TPL_APPLICATION, TPL_CALLBACK, TPL_NOTIFY, TPL_HIGH_LEVEL = 4, 8, 16, 31
NS_PER_TRIGGER_TIME = 100
TIMER_TICK_NS = 10_000_000
"""Period of edk2's timer interrupt, for a periodic timer that asks for none."""


class EventType(IntFlag):
    """Bits of an event's type (UEFI 2.10, section 7.1.1)."""

    EVT_TIMER = 0x8000_0000
    EVT_RUNTIME = 0x4000_0000
    EVT_NOTIFY_WAIT = 0x100
    EVT_NOTIFY_SIGNAL = 0x200


EVT_SIGNAL_EXIT_BOOT_SERVICES = 0x201
EVT_SIGNAL_VIRTUAL_ADDRESS_CHANGE = 0x6000_0202


@dataclass(slots=True, eq=False)
class Event:
    """An event: its type, what it does, the 16 bytes of its group; ``due`` and ``period`` of its timer are in ns."""

    type: int
    tpl: int = 0
    notify: Callable[[], None] | None = None
    group: bytes | None = None
    signaled: bool = False
    due: int | None = None
    period: int = 0


class Events:
    """All events, by address, and the task priority level."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._events: dict[int, Event] = {}
        self._own: list[Event] = []
        """The firmware's own, which have no EFI_EVENT."""
        self._queue: list[Event] = []
        self.tpl = TPL_APPLICATION

    def add(self, address: int, event: Event) -> None:
        """Keep ``event``, whose EFI_EVENT is ``address``."""
        self._events[address] = event

    def on_group(self, group: UUID, notify: Callable[[], None]) -> None:
        """Call ``notify``, the firmware's own, when ``group`` is signalled."""
        self._own.append(Event(EventType.EVT_NOTIFY_SIGNAL, TPL_NOTIFY, notify, guid_bytes(group)))

    def find(self, address: int) -> Event | None:
        """The event behind an EFI_EVENT."""
        return self._events.get(address)

    def close(self, address: int) -> Event | None:
        """Forget an event, also where it waits for its turn; returns it."""
        event = self._events.pop(address, None)
        self._queue = [waiting for waiting in self._queue if waiting is not event]
        return event

    def call(self, function: int, *args: int) -> None:
        """Call a notification function of an image."""
        if self._machine.gates.at(function) is None:
            text = f"the function at {function:#x} of an event is machine code, which the firmware does not call back"
            raise self._machine.panic(text)
        self._machine.call(function, *args)

    def signal(self, event: Event) -> None:
        """SignalEvent(): no effect if it is signalled already; an event of a group stands for all of the group."""
        if event.signaled:
            return
        event.signaled = True
        if event.type & EventType.EVT_NOTIFY_SIGNAL:
            self._enqueue(self._members(event.group) if event.group else [event])
        self.dispatch()

    def signal_group(self, group: UUID) -> None:
        """Tell every event of ``group``."""
        self._enqueue(self._members(guid_bytes(group)))
        self.dispatch()

    def check(self, event: Event) -> bool:
        """CheckEvent(): whether it is signalled, which it then is no more; its function is asked first."""
        if not event.signaled and event.type & EventType.EVT_NOTIFY_WAIT:
            self._enqueue([event])
            self.dispatch()
        signaled, event.signaled = event.signaled, False
        return signaled

    def dispatch(self) -> None:
        """Run what waits at a level above the present one, the highest level first, in the order it was told."""
        while self._queue:
            event = max(self._queue, key=lambda waiting: waiting.tpl)  # the first of several
            if event.tpl <= self.tpl:
                return
            self._queue.remove(event)
            if event.type & EventType.EVT_NOTIFY_SIGNAL:
                event.signaled = False
            before, self.tpl = self.tpl, event.tpl
            if event.notify is not None:
                event.notify()
            self.tpl = before

    def expire(self) -> None:
        """Signal the timers whose time has come; a periodic one that was due several times is signalled once."""
        now = self._machine.clock.ns
        for event in [event for event in self._events.values() if event.due is not None and event.due <= now]:
            if event.due is None:  # a function that ran before has cancelled it
                continue
            event.due = now + event.period - (now - event.due) % event.period if event.period else None
            self.signal(event)

    def next_timer(self) -> int | None:
        """Virtual time at which the next timer is due."""
        return min((event.due for event in self._events.values() if event.due is not None), default=None)

    def stop_timers(self) -> None:
        """No timer expires any more."""
        for event in self._events.values():
            event.due = None

    def _members(self, group: bytes) -> list[Event]:
        return [event for event in (*self._own, *self._events.values()) if event.group == group]

    def _enqueue(self, events: list[Event]) -> None:
        self._queue += [event for event in events if event not in self._queue]
