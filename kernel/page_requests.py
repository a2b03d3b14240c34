"""How stage runtime asks the page allocator: by order, GFP flags and CPU.

The allocator of now has one list for all CPUs, and every request is GFP_KERNEL to it: flags and CPU stop here.
"""

from __future__ import annotations

from kernel.cpus import Cpu
from kernel.page_alloc import PageAllocator

GFP_NAMES = frozenset(
    {
        "GFP_ATOMIC",
        "GFP_KERNEL",
        "GFP_NOWAIT",
        "GFP_NOIO",
        "GFP_NOFS",
        "GFP_USER",
        "GFP_DMA",
        "GFP_DMA32",
        "GFP_HIGHUSER",
        "GFP_HIGHUSER_MOVABLE",
        "GFP_TRANSHUGE_LIGHT",
        "GFP_TRANSHUGE",
    }
)
"""The combinations that callers use (include/linux/gfp_types.h)."""


class PageRequests:
    """Allocations and frees of a script."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator

    def alloc(self, order: int, gfp: str, cpu: Cpu) -> int | None:
        """A block of ``order`` for ``cpu``: its first pfn; None if there is none."""
        return self._allocator.alloc_pages(order)

    def free(self, pfn: int, order: int, cpu: Cpu) -> None:
        """Give a block back."""
        self._allocator.free_pages(pfn, order)
