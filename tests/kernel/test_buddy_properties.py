"""The page allocator under random requests, looked at page by page after each of them."""

from __future__ import annotations

import random

import pytest

from guest.units import PFN_DOWN, PMD_SIZE, SZ_1M
from kernel.gfp import GFP_ATOMIC, GFP_DMA, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, Gfp
from kernel.mm_rules import MAINLINE_MM, V9_MM
from kernel.mmzone import Zone, ZoneType
from kernel.page_alloc import PageAllocator
from kernel.proc import buddyinfo, pagetypeinfo, vmstat, zoneinfo
from kernel.unaccepted_memory import UnacceptedMemory
from tests.kernel.alloc_guest import NORMAL_PFN, AllocGuest
from tests.kernel.page_model import PageModel

GFPS = [GFP_KERNEL, GFP_HIGHUSER_MOVABLE, GFP_KERNEL | Gfp.RECLAIMABLE, GFP_ATOMIC, GFP_DMA | GFP_KERNEL]
WEIGHTS = [4, 6, 2, 3, 1]
STEPS = 3125
"""With 2 rules and 8 seeds: 50,000 steps."""
END_PFN = PFN_DOWN(32 * SZ_1M)


class Machine:
    """Two nodes with two CPUs: DMA and DMA32 of 24 MiB on one, Normal of 8 MiB on the other; some is unaccepted."""

    def __init__(self, new_bitmap, rng, rules):
        self.rng = rng
        self.bitmap = new_bitmap()
        for first in rng.sample(range(4, 16), 4):
            self.bitmap.set(first, first + rng.randrange(1, 5))
        self.requests = []
        self.unaccepted = UnacceptedMemory(self.bitmap, lambda start, end: self.requests.append((start, end)))
        zones = [
            Zone(ZoneType.ZONE_DMA, 1, 4095, 4095),
            Zone(ZoneType.ZONE_DMA32, 4096, 2048, 2048),
            Zone(ZoneType.ZONE_NORMAL, 6144, END_PFN - 6144, END_PFN - 6144, node=1),
        ]
        self.events = []
        self.allocator = PageAllocator(
            zones, self.unaccepted, lazy=rng.random() < 0.8, rules=rules, record=self.events.append
        )
        self.cpus = 1
        self.model = PageModel(self.allocator, END_PFN, lists_are_pure=rules is MAINLINE_MM)
        edges = sorted(rng.sample(range(1, END_PFN), 8))
        self.allocator.memblock_free_all(zip(edges[::2], edges[1::2], strict=True))

    def allocate(self):
        rng, used = self.rng, self.model.used
        gfp, node, cpu = rng.choices(GFPS, WEIGHTS)[0], rng.randrange(2), rng.randrange(self.cpus)
        if rng.random() < 0.05:
            pages = self.allocator.alloc_pages_bulk(gfp, rng.randrange(1, 20), node, cpu)
            order = 0
        else:
            order = min(int(rng.expovariate(0.4)), 10)
            pfn = self.allocator.alloc_pages(gfp, order, node, cpu)
            pages = [] if pfn is None else [pfn]
        for pfn in pages:
            assert pfn % (1 << order) == 0
            assert pfn not in used
            used[pfn] = order

    def free(self, count):
        used = self.model.used
        for pfn in self.rng.sample(list(used), min(count, len(used))):
            self.allocator.free_pages(pfn, used.pop(pfn), self.rng.randrange(self.cpus))

    def step(self, number):
        rng, allocator = self.rng, self.allocator
        chance = rng.random()
        if number == 100:
            allocator.setup_per_cpu_pageset()
        elif number == 150:
            self.cpus = allocator.online_cpu(1) + 1
        elif number == 200:
            allocator.init_per_zone_wmark_min(transparent_hugepage=False)
        elif chance < 0.005:
            allocator.accept_memory_sysfs("4M")
        elif chance < 0.01:
            allocator.drain_all_pages()
        elif chance < 0.51 if number // 400 % 2 else chance < 0.56:
            self.free(rng.choice([1, 1, 1, 5]))
        else:
            self.allocate()


@pytest.mark.parametrize("rules", [V9_MM, MAINLINE_MM], ids=lambda rules: rules.name)
@pytest.mark.parametrize("seed", range(8))
def test_random_requests(new_bitmap, rules, seed):
    """No page is twice anywhere, counters are the sums of lists, free blocks are aligned and cannot be joined.

    Unaccepted blocks are on no free list, and what is on one or in use is accepted. At the end all comes back.
    """
    machine = Machine(new_bitmap, random.Random(f"{rules.name} {seed}"), rules)
    model = machine.model
    for number in range(STEPS):
        machine.step(number)
        model.check()
        if number % 25 == 0:
            model.accepted(machine.unaccepted)
    machine.free(len(model.used))
    machine.allocator.drain_all_pages()
    model.check()
    assert set(model.owner) <= {0, 1, 4}
    assert all(start % PMD_SIZE == 0 == end % PMD_SIZE for start, end in machine.requests)
    assert any(event.name == "MmPageAllocExtfrag" for event in machine.events)


class PlainAllocator(PageAllocator):
    """Without the short way to a page of the CPU's own list."""

    def alloc_pages(self, gfp=GFP_KERNEL, order=0, node=0, cpu=0):
        return self._alloc_pages(gfp, order, node, cpu)


def requests_of(guest, seed):
    """Thousands of requests, mostly for single pages, through times of plenty and of want; what came of each."""
    rng, allocator, pages, results = random.Random(seed), guest.allocator, [], []
    for number in range(6000):
        wanted = 60_000 if number // 1000 % 2 else 500  # pages in use, of 98304
        if sum(1 << order for _, order in pages) < wanted * rng.random() * 2:
            gfp = rng.choices(GFPS, WEIGHTS)[0]
            order = rng.choice([0, 0, 0, 3, 9]) if wanted > 500 else 0
            pfn = allocator.alloc_pages(gfp, order, cpu=rng.randrange(2))
            results.append(pfn)
            pages += [] if pfn is None else [(pfn, order)]
        elif pages:
            allocator.free_pages(*pages.pop(rng.randrange(len(pages))), cpu=rng.randrange(2))
    return results


@pytest.mark.parametrize("rules", [V9_MM, MAINLINE_MM], ids=lambda rules: rules.name)
def test_the_short_way_changes_nothing(new_bitmap, rules):
    """With and without it the same pages are handed out, the same memory is accepted, the same is counted."""
    guests, results = [], []
    for kind in (PageAllocator, PlainAllocator):
        zones = (1, 1 << 16, 1 << 15), (2, NORMAL_PFN, 1 << 16)
        guest = AllocGuest(
            new_bitmap, *zones, rules=rules, unaccepted=((NORMAL_PFN + (1 << 15), NORMAL_PFN + (1 << 16)),), kind=kind
        )
        guest.allocator.online_cpu()
        guest.allocator.init_per_zone_wmark_min(transparent_hugepage=False)
        guests.append(guest)
        results.append(requests_of(guest, 1))
    short, plain = guests
    assert results[0] == results[1]
    assert (short.accepted, short.events) == (plain.accepted, plain.events)
    for file in (vmstat, zoneinfo, buddyinfo, pagetypeinfo):
        assert file(short.allocator) == file(plain.allocator)
    fast = [sum(pcp.fast_allocs for buddy in g.allocator.buddies for pcp in buddy.pagesets) for g in guests]
    assert fast[0] > 1000
    assert fast[1] == 0
