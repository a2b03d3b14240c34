"""Events, timers and task priority levels, and what happens to them at ExitBootServices()."""

from __future__ import annotations

import pytest

from guest.errors import GuestPanic

SUCCESS = 0
INVALID_PARAMETER, UNSUPPORTED, NOT_READY = (1 << 63 | n for n in (2, 3, 6))
TIMER, RUNTIME, WAIT, SIGNAL = 0x8000_0000, 0x4000_0000, 0x100, 0x200
EXIT, VIRTUAL = 0x201, 0x6000_0202
APPLICATION, CALLBACK, NOTIFY, HIGH = 4, 8, 16, 31
CANCEL, PERIODIC, RELATIVE = 0, 1, 2
BEFORE_EXIT_GROUP = "8be0e274-3970-4b44-80c5-1ab9502f3b3b"
EXIT_GROUP = "27abf055-b1b8-4c26-8048-748f37baa2df"
OTHER_GROUP = "0000000a-0000-4000-8000-000000000001"
LOADER_DATA = 2
MS = 10_000
"""A millisecond in the unit of SetTimer(), 100 ns."""


class Log:
    """Events whose functions write down their context."""

    def __init__(self, efi) -> None:
        self.efi, self.told = efi, []
        self.function = efi.function(self._told)

    def _told(self, event: int, context: int) -> int:
        self.told.append(context)
        return 0

    def event(self, context: int = 1, type: int = SIGNAL, tpl: int = CALLBACK, group: str | None = None) -> int:
        at = self.efi.word()
        function = self.function if type & (WAIT | SIGNAL) else 0
        if group is None:
            status = self.efi.call("CreateEvent", type, tpl, function, context, at)
        else:
            status = self.efi.call("CreateEventEx", type, tpl, function, context, self.efi.id(group), at)
        assert status == SUCCESS
        return self.efi.load(at)


@pytest.fixture
def log(efi):
    return Log(efi)


def test_a_signalled_event_calls_its_function(efi, log):
    """Once per signal, with event and context; a closed event is none any more."""
    event = log.event(7)
    for _ in range(2):
        assert efi.call("SignalEvent", event) == SUCCESS
    assert log.told == [7, 7]
    assert efi.call("CloseEvent", event) == SUCCESS
    assert efi.call("SignalEvent", event) == efi.call("CloseEvent", event) == INVALID_PARAMETER


def test_an_event_without_a_function_stays_signalled(efi, log):
    """CheckEvent() finds it once."""
    event = log.event(type=0)
    assert efi.call("CheckEvent", event) == NOT_READY
    efi.call("SignalEvent", event)
    assert [efi.call("CheckEvent", event) for _ in range(2)] == [SUCCESS, NOT_READY]


def test_a_function_that_waits_is_asked(efi):
    """CheckEvent() of an event that is not signalled calls its function, which may signal it."""
    at = efi.word()
    function = efi.function(lambda event, context: efi.call("SignalEvent", event))
    assert efi.call("CreateEvent", WAIT, CALLBACK, function, 0, at) == SUCCESS
    assert efi.call("CheckEvent", efi.load(at)) == SUCCESS


@pytest.mark.parametrize(
    "type, tpl, function, event_at",
    [
        (SIGNAL, CALLBACK, True, False),
        (SIGNAL, CALLBACK, False, True),
        (SIGNAL, APPLICATION, True, True),
        (WAIT, HIGH, True, True),
        (SIGNAL | WAIT, CALLBACK, True, True),
        (1, 0, True, True),
        (0x400, 0, True, True),
        (EXIT | WAIT, CALLBACK, True, True),
        (EXIT | RUNTIME, CALLBACK, True, True),
    ],
)
def test_events_that_cannot_be(efi, log, type, tpl, function, event_at):
    """No place for the event, no function, a wrong level, an unknown type."""
    args = (type, tpl, log.function if function else 0, 0)
    assert efi.call("CreateEvent", *args, efi.word() if event_at else 0) == INVALID_PARAMETER


def test_the_exit_events_have_their_group_already(efi, log):
    """CreateEventEx() does not take the types that stand for a group, together with a group."""
    for type in (EXIT, VIRTUAL):
        args = (type, CALLBACK, log.function, 0, efi.id(OTHER_GROUP), efi.word())
        assert efi.call("CreateEventEx", *args) == INVALID_PARAMETER
    assert efi.call("CheckEvent", log.event()) == INVALID_PARAMETER  # of an event with a function for its signal


