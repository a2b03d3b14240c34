"""A bitmap in guest memory against a set of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.bitmap import GuestBitmap
from guest.errors import MemoryFault
from guest.units import PAGE_SIZE, SZ_1G

NBITS = 160
BORDER_BITS = 80
"""Bits of the test's bitmap that lie before the border of two mappings."""
GPA = SZ_1G - BORDER_BITS // 8

spans = st.tuples(st.integers(0, NBITS), st.integers(0, NBITS)).map(sorted)
operations = st.lists(st.tuples(spans, st.booleans()), max_size=10)


def runs_of(members: set[int], start: int, end: int) -> list[tuple[int, int]]:
    """Maximal runs of ``members``, bit by bit."""
    out: list[tuple[int, int]] = []
    for bit in range(start, end):
        if bit in members and out and out[-1][1] == bit:
            out[-1] = (out[-1][0], bit + 1)
        elif bit in members:
            out.append((bit, bit + 1))
    return out


def filled(bench, changes) -> tuple[GuestBitmap, set[int]]:
    """A bitmap and a set after the same changes."""
    bitmap, model = GuestBitmap(bench.memory, GPA), set()
    for (start, end), value in changes:
        (bitmap.set if value else bitmap.clear)(start, end)
        model = model | set(range(start, end)) if value else model - set(range(start, end))
    return bitmap, model


@given(operations, spans)
def test_bitmap_is_a_set_of_bits(make_bench, changes, window):
    """Across the border of two mappings, every question has the answer that a set of numbers gives."""
    bench = make_bench()
    bitmap, model = filled(bench, changes)
    start, end = window
    inside = {bit for bit in model if start <= bit < end}
    assert [bit for bit in range(NBITS) if bitmap.test(bit)] == sorted(model)
    assert bitmap.any(start, end) == bool(inside)
    assert bitmap.count(start, end) == len(inside)
    assert list(bitmap.runs(start, end)) == runs_of(model, start, end)
    assert int.from_bytes(bench.physical.read(GPA, NBITS // 8), "little") == sum(1 << bit for bit in model)


@given(operations, spans)
def test_a_run_may_be_cleared_while_the_runs_are_walked(make_bench, changes, window):
    """Clearing each run as it comes changes neither the runs that follow nor the bits outside the walk."""
    bitmap, model = filled(make_bench(), changes)
    walked = []
    for start, end in bitmap.runs(*window):
        bitmap.clear(start, end)
        walked.append((start, end))
    assert walked == runs_of(model, *window)
    assert list(bitmap.runs(0, NBITS)) == runs_of(model - set(range(*window)), 0, NBITS)


def test_bit_0_is_the_lowest_of_the_first_byte(bench):
    """Bits are counted as in an array of unsigned long on a little-endian machine."""
    bitmap = GuestBitmap(bench.memory, 0x1000)
    bitmap.set(0, 1)
    bitmap.set(9, 11)
    bitmap.set(63, 65)
    assert bench.physical.read(0x1000, 9) == bytes([0x01, 0x06, 0, 0, 0, 0, 0, 0x80, 0x01])


def test_an_access_touches_only_the_bytes_of_its_bits(make_bench):
    """The gate is asked for the bytes that hold the bits, no more, and an empty range asks nothing."""
    bench = make_bench()
    bitmap = GuestBitmap(bench.memory, 0x1000)
    bitmap.set(5, 5)
    assert not bitmap.any(9, 9)
    assert bench.gate.asked == []
    bitmap.set(7, 17)
    assert bench.gate.asked == [(0x1000, 3, "write")]
    assert bench.memory.writes == [(0, 0x1000, 0x1003)]


def test_a_refused_bit_changes_no_bit(make_bench):
    """If the last byte of a range may not be touched, no bit of it is set."""
    bench = make_bench(run=(0, PAGE_SIZE))
    bitmap = GuestBitmap(bench.memory, PAGE_SIZE - 1)
    with pytest.raises(MemoryFault):
        bitmap.set(0, 9)
    with pytest.raises(MemoryFault):
        bitmap.test(8)
    bitmap.set(0, 8)
    assert bench.physical.read(PAGE_SIZE - 1, 2) == b"\xff\0"


@pytest.mark.parametrize("start, end", [(-1, 4), (4, 3)])
def test_a_range_that_is_none_is_refused(bench, start, end):
    """A negative bit and a range that runs backwards are a ValueError."""
    bitmap = GuestBitmap(bench.memory, 0x1000)
    for operation in (bitmap.set, bitmap.clear, bitmap.any, bitmap.count):
        with pytest.raises(ValueError, match="expected 0 <= start <= end"):
            operation(start, end)
    assert bench.memory.writes == []


def test_far_bits_cost_nothing(bench):
    """A bitmap for 4 PiB at 2 MiB a bit answers for its last bit, and a long run is found as one."""
    bitmap = GuestBitmap(bench.memory, 0x1000)
    last = (1 << 52) // (1 << 21)
    bitmap.set(last - 1, last)
    bitmap.set(0, 1 << 20)
    assert list(bitmap.runs(0, last)) == [(0, 1 << 20), (last - 1, last)]
    assert bitmap.count(0, last) == (1 << 20) + 1
