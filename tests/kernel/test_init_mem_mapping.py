"""The direct map: the page tables that are taken are those that a map of all RAM needs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.init_mem_mapping import _DirectMap, init_mem_mapping
from kernel.kernel import Kernel
from tests.kernel.plain_guest import GIB, IMAGE, IMAGE_SIZE, MIB, machine_with

PAGE, PMD = 4096, 2 * MIB
GB_PAGES = {0x80000000: (0x80000001, 0, 0, 0), 0x80000001: (0, 0, 0, 1 << 26)}


def kernel_with(rows, gbpages: bool = False, cmdline: str = "") -> Kernel:
    """A kernel whose memblock has image and RAM, before init_mem_mapping()."""
    machine = machine_with(cmdline=cmdline, leaves=GB_PAGES if gbpages else {})
    kernel = Kernel.enter(machine, image_size=IMAGE_SIZE)
    memblock = kernel.memblock
    memblock.add(PAGE, 159 * PAGE)
    memblock.reserve(0, MIB)
    memblock.reserve(IMAGE, kernel.brk.end - IMAGE)
    for start, size in [(MIB, 255 * MIB), *rows]:
        memblock.add(start, size)
    kernel.max_pfn = memblock.end_of_DRAM() >> 12
    return kernel


def tables_needed(kernel: Kernel) -> set[tuple[int, int]]:
    """Tables of a map that uses a page of 1 GiB, 2 MiB or 4 KiB wherever memory holds all of it: a slow model."""
    sizes = (GIB, PMD) if kernel.gbpages else (PMD,)
    regions = [(0, MIB), *((r.base, r.end) for r in kernel.memblock.memory.regions if r.base >= MIB)]
    need = set()
    for start, end in regions:
        at = start
        while at < end:
            need.add((at - at % (512 * GIB), 512 * GIB))
            inside = [s for s in sizes if any(a <= at - at % s and at - at % s + s <= b for a, b in regions)]
            size = max(inside, default=PAGE)
            if size < GIB:
                need.add((at - at % GIB, GIB))
            if size < PMD:
                need.add((at - at % PMD, PMD))
            at += size - at % size
    return need


rows = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows, st.booleans())
def test_tables_are_those_of_the_map(gaps, gbpages):
    """For any RAM: all of it is mapped, and no table is missing; memblock gives what brk does not hold."""
    at, places = 4 * GIB, []
    for gap, size in gaps:
        at += gap * 256 * 1024
        places.append((at, size * 256 * 1024))
        at += size * 256 * 1024
    kernel = kernel_with(places, gbpages)
    mapping = _DirectMap(kernel)
    mapping.init_memory_mapping(0, MIB)
    mapping.top_down(MIB, kernel.max_pfn << 12)
    assert mapping._tables >= tables_needed(kernel)
    mapped = sum(part.size for part in mapping.mapped)
    assert mapped == MIB + kernel.memblock.memory.total_size - 159 * PAGE
    assert mapping.max_pfn_mapped == kernel.max_pfn


@pytest.mark.parametrize("gbpages", [False, True])
def test_whole_gibs(gbpages):
    """4 GiB in one piece: a table for each GiB, or none with pages of 1 GiB."""
    kernel = kernel_with([(4 * GIB, 4 * GIB)], gbpages)
    mapping = _DirectMap(kernel)
    mapping.init_memory_mapping(0, MIB)
    mapping.top_down(MIB, 8 * GIB)
    assert sum(at >= 4 * GIB for at, size in mapping._tables if size == GIB) == (0 if gbpages else 4)


def test_a_hole_of_4_pib_costs_nothing():
    """Little RAM above a wide hole: the steps over it are left out."""
    kernel = kernel_with([(4 << 50, 64 * MIB)])
    kernel.la57 = True
    init_mem_mapping(kernel)
    assert kernel.memblock.current_limit == (4 << 50) + 64 * MIB


def test_bottom_up():
    """With movable_node the map grows from the kernel upwards, and its tables lie near the kernel."""
    kernel = kernel_with([(4 * GIB, 64 * GIB)], cmdline="movable_node memblock=debug")
    kernel.memblock.bottom_up = True
    lines: list[str] = []
    kernel.memblock.debug = lines.append
    init_mem_mapping(kernel)
    tables = [int(line.split("[")[1].split("-")[0], 16) for line in lines if line.startswith("memblock_reserve")]
    assert tables
    assert all(IMAGE < at < GIB for at in tables)
