"""The firmware's memory map against a type for every page."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from firmware.memory_descriptor import MemoryDescriptor
from firmware.memory_map import MemoryMap

PAGE = 0x1000
FREE = 7
RUNTIME = 1 << 63
REGIONS = [
    # type, first page, pages, attribute: three regions, two of which touch, and a hole
    (FREE, 16, 8, 0xF),
    (4, 24, 4, 0xF),
    (FREE, 2, 10, 0xF),
]
FIXED = [MemoryDescriptor(0, 0xE000_0000, 1, 0), MemoryDescriptor(15, 1 << 32, 256, 0)]
TYPES = st.sampled_from([1, 2, 3, 4, 5, 6, 9, 10])
PAGES = st.integers(0, 30)


def build() -> MemoryMap:
    """A map of REGIONS."""
    return MemoryMap([MemoryDescriptor(t, first * PAGE, pages, a) for t, first, pages, a in REGIONS], FIXED)


class MapModel(RuleBasedStateMachine):
    """Random calls to a MemoryMap, and a dictionary from page to type that does the same."""

    def __init__(self) -> None:
        super().__init__()
        self.map = build()
        self.model = {page: t for t, first, pages, _ in REGIONS for page in range(first, first + pages)}
        self.last = (self.map.key, self.map.descriptors())

    def change(self, page: int, count: int, kind: int) -> None:
        self.model |= dict.fromkeys(range(page, page + count), kind)

    def all_are(self, page: int, count: int, test) -> bool:
        return all(p in self.model and test(self.model[p]) for p in range(page, page + count))

    def inside_one_region(self, page: int, count: int) -> bool:
        return any(first <= page and page + count <= first + pages for _, first, pages, _ in REGIONS)

    @rule(kind=TYPES, count=st.integers(1, 6), odd=st.integers(0, 1), below=PAGES | st.just(1 << 40))
    def allocate(self, kind: int, count: int, odd: int, below: int) -> None:
        """The highest place below the limit that is free, or nothing if there is none."""
        places = [
            page
            for page in self.model
            if self.inside_one_region(page, count) and self.all_are(page, count, FREE.__eq__) and page + count <= below
        ]
        found = self.map.allocate(kind, count * PAGE - odd, below * PAGE)
        assert found == (max(places) * PAGE if places else None)
        if found is not None:
            self.change(found // PAGE, count, kind)

    @rule(kind=TYPES, page=PAGES, count=st.integers(0, 6))
    def allocate_at(self, kind: int, page: int, count: int) -> None:
        """The very place, if every page of it is free."""
        possible = count > 0 and self.all_are(page, count, FREE.__eq__)
        assert self.map.allocate_at(kind, page * PAGE, count * PAGE) is possible
        if possible:
            self.change(page, count, kind)

    @rule(page=PAGES, count=st.integers(0, 6))
    def free(self, page: int, count: int) -> None:
        """Gives back what is allocated, all of it or nothing."""
        possible = count > 0 and self.all_are(page, count, FREE.__ne__)
        assert self.map.free(page * PAGE, count * PAGE) is possible
        if possible:
            self.change(page, count, FREE)

    @invariant()
    def nothing_is_lost(self) -> None:
        """Each page of the regions is in one descriptor, with its type, and the fixed ones stand behind."""
        descriptors = self.map.descriptors()
        assert descriptors[len(descriptors) - len(FIXED) :] == FIXED
        owned = descriptors[: len(descriptors) - len(FIXED)]
        listed = [(page, d.type) for d in owned for page in range(d.start // PAGE, d.end // PAGE)]
        assert len(listed) == len(self.model)
        assert dict(listed) == self.model
        starts = {first * PAGE for _, first, _, _ in REGIONS}
        for low, high in pairwise(owned):
            assert high.start in starts or (low.end, low.type) != (high.start, high.type)
        assert [d.attribute for d in owned] == [0xF | RUNTIME if d.type in (5, 6) else 0xF for d in owned]

    @invariant()
    def the_key_changes_with_the_map(self) -> None:
        """A new key if and only if there is a new map."""
        now = (self.map.key, self.map.descriptors())
        assert (now[0] == self.last[0]) == (now[1] == self.last[1])
        assert now[0] >= self.last[0]
        self.last = now


TestMapModel = MapModel.TestCase
TestMapModel.settings = settings(max_examples=40, stateful_step_count=40)


def test_regions_keep_their_order_and_borders():
    """Descriptors come region by region, and neighbours of one type do not join over a border."""
    found = build()
    assert [(d.type, d.start // PAGE, d.pages) for d in found.descriptors()[:3]] == [
        (7, 16, 8),
        (4, 24, 4),
        (7, 2, 10),
    ]
    assert found.allocate_at(4, 20 * PAGE, 4 * PAGE)
    assert [(d.type, d.start // PAGE, d.pages) for d in found.descriptors()[:4]] == [
        (7, 16, 4), (4, 20, 4), (4, 24, 4), (7, 2, 10)
    ]  # fmt: skip


def test_regions_that_touch_can_be_one():
    """As edk2 has them: neighbours of one type are one descriptor, whatever was there when the firmware began."""
    rows = [(FREE, 0, 8), (4, 8, 4), (5, 12, 1), (FREE, 16, 2)]
    found = MemoryMap([MemoryDescriptor(t, first * PAGE, pages, 0xF) for t, first, pages in rows], FIXED, joined=True)
    assert found.allocate_at(4, 6 * PAGE, 2 * PAGE)
    assert [(d.type, d.start // PAGE, d.pages) for d in found.descriptors()[:4]] == [
        (FREE, 0, 6), (4, 6, 6), (5, 12, 1), (FREE, 16, 2)
    ]  # fmt: skip


def test_memory_below_4_gib_comes_first():
    """Where the default bin ends there, memory above is handed out last; address 0 is nobody's unless asked for."""
    low, high = MemoryDescriptor(FREE, 0, 3, 0xF), MemoryDescriptor(FREE, 1 << 32, 8, 0xF)
    found = MemoryMap([high, low], [], default_end=1 << 32)
    below = 1 << 52
    assert [found.allocate(2, PAGE, below) for _ in range(3)] == [2 * PAGE, PAGE, (1 << 32) + 7 * PAGE]
    assert found.allocate(2, PAGE, 1 << 32) is None
    assert found.allocate_at(2, 0, PAGE)


