"""The trace: the same records whether somebody watches or not."""

from __future__ import annotations

import pytest

from guest.clock import VirtualClock
from guest.trace import Note, Print, Record, Trace


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("looks", [set(), {1}, {0, 2, 3}])
def test_events_keep_number_stage_and_time(watched, looks):
    """Events that are made later are those that were added at once; a watcher sees each when it happens."""
    clock = VirtualClock()
    trace, seen = Trace(clock), []
    if watched:
        trace.watchers.append(lambda record: seen.append((record.number, clock.ns)))
    for number in range(4):
        trace.stage = f"stage {number // 2}"
        assert trace.count == number
        if number % 2:
            trace.add_later(Note, f"text {number}")
        else:
            trace.add(Print(f"text {number}"))
        if number in looks:
            assert trace.records[-1].number == number
        clock.advance(10)
    kinds = (Print, Note, Print, Note)
    assert trace.records == [Record(n, f"stage {n // 2}", 10 * n, kinds[n](f"text {n}")) for n in range(4)]
    assert trace.count == 4
    assert seen == ([(n, 10 * n) for n in range(4)] if watched else [])
