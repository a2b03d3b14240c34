"""The journal of writes: who wrote a byte last, against a model that keeps an author per byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guest.bitmap import GuestBitmap
from guest.trace import Note
from guest.write_journal import Write, WriteJournal, authors

SIZE = 64
spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)


def writer(bench, gpa: int) -> None:
    bench.memory.write(gpa, b"12")


def kept(bench, *helpers: str) -> WriteJournal:
    journal = WriteJournal(bench.trace, helpers)
    bench.physical.on_write = journal.record
    return journal


def test_author_event_and_range(bench):
    """A write has the function that wanted it, the stage, the number of the next event, and its range."""
    journal = kept(bench)
    bench.trace.add(Note("first"))
    bench.trace.stage = "efi-stub"
    writer(bench, 0x1000)
    assert journal.writes == [Write(1, "efi-stub", f"{__name__}.writer", 0x1000, 0x1002)]
    assert journal.writes[0].text == f"efi-stub {__name__}.writer #1"


def test_every_way_to_write(bench):
    """Writes, clears, fields, bits, and what is written past the gate are all in the journal; reads are not."""
    journal = kept(bench)
    bench.memory.write_uint(0x1000, 5, 8)
    bench.memory.clear(0x2000, 0x4000)
    GuestBitmap(bench.memory, 0x5000).set(7, 9)
    bench.physical.write(0x6000, b"host")
    bench.memory.read(0x1000, 8)
    assert not GuestBitmap(bench.memory, 0x5000).any(0, 7)
    ranges = [(0x1000, 0x1008), (0x2000, 0x4000), (0x5000, 0x5002), (0x6000, 0x6004)]
    assert [(w.start, w.end) for w in journal.writes] == ranges


def test_helpers_are_no_authors(bench):
    """A function of a module that writes for others is not named; its caller is."""
    journal = kept(bench, __name__)
    writer(bench, 0x1000)
    (write,) = journal.writes
    assert write.author.startswith("_pytest.")


def test_neighbours_of_one_event_are_one_entry(bench):
    """What one author writes in order before one event is one range; an event in between parts it."""
    journal = kept(bench)
    writer(bench, 0x1000)
    writer(bench, 0x1002)
    bench.trace.add(Note("between"))
    writer(bench, 0x1004)
    bench.memory.write(0x1006, b"")
    assert [(w.event, w.start, w.end) for w in journal.writes] == [(0, 0x1000, 0x1004), (1, 0x1004, 0x1006)]


@given(st.lists(st.tuples(spans, st.integers(0, 9)), max_size=12), spans, st.integers(0, 9) | st.none())
def test_last_writer_of_each_byte(operations, window, up_to):
    """Runs cover the window and name for each byte the last write before the given event that holds it."""
    writes = [Write(event, "stage", str(n), start, end) for n, ((start, end), event) in enumerate(operations)]
    model: list[Write | None] = [None] * SIZE
    for write in writes:
        if up_to is None or write.event <= up_to:
            model[write.start : write.end] = [write] * (write.end - write.start)
    found = [write for start, end, write in authors(writes, *window, up_to) for _ in range(start, end)]
    assert found == model[window[0] : window[1]]
