"""memblock against the real mm/memblock.c and against a page-granular model."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from guest.ranges import Range
from guest.units import PAGE_SIZE
from kernel.memblock import MEMBLOCK_ALLOC_ACCESSIBLE, Memblock
from kernel.memblock_type import PHYS_ADDR_MAX, MemblockFlags, MemblockType

VECTORS = Path(__file__).parents[1] / "vectors" / "memblock.jsonl.gz"
METHODS = {
    "free": "phys_free",
    "rsrv_noinit": "reserved_mark_noinit",
    "trim": "trim_memory",
    "enforce": "enforce_memory_limit",
    "cap": "cap_memory_range",
    "limit_map": "mem_limit_remove_map",
    "region_memory": "is_region_memory",
    "region_reserved": "is_region_reserved",
    "start_dram": "start_of_DRAM",
    "end_dram": "end_of_DRAM",
    "phys_size": "phys_mem_size",
    "rsv_size": "reserved_size",
}
ARRAY_GROWS = {"mmax", "vmax", "panic"}


def memblock() -> Memblock:
    return Memblock(lambda start, end: None)


def flat(array: MemblockType) -> list[int]:
    return [number for region in array.regions for number in region]


def blocks(ranges: list[Range]) -> list[int]:
    """Largest naturally aligned blocks, as memblock_free_pages() would be called: pfn, order, pfn, ..."""
    out = []
    for start, end in ranges:
        pfn = start
        while pfn < end:
            order = next(o for o in range(10, -1, -1) if pfn % (1 << o) == 0 and pfn + (1 << o) <= end)
            out += [pfn, order]
            pfn += 1 << order
    return out


def call(mb: Memblock, name: str, args: list[int]) -> tuple[int | None, list[int]]:
    """Return value and result list of one operation of the vectors."""
    if name == "bottom_up":
        mb.bottom_up = bool(args[0])
    elif name == "limit":
        mb.current_limit = args[0]
    elif name in ("alloc", "alloc_nid"):
        return mb.phys_alloc_range(*args[:4]), []
    elif name == "free_ranges":
        return None, [address for r in mb.free_ranges() for address in r]
    elif name == "free_all":
        return None, blocks(mb.free_all(args[0]))
    else:
        return getattr(mb, METHODS.get(name, name))(*args), []
    return None, []


def expect_array(array: MemblockType, expected: list[int], record: dict, whole: str, spliced: str) -> None:
    """Follow one array of the vectors and compare."""
    if whole in record:
        expected[:] = record[whole]
    if spliced in record:
        index, removed, *inserted = record[spliced]
        expected[3 * index : 3 * (index + removed)] = inserted
    assert flat(array) == expected
    assert array.total_size == record.get(whole + "t", sum(expected[1::3]))


def run(case: dict) -> bool:
    """Play a sequence; False if a region array would have to grow, which ends it."""
    accepted: list[int] = []
    mb = Memblock(
        lambda start, end: accepted.extend((start, end - start)),
        movable_node=bool(case.get("movable_node")),
        mirrored_kernelcore=bool(case.get("mirrored_kernelcore")),
    )
    memory: list[int] = []
    reserved: list[int] = []
    for name, *args, record in case["ops"]:
        if record.keys() & ARRAY_GROWS:
            return False
        accepted.clear()
        result, listed = call(mb, name, args)
        assert int(result or 0) == record.get("r", 0)
        assert listed == record.get("list", [])
        assert accepted == record.get("acc", [])
        expect_array(mb.memory, memory, record, "m", "ms")
        expect_array(mb.reserved, reserved, record, "v", "vs")
    return True


def test_vectors_of_the_real_memblock():
    """Every sequence gives what mm/memblock.c gave, up to where a region array outgrows its 128 entries."""
    with gzip.open(VECTORS, "rt") as lines:
        complete = Counter(run(json.loads(line)) for line in lines)
    assert complete == {True: 372, False: 15}


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
    mb = Memblock(lambda start, end: accepted.append((start, end)))
    mb.add(0x10_0000, 0x10_0000)
    mb.reserve(0x1F_F000, 0x1000)
    assert accepted == []
    assert mb.phys_alloc_range(0x2000, 0x1000, 0, MEMBLOCK_ALLOC_ACCESSIBLE) == 0x1F_D000
    assert accepted == [(0x1F_D000, 0x1F_F000)]
    assert mb.is_region_reserved(0x1F_D000, 0x2000)


def test_failed_allocation_changes_nothing():
    """Without room the result is 0: nothing is reserved and nothing accepted."""
    accepted = []
    mb = Memblock(lambda start, end: accepted.append((start, end)))
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
