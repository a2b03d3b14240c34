"""What a real 6.12 kernel accepted through its page allocator, range by range, against ours on the same free memory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from guest.ranges import RangeSet
from guest.units import PAGE_SHIFT, PMD_SIZE, SZ_4G
from kernel.gfp import GFP_KERNEL
from kernel.lazy_accept import MAX_ORDER_SIZE
from kernel.mm_rules import MAINLINE_MM
from kernel.mmzone import Zone, ZoneType
from kernel.page_alloc import PageAllocator
from kernel.unaccepted_memory import UnacceptedMemory

VECTORS = Path(__file__).parent.parent / "vectors" / "boot.jsonl.gz"
RUNS = {run["name"]: run for run in map(json.loads, gzip.decompress(VECTORS.read_bytes()).splitlines())}


def calls_by(run, function):
    """Ranges that accept_memory() was called with from a function."""
    calls = [call for call in run["accept_memory_calls"] if call["by"][0] == function]
    return [(call["start"], call["start"] + call["size"]) for call in calls]


@pytest.fixture
def replay(new_bitmap):
    """``replay(run)``: an allocator with what the run's zone Normal had, and the requests to the platform so far."""

    def start(run, *, lazy=True):
        blocks = calls_by(run, "__accept_page" if lazy else "__free_pages_core")
        pieces = calls_by(run, "deferred_init_maxorder")
        free = RangeSet([*blocks, *pieces])
        for low, high in run["still_pending"]:  # what begins with a guard waits as a block too
            free.add(low // MAX_ORDER_SIZE * MAX_ORDER_SIZE, high)
        first = next(n for n, (low, _) in enumerate(run["tdx_accept_memory_ranges"]) if low == blocks[0][0])
        wanted = [tuple(pair) for pair in run["tdx_accept_memory_ranges"][first:]]
        bitmap = new_bitmap()
        for low, high in [*wanted, *run["still_pending"]]:
            bitmap.set((low - SZ_4G) // PMD_SIZE, (high - SZ_4G) // PMD_SIZE)
        size = run["table"]["size"] * 8 * PMD_SIZE
        requests: list[tuple[int, int]] = []
        unaccepted = UnacceptedMemory(bitmap, lambda low, high: requests.append((low, high)), SZ_4G, size)
        pages = [(low >> PAGE_SHIFT, high >> PAGE_SHIFT) for low, high in free]
        memory = [(SZ_4G >> PAGE_SHIFT, pages[-1][1])]
        zone = Zone(ZoneType.ZONE_NORMAL, memory[0][0], memory[0][1] - memory[0][0], 1)
        allocator = PageAllocator([zone], unaccepted, lazy=lazy, rules=MAINLINE_MM)
        allocator.memblock_free_all(pages, memory)
        return allocator, zone, requests, wanted

    return start


@pytest.mark.parametrize("name", ["base", "holes", "small"])
def test_requests_in_order(replay, name):
    """A block for each look while watermarks are zero, small deferred pieces upfront, then block by block."""
    allocator, zone, requests, wanted = replay(RUNS[name])
    looks = 0
    while zone.nr_unaccepted:  # all that is not deferred is accepted before the rest comes
        allocator.alloc_pages(GFP_KERNEL)
        looks += 1
    assert looks == len(requests) == {"base": 32, "holes": 32, "small": 28}[name]
    list(allocator.page_alloc_init_late())
    while len(requests) < len(wanted):
        before = len(requests)
        allocator.alloc_pages(GFP_KERNEL)
        assert len(requests) > before
    assert requests == wanted


def test_eager_requests_in_order(replay):
    """With accept_memory=eager the first section is accepted when memblock ends, the rest with the deferred pages."""
    allocator, zone, requests, wanted = replay(RUNS["eager"], lazy=False)
    assert len(requests) == 32
    list(allocator.page_alloc_init_late())
    assert requests == wanted
    assert zone.nr_unaccepted == 0
