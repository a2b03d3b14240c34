"""How stage runtime asks the page allocator: by order, GFP flags and CPU.

Flags are names here, as a script has them.
"""

from __future__ import annotations

from kernel.cpus import Cpu
from kernel.gfp import GFP_NAMES
from kernel.page_alloc import PageAllocator


class PageRequests:
    """Allocations and frees of a script."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator

    def alloc(self, order: int, gfp: str, cpu: Cpu, node: int | None = None) -> int | None:
        """A block of ``order`` for ``cpu``, from ``node`` or its own node if possible: its first pfn, or None."""
        nid = self._allocator.cpu_nodes[cpu.number] if node is None else node
        return self._allocator.alloc_pages(GFP_NAMES[gfp], order, nid, cpu.number)

    def free(self, pfn: int, order: int, cpu: Cpu) -> None:
        """Give a block back to the list of ``cpu``."""
        self._allocator.free_pages(pfn, order, cpu.number)