def test_a_group_is_signalled_together(efi, log):
    """All of the group are told, the highest level first, and then in the order of their making; others are not."""
    first = log.event(1, group=OTHER_GROUP)
    log.event(2, tpl=NOTIFY, group=OTHER_GROUP)
    log.event(3, group=OTHER_GROUP)
    log.event(4, group=EXIT_GROUP)
    log.event(5)
    efi.call("SignalEvent", first)
    assert log.told == [2, 1, 3]


def test_functions_wait_for_a_lower_level(efi, log):
    """RaiseTPL() gives the level before and holds functions of its level back; RestoreTPL() lets them run."""
    low, high = log.event(1, tpl=CALLBACK), log.event(2, tpl=NOTIFY)
    assert efi.call("RaiseTPL", NOTIFY) == APPLICATION
    efi.call("SignalEvent", low)
    efi.call("SignalEvent", high)
    assert log.told == []
    efi.call("RestoreTPL", CALLBACK)
    assert log.told == [2]
    efi.call("RestoreTPL", APPLICATION)
    assert log.told == [2, 1]
    closed = log.event(3)
    efi.call("RaiseTPL", CALLBACK)
    efi.call("SignalEvent", closed)
    efi.call("CloseEvent", closed)
    efi.call("RestoreTPL", APPLICATION)
    assert log.told == [2, 1]


def test_a_function_runs_at_its_own_level(efi):
    """While it runs, RaiseTPL() finds the level of the event."""
    levels, at = [], efi.word()

    def function(event: int, context: int) -> int:
        levels.append(efi.call("RaiseTPL", HIGH))
        efi.call("RestoreTPL", levels[-1])
        return 0

    efi.call("CreateEvent", SIGNAL, NOTIFY, efi.function(function), 0, at)
    efi.call("SignalEvent", efi.load(at))
    assert (levels, efi.call("RaiseTPL", APPLICATION)) == ([NOTIFY], APPLICATION)


@pytest.mark.parametrize("service, level", [("RaiseTPL", 3), ("RaiseTPL", 32), ("RestoreTPL", 8)])
def test_levels_go_one_way(efi, service, level):
    """To raise to a lower level or to restore a higher one is undefined, and here it ends the guest."""
    with pytest.raises(GuestPanic, match=f"{service} to {level}"):
        efi.call(service, level)


def test_machine_code_is_not_called_back(efi):
    """A function that is no call gate ends the guest with its address."""
    at = efi.word()
    efi.call("CreateEvent", SIGNAL, CALLBACK, 0x1234, 0, at)
    with pytest.raises(GuestPanic, match="the function at 0x1234 of an event is machine code"):
        efi.call("SignalEvent", efi.load(at))


# Timers


def test_a_timer_expires_in_virtual_time(efi, log):
    """A relative one once, after its time and not before."""
    event = log.event(type=TIMER | SIGNAL)
    assert efi.call("SetTimer", event, RELATIVE, 5 * MS) == SUCCESS
    for microseconds, told in ((4_999, 0), (1, 1), (10_000, 1)):
        assert efi.call("Stall", microseconds) == SUCCESS
        assert len(log.told) == told


def test_a_periodic_timer_goes_on(efi, log):
    """It expires each period, and once for periods that passed together, until it is cancelled or closed."""
    event = log.event(type=TIMER | SIGNAL)
    efi.call("SetTimer", event, PERIODIC, 2 * MS)
    for _ in range(3):
        efi.call("Stall", 2_000)
    assert len(log.told) == 3
    efi.call("Stall", 7_000)  # 13 ms: the next one is due at 14 ms
    assert len(log.told) == 4
    efi.call("Stall", 1_000)
    assert len(log.told) == 5
    assert efi.call("SetTimer", event, CANCEL, 0) == SUCCESS
    efi.call("Stall", 10_000)
    assert len(log.told) == 5


def test_a_timer_is_seen_by_any_boot_service(efi, log):
    """Time that other things took lets a timer expire at the next call."""
    event = log.event(type=TIMER | SIGNAL)
    efi.call("SetTimer", event, RELATIVE, 0)
    efi.machine.clock.advance(1)
    efi.key()
    assert log.told == [1]


@pytest.mark.parametrize("type, kind", [(SIGNAL, RELATIVE), (0, PERIODIC), (TIMER, 3)])
def test_only_timers_have_a_time(efi, log, type, kind):
    """An event without a timer, and an unknown kind of time."""
    assert efi.call("SetTimer", log.event(type=type), kind, 1) == INVALID_PARAMETER
    assert efi.call("SetTimer", 0x1234, RELATIVE, 1) == INVALID_PARAMETER


