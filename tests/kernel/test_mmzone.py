"""Zones, their watermarks and dmesg lines against captured boots of Debian's kernels (QEMU, no TDX).

Numbers are copied by hand from each capture's zoneinfo, vm.min_free_kbytes and dmesg. The watermarks were set
before the kernel freed its initrd and init memory, so ``freed`` is subtracted from DMA32's managed pages: the sum
of dmesg's later ``Freeing ... memory`` lines.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import pytest

from kernel.memblock import Memblock
from kernel.mmzone import (
    Zone,
    free_area_init,
    memory_node_lines,
    setup_zone_wmarks,
    totalreserve_pages,
    zone_ranges_lines,
)
from kernel.watermark import Watermarks

EFI_2G = [(0x1000, 0xA0000), (0x100000, 0x806000), (0x808000, 0x810000), (0x900000, 0x7EAA0000)]
EFI_2G += [(0x7EBA2000, 0x7F4EC000), (0x7F7FE000, 0x7FEF4000)]
EFI_8G = [*EFI_2G, (0x100000000, 0x280000000)]
BIOS_40G = [(0x1000, 0x9F000), (0x100000, 0x7FFDF000), (0x100000000, 0xA80000000)]
EFI_MEM_1G = [*EFI_2G[:3], (0x900000, 0x40000000)]
EFI_512M = [*EFI_2G[:3], (0x900000, 0x1EAA0000), (0x1EBA2000, 0x1F4EC000), (0x1F7FE000, 0x1FEF4000)]


@dataclass(frozen=True)
class Capture:
    memory: list[tuple[int, int]]
    max_pfn: int
    spanned: tuple[int, ...]
    present: tuple[int, ...]
    managed: tuple[int, ...]
    freed: int
    min_free_kbytes: int
    marks: list[tuple[int, int, int, int]]
    protection: list[tuple[int, ...]]


CAPTURES = {
    "efi-q35-8G-k6.12": Capture(
        EFI_8G,
        0x280000,
        (4095, 1044480, 1572864),
        (3757, 518880, 1572864),
        (1806, 483244, 1532100),
        2109,
        67584,
        [(15, 18, 21, 24), (4034, 5042, 6050, 7058), (12846, 16057, 19268, 22479)],
        [(0, 1879, 7864, 7864, 7864), (0, 0, 5984, 5984, 5984), (0, 0, 0, 0, 0)],
    ),
    "bios-q35-40G-k6.12": Capture(
        BIOS_40G,
        0xA80000,
        (4095, 1044480, 9961472),
        (3998, 520159, 9961472),
        (3840, 494361, 9768102),
        2109,
        67584,
        [(6, 9, 12, 15), (810, 1302, 1794, 2286), (16079, 25847, 35615, 45383)],
        [(0, 1922, 40079, 40079, 40079), (0, 0, 38156, 38156, 38156), (0, 0, 0, 0, 0)],
    ),
    "efi-q35-2G-k6.1": Capture(
        EFI_2G,
        0x7FEF4,
        (4095, 519924, 0),
        (3757, 518880, 0),
        (1806, 486636, 0),
        2397,
        45056,
        [(41, 51, 61, 71), (11222, 14027, 16832, 19637), (0, 0, 0, 0)],
        [(0, 1891, 1891, 1891, 1891), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)],
    ),
    "efi-q35-8G-mem1G-k6.12": Capture(
        EFI_MEM_1G,
        0x7F77E,
        (4095, 258048, 0),
        (3757, 258048, 0),
        (1806, 238145, 0),
        2109,
        45056,
        [(85, 106, 127, 148), (11178, 13972, 16766, 19560), (0, 0, 0, 0)],
        [(0, 922, 922, 922, 922), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)],
    ),
    "efi-q35-512M-k6.12": Capture(
        EFI_512M,
        0x1FEF4,
        (4095, 126708, 0),
        (3757, 125664, 0),
        (1806, 99443, 0),
        2109,
        2518,
        [(11, 13, 15, 17), (617, 771, 925, 1079), (0, 0, 0, 0)],
        [(0, 380, 380, 380, 380), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)],
    ),
}


@pytest.fixture(params=CAPTURES.values(), ids=CAPTURES.keys())
def capture(request):
    return request.param


def memory_of(ranges):
    mb = Memblock(lambda start, end: None, clear_memory=lambda start, end: None)
    for start, end in ranges:
        mb.add(start, end - start)
    return mb.memory.regions


def zones_of(capture: Capture) -> list[Zone]:
    """The capture's zones with the managed pages that they had when the watermarks were set."""
    zones = free_area_init(memory_of(capture.memory), capture.max_pfn)
    for zone, managed in zip(zones, capture.managed, strict=True):
        zone.managed_pages = managed
    zones[1].managed_pages -= capture.freed
    return zones


