"""/proc texts, letter by letter where a capture has the same line."""

from __future__ import annotations

from kernel.mmzone import Zone, ZoneType
from kernel.proc import buddyinfo, meminfo, vmstat
from kernel.watermark import Watermarks


def zone_with_blocks(zone_type, counts):
    """A zone with ``counts[order]`` free blocks that cannot merge."""
    zone = Zone(zone_type, 0, 1, 1)
    for order, count in enumerate(counts):
        for number in range(count):
            zone.free_area.free_one_page((number * 16 + order) << 11, order, to_tail=True)
    return zone


def test_buddyinfo_of_a_capture():
    """buddyinfo of efi-q35-8G-k6.12; an empty zone has no line."""
    zones = [
        zone_with_blocks(ZoneType.ZONE_DMA, [0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]),
        zone_with_blocks(ZoneType.ZONE_DMA32, [5, 4, 2, 2, 2, 3, 3, 2, 4, 2, 467]),
        Zone(ZoneType.ZONE_NORMAL, 0, 0, 0),
    ]
    assert buddyinfo(zones) == (
        "Node 0, zone      DMA      0      1      1      1      0      0      0      0      0      1      1 \n"
        "Node 0, zone    DMA32      5      4      2      2      2      3      3      2      4      2    467 \n"
    )


def test_meminfo_lines():
    """Name padded to 16 columns, number to 8; MemFree and MemTotal include what is unaccepted."""
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
    assert meminfo([low, high]) == (
        "MemTotal:        6114304 kB\n"
        "MemFree:         5880000 kB\n"
        "MemAvailable:    5879880 kB\n"
        "Unaccepted:      1540096 kB\n"
    )


def test_meminfo_of_nothing():
    """Zero is padded too, and MemAvailable is never negative."""
    zone = Zone(ZoneType.ZONE_DMA, 1, 4095, 4095, managed_pages=100, watermark=Watermarks(10, 20, 30, 40))
    assert meminfo([zone]) == (
        "MemTotal:            400 kB\n"
        "MemFree:               0 kB\n"
        "MemAvailable:          0 kB\n"
        "Unaccepted:            0 kB\n"
    )


def test_vmstat_lines():
    """Pages, free ones first."""
    zone = Zone(ZoneType.ZONE_NORMAL, 1 << 20, 4096, 4096, nr_free_pages=3072, nr_unaccepted=1024)
    assert vmstat([zone]) == "nr_free_pages 3072\nnr_unaccepted 1024\n"
