"""Texts of /proc/meminfo, vmstat, zoneinfo, buddyinfo and pagetypeinfo, and of a node's meminfo in /sys.

Format and order of all lines are the kernel's (fs/proc/meminfo.c, mm/vmstat.c, drivers/base/node.c), of Debian's
configuration; ``Unaccepted`` and ``nr_unaccepted``: v9 02/14. What this kernel does not have (slabs, swap) is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from kernel import proc_names
from kernel.buddy import ZoneBuddy
from kernel.free_area import NR_PAGE_ORDERS
from kernel.migratetype import (
    MIGRATE_MOVABLE,
    MIGRATE_TYPES,
    MIGRATETYPE_NAMES,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
)
from kernel.mmzone import ZONE_NAMES, Zone, ZoneType, totalreserve_pages
from kernel.page_alloc import PageAllocator
from kernel.watermark import KBYTES_SHIFT, SWAP_CLUSTER_MAX

_MOST_SHOWN = 100_000


def meminfo(allocator: PageAllocator) -> str:
    """/proc/meminfo. Unaccepted memory is part of the first three lines too; DirectMap is what it was before splits."""
    zones = allocator.zones
    managed, free = _total(zones, "managed_pages"), _total(zones, "nr_free_pages")
    present_kb = _total(zones, "present_pages") << KBYTES_SHIFT
    file, anon = (_pages_of(allocator.buddies, field) << KBYTES_SHIFT for field in ("inactive_file", "inactive_anon"))
    small_kb = present_kb % (PAGEBLOCK_NR_PAGES << KBYTES_SHIFT)
    kbytes = {
        "MemTotal": managed << KBYTES_SHIFT,
        "MemFree": free << KBYTES_SHIFT,
        "MemAvailable": _available(allocator) << KBYTES_SHIFT,
        **_lru(file, anon),
        "Cached": file,
        "CommitLimit": managed // 2 << KBYTES_SHIFT,
        "VmallocTotal": (1 << 45) - 1 >> 10,
        "Unaccepted": _total(zones, "nr_unaccepted") << KBYTES_SHIFT,
        "HugePages_Total": allocator.hugetlb.default.nr_huge_pages(),
        "HugePages_Free": allocator.hugetlb.default.nr_huge_pages(),
        "Hugepagesize": allocator.hugetlb.default.size >> 10,
        "Hugetlb": sum(pool.nr_huge_pages() * pool.size for pool in allocator.hugetlb.hstates) >> 10,
        "DirectMap4k": small_kb,
        "DirectMap2M": present_kb - small_kb,
    }
    return "".join(_meminfo_line("", 19, name, kbytes) for name in _names(allocator, proc_names.MEMINFO))


def _lru(file: int, anon: int) -> dict[str, int]:
    return {"Inactive": file + anon, "Inactive(anon)": anon, "Inactive(file)": file, "AnonPages": anon}


def _available(allocator: PageAllocator) -> int:
    """Free pages and most of the page cache, which can be reclaimed (``si_mem_available``)."""
    zones, pagecache = allocator.zones, _pages_of(allocator.buddies, "inactive_file")
    low = sum(zone.watermark.low for zone in zones)
    return max(_total(zones, "nr_free_pages") - totalreserve_pages(zones) + pagecache - min(pagecache // 2, low), 0)


def node_meminfo(allocator: PageAllocator, node: int) -> str:
    """/sys/devices/system/node/nodeN/meminfo."""
    buddies = [buddy for buddy in allocator.buddies if buddy.zone.node == node]
    zones = [buddy.zone for buddy in buddies]
    file, anon = (_pages_of(buddies, field) << KBYTES_SHIFT for field in ("inactive_file", "inactive_anon"))
    managed, free = _total(zones, "managed_pages"), _total(zones, "nr_free_pages")
    kbytes = {
        "MemTotal": managed << KBYTES_SHIFT,
        "MemFree": free << KBYTES_SHIFT,
        "MemUsed": managed - free << KBYTES_SHIFT,
        **_lru(file, anon),
        "FilePages": file,
        "Unaccepted": _total(zones, "nr_unaccepted") << KBYTES_SHIFT,
        "HugePages_Total": allocator.hugetlb.default.nr_huge_pages(node),
        "HugePages_Free": allocator.hugetlb.default.nr_huge_pages(node),
    }
    narrow = () if allocator.rules.is_6_12 else ("FileHugePages", "FilePmdMapped")
    lines = [_meminfo_line(f"Node {node} ", 17, name, kbytes) for name in proc_names.NODE_MEMINFO]
    return "".join(
        line.replace(": ", ":", 1) if name in narrow else line
        for name, line in zip(proc_names.NODE_MEMINFO, lines, strict=True)
    )


def _meminfo_line(before: str, huge_columns: int, name: str, kbytes: Mapping[str, int]) -> str:
    """Number at column 24, if its name leaves so much room; counts of huge pages have no unit."""
    huge = name.startswith("HugePages_")
    label = f"{name + ':':<{huge_columns if huge else 16}}"
    columns = 5 if huge else 24 - len(label)
    return f"{before}{label}{kbytes.get(name, 0):{columns}}{'' if huge else ' kB'}\n"


def vmstat(allocator: PageAllocator) -> str:
    """/proc/vmstat: pages by state, then events since boot."""
    values = Counter[str]()
    for buddy in allocator.buddies:
        values.update(_zone_stats(buddy))
        values.update(_node_stats([buddy]))
        values.update(_numa_stats(allocator, buddy))
        values[f"pgalloc_{buddy.zone.name.lower()}"] += _pgalloc(buddy)
        values["pgfree"] += _pgalloc(buddy) + buddy.fresh
    values["pgfree"] -= allocator.nr_in_use()
    values.update(allocator.vm_events)
    values["nr_memmap_boot_pages"] = allocator.nr_sections * PAGEBLOCK_NR_PAGES
    lists = (
        proc_names.ZONE_STATS,
        proc_names.ZONE_NUMA_STATS,
        proc_names.NODE_STATS,
        proc_names.VMSTAT_ONLY,
        proc_names.VM_EVENTS,
    )
    return "".join(f"{name} {values[name]}\n" for names in lists for name in _names(allocator, names))


def zoneinfo(allocator: PageAllocator) -> str:
    """/proc/zoneinfo: all zones of all nodes, those without memory in short."""
    return "".join(line + "\n" for node in allocator.zonelists.nodes for line in _zoneinfo_of_node(allocator, node))


def buddyinfo(allocator: PageAllocator) -> str:
    """/proc/buddyinfo: free blocks of each order. Unaccepted blocks are on no free list and do not count."""
    lines = []
    for zone in filter(lambda zone: zone.populated, allocator.zones):
        counts = "".join(f"{zone.free_area.nr_free(order):6} " for order in range(NR_PAGE_ORDERS))
        lines.append(f"{_zone_label(zone)} {counts}\n")
    return "".join(lines)


def pagetypeinfo(allocator: PageAllocator) -> str:
    """/proc/pagetypeinfo: free blocks of each order and migrate type, and pageblocks of each type."""
    lines: list[str] = []
    for node in allocator.zonelists.nodes:
        zones = [zone for zone in allocator.zones if zone.node == node and zone.populated]
        if not zones:
            continue
        orders = "".join(f"{order:6} " for order in range(NR_PAGE_ORDERS))
        lines += [f"Page block order: {PAGEBLOCK_ORDER}", f"Pages per block:  {PAGEBLOCK_NR_PAGES}", ""]
        lines.append(f"{'Free pages count per migrate type at order':<43} {orders}")
        lines += [_free_of_type(zone, mt) for zone in zones for mt in range(MIGRATE_TYPES)]
        lines += ["", f"{'Number of blocks type ':<23}" + "".join(f"{name:>12} " for name in MIGRATETYPE_NAMES)]
        lines += [_blocks_of_types(allocator, zone) for zone in zones]
    return "".join(line + "\n" for line in lines)


PROC_FILES: dict[str, Callable[[PageAllocator], str]] = {
    "/proc/meminfo": meminfo,
    "/proc/vmstat": vmstat,
    "/proc/zoneinfo": zoneinfo,
    "/proc/buddyinfo": buddyinfo,
    "/proc/pagetypeinfo": pagetypeinfo,
}


def _names(allocator: PageAllocator, names: tuple[str, ...]) -> tuple[str, ...]:
    return names if allocator.rules.is_6_12 else proc_names.of_6_1(names)


def _total(zones: Iterable[Zone], field: str) -> int:
    return sum(getattr(zone, field) for zone in zones)


def _zone_label(zone: Zone) -> str:
    return f"Node {zone.node}, zone {zone.name:>8}"


def _pages_of(buddies: Iterable[ZoneBuddy], field: str) -> int:
    return sum(getattr(buddy, field) for buddy in buddies)


def _zone_stats(buddy: ZoneBuddy) -> dict[str, int]:
    return {
        "nr_free_pages": buddy.zone.nr_free_pages,
        "nr_zone_inactive_anon": buddy.inactive_anon,
        "nr_zone_inactive_file": buddy.inactive_file,
        "nr_unaccepted": buddy.zone.nr_unaccepted,
    }


def _node_stats(buddies: Sequence[ZoneBuddy]) -> dict[str, int]:
    file, anon = (_pages_of(buddies, field) for field in ("inactive_file", "inactive_anon"))
    return {"nr_inactive_anon": anon, "nr_inactive_file": file, "nr_anon_pages": anon, "nr_file_pages": file}


def _pgalloc(buddy: ZoneBuddy) -> int:
    return buddy.pgalloc + sum(pcp.fast_allocs for pcp in buddy.pagesets)


def _numa_stats(allocator: PageAllocator, buddy: ZoneBuddy) -> dict[str, int]:
    """What the per-CPU lists gave out by themselves was from the preferred zone."""
    cpus = list(zip(allocator.cpu_nodes, buddy.pagesets, strict=True))
    local = sum(pcp.fast_allocs for node, pcp in cpus if node == buddy.zone.node)
    fast = sum(pcp.fast_allocs for _, pcp in cpus)
    return {
        "numa_hit": buddy.numa_hit + fast,
        "numa_miss": buddy.numa_miss,
        "numa_foreign": buddy.numa_foreign,
        "numa_local": buddy.numa_local + local,
        "numa_other": buddy.numa_other + fast - local,
    }


def _zoneinfo_of_node(allocator: PageAllocator, node: int) -> Iterator[str]:
    own = {int(buddy.zone.zone_type): buddy for buddy in allocator.buddies if buddy.zone.node == node}
    first = min((kind for kind, buddy in own.items() if buddy.zone.populated), default=None)
    for kind, name in enumerate(ZONE_NAMES):
        yield f"Node {node}, zone {name:>8}"
        if kind == first:
            yield "  per-node stats"
            stats = _node_stats(list(own.values()))
            names = _names(allocator, proc_names.NODE_STATS)
            yield from (f"      {name:<12} {stats.get(name, 0)}" for name in names)
        buddy = own.get(kind)
        yield from _zone_numbers(allocator, None if buddy is None else buddy.zone, kind)
        if buddy is not None and buddy.zone.populated:
            yield from _populated_zone(allocator, buddy)


def _zone_numbers(allocator: PageAllocator, zone: Zone | None, kind: int) -> Iterator[str]:
    """Free pages, watermarks and sizes. An empty zone Movable has watermarks all the same, once there are any."""
    least = 0
    if kind == ZoneType.ZONE_MOVABLE and any(other.watermark.promo for other in allocator.zones):
        least = SWAP_CLUSTER_MAX
    boost = 0 if zone is None else zone.watermark_boost
    yield f"  pages free     {0 if zone is None else zone.nr_free_pages}"
    yield f"        boost    {boost}"
    for name in ("min", "low", "high", "promo") if allocator.rules.is_6_12 else ("min", "low", "high"):
        pages = least if zone is None or not zone.populated else getattr(zone.watermark, name)
        yield f"        {name:<8} {pages + boost}"
    for name in ("spanned", "present", "managed"):
        yield f"        {name:<8} {0 if zone is None else getattr(zone, name + '_pages')}"
    yield f"        {'cma':<8} 0"
    reserve = (0,) * len(ZONE_NAMES) if zone is None else zone.lowmem_reserve
    yield f"        protection: ({', '.join(map(str, reserve))})"


def _populated_zone(allocator: PageAllocator, buddy: ZoneBuddy) -> Iterator[str]:
    """Counters and per-CPU lists."""
    values = {**_zone_stats(buddy), **_numa_stats(allocator, buddy)}
    names = (*_names(allocator, proc_names.ZONE_STATS), *proc_names.ZONE_NUMA_STATS)
    yield from (f"      {name:<12} {values.get(name, 0)}" for name in names)
    yield "  pagesets"
    for cpu, pcp in enumerate(buddy.pagesets):
        yield f"    cpu: {cpu}"
        yield f"              count: {pcp.count}"
        yield f"              high:  {pcp.high}"
        yield f"              batch: {pcp.batch}"
        yield f"  vm stats threshold: {_stat_threshold(buddy.zone, len(buddy.pagesets))}"
    yield "  node_unreclaimable:  0"
    yield f"  start_pfn:           {buddy.zone.zone_start_pfn}"


def _stat_threshold(zone: Zone, cpus: int) -> int:
    """How far a CPU's own counters may be off (``calculate_normal_threshold``); 0 until there are watermarks."""
    if not zone.watermark.promo:
        return 0
    return min(2 * cpus.bit_length() * (1 + (zone.managed_pages >> 27 - 12).bit_length()), 125)


