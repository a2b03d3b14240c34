"""Huge pages that the kernel takes while it boots, and /proc/sys/vm/nr_hugepages (mm/hugetlb.c).

Those of 1 GiB come from memblock while the command line is read, those of 2 MiB from the page allocator when CPUs are
up: in a TD both accept what they take.
"""

from __future__ import annotations

from itertools import cycle

from guest.units import PAGE_SHIFT, PFN_DOWN, PMD_SIZE, SZ_1G
from kernel.early_param import parse_args
from kernel.gfp import GFP_HIGHUSER_MOVABLE, Gfp
from kernel.hstate import Hstate, Hugetlb
from kernel.kernel import Kernel
from kernel.mmzone import nodes_of
from kernel.page_alloc import PageAllocator

_ORDER = 9
_GFP = GFP_HIGHUSER_MOVABLE | Gfp.COMP | Gfp.THISNODE | Gfp.NOWARN | Gfp.RETRY_MAYFAIL


def parse_hugetlb(kernel: Kernel, allocator: PageAllocator) -> None:
    """Read the parameters, and take pages of 1 GiB from memblock."""
    allocator.hugetlb = Hugetlb(kernel.gbpages, kernel.machine.print)
    nodes = nodes_of(kernel.memblock.memory.regions) or [0]
    taken = kernel.hugetlb_gigantic

    def gigantic(pool: Hstate) -> None:
        of_node = (nid for nid, count in pool.max_of_node.items() for _ in range(count))
        for _, nid in zip(range(pool.max_huge_pages), of_node if pool.max_of_node else cycle(nodes), strict=False):
            form, who = "alloc_try_nid_raw", "__alloc_bootmem_huge_page"
            at = kernel.memblock.alloc_try_nid(SZ_1G, SZ_1G, nid=nid, who=who, form=form)
            if not at:
                break
            taken.append(at)
            owner = kernel.memblock.memory.search(at)
            pool.gigantic[max(owner.nid, 0) if owner is not None else 0] += 1
        allocator.hugetlb.check_allocated(pool)

    allocator.hugetlb.parse(parse_args(kernel.command_line), nodes, gigantic)


def hugetlb_init(kernel: Kernel, allocator: PageAllocator) -> None:
    """Pages of 2 MiB for whoever asked, node by node in turns; those of 1 GiB become managed pages."""
    hugetlb = allocator.hugetlb
    hugetlb.complete()
    for at in kernel.hugetlb_gigantic:
        allocator.page_zone(PFN_DOWN(at)).zone.managed_pages += SZ_1G >> PAGE_SHIFT
    for pool in hugetlb.hstates:
        if pool.size == PMD_SIZE and pool.max_huge_pages:
            _alloc_pool(allocator, pool)
            hugetlb.check_allocated(pool)
    if hugetlb.asked:
        hugetlb.report()


def _alloc_pool(allocator: PageAllocator, pool: Hstate) -> None:
    if pool.max_of_node:
        for node, count in pool.max_of_node.items():
            while len(pool.pages.get(node, ())) < count and _alloc_page(allocator, pool, node):
                pass
        return
    _grow(allocator, pool, pool.max_huge_pages)


def _grow(allocator: PageAllocator, pool: Hstate, count: int) -> None:
    """Take pages from all nodes in turns until there are ``count`` or no node has any more."""
    willing = list(allocator.zonelists.nodes)
    while willing and pool.nr_huge_pages() < count:
        willing = [nid for nid in willing if pool.nr_huge_pages() >= count or _alloc_page(allocator, pool, nid)]


def _alloc_page(allocator: PageAllocator, pool: Hstate, node: int) -> bool:
    pfn = allocator.alloc_pages(_GFP, _ORDER, node)
    allocator.vm_events[f"htlb_buddy_alloc_{'fail' if pfn is None else 'success'}"] += 1
    if pfn is None:
        return False
    pool.pages.setdefault(node, []).append(pfn)
    return True


def set_max_huge_pages(allocator: PageAllocator, count: int) -> None:
    """A write to vm.nr_hugepages: as many pages of the default size as there can be, or less again.

    Pages of 1 GiB stay as they are: the page allocator has no blocks of that size.
    """
    pool = allocator.hugetlb.default
    if pool.size > PMD_SIZE:
        return
    _grow(allocator, pool, count)
    while pool.nr_huge_pages() > count:
        fullest = max(pool.pages, key=lambda node: len(pool.pages[node]))
        allocator.free_pages(pool.pages[fullest].pop(), _ORDER)
    pool.max_huge_pages = pool.nr_huge_pages()
