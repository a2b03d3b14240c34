"""Event, timer and task priority services (UEFI 2.10, section 7.1)."""

from __future__ import annotations

from functools import partial

from firmware.boot_services import EfiServices, Handler
from firmware.efi_types import (
    EFI_EVENT_GROUP_EXIT_BOOT_SERVICES,
    EFI_EVENT_GROUP_VIRTUAL_ADDRESS_CHANGE,
    EfiStatus,
    guid_bytes,
)
from firmware.events import (
    EVT_SIGNAL_EXIT_BOOT_SERVICES,
    EVT_SIGNAL_VIRTUAL_ADDRESS_CHANGE,
    NS_PER_TRIGGER_TIME,
    TIMER_TICK_NS,
    TPL_APPLICATION,
    TPL_HIGH_LEVEL,
    Event,
    EventType,
)

_TIMER, _RUNTIME = EventType.EVT_TIMER, EventType.EVT_RUNTIME
_WAIT, _SIGNAL = EventType.EVT_NOTIFY_WAIT, EventType.EVT_NOTIFY_SIGNAL
_GROUP_OF_TYPE = {
    EVT_SIGNAL_EXIT_BOOT_SERVICES: EFI_EVENT_GROUP_EXIT_BOOT_SERVICES,
    EVT_SIGNAL_VIRTUAL_ADDRESS_CHANGE: EFI_EVENT_GROUP_VIRTUAL_ADDRESS_CHANGE,
}
_TYPES = {kind | notify for kind in (0, int(_TIMER)) for notify in (0, int(_WAIT), int(_SIGNAL))}
"""The other types, each with or without EVT_RUNTIME."""
_TIMER_CANCEL, _TIMER_PERIODIC, _TIMER_RELATIVE = range(3)
_MAX_CHECKS = 1 << 17
"""Events that one WaitForEvent() looks at before the firmware takes it that none will ever be signalled."""


