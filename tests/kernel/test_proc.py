"""Files of /proc and /sys: every line's name, order and columns are those of captured kernels."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from kernel.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from kernel.mm_rules import MAINLINE_MM, V9_MM
from kernel.mmzone import Zone, ZoneType
from kernel.page_alloc import PageAllocator
from kernel.proc import PROC_FILES, buddyinfo, meminfo, node_meminfo, pagetypeinfo, vmstat, zoneinfo
from kernel.unaccepted_memory import UnacceptedMemory
from kernel.watermark import Watermarks

SAMPLES = Path(__file__).parent.parent / "samples" / "proc"
CAPTURES = {
    "efi-q35-4G-numa2-k6.12": MAINLINE_MM,
    "efi-q35-8G-numa2-k6.1": V9_MM,
}
FILES = [
    *(f"/proc/{name}" for name in ("meminfo", "vmstat", "zoneinfo", "buddyinfo", "pagetypeinfo")),
    *(f"/sys/devices/system/node/node{node}/meminfo" for node in (0, 1)),
]


def sample(capture: str) -> dict[str, str]:
    return json.loads(gzip.decompress((SAMPLES / f"{capture}.json.gz").read_bytes()))


def allocator_of(zones, rules=V9_MM):
    return PageAllocator(zones, UnacceptedMemory(None, lambda start, end: None), lazy=True, rules=rules)


def text_of(allocator: PageAllocator, path: str) -> str:
    node = re.search(r"/node(\d+)/", path)
    return node_meminfo(allocator, int(node[1])) if node else PROC_FILES[path](allocator)


def numbers(text: str, name: str) -> int:
    return int(re.search(rf"{name}\s+(\d+)", text)[1])


def guest_of(text: str, rules) -> PageAllocator:
    """An allocator with the nodes, zones and CPUs that a zoneinfo tells of."""
    zones = []
    for part in text.split("Node ")[1:]:
        node, name = re.match(r"(\d+), zone +(\w+)", part).groups()
        if name in ("DMA", "DMA32", "Normal"):
            start = numbers(part, "start_pfn:") if "start_pfn" in part else 0
            kind = ("DMA", "DMA32", "Normal").index(name)
            zones.append(
                Zone(ZoneType(kind), start, numbers(part, "spanned"), numbers(part, "present"), node=int(node))
            )
    allocator = allocator_of(zones, rules)
    allocator.online_cpu(1)
    populated = [zone for zone in zones if zone.populated]
    memory = [(zone.zone_start_pfn, zone.zone_start_pfn + zone.present_pages) for zone in populated]
    allocator.memblock_free_all(memory, [(zone.zone_start_pfn, zone.end_pfn) for zone in populated])
    list(allocator.page_alloc_init_late())
    allocator.init_per_zone_wmark_min(transparent_hugepage=True)
    return allocator


def shape(path: str, line: str) -> tuple[str, int]:
    """The words of a line, and its length where numbers stand in columns."""
    columns = not path.endswith(("zoneinfo", "vmstat"))
    words = re.sub(r" *\d+", " #", line) if columns else re.sub(r"\d+", "#", line)
    return words, len(line) if columns else 0


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("capture", CAPTURES)
def test_lines_of_a_capture(capture, path):
    """Line by line the same names in the same order, with numbers in the same columns; v9 adds its lines to 6.1's."""
    files, rules = sample(capture), CAPTURES[capture]
    ours = text_of(guest_of(files["/proc/zoneinfo"], rules), path).splitlines()
    if rules is V9_MM:
        added = [line for line in ours if re.search("unaccepted", line, re.IGNORECASE)]
        assert bool(added) == ("buddy" not in path and "type" not in path)
        ours = [line for line in ours if line not in added]
    assert [shape(path, line) for line in ours] == [shape(path, line) for line in files[path].splitlines()]


def test_unaccepted_lines():
    """Where v9's lines stand, and that they count what waits."""
    zone = Zone(ZoneType.ZONE_NORMAL, 1 << 20, 4096, 4096, managed_pages=4096, nr_free_pages=3072, nr_unaccepted=1024)
    allocator = allocator_of([zone])
    for path, line, before in (
        ("/proc/meminfo", "Unaccepted:         4096 kB", "FilePmdMapped:         0 kB"),
        ("/proc/vmstat", "nr_unaccepted 1024", "nr_free_cma 0"),
        ("/proc/zoneinfo", "      nr_unaccepted 1024", "      nr_free_cma  0"),
        (FILES[-2], "Node 0 Unaccepted:         4096 kB", "Node 0 FilePmdMapped:        0 kB"),
    ):  # fmt: skip
        lines = text_of(allocator, path).splitlines()
        assert lines[lines.index(line) - 1] == before


def with_blocks(zone_type, counts):
    """A zone with ``counts[order]`` free blocks that cannot merge."""
    zone = Zone(zone_type, 0, 1 << 30, 1)
    for order, count in enumerate(counts):
        for number in range(count):
            zone.free_area.add((number * 16 + order) << 11, order, number % 3, to_tail=True)
    return zone