def wait(efi, *events: int) -> tuple[int, int]:
    """WaitForEvent(): status and index."""
    index = efi.word(0xAA)
    at = efi.put(b"".join(event.to_bytes(8, "little") for event in events))
    return efi.call("WaitForEvent", len(events), at, index), efi.load(index)


def test_waiting_lets_time_pass(efi, log):
    """The first event that is signalled ends it; a timer is waited for."""
    idle, slow, quick = log.event(type=0), log.event(type=TIMER), log.event(type=TIMER)
    efi.call("SetTimer", slow, RELATIVE, 9 * MS)
    efi.call("SetTimer", quick, RELATIVE, 3 * MS)
    before = efi.machine.clock.ns
    assert wait(efi, idle, slow, quick) == (SUCCESS, 2)
    assert efi.machine.clock.ns - before == 3_000_000
    efi.call("SignalEvent", idle)
    assert wait(efi, slow, idle) == (SUCCESS, 1)


def test_waiting_for_nothing_is_a_dead_guest(efi, log, monkeypatch):
    """If no timer can signal anything, or only others than those waited for, for ever, the guest ends."""
    event, other = log.event(type=0), log.event(type=TIMER)
    with pytest.raises(GuestPanic, match="nothing signals any of the events"):
        wait(efi, event)
    efi.call("SetTimer", other, PERIODIC, 0)
    monkeypatch.setattr("firmware.event_services._MAX_CHECKS", 100)
    with pytest.raises(GuestPanic, match="nothing signals any of the events"):
        wait(efi, event)


def test_wrong_arguments_of_wait(efi, log):
    """No events, null pointers, an event with a function for its signal, and a raised level."""
    assert wait(efi)[0] == INVALID_PARAMETER
    assert efi.call("WaitForEvent", 1, 0, efi.word()) == INVALID_PARAMETER
    assert efi.call("WaitForEvent", 1 << 60, efi.word(), efi.word()) == INVALID_PARAMETER
    assert wait(efi, log.event(type=0), log.event())[:2] == (INVALID_PARAMETER, 1)
    efi.call("RaiseTPL", CALLBACK)
    assert wait(efi, log.event(type=0))[0] == UNSUPPORTED


# ExitBootServices()


def test_the_map_grows_between_the_calls(efi):
    """A driver that allocates before the exit makes the key stale: the first call fails, and the second succeeds."""
    told = []

    def driver(event: int, context: int) -> int:
        told.append(efi.allocate_pool(LOADER_DATA, 1)[0])
        return 0

    group, at = efi.id(BEFORE_EXIT_GROUP), efi.word()
    assert efi.call("CreateEventEx", SIGNAL, CALLBACK, efi.function(driver), 0, group, at) == SUCCESS
    before, key = efi.memory_map()[1], efi.key()
    assert efi.call("ExitBootServices", 0, key) == INVALID_PARAMETER
    status, size, fresh, *_ = efi.memory_map()
    assert (status, size > before, fresh != key) == (SUCCESS, True, True)
    assert efi.call("ExitBootServices", 0, fresh) == SUCCESS
    assert told == [SUCCESS]  # once, and not at the second call


def test_exit_events_are_told_after_a_good_key(efi, log):
    """A stale key tells nobody; the good one tells the types and members of the group."""
    log.event(1, type=EXIT)
    log.event(2, group=EXIT_GROUP)
    assert efi.call("ExitBootServices", 0, efi.key() + 1) == INVALID_PARAMETER
    assert log.told == []
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS
    assert log.told == [1, 2]


def test_an_exit_event_must_not_allocate(efi):
    """The caller's map would be wrong for good: the guest ends there."""
    function = efi.function(lambda event, context: efi.allocate_pool(LOADER_DATA, 1)[0])
    assert efi.call("CreateEvent", EXIT, CALLBACK, function, 0, efi.word()) == SUCCESS
    with pytest.raises(GuestPanic, match="AllocatePool called by an event of ExitBootServices"):
        efi.call("ExitBootServices", 0, efi.key())


def test_timers_end_with_boot_services(efi, log):
    """Whatever time passes, no function runs any more."""
    event = log.event(type=TIMER | SIGNAL)
    efi.call("SetTimer", event, PERIODIC, 1 * MS)
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS
    efi.machine.clock.advance(10**9)
    efi.services.events.expire()
    assert log.told == []