def _free_of_type(zone: Zone, migratetype: int) -> str:
    counts = [zone.free_area.nr_free(order, migratetype) for order in range(NR_PAGE_ORDERS)]
    shown = "".join(f"{'>' if n >= _MOST_SHOWN else ''}{min(n, _MOST_SHOWN):6} " for n in counts)
    return f"Node {zone.node:4}, zone {zone.name:>8}, type {MIGRATETYPE_NAMES[migratetype]:>12} {shown}"


def _blocks_of_types(allocator: PageAllocator, zone: Zone) -> str:
    """Pageblocks of each type, counted where a zone's first page and every 512th behind it lies in a section."""
    counts = [0] * MIGRATE_TYPES
    start = zone.zone_start_pfn
    for own in allocator.pages_of_zone(zone):
        for low, high in allocator.sections.within(*own):
            first = -(-(low - start) // PAGEBLOCK_NR_PAGES)
            last = -(-(high - start) // PAGEBLOCK_NR_PAGES)
            counts[MIGRATE_MOVABLE] += max(last - first, 0)
        for block, migratetype in allocator.pageblocks.others.items():
            pfn = block * PAGEBLOCK_NR_PAGES + start % PAGEBLOCK_NR_PAGES
            if pfn in range(*own):
                counts[MIGRATE_MOVABLE] -= 1
                counts[migratetype] += 1
    return _zone_label(zone) + " " + "".join(f"{count:12} " for count in counts)
