"""Where ZONE_MOVABLE begins on each node: ``kernelcore=``, ``movablecore=``, ``movable_node``, ``kernelcore=mirror``.

With ``kernelcore=mirror`` the real zones overlap, and mirrored memory above the first that is not stays with the
kernel; here it goes to ZONE_MOVABLE.

Source: mm/mm_init.c, find_zone_movable_pfns_for_nodes().
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from guest.units import PFN_DOWN, PFN_UP, SZ_4G, round_up
from kernel.early_param import CoreMemory, EarlyParams
from kernel.free_area import MAX_ORDER_NR_PAGES
from kernel.memblock_type import MemblockFlags, MemblockRegion
from kernel.mmzone import mem_pfn_ranges, nodes_of, pfn_range_for_nid, zone_pfn_ranges

MIRROR_NOTES = (
    "The system has no mirror memory, ignore kernelcore=mirror.",
    "This configuration results in unmirrored kernel memory.",
)


def find_zone_movable_pfns(
    memory: Sequence[MemblockRegion], max_pfn: int, early: EarlyParams
) -> tuple[dict[int, int], list[str]]:
    """First page frame of ZONE_MOVABLE by node, for the nodes that have one, and what the kernel says of it.

    ``memory`` is memblock's, ``max_pfn`` the end of RAM.
    """
    notes: list[str] = []
    if early.movable_node:
        starts = _lowest(r for r in memory if r.flags & MemblockFlags.MEMBLOCK_HOTPLUG)
    elif early.mirrored_kernelcore:
        starts = _unmirrored(memory, notes)
    else:
        starts = _spread(memory, max_pfn, early)
    aligned = {nid: round_up(pfn, MAX_ORDER_NR_PAGES) for nid, pfn in starts.items()}
    return {nid: pfn for nid, pfn in aligned.items() if pfn and pfn < pfn_range_for_nid(memory, nid).end}, notes


def _lowest(regions: Iterator[MemblockRegion]) -> dict[int, int]:
    """The lowest page frame of each node's regions."""
    starts: dict[int, int] = {}
    for region in regions:
        starts.setdefault(region.nid, PFN_UP(region.base))
    return starts


def _unmirrored(memory: Sequence[MemblockRegion], notes: list[str]) -> dict[int, int]:
    """What is not mirrored, above 4 GiB."""
    plain = [region for region in memory if not region.flags & MemblockFlags.MEMBLOCK_MIRROR]
    if len(plain) == len(memory):
        notes.append(MIRROR_NOTES[0])
        return {}
    if any(region.base < SZ_4G for region in plain):
        notes.append(MIRROR_NOTES[1])
    return _lowest(region for region in plain if region.base >= SZ_4G)


def _pages(core: CoreMemory, total: int) -> int:
    return total * core.percent // 100 if core.percent else PFN_DOWN(core.size)


def _spread(memory: Sequence[MemblockRegion], max_pfn: int, early: EarlyParams) -> dict[int, int]:
    """Share out memory for the kernel evenly over nodes; what a node cannot give, the others do."""
    nodes = nodes_of(memory)
    total = sum(pages.size for pages in mem_pfn_ranges(memory))
    required = _pages(early.kernelcore, total)
    movable = _pages(early.movablecore, total)
    if movable:
        required = max(required, total - min(total, round_up(movable, MAX_ORDER_NR_PAGES)))
    starts: dict[int, int] = {}
    if not required or required >= total:
        return starts
    usable_start = next(r.start for r in reversed(zone_pfn_ranges(memory, max_pfn)) if r.size)
    usable_nodes = len(nodes)
    while True:
        share = required // usable_nodes
        for nid in nodes:
            share = required // usable_nodes if required < share else share
            required -= _take(memory, nid, share, usable_start, starts)
            required = max(required, 0)
        usable_nodes -= 1
        if not usable_nodes or required <= usable_nodes:
            return starts


def _take(memory: Sequence[MemblockRegion], nid: int, share: int, usable_start: int, starts: dict[int, int]) -> int:
    """Give ``share`` pages of the node to the kernel and move the node's start behind them; pages given.

    Pages below ``usable_start`` are the kernel's anyway, and count even beyond its share.
    """
    given, left = 0, share
    for pages in mem_pfn_ranges(region for region in memory if region.nid == nid):
        start = max(pages.start, starts.get(nid, 0))
        if start >= pages.end:
            continue
        if start < usable_start:
            low = min(pages.end, usable_start) - start
            given, left = given + low, left - min(low, left)
            if pages.end <= usable_start:
                starts[nid] = pages.end
                continue
            start = usable_start
        size = min(pages.end - start, left)
        starts[nid] = start + size
        given, left = given + size, left - size
        if not left:
            break
    return given