def test_buddyinfo_of_a_capture():
    """buddyinfo of efi-q35-8G-k6.12, blocks of all types together; an empty zone has no line."""
    zones = [
        with_blocks(ZoneType.ZONE_DMA, [0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]),
        with_blocks(ZoneType.ZONE_DMA32, [5, 4, 2, 2, 2, 3, 3, 2, 4, 2, 467]),
        Zone(ZoneType.ZONE_NORMAL, 0, 0, 0),
    ]
    assert buddyinfo(allocator_of(zones)) == (
        "Node 0, zone      DMA      0      1      1      1      0      0      0      0      0      1      1 \n"
        "Node 0, zone    DMA32      5      4      2      2      2      3      3      2      4      2    467 \n"
    )


def test_meminfo_numbers():
    """MemFree and MemTotal include what is unaccepted; MemAvailable leaves out what is kept back."""
    low = Zone(ZoneType.ZONE_DMA32, 4096, 1 << 19, 1 << 19, managed_pages=480_000, nr_free_pages=470_000)
    high = Zone(
        ZoneType.ZONE_NORMAL,
        1 << 20,
        1 << 20,
        1 << 20,
        managed_pages=1 << 20,
        nr_free_pages=1_000_000,
        nr_unaccepted=385_024,
        watermark=Watermarks(10, 20, 30, 40),
    )
    lines = meminfo(allocator_of([low, high])).splitlines()
    assert lines[:3] == ["MemTotal:        6114304 kB", "MemFree:         5880000 kB", "MemAvailable:    5879880 kB"]
    assert "Unaccepted:      1540096 kB" in lines
    assert "CommitLimit:     3057152 kB" in lines
    assert "DirectMap2M:     6291456 kB" in lines


def test_memavailable_is_never_negative():
    """A guest with less free memory than it keeps back."""
    zone = Zone(ZoneType.ZONE_DMA, 1, 4095, 4095, managed_pages=100, watermark=Watermarks(10, 20, 30, 40))
    assert "MemAvailable:          0 kB" in meminfo(allocator_of([zone])).splitlines()


def small_guest(rules=MAINLINE_MM):
    zones = [Zone(ZoneType.ZONE_DMA, 1, 4095, 4095), Zone(ZoneType.ZONE_DMA32, 4096, 1 << 17, 1 << 17)]
    allocator = allocator_of(zones, rules)
    allocator.memblock_free_all([(1, 4096 + (1 << 17))], [(1, 4096 + (1 << 17))])
    list(allocator.page_alloc_init_late())
    allocator.init_per_zone_wmark_min(transparent_hugepage=False)
    return allocator


def test_events_are_counted():
    """Pages allocated, freed and in use; single pages from the CPU's own list count too."""
    allocator = small_guest()
    pages = [allocator.alloc_pages(GFP_KERNEL) for _ in range(100)]
    block = allocator.alloc_pages(GFP_HIGHUSER_MOVABLE, 5)
    for pfn in pages[:40]:
        allocator.free_pages(pfn, 0)
    values = dict(line.split() for line in vmstat(allocator).splitlines())
    assert (values["pgalloc_dma"], values["pgalloc_dma32"]) == ("0", "132")
    assert (values["numa_hit"], values["numa_local"], values["numa_miss"]) == ("101", "101", "0")
    assert int(values["pgfree"]) == 4095 + (1 << 17) + 40
    assert values["nr_memmap_boot_pages"] == str(5 * 512)
    allocator.free_pages(block, 5)


def test_pagetypeinfo_counts_blocks_by_type():
    """Pageblocks that unmovable requests claimed are unmovable, with all that is free in them."""
    allocator = small_guest()
    assert pagetypeinfo(allocator).splitlines()[-2:] == [
        "Node 0, zone      DMA            0            8            0            0            0 ",
        "Node 0, zone    DMA32            0          256            0            0            0 ",
    ]
    allocator.alloc_pages(GFP_KERNEL)
    text = pagetypeinfo(allocator)
    assert text.splitlines()[-1] == (
        "Node 0, zone    DMA32            2          254            0            0            0 "
    )
    row = next(line for line in text.splitlines() if "DMA32, type    Unmovable" in line)
    free = sum(int(count) << order for order, count in enumerate(row.split()[-11:]))
    assert free == 1024 - 1 - allocator.buddies[1].pagesets[0].count


def test_many_free_blocks_are_not_counted_to_the_end():
    """From 100000 on pagetypeinfo only says that there are more."""
    zone = with_blocks(ZoneType.ZONE_DMA32, [])
    zone.free_area.append_run(0, 1024 * 100_000, 1)
    rows = pagetypeinfo(allocator_of([zone])).splitlines()
    assert any(row.endswith("0 >100000 ") for row in rows)


def test_per_cpu_lists_in_zoneinfo():
    """Count, high and batch of each CPU; 6.12's high grows with use."""
    allocator = small_guest()
    allocator.alloc_pages(GFP_KERNEL)
    text = zoneinfo(allocator)
    part = text.split("zone    DMA32")[1]
    assert "    cpu: 0\n              count: 30\n              high:  921\n              batch: 31\n" in part
    assert "  vm stats threshold: 8\n" in part
