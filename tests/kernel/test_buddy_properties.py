"""The page allocator under random requests, looked at page by page after each of them."""

from __future__ import annotations

import random

import pytest

from guest.units import PFN_DOWN, PMD_SIZE, SZ_1M
from kernel.gfp import GFP_ATOMIC, GFP_DMA, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, Gfp
from kernel.mm_rules import MAINLINE_MM, V9_MM
from kernel.mmzone import Zone, ZoneType
from kernel.page_alloc import PageAllocator
from kernel.unaccepted_memory import UnacceptedMemory
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