def test_runtime_memory_is_marked_and_unmarked():
    """The RUNTIME attribute comes and goes with the runtime types, and other attributes stay."""
    found = build()
    assert found.allocate_at(6, 16 * PAGE, PAGE)
    assert found.descriptors()[0] == MemoryDescriptor(6, 16 * PAGE, 1, 0xF | RUNTIME)
    assert found.free(16 * PAGE, PAGE)
    assert found.descriptors() == build().descriptors()


@pytest.mark.parametrize("align", [PAGE, 4 * PAGE, 0x20_0000])
def test_an_alignment_is_kept(align):
    """An aligned allocation is the highest aligned place that fits."""
    found = MemoryMap([MemoryDescriptor(FREE, PAGE, 1024, 0xF)], [])
    address = found.allocate(2, 3 * PAGE, 1 << 52, align)
    assert address is not None
    assert address % align == 0
    assert address + 3 * PAGE <= 1025 * PAGE < address + 3 * PAGE + align


@pytest.mark.parametrize("start", [0, 2 * PAGE, 1 << 52, (1 << 64) - PAGE, (1 << 64) - 1])
@pytest.mark.parametrize("size", [0, 1 << 52, 1 << 64, 1 << 76])
def test_ranges_that_no_memory_has_are_refused(start, size):
    """An empty range, and one that reaches above the address space or wraps, is never free nor allocated."""
    found = build()
    assert not found.allocate_at(2, start, size)
    assert not found.free(start, size)
    assert found.key == build().key


@pytest.mark.parametrize("start", [1 << 52, (1 << 64) - PAGE, 12 * PAGE, 16 * PAGE + 1])
def test_pages_that_are_none_are_refused(start):
    """Addresses above 2^52, in a hole, or inside a page cannot be allocated or freed."""
    found = build()
    assert not found.allocate_at(2, start, PAGE)
    assert not found.free(start, PAGE)
    assert found.key == build().key


def test_find_gives_the_first_range_that_is_large_enough():
    """In the order of the map, and None if no range of the type has the size."""
    found = build()
    assert found.find(FREE, PAGE) == 16 * PAGE
    assert found.find(FREE, 9 * PAGE) == 2 * PAGE
    assert found.find(FREE, 11 * PAGE) is None
    assert found.find(15, PAGE) == 1 << 32
    assert found.find(9, 1) is None
