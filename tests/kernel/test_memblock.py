"""memblock against a page-granular model, and what a full region array does; ``unaccepted conform`` has the rest."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from guest.errors import GuestPanic
from guest.ranges import Range
from guest.units import PAGE_SIZE
from kernel.memblock import (
    MAINLINE_MEMBLOCK,
    MEMBLOCK_ALLOC_ACCESSIBLE,
    V9_MEMBLOCK,
    Memblock,
    MemblockVersion,
)
from kernel.memblock_type import INIT_MEMBLOCK_REGIONS, PHYS_ADDR_MAX, MemblockFlags, MemblockType


def memblock(
    accept_memory: Callable[[int, int], None] = lambda start, end: None, version: MemblockVersion = V9_MEMBLOCK
) -> Memblock:
    """A memblock that tells ``accept_memory`` what it accepts, and has no memory to put its arrays in."""
    return Memblock(accept_memory, clear_memory=lambda start, end: None, version=version)


def flat(array: MemblockType) -> list[int]:
    return [number for region in array.regions for number in region[:3]]


class Model:
    """Flags of each page of memory, and the set of reserved pages."""

    def __init__(self) -> None:
        self.memory: dict[int, int] = {}
        self.reserved: set[int] = set()

    def regions(self) -> list[int]:
        return self._runs(sorted(self.memory), self.memory)

    def reserved_regions(self) -> list[int]:
        return self._runs(sorted(self.reserved), dict.fromkeys(self.reserved, 0))

    @staticmethod
    def _runs(pages: list[int], flags: dict[int, int]) -> list[int]:
        out: list[int] = []
        for page in pages:
            if out and out[-3] + out[-2] == page * PAGE_SIZE and out[-1] == flags[page]:
                out[-2] += PAGE_SIZE
            else:
                out += [page * PAGE_SIZE, PAGE_SIZE, flags[page]]
        return out

    def find(self, size: int, align: int, start: int, end: int, bottom_up: bool) -> int:
        fits = [
            page
            for page in range(max(start, 1), end - size + 1)
            if page % align == 0
            and all(
                p in self.memory and not self.memory[p] & 4 and p not in self.reserved for p in range(page, page + size)
            )
        ]
        return (min(fits) if bottom_up else max(fits)) * PAGE_SIZE if fits else 0


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_against_the_model(seed):
    """After each random operation both arrays are the maximal runs of equal pages that the model has."""
    rng = random.Random(seed)
    mb, model = memblock(), Model()
    for _ in range(250):
        first = rng.randrange(60)
        count = rng.randrange(1, 20)
        pages = range(first, first + count)
        where = first * PAGE_SIZE, count * PAGE_SIZE
        match rng.randrange(8):
            case 0 | 1:
                mb.add(*where)
                model.memory = dict.fromkeys(pages, 0) | model.memory
            case 2:
                mb.remove(*where)
                for page in pages:
                    model.memory.pop(page, None)
            case 3:
                mb.reserve(*where)
                model.reserved |= set(pages)
            case 4 | 5:
                mb.phys_free(*where)
                model.reserved -= set(pages)
            case 6:
                nomap = rng.randrange(2)
                (mb.mark_nomap if nomap else mb.clear_nomap)(*where)
                model.memory |= {page: 4 * nomap for page in pages if page in model.memory}
            case 7:
                mb.bottom_up = bool(rng.randrange(2))
                size, align = rng.randrange(1, 6), 1 << rng.randrange(3)
                found = mb.phys_alloc_range(size * PAGE_SIZE, align * PAGE_SIZE, where[0], sum(where))
                assert found == model.find(size, align, first, first + count, mb.bottom_up)
                if found:
                    model.reserved |= set(range(found // PAGE_SIZE, found // PAGE_SIZE + size))
        assert flat(mb.memory) == model.regions()
        assert flat(mb.reserved) == model.reserved_regions()
        assert mb.phys_mem_size() == len(model.memory) * PAGE_SIZE
        free = [page for r in mb.free_ranges() for page in range(r.start // PAGE_SIZE, r.end // PAGE_SIZE)]
        assert free == sorted(page for page in model.memory if not model.memory[page] and page not in model.reserved)
        probe = rng.randrange(80)
        assert mb.is_memory(probe * PAGE_SIZE) == (probe in model.memory)
        assert mb.is_reserved(probe * PAGE_SIZE) == (probe in model.reserved)
        assert mb.is_region_reserved(*where) == bool(model.reserved & set(pages))


def test_allocation_is_accepted_before_it_is_handed_out():
    """An allocation comes from the top of memory and its bytes, and only they, are accepted."""
    accepted = []
    mb = memblock(lambda start, end: accepted.append((start, end)))
    mb.add(0x10_0000, 0x10_0000)
    mb.reserve(0x1F_F000, 0x1000)
    assert accepted == []
    assert mb.phys_alloc_range(0x2000, 0x1000, 0, MEMBLOCK_ALLOC_ACCESSIBLE) == 0x1F_D000
    assert accepted == [(0x1F_D000, 0x1F_F000)]
    assert mb.is_region_reserved(0x1F_D000, 0x2000)


def test_failed_allocation_changes_nothing():
    """Without room the result is 0: nothing is reserved and nothing accepted."""
    accepted = []
    mb = memblock(lambda start, end: accepted.append((start, end)))
    mb.add(0x10_0000, 0x1000)
    assert mb.phys_alloc_range(0x2000, 0x1000, 0, MEMBLOCK_ALLOC_ACCESSIBLE) == 0
    assert accepted == [] and flat(mb.reserved) == []


def test_current_limit_bounds_allocations():
    """MEMBLOCK_ALLOC_ACCESSIBLE means the current limit."""
    mb = memblock()
    mb.add(0, 0x100_0000)
    mb.current_limit = 0x10_0000
    assert mb.phys_alloc_range(0x1000, 0x1000, 0, MEMBLOCK_ALLOC_ACCESSIBLE) == 0xF_F000


def test_first_page_is_never_given_out():
    """Address 0 means failure, so page 0 is left alone even bottom-up."""
    mb = memblock()
    mb.bottom_up = True
    mb.add(0, 0x2000)
    assert mb.phys_alloc_range(0x1000, 0x1000, 0, MEMBLOCK_ALLOC_ACCESSIBLE) == 0x1000
    assert mb.phys_alloc_range(0x1000, 0x1000, 0, MEMBLOCK_ALLOC_ACCESSIBLE) == 0


def test_bitmap_reservation_leaves_the_guard_byte_free():
    """With 4 GiB of RAM v9 reserves 256 bytes of bitmap; the guard's byte behind them is the next allocation."""
    mb = memblock()
    mb.bottom_up = True
    mb.add(0x10_0000, (4 << 30) - 0x10_0000)
    mb.reserve(0x10_0000, 256)
    assert mb.phys_alloc_range(64, 64, 0, MEMBLOCK_ALLOC_ACCESSIBLE) == 0x10_0100


