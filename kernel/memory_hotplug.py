"""Memory that comes after boot (mm/memory_hotplug.c): the host plugs it in, the kernel brings it online.

The record of unaccepted memory is as long as memory was at boot, and says nothing of it: to the page allocator such
memory is accepted, or, with v9, what the bytes behind the bitmap say. In a TD it is not, unless the driver accepts it
before it goes online, which no released kernel does ("x86/tdx: Fix memory hotplug in TDX guests", March 2026, is under
discussion): the first use ends the guest.
"""

from __future__ import annotations

import errno

from guest.ranges import Range
from guest.units import PFN_DOWN, PFN_PHYS, PMD_SIZE, SZ_4G, SZ_128M
from kernel.events import MemoryAdded
from kernel.mmzone import ZoneType
from kernel.readers import system_ram
from kernel.running import RunningKernel

MEMORY_BLOCK_SIZE = SZ_128M
"""memory_block_size_bytes() of a guest with less than 64 GiB; a section."""
_VMEMMAP_ORDER = 9
"""Struct pages of a section: 2 MiB, from the page allocator (vmemmap_alloc_block())."""


def add_memory(running: RunningKernel, start: int, size: int, accept: bool) -> int:
    """Plug in ``size`` bytes at ``start`` and bring them online in the last node's zone Normal; 0 or a negative errno.

    The zone's span then reaches over that of zone Movable, if there is one (``default_zone_for_pfn``).

    -EINVAL: not whole blocks of 128 MiB, below 4 GiB, or not behind all memory; -EEXIST: there is memory already;
    -ENOMEM: no room for the struct pages. With ``accept`` all of it is accepted first.
    """
    end, zones = start + size, running.allocator.zones
    last = max(zones, key=lambda zone: zone.end_pfn)
    zone = next(zone for zone in zones if zone.node == last.node and zone.zone_type == ZoneType.ZONE_NORMAL)
    if start % MEMORY_BLOCK_SIZE or size % MEMORY_BLOCK_SIZE or start < SZ_4G:
        return -errno.EINVAL
    if system_ram(running).overlaps(start, end):
        return -errno.EEXIST
    if PFN_DOWN(start) < last.end_pfn:
        return -errno.EINVAL
    if not _populate_memmap(running, last.node, size):
        return -errno.ENOMEM
    running.plug(start, end)
    if accept and running.tdx:
        running.kernel.unaccepted.arch_accept(start, end)
    running.allocator.move_pfn_range_to_zone(zone, PFN_DOWN(start), PFN_DOWN(end))
    running.kernel.hotplugged.append(Range(start, end))
    running.allocator.free_pages_core(PFN_DOWN(start), PFN_DOWN(end))
    running.sysctl.init_per_zone_wmark_min()
    running.machine.trace.add(MemoryAdded(start, end, accept))
    return 0


def _populate_memmap(running: RunningKernel, node: int, size: int) -> bool:
    """Struct pages for the new sections: 2 MiB each, written to. False if there is no memory for all of them."""
    requests, cpu = running.requests, running.cpus.current
    taken: list[int] = []
    for _ in range(size // MEMORY_BLOCK_SIZE):
        pfn = requests.alloc(_VMEMMAP_ORDER, "GFP_KERNEL", cpu, node)
        if pfn is None:
            for other in taken:
                requests.free(other, _VMEMMAP_ORDER, cpu)
            return False
        taken.append(pfn)
        running.machine.memory.clear(PFN_PHYS(pfn), PFN_PHYS(pfn) + PMD_SIZE)
    return True
