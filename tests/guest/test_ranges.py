"""Range maps and sets against a value for every elementary interval."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.ranges import TOP, Range, RangeMap, RangeSet

EDGES = [*range(12), 1 << 32, TOP - 1, TOP]
"""All starts and ends that the random operations use: small numbers, and the top."""
CELLS = EDGES[:-1]
"""Each stands for the addresses from itself to the next edge."""

spans = st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)).map(lambda pair: tuple(sorted(pair)))


def cells(start: int, end: int) -> list[int]:
    """The elementary intervals inside ``[start, end)``."""
    return [cell for cell in CELLS if start <= cell < end]


def joined(members: list[int]) -> list[tuple[int, int]]:
    """Maximal ranges of elementary intervals, which are in ascending order."""
    out: list[tuple[int, int]] = []
    for cell in members:
        end = EDGES[EDGES.index(cell) + 1]
        if out and out[-1][1] == cell:
            out[-1] = (out[-1][0], end)
        else:
            out.append((cell, end))
    return out


@given(st.lists(st.tuples(spans, st.integers(0, 2)), max_size=12), spans)
def test_range_map_is_a_value_for_each_address(operations, window):
    """After any assignments each address has its last value, and runs are as long as they can be."""
    found: RangeMap[int] = RangeMap(0)
    model = dict.fromkeys(CELLS, 0)
    for (start, end), value in operations:
        found.assign(start, end, value)
        model |= dict.fromkeys(cells(start, end), value)
    assert {cell: found[cell] for cell in CELLS} == model

    runs = list(found.runs())
    assert runs[0][0] == 0
    assert runs[-1][1] == TOP
    for (_, end, value), (start, _, after) in pairwise(runs):
        assert end == start
        assert value != after
    for run in runs:
        assert {found.run_at(cell) for cell in cells(run[0], run[1])} == {run}

    low, high = window
    clipped = [(max(s, low), min(e, high), v) for s, e, v in runs if s < high and e > low and low < high]
    assert list(found.runs(low, high)) == clipped


@given(st.lists(st.tuples(spans, st.booleans()), max_size=12), spans)
def test_range_set_is_a_set_of_addresses(operations, window):
    """After any additions and removals the set holds what a set of addresses would hold."""
    found, model = RangeSet(), set()
    for (start, end), add in operations:
        (found.add if add else found.remove)(start, end)
        model = model | set(cells(start, end)) if add else model - set(cells(start, end))
    low, high = window
    inside = cells(low, high)
    assert list(found) == joined(sorted(model))
    assert {cell for cell in CELLS if cell in found} == model
    assert bool(found) == bool(model)
    assert found.total() == sum(end - start for start, end in joined(sorted(model)))
    assert list(found.within(low, high)) == joined([cell for cell in inside if cell in model])
    assert list(found.gaps(low, high)) == joined([cell for cell in inside if cell not in model])
    assert found.covers(low, high) == (set(inside) <= model)
    assert found.overlaps(low, high) == bool(set(inside) & model)


@given(st.lists(spans, max_size=6), spans)
def test_a_copy_is_equal_and_independent(ranges, change):
    """A copy equals its original, and what is done to it does not reach the original."""
    original = RangeSet(ranges)
    before = list(original)
    copy = original.copy()
    assert copy == original
    copy.add(*change)
    copy.remove(0, 1)
    assert list(original) == before


@given(st.lists(st.tuples(spans, st.integers(0, 2)), max_size=8))
def test_maps_of_equal_values_are_equal(operations):
    """Equality is that of the values, not of the way they got there."""
    found: RangeMap[int] = RangeMap(0)
    for (start, end), value in operations:
        found.assign(start, end, value)
    rebuilt: RangeMap[int] = RangeMap(7)
    for start, end, value in found.runs():
        rebuilt.assign(start, end, value)
    assert rebuilt == found
    rebuilt.assign(3, 4, 9)
    assert rebuilt != found


@pytest.mark.parametrize("start, end", [(-1, 4), (4, 3), (0, TOP + 1), (TOP + 1, TOP + 2)])
def test_a_range_outside_the_address_space_is_refused(start, end):
    """A range that is negative, backwards or above 2^64 is a ValueError and changes nothing."""
    found = RangeSet([(8, 16)])
    for operation in (found.add, found.remove, lambda s, e: list(found.within(s, e))):
        with pytest.raises(ValueError, match="expected 0 <= start <= end <= 2\\^64"):
            operation(start, end)
    assert list(found) == [(8, 16)]


def test_the_top_is_64_bits():
    """The last address of a map is 2^64 - 1."""
    assert TOP == 0x1_0000_0000_0000_0000


def test_touching_ranges_are_one():
    """Ranges that touch are one range, and one address between them keeps them apart."""
    assert list(RangeSet([(0, 4), (4, 8)])) == [(0, 8)]
    assert list(RangeSet([(0, 4), (5, 8)])) == [(0, 4), (5, 8)]
    assert list(RangeSet([(0, 0), (9, 9)])) == []


def test_ranges_are_printed_half_open_and_in_hex():
    """A range and a set say in their text where they start and end."""
    assert str(Range(0x1000, 0x2000)) == "[0x1000, 0x2000)"
    assert Range(0x1000, 0x2000).size == 0x1000
    assert repr(RangeSet([(0, 16), (32, 48)])) == "RangeSet([0x0, 0x10), [0x20, 0x30))"


def test_ranges_are_not_hashable():
    """A mutable set cannot be a key."""
    with pytest.raises(TypeError):
        hash(RangeSet())
    with pytest.raises(TypeError):
        hash(RangeMap(0))
    assert RangeSet() != 0
    assert RangeMap(0) != 0


BEFORE, AFTER = (1,), (2,)
"""Values that can be told apart by identity."""


@given(st.lists(st.tuples(spans, st.sampled_from([BEFORE, AFTER, None])), max_size=5), spans)
def test_moving_a_border_is_an_assignment_that_was_easy(operations, span):
    """If it says that it did, the map is as after ``assign``; if not, nothing changed, and it was not that case."""
    ours, wanted = RangeMap(None), RangeMap(None)
    for (start, end), value in operations:
        ours.assign(start, end, value)
        wanted.assign(start, end, value)
    start, end = span
    if start == end:
        return
    run = wanted.run_at(start)
    easy = run[0] == start > 0 and run[2] is BEFORE and end < run[1] and wanted[start - 1] is AFTER
    assert ours.move_border(start, end, BEFORE, AFTER) is (easy and run[1] > end)
    if easy:
        wanted.assign(start, end, AFTER)
    assert ours == wanted