def test_size_is_capped_at_the_end_of_the_address_space():
    """A range that runs past 2^64 ends at PHYS_ADDR_MAX."""
    mb = memblock()
    mb.add(PHYS_ADDR_MAX - 0x1000, 0x8000)
    assert flat(mb.memory) == [PHYS_ADDR_MAX - 0x1000, 0x1000, 0]


def test_touching_regions_merge_only_with_equal_flags():
    """Regions that touch are one unless their flags differ, and again one when the flags are equal."""
    mb = memblock()
    mb.add(0, 0x4000)
    mb.mark_hotplug(0x1000, 0x1000)
    hotplug = int(MemblockFlags.MEMBLOCK_HOTPLUG)
    assert flat(mb.memory) == [0, 0x1000, 0, 0x1000, 0x1000, hotplug, 0x2000, 0x2000, 0]
    mb.clear_hotplug(0, 0x4000)
    assert flat(mb.memory) == [0, 0x4000, 0]


def test_free_all_gives_whole_pages_below_the_limit():
    """The page allocator gets page frames that lie whole in free memory, up to max_low_pfn."""
    mb = memblock()
    mb.add(0x800, 0x4000)
    mb.add(0x10_0000, 0x10_0000)
    mb.reserve(0x10_0000, 0x100)
    assert mb.free_all(0x180) == [Range(1, 4), Range(0x101, 0x180)]


