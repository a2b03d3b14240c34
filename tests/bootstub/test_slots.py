"""Slots against a slow model that tries every aligned address."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.slots import MAX_SLOT_AREA, MemVector, SlotArea, Slots, slot_address
from guest.errors import FormatError

UNIT, GIB = 2 << 20, 1 << 30
MINIMUM = 16 << 20
addresses = st.integers(0, 6 * 512).map(lambda n: n << 21) | st.integers(0, 6 * GIB)
sizes = st.sampled_from([0, 1, 4096, UNIT, 3 * UNIT]) | st.integers(0, 3 * GIB)
vectors = st.builds(MemVector, addresses, sizes)
lists = st.lists(vectors, max_size=4)


def pieces(start: int, end: int, avoid: list[MemVector]) -> list[tuple[int, int]]:
    """``[start, end)`` without ``avoid``; what is empty cuts as well."""
    inside = [a for a in avoid if a.start < end and a.start + a.size > start]
    edges = sorted({start, end, *(e for a in inside for e in (a.start, a.start + a.size) if start < e < end)})
    free = [
        (low, high) for low, high in pairwise(edges)
        if not any(a.start <= low and high <= a.start + a.size for a in inside)
    ]  # fmt: skip
    joined: list[tuple[int, int]] = []
    for low, high in free:
        cut = any(a.size == 0 and a.start == low for a in inside)
        if joined and joined[-1][1] == low and not cut:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


class Model:
    """Every place, one by one, in the order in which slots are numbered."""

    def __init__(self, size: int, limit: int, avoid: list[MemVector], huge: int) -> None:
        self.size, self.limit, self.avoid, self.huge = size, limit, avoid, huge

    def places(self, regions: list[MemVector], nodes: list[MemVector]) -> list[int]:
        found = []
        for region in regions:
            parts = [(max(region.start, n.start), min(region.end, n.end)) for n in nodes] if nodes else [region]
            for part in parts:
                start, end = part if nodes else (region.start, region.end)
                if start < end or not nodes:
                    found += self.of_region(max(start, MINIMUM), min(end, self.limit))
        return found

    def of_region(self, start: int, end: int) -> list[int]:
        start = -(-start // UNIT) * UNIT
        found = []
        for piece, high in pieces(start, end, self.avoid) if end - start >= self.size else ():
            low = -(-piece // UNIT) * UNIT
            candidates = [at for at in range(low, high, UNIT) if at + self.size <= high]
            if candidates:
                pages = [page for page in range(-(-low // GIB) * GIB, high, GIB) if page + GIB <= high][: self.huge]
                self.huge -= len(pages)
                found += [at for at in candidates if not any(at < p + GIB and p < at + self.size for p in pages)]
        return found


def slots_of(regions, size, limit, avoid, huge=0, nodes=()):
    slots = Slots(size, UNIT, MINIMUM, limit, avoid, huge, nodes)
    for region in regions:
        if slots.process(region):
            break
    return slots


@given(
    lists, st.integers(1, 40).map(lambda n: n * UNIT), st.integers(0, 8 * GIB), lists,
    st.sampled_from([0, 0, 1, 2, 9]), st.just([]) | lists,
)  # fmt: skip
def test_slots_are_all_aligned_places(regions, size, limit, avoid, huge, nodes):
    """Number and address of each slot are those of the places that are found by trying each address."""
    slots = slots_of(regions, size, limit, avoid, huge, nodes)
    wanted = Model(size, limit, avoid, huge).places(regions, nodes)
    assert sum(area.num for area in slots.areas) == len(wanted)
    assert [slot_address(slots.areas, UNIT, n) for n in range(len(wanted))] == wanted
    assert slot_address(slots.areas, UNIT, len(wanted)) is None


def test_a_hundred_areas():
    """The hundredth area is the last; what comes behind it has no slots."""
    regions = [MemVector(n * GIB, 4 * UNIT) for n in range(1, 200)]
    slots = slots_of(regions, UNIT, 1 << 46, [])
    assert (len(slots.areas), slots.full) == (MAX_SLOT_AREA, True)
    assert slots.areas[-1] == SlotArea(100 * GIB, 4)
    holes = [MemVector(n * 2 * UNIT, 1) for n in range(10, 300)]
    assert len(slots_of([MemVector(0, GIB * 2)], UNIT, 1 << 46, holes).areas) == MAX_SLOT_AREA


def test_sizes_wrap_as_in_c():
    """A region to avoid that ends beyond 2^64 is none at all; one that ends right there ends the search."""
    free = MemVector(MINIMUM, GIB)
    assert slots_of([free], UNIT, 1 << 46, [MemVector(4 * UNIT, (1 << 64) - UNIT)]).areas == [SlotArea(MINIMUM, 512)]
    with pytest.raises(FormatError, match="region of memory"):
        slots_of([free], UNIT, 1 << 46, [MemVector(UNIT * 9, (1 << 64) - 1 - UNIT * 9)])
