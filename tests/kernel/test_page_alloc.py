"""The page allocator against a slow model that keeps plain lists and asks bit by bit."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import pytest

from guest.units import PAGE_SIZE, PFN_DOWN, PFN_PHYS, PMD_SIZE, SZ_1M
from kernel.free_area import MAX_ORDER, MAX_ORDER_NR_PAGES
from kernel.gfp import GFP_HIGHUSER_MOVABLE
from kernel.memblock_type import MemblockRegion
from kernel.mm_rules import MAINLINE_MM, V9_MM
from kernel.mmzone import Zone, ZoneType, free_area_init, setup_zone_wmarks
from kernel.page_alloc import PageAllocator
from kernel.unaccepted_memory import UnacceptedMemory
from kernel.watermark import Watermarks
from kernel.zone_watermark import zone_watermark_ok

UNIT_PAGES = PMD_SIZE // PAGE_SIZE
END_PFN = PFN_DOWN(64 * SZ_1M)


class Guest:
    """Zones DMA and DMA32 of 64 MiB, a page allocator, and the ranges that the platform accepted."""

    def __init__(self, new_bitmap, unaccepted, *, lazy=True, end_pfn=END_PFN, rules=V9_MM):
        self.bitmap = new_bitmap()
        for first, last in unaccepted:
            self.bitmap.set(first, last)
        self.accepted = []
        self.unaccepted = UnacceptedMemory(self.bitmap, lambda start, end: self.accepted.append((start, end)))
        memory = [MemblockRegion(PAGE_SIZE, PFN_PHYS(end_pfn) - PAGE_SIZE, 0)]
        self.zones = free_area_init(memory, end_pfn)
        self.allocator = PageAllocator(self.zones, self.unaccepted, lazy=lazy, rules=rules)
        self.alloc = partial(self.allocator.alloc_pages, GFP_HIGHUSER_MOVABLE)


def free_lists(zone):
    """Every free block by order, head first."""
    lists = [[start for start, _ in zone.free_area.blocks(order)] for order in range(MAX_ORDER)]
    runs = zone.free_area.blocks(MAX_ORDER)
    return [*lists, [pfn for start, end in runs for pfn in range(start, end, MAX_ORDER_NR_PAGES)]]


def unaccepted_list(zone):
    """Every unaccepted block, head first."""
    return [pfn for start, end in zone.unaccepted_pages.runs() for pfn in range(start, end, MAX_ORDER_NR_PAGES)]


def check(guest, allocated):
    """Counters are the sums of the lists, no page is in two places, and what is free is accepted."""
    pages = []
    for zone in guest.zones:
        lists = free_lists(zone)
        waiting = unaccepted_list(zone)
        free = sum(len(blocks) << order for order, blocks in enumerate(lists))
        assert zone.nr_unaccepted == len(waiting) * MAX_ORDER_NR_PAGES
        assert zone.nr_free_pages == free + zone.nr_unaccepted
        for order, blocks in enumerate(lists):
            assert all(pfn % (1 << order) == 0 for pfn in blocks)
            assert order == MAX_ORDER or not any(pfn ^ (1 << order) in blocks for pfn in blocks)
            pages += [(pfn, pfn + (1 << order)) for pfn in blocks]
        pages += [(pfn, pfn + MAX_ORDER_NR_PAGES) for pfn in waiting]
        assert all(zone.zone_start_pfn <= pfn < zone.end_pfn for blocks in [*lists, waiting] for pfn in blocks)
    pages += [(pfn, pfn + (1 << order)) for pfn, order in allocated.items()]
    pages.sort()
    assert all(one[1] <= two[0] for one, two in pairwise(pages))
    assert sum(end - start for start, end in pages) == sum(zone.managed_pages for zone in guest.zones)


def check_accepted(guest, allocated):
    """No unit of a free or allocated block is unaccepted, nor the guard behind it."""
    blocks = [(pfn, order) for zone in guest.zones for order, pfns in enumerate(free_lists(zone)) for pfn in pfns]
    for pfn, order in [*blocks, *allocated.items()]:
        assert not guest.unaccepted.range_contains_unaccepted_memory(PFN_PHYS(pfn), PFN_PHYS(pfn + (1 << order)))


class SlowZone:
    """A zone with one plain list for each order and one for the unaccepted blocks."""

    def __init__(self, zone: Zone):
        self.start, self.end = zone.zone_start_pfn, zone.end_pfn
        self.lists = [[] for _ in range(MAX_ORDER + 1)]
        self.unaccepted = []

    def free(self):
        return sum(len(pfns) << order for order, pfns in enumerate(self.lists)) + 1024 * len(self.unaccepted)

    def put(self, pfn, order, tail):
        while order < MAX_ORDER and pfn ^ (1 << order) in self.lists[order]:
            self.lists[order].remove(pfn ^ (1 << order))
            pfn &= ~(1 << order)
            order += 1
        if not tail and order < MAX_ORDER - 1:
            tail = (pfn & ~(1 << order)) ^ (2 << order) in self.lists[order + 1]
        self.lists[order].insert(len(self.lists[order]) if tail else 0, pfn)

    def take(self, order):
        found = next((o for o in range(order, MAX_ORDER + 1) if self.lists[o]), None)
        if found is None:
            return None
        pfn = self.lists[found].pop(0)
        while found > order:
            found -= 1
            self.lists[found].insert(0, pfn + (1 << found))
        return pfn


class SlowAllocator:
    """What v9's text and 6.12's rules say, block by block and bit by bit."""

    def __init__(self, zones, bits, lazy, rules):
        self.real, self.mainline = zones, rules is MAINLINE_MM
        self.zones = [SlowZone(zone) for zone in zones]
        self.bits, self.lazy, self.requests = bits, lazy, []

    def units(self, pfn, order):
        end = pfn + (1 << order)
        last = end // UNIT_PAGES + 1 if end % UNIT_PAGES == 0 else -(-end // UNIT_PAGES)
        return range(pfn // UNIT_PAGES, last)

    def accept(self, pfn, order):
        run = []
        for unit in [*self.units(pfn, order), None]:
            if unit in self.bits:
                run.append(unit)
            elif run:
                self.requests.append((run[0] * PMD_SIZE, (run[-1] + 1) * PMD_SIZE))
                self.bits.difference_update(run)
                run = []

    def free_core(self, pfn, end):
        while pfn < end:
            order = next(o for o in range(MAX_ORDER, -1, -1) if pfn % (1 << o) == 0 and pfn + (1 << o) <= end)
            zone = next(z for z in self.zones if z.start <= pfn < z.end)
            if order == MAX_ORDER and self.lazy and self.bits.intersection(self.units(pfn, order)):
                zone.unaccepted.append(pfn)
            else:
                if self.bits.intersection(self.units(pfn, order)):
                    self.accept(pfn, order)
                zone.put(pfn, order, True)
            pfn += 1 << order

    def accept_one(self, zone):
        if zone.unaccepted:
            pfn = zone.unaccepted.pop(0)
            self.accept(pfn, MAX_ORDER)
            zone.put(pfn, MAX_ORDER, True)
            return True
        return False

    def try_accept(self, zone, real, order):
        unaccepted = 1024 * len(zone.unaccepted)
        usable = zone.free() - ((1 << order) - 1) - unaccepted
        target = real.watermark.promo if self.mainline else real.watermark.high
        if self.mainline and target == 0:
            return self.accept_one(zone)
        to_accept, done = target - usable, False
        while (to_accept > 0 or not (self.mainline or done)) and self.accept_one(zone):
            done = True
            to_accept -= 1024
        return done

    def alloc(self, order):
        for name in ("low", "min", "high"):
            for zone, real in reversed(list(zip(self.zones, self.real, strict=True))):
                if self.mainline:
                    self.try_accept(zone, real, order)
                usable = zone.free() - ((1 << order) - 1) - (0 if self.mainline else 1024 * len(zone.unaccepted))
                enough = usable > getattr(real.watermark, name) + real.lowmem_reserve[3]
                enough = enough and (order == 0 or any(zone.lists[order:]))
                if not enough and not self.try_accept(zone, real, order):
                    continue
                while (pfn := zone.take(order)) is None and self.try_accept(zone, real, order):
                    pass
                if pfn is not None:
                    return pfn
        return None

    def sysfs(self, size):
        for zone in self.zones:
            while self.accept_one(zone):
                if size <= 4 * SZ_1M:
                    return
                size -= 4 * SZ_1M


def random_memory(rng):
    """Free ranges of page frames, as memblock would hand them over: sorted, apart."""
    edges = sorted(rng.sample(range(1, END_PFN), 8))
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("rules", [V9_MM, MAINLINE_MM], ids=lambda rules: rules.name)
@pytest.mark.parametrize("seed", range(6))
def test_random_operations_against_the_model(new_bitmap, seed, rules):
    """Same blocks, same lists in the same order, same requests to the platform; the invariants hold throughout.

    Movable pages only, before the per-CPU lists are set up.
    """
    rng = random.Random(seed)
    lazy = seed % 3 != 2
    bits = [(first, first + rng.randrange(1, 9)) for first in rng.sample(range(32), 5)]
    guest = Guest(new_bitmap, bits, lazy=lazy, rules=rules)
    model = SlowAllocator(guest.zones, {unit for first, last in bits for unit in range(first, last)}, lazy, rules)
    for start, end in random_memory(rng):
        guest.allocator.free_pages_core(start, end)
        model.free_core(start, end)
    allocated = {}
    for step in range(500):
        if step == 100:
            setup_zone_wmarks(guest.zones, transparent_hugepage=False)
        growing = step // 125 % 2 == 0
        if allocated and rng.random() < (0.3 if growing else 0.7):
            pfn = rng.choice(list(allocated))
            guest.allocator.free_pages(pfn, allocated[pfn])
            next(z for z in model.zones if z.start <= pfn < z.end).put(pfn, allocated.pop(pfn), False)
        elif rng.random() < 0.01:
            assert guest.allocator.accept_memory_sysfs("5M\n") == 3
            model.sysfs(5 * SZ_1M)
        else:
            order = min(int(rng.expovariate(0.35)), MAX_ORDER)
            pfn = guest.alloc(order)
            assert pfn == model.alloc(order)
            if pfn is not None:
                allocated[pfn] = order
        assert [free_lists(zone) for zone in guest.zones] == [zone.lists for zone in model.zones]
        assert [unaccepted_list(zone) for zone in guest.zones] == [zone.unaccepted for zone in model.zones]
        check(guest, allocated)
    assert guest.accepted == model.requests
    check_accepted(guest, allocated)


def test_fresh_accepted_memory_is_cut_into_the_largest_blocks(new_bitmap):
    """Pages 1..1023 become one block of each order, whole 4 MiB go to the list of order 10."""
    guest = Guest(new_bitmap, [])
    guest.allocator.free_pages_core(1, 4096)
    assert [len(blocks) for blocks in free_lists(guest.zones[0])] == [1] * 10 + [3]
    assert guest.zones[0].managed_pages == guest.zones[0].nr_free_pages == 4095


def test_lazy_blocks_wait_unaccepted(new_bitmap):
    """Whole 4 MiB blocks are not accepted; the block below them counts too, because of its guard."""
    guest = Guest(new_bitmap, [(20, 32)])
    guest.allocator.free_pages_core(4096, END_PFN)
    dma32 = guest.zones[1]
    assert guest.accepted == []
    assert list(dma32.unaccepted_pages.runs()) == [(9216, END_PFN)]
    assert dma32.nr_unaccepted == END_PFN - 9216
    assert dma32.nr_free_pages == dma32.managed_pages == END_PFN - 4096


def test_small_unaccepted_blocks_are_accepted_at_once(new_bitmap):
    """What is less than a whole 4 MiB block is accepted with its guard when it is freed."""
    guest = Guest(new_bitmap, [(8, 32)])
    guest.allocator.free_pages_core(4096 + 512, 8192)
    assert guest.accepted == [(18 * SZ_1M, 22 * SZ_1M)]
    assert list(guest.zones[1].unaccepted_pages.runs()) == [(5120, 8192)]


def test_eager_accepts_block_by_block(new_bitmap):
    """With accept_memory=eager each 4 MiB block is a request of its own and nothing waits."""
    guest = Guest(new_bitmap, [(8, 32)], lazy=False)
    guest.allocator.free_pages_core(4096, END_PFN)
    assert guest.accepted[:2] == [(16 * SZ_1M, 22 * SZ_1M), (22 * SZ_1M, 26 * SZ_1M)]
    assert len(guest.accepted) == 12 and guest.accepted[-1] == (62 * SZ_1M, 64 * SZ_1M)
    assert guest.zones[1].nr_unaccepted == 0
    assert not guest.bitmap.any(0, 40)


def test_before_watermarks_accept_only_when_nothing_is_left(new_bitmap):
    """With all watermarks at zero every usable page is given out before a block is accepted."""
    guest = Guest(new_bitmap, [(10, 33)])
    guest.allocator.free_pages_core(4096, 4098)
    guest.allocator.free_pages_core(6144, END_PFN)
    assert guest.alloc(0) == 4096
    assert guest.alloc(0) == 4097
    assert guest.accepted == []
    assert guest.alloc(0) == 6144
    assert guest.accepted == [(24 * SZ_1M, 30 * SZ_1M)]


def test_acceptance_reaches_the_high_watermark(new_bitmap):
    """Once below the low watermark, blocks are accepted in order until the high watermark is reached."""
    guest = Guest(new_bitmap, [(8, 33)])
    guest.allocator.free_pages_core(4096, END_PFN)
    dma32 = guest.zones[1]
    dma32.watermark = Watermarks(1000, 2000, 3000, 4000)
    assert guest.alloc(0) == 4096
    assert guest.accepted == [(16 * SZ_1M, 22 * SZ_1M), (22 * SZ_1M, 26 * SZ_1M), (26 * SZ_1M, 30 * SZ_1M)]
    assert dma32.nr_free_pages - dma32.nr_unaccepted == 3 * 1024 - 1
    assert list(dma32.unaccepted_pages.runs()) == [(4096 + 3 * 1024, END_PFN)]


def test_unaccepted_pages_are_not_usable():
    """A zone full of unaccepted memory fails v9's watermark check, not mainline's."""
    zone = Zone(ZoneType.ZONE_NORMAL, 1 << 20, 4096, 4096, nr_free_pages=4096, nr_unaccepted=4096)
    assert not zone_watermark_ok(zone, V9_MM, 0, 0, ZoneType.ZONE_NORMAL)
    assert zone_watermark_ok(zone, MAINLINE_MM, 0, 4095, ZoneType.ZONE_NORMAL)
    zone.nr_unaccepted = 3072
    assert zone_watermark_ok(zone, V9_MM, 0, 1023, ZoneType.ZONE_NORMAL)
    assert not zone_watermark_ok(zone, V9_MM, 0, 1024, ZoneType.ZONE_NORMAL)
    assert not zone_watermark_ok(zone, V9_MM, 1, 0, ZoneType.ZONE_NORMAL)  # no free block of order 1 is on a list


def test_lower_zone_keeps_its_reserve(new_bitmap):
    """Zone DMA serves a request only above its protection against requests for higher zones."""
    guest = Guest(new_bitmap, [])
    guest.allocator.free_pages_core(1024, 4096)
    guest.zones[0].lowmem_reserve = (0, 3070, 3070, 3070, 3070)
    assert guest.alloc(0) is not None
    assert guest.alloc(0) is not None
    assert guest.alloc(0) is None


def test_highest_zone_is_used_first(new_bitmap):
    """DMA32 is emptied before DMA is touched."""
    guest = Guest(new_bitmap, [])
    guest.allocator.free_pages_core(3072, 5120)
    assert guest.alloc(MAX_ORDER) == 4096
    assert guest.alloc(MAX_ORDER) == 3072
    assert guest.alloc(0) is None


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("all", 12), ("all\n", 12), ("4M", 1), ("1", 1), ("4097K \n", 2), ("0x800000", 2), ("1T", 12)],
)
def test_sysfs_accepts_whole_blocks(new_bitmap, text, blocks):
    """A size is rounded up to 4 MiB blocks; more than there is accepts all."""
    guest = Guest(new_bitmap, [(8, 32)])
    guest.allocator.free_pages_core(4096, END_PFN)
    assert guest.allocator.accept_memory_sysfs(text) == len(text)
    assert guest.zones[1].nr_unaccepted == (12 - blocks) * MAX_ORDER_NR_PAGES
    assert guest.zones[1].nr_free_pages == 12 * MAX_ORDER_NR_PAGES


@pytest.mark.parametrize("text", ["", "0", "0K", "\n", "ALL", "all\n\n", "all ", "4M x", "4MB", "-4M", "09"])
def test_sysfs_refuses_garbage(new_bitmap, text):
    """Anything else is -EINVAL and accepts nothing."""
    guest = Guest(new_bitmap, [(8, 32)])
    guest.allocator.free_pages_core(4096, END_PFN)
    assert guest.allocator.accept_memory_sysfs(text) == -22
    assert guest.accepted == []


def test_wrong_use_is_refused_and_changes_nothing(new_bitmap):
    """Pages outside zones, pages given twice, wrong frees and wrong orders are ValueErrors without effect."""
    guest = Guest(new_bitmap, [])
    guest.allocator.free_pages_core(4096, 5120)
    pfn = guest.alloc(3)
    refused = [
        lambda: guest.allocator.free_pages_core(5000, 6000),
        lambda: guest.allocator.free_pages_core(END_PFN - 1, END_PFN + 1),
        lambda: guest.allocator.free_pages(pfn, 2),
        lambda: guest.allocator.free_pages(pfn + 1, 0),
        lambda: guest.alloc(11),
        lambda: guest.alloc(-1),
    ]
    for step in refused:
        with pytest.raises(ValueError):
            step()
        check(guest, {pfn: 3})
    guest.allocator.free_pages(pfn, 3)
    with pytest.raises(ValueError):
        guest.allocator.free_pages(pfn, 3)
    check(guest, {})


def test_a_tebibyte_is_a_few_runs(new_bitmap):
    """Fresh memory of any size is one element of a list, so that boot costs per range."""
    end_pfn = PFN_DOWN(1 << 40)
    guest = Guest(new_bitmap, [(1 << 12, 1 << 19)], end_pfn=end_pfn)
    guest.allocator.free_pages_core(4096, end_pfn)
    dma32, normal = guest.zones[1:]
    assert list(dma32.free_area.blocks(MAX_ORDER)) == [(4096, dma32.end_pfn)]
    assert list(normal.free_area.blocks(MAX_ORDER)) == [(1 << 20, (1 << 21) - 1024)]
    assert list(normal.unaccepted_pages.runs()) == [((1 << 21) - 1024, end_pfn)]