MIB = 1 << 20


def fill_reserved(mb: Memblock) -> None:
    """Reserve every second page above 1 MiB until the array is full."""
    for number in range(INIT_MEMBLOCK_REGIONS):
        assert mb.reserve(MIB + 2 * number * PAGE_SIZE, PAGE_SIZE) == 0


@pytest.mark.parametrize(
    ("version", "accepts"), [(V9_MEMBLOCK, []), (MAINLINE_MEMBLOCK, [(16 * MIB - 8192, 16 * MIB)])]
)
def test_a_doubled_array_is_accepted_by_mainline_only(version, accepts):
    """The 129th reservation moves the array to 8 KiB at the top; mainline accepts them, v9 only writes to them."""
    accepted, written = [], []
    mb = Memblock(
        lambda start, end: accepted.append((start, end)),
        clear_memory=lambda start, end: written.append((start, end)),
        version=version,
    )
    mb.add(0, 16 * MIB)
    mb.allow_resize()
    fill_reserved(mb)
    assert mb.reserve(8 * MIB, PAGE_SIZE) == 0
    assert accepted == accepts
    assert written == [(16 * MIB - 8192, 16 * MIB - 8192 + 256 * 24)]
    assert mb.reserved.max == 256
    assert flat(mb.reserved)[-6:] == [8 * MIB, PAGE_SIZE, 0, 16 * MIB - 8192, 8192, 0]


def test_the_old_place_of_an_array_is_free_after_it_moved_again():
    """At 257 reservations the array moves to 12 KiB, and the 8 KiB that it had are free."""
    mb = memblock()
    mb.add(0, 16 * MIB)
    mb.allow_resize()
    for number in range(256):
        mb.reserve(MIB + 2 * number * PAGE_SIZE, PAGE_SIZE)
    assert mb.reserved.max == 512
    assert not mb.is_reserved(16 * MIB - PAGE_SIZE)
    assert mb.is_region_reserved(16 * MIB - 8192 - 12288, 12288)


def test_the_new_array_is_not_put_into_the_range_being_reserved():
    """Where the range that is being reserved ends with memory, the array goes below it."""
    mb = memblock()
    mb.add(0, 8 * MIB)
    mb.allow_resize()
    fill_reserved(mb)
    assert mb.reserve(4 * MIB, 4 * MIB) == 0
    assert flat(mb.reserved)[-3:] == [4 * MIB - 8192, 4 * MIB + 8192, 0]


def test_a_full_array_that_must_not_move_is_a_panic_in_mainline():
    """Before memblock_allow_resize() the 129th reservation stops a mainline kernel, in its own words."""
    mb = memblock(version=MAINLINE_MEMBLOCK)
    fill_reserved(mb)
    with pytest.raises(GuestPanic) as stopped:
        mb.reserve(8 * MIB, PAGE_SIZE)
    assert stopped.value.text == "memblock: cannot resize reserved array"


def test_a_full_array_that_must_not_move_fails_in_v9():
    """The same call returns -ENOMEM in the kernel of v9 and changes nothing; an allocation finds no room."""
    mb = memblock()
    mb.add(0, 16 * MIB)
    fill_reserved(mb)
    before = flat(mb.reserved)
    assert mb.reserve(8 * MIB, PAGE_SIZE) == -12
    assert mb.phys_free(MIB, PAGE_SIZE) == -12
    assert mb.phys_alloc_range(PAGE_SIZE, PAGE_SIZE, 0, 8 * MIB) == 0
    assert flat(mb.reserved) == before


def test_without_memory_an_array_cannot_move():
    """No memory is known: the array stays full although it may grow."""
    mb = memblock(version=MAINLINE_MEMBLOCK)
    mb.allow_resize()
    fill_reserved(mb)
    assert mb.reserve(8 * MIB, PAGE_SIZE) == -12
    assert mb.reserved.max == INIT_MEMBLOCK_REGIONS