class EventServices:
    """RaiseTPL() to CheckEvent(), on the firmware's events."""

    def __init__(self, services: EfiServices) -> None:
        self._services, self._events = services, services.events
        self._machine = services.machine

    def handlers(self) -> dict[str, Handler]:
        """The services of this family, by name."""
        return {
            "RaiseTPL": self.raise_tpl,
            "RestoreTPL": self.restore_tpl,
            "CreateEvent": self.create_event,
            "CreateEventEx": self.create_event_ex,
            "CloseEvent": self.close_event,
            "SignalEvent": self.signal_event,
            "CheckEvent": self.check_event,
            "WaitForEvent": self.wait_for_event,
            "SetTimer": self.set_timer,
        }

    def raise_tpl(self, new_tpl: int) -> int:
        """RaiseTPL(): returns the level before, not a status."""
        before = self._events.tpl
        if not before <= new_tpl <= TPL_HIGH_LEVEL:
            raise self._machine.panic(f"RaiseTPL to {new_tpl}: expected {before} to {TPL_HIGH_LEVEL}")
        self._events.tpl = new_tpl
        return before

    def restore_tpl(self, old_tpl: int) -> int:
        """RestoreTPL(): functions that waited for the lower level run."""
        if old_tpl > self._events.tpl:
            raise self._machine.panic(f"RestoreTPL to {old_tpl}: expected at most {self._events.tpl}")
        self._events.tpl = old_tpl
        self._events.dispatch()
        return EfiStatus.EFI_SUCCESS

    def create_event(self, type: int, tpl: int, function: int, context: int, event_at: int) -> int:
        """CreateEvent()."""
        return self._create(type, tpl, function, context, None, event_at)

    def create_event_ex(self, type: int, tpl: int, function: int, context: int, group: int, event_at: int) -> int:
        """CreateEventEx(): with a group, whose events are signalled together."""
        if group == 0:
            return self._create(type, tpl, function, context, None, event_at)
        if type in _GROUP_OF_TYPE:
            return EfiStatus.EFI_INVALID_PARAMETER
        return self._create(type, tpl, function, context, self._machine.memory.read(group, 16), event_at)

    def close_event(self, event_at: int) -> int:
        """CloseEvent()."""
        event = self._events.close(event_at)
        if event is None:
            return EfiStatus.EFI_INVALID_PARAMETER
        registrations = self._services.handles.registrations
        for key in [key for key, registration in registrations.items() if registration.event is event]:
            del registrations[key]
        return EfiStatus.EFI_SUCCESS

    def signal_event(self, event_at: int) -> int:
        """SignalEvent()."""
        event = self._events.find(event_at)
        if event is None:
            return EfiStatus.EFI_INVALID_PARAMETER
        self._events.signal(event)
        return EfiStatus.EFI_SUCCESS

    def check_event(self, event_at: int) -> int:
        """CheckEvent(): EFI_NOT_READY if it is not signalled."""
        event = self._events.find(event_at)
        if event is None or event.type & _SIGNAL:
            return EfiStatus.EFI_INVALID_PARAMETER
        return EfiStatus.EFI_SUCCESS if self._events.check(event) else EfiStatus.EFI_NOT_READY

    def wait_for_event(self, count: int, events_at: int, index_at: int) -> int:
        """WaitForEvent(): time passes until one of the events is signalled. One that never is ends the guest."""
        if count == 0 or 0 in (events_at, index_at) or count > _MAX_CHECKS:
            return EfiStatus.EFI_INVALID_PARAMETER
        if self._events.tpl != TPL_APPLICATION:
            return EfiStatus.EFI_UNSUPPORTED
        memory = self._machine.memory
        addresses = [memory.read_uint(events_at + 8 * number, 8) for number in range(count)]
        for _ in range(_MAX_CHECKS // count):
            for index, address in enumerate(addresses):
                status = self.check_event(address)
                if status != EfiStatus.EFI_NOT_READY:
                    memory.write_uint(index_at, index, 8)
                    return status
            due = self._events.next_timer()
            if due is None:
                break
            self._machine.clock.advance(max(due - self._machine.clock.ns, 0))
            self._events.expire()
        raise self._machine.panic("WaitForEvent: nothing signals any of the events")

    def set_timer(self, event_at: int, kind: int, trigger_time: int) -> int:
        """SetTimer(): ``trigger_time`` in units of 100 ns."""
        event = self._events.find(event_at)
        if event is None or not event.type & _TIMER or kind > _TIMER_RELATIVE:
            return EfiStatus.EFI_INVALID_PARAMETER
        event.due, event.period = None, 0
        if kind == _TIMER_CANCEL:
            return EfiStatus.EFI_SUCCESS
        ns = trigger_time * NS_PER_TRIGGER_TIME
        if kind == _TIMER_PERIODIC:
            ns = event.period = ns or TIMER_TICK_NS
        event.due = self._machine.clock.ns + ns
        return EfiStatus.EFI_SUCCESS

    def _create(self, type: int, tpl: int, function: int, context: int, group: bytes | None, event_at: int) -> int:
        if event_at == 0 or (type not in _GROUP_OF_TYPE and type & ~int(_RUNTIME) not in _TYPES):
            return EfiStatus.EFI_INVALID_PARAMETER
        notifies = type & (_WAIT | _SIGNAL)
        if notifies and (function == 0 or not TPL_APPLICATION < tpl < TPL_HIGH_LEVEL):
            return EfiStatus.EFI_INVALID_PARAMETER
        if type in _GROUP_OF_TYPE:
            group = guid_bytes(_GROUP_OF_TYPE[type])
        address = self._services.new_object(b"evnt")
        notify = partial(self._events.call, function, address, context) if notifies else None
        self._events.add(address, Event(type, tpl, notify, group))
        self._machine.memory.write_uint(event_at, address, 8)
        return EfiStatus.EFI_SUCCESS