def test_spanned_and_present_pages(capture):
    """Zones span and hold what zoneinfo says."""
    zones = free_area_init(memory_of(capture.memory), capture.max_pfn)
    assert tuple(zone.spanned_pages for zone in zones) == capture.spanned
    assert tuple(zone.present_pages for zone in zones) == capture.present
    assert [zone.zone_start_pfn for zone in zones[:2]] == [1, 4096]


def test_watermarks_and_protection(capture):
    """From the managed pages follow vm.min_free_kbytes, min, low, high, promo and protection of zoneinfo."""
    zones = zones_of(capture)
    assert setup_zone_wmarks(zones, transparent_hugepage=True) == capture.min_free_kbytes
    assert [astuple(zone.watermark) for zone in zones] == capture.marks
    assert [zone.lowmem_reserve for zone in zones] == capture.protection


def test_watermarks_without_transparent_hugepages():
    """Without khugepaged the root formula stays."""
    zones = zones_of(CAPTURES["efi-q35-8G-k6.12"])
    assert setup_zone_wmarks(zones, transparent_hugepage=False) == 11_356


def test_watermarks_are_zero_until_they_are_set_up(capture):
    """Fresh zones have no watermarks and no reserves."""
    for zone in free_area_init(memory_of(capture.memory), capture.max_pfn):
        assert zone.watermark == Watermarks() and zone.lowmem_reserve == (0,) * 5


def test_totalreserve_of_a_capture():
    """MemFree minus MemAvailable of efi-q35-8G-k6.12: 33108 pages, less half of 290 pages of reclaimable slab."""
    zones = zones_of(CAPTURES["efi-q35-8G-k6.12"])
    setup_zone_wmarks(zones, transparent_hugepage=True)
    assert totalreserve_pages(zones) == (8028308 - 7896456) // 4 + 290 // 2


def test_dmesg_of_8_gib():
    """The zone and node lines of efi-q35-8G-k6.12, letter by letter."""
    memory = memory_of(EFI_8G)
    assert zone_ranges_lines(memory, 0x280000) + memory_node_lines(memory) == [
        "Zone ranges:",
        "  DMA      [mem 0x0000000000001000-0x0000000000ffffff]",
        "  DMA32    [mem 0x0000000001000000-0x00000000ffffffff]",
        "  Normal   [mem 0x0000000100000000-0x000000027fffffff]",
        "  Device   empty",
        "Movable zone start for each node",
        "Early memory node ranges",
        "  node   0: [mem 0x0000000000001000-0x000000000009ffff]",
        "  node   0: [mem 0x0000000000100000-0x0000000000805fff]",
        "  node   0: [mem 0x0000000000808000-0x000000000080ffff]",
        "  node   0: [mem 0x0000000000900000-0x000000007ea9ffff]",
        "  node   0: [mem 0x000000007eba2000-0x000000007f4ebfff]",
        "  node   0: [mem 0x000000007f7fe000-0x000000007fef3fff]",
        "  node   0: [mem 0x0000000100000000-0x000000027fffffff]",
        "Initmem setup node 0 [mem 0x0000000000001000-0x000000027fffffff]",
    ]


def test_dmesg_of_2_gib():
    """Zone Normal is empty if RAM ends below 4 GiB (efi-q35-2G-k6.1)."""
    assert zone_ranges_lines(memory_of(EFI_2G), 0x7FEF4) == [
        "Zone ranges:",
        "  DMA      [mem 0x0000000000001000-0x0000000000ffffff]",
        "  DMA32    [mem 0x0000000001000000-0x000000007fef3fff]",
        "  Normal   empty",
        "  Device   empty",
        "Movable zone start for each node",
    ]


def test_dmesg_with_a_memory_limit():
    """mem=1G shortens the node, not the zone ranges (efi-q35-8G-mem1G-k6.12)."""
    memory = memory_of(EFI_MEM_1G)
    assert zone_ranges_lines(memory, 0x7F77E)[2] == "  DMA32    [mem 0x0000000001000000-0x000000007f77dfff]"
    assert memory_node_lines(memory)[-1] == "Initmem setup node 0 [mem 0x0000000000001000-0x000000003fffffff]"


def test_no_memory_at_all():
    """Without memory the zones are empty and the node is memoryless."""
    assert [zone.populated for zone in free_area_init([], 0)] == [False] * 3
    assert memory_node_lines([]) == ["Early memory node ranges", "Initmem setup node 0 as memoryless"]
