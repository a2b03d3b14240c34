"""ZONE_MOVABLE: how much the kernel keeps, on one node and on several."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.early_param import parse_early_param
from kernel.memblock_type import MemblockFlags, MemblockRegion
from kernel.mmzone import free_area_init, nodes_of, unavailable_ranges
from kernel.zone_movable import MIRROR_NOTES, find_zone_movable_pfns
from tests.kernel.plain_guest import GIB, MIB, booted

PAGE, BLOCK = 4096, 1024
NODE_0 = [MemblockRegion(PAGE, 2 * GIB - PAGE, 0, 0), MemblockRegion(4 * GIB, 2 * GIB, 0, 0)]
NODES = [*NODE_0, MemblockRegion(6 * GIB, 4 * GIB, 0, 1)]


def movable(memory, text):
    """First page frames by node."""
    end = max(region.end for region in memory)
    return find_zone_movable_pfns(memory, end >> 12, parse_early_param(text))[0]


@pytest.mark.parametrize(
    ("memory", "text", "expected"),
    [
        (NODE_0, "", {}),
        (NODE_0, "kernelcore=3G", {0: 5 * GIB >> 12}),  # page 0 is missing, and the start is rounded up
        (NODE_0, "kernelcore=50%", {0: 4 * GIB >> 12}),
        (NODE_0, "movablecore=1G", {0: 5 * GIB >> 12}),
        (NODE_0, "movablecore=1G kernelcore=1G", {0: 5 * GIB >> 12}),  # the kernel gets the larger of both
        (NODE_0, "kernelcore=100G", {}),
        (NODE_0, "kernelcore=1M", {0: 4 * GIB >> 12}),  # lower zones are the kernel's anyway
        (NODES, "kernelcore=6G", {0: 5 * GIB >> 12, 1: 9 * GIB >> 12}),
        (NODES, "movablecore=2G", {0: 5 * GIB >> 12, 1: 9 * GIB >> 12}),
    ],
)
def test_sizes(memory, text, expected):
    """kernelcore= is spread over nodes; movablecore= is what is left."""
    found = movable(memory, text)
    assert found.keys() == expected.keys()
    assert all(0 <= found[nid] - pfn <= BLOCK for nid, pfn in expected.items())
    zones = free_area_init(memory, max(region.end for region in memory) >> 12, found)
    assert sum(zone.present_pages for zone in zones) == sum(region.size for region in memory) >> 12


def test_mirror():
    """kernelcore=mirror keeps the kernel in mirrored memory; without such memory, or below 4 GiB, it is said."""
    mirror = int(MemblockFlags.MEMBLOCK_MIRROR)
    memory = [NODE_0[0], MemblockRegion(4 * GIB, GIB, mirror, 0), MemblockRegion(5 * GIB, GIB, 0, 0)]
    found, notes = find_zone_movable_pfns(memory, 6 * GIB >> 12, parse_early_param("kernelcore=mirror"))
    assert (found, notes) == ({0: 5 * GIB >> 12}, [MIRROR_NOTES[1]])
    found, notes = find_zone_movable_pfns(NODE_0, 6 * GIB >> 12, parse_early_param("kernelcore=mirror"))
    assert (found, notes) == ({}, [MIRROR_NOTES[0]])


regions = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=8
)  # fmt: skip


def memory_of(rows) -> list[MemblockRegion]:
    """Regions of blocks of 64 MiB with gaps between, from 1 MiB on."""
    out, at = [], MIB
    for gap, size, nid in rows:
        at += gap * 64 * MIB
        out.append(MemblockRegion(at, size * 64 * MIB, 0, nid))
        at += size * 64 * MIB
    return out


@settings(max_examples=200)
@given(regions, st.integers(0, 8 * GIB))
def test_the_kernel_gets_what_it_asked_for(rows, size):
    """Whatever the nodes: memory below ZONE_MOVABLE is what was asked for, but for rounding, or all there is."""
    memory = memory_of(rows)
    end = memory[-1].end >> 12
    total = sum(region.size for region in memory) >> 12
    found, _ = find_zone_movable_pfns(memory, end, parse_early_param(f"kernelcore={size}"))
    zones = free_area_init(memory, end, found)
    assert sum(zone.present_pages for zone in zones) == total
    kept = sum(zone.present_pages for zone in zones if zone.name != "Movable")
    if found:
        assert kept + len(nodes_of(memory)) >= min(size >> 12, total)
    else:
        assert kept == total
    for zone in zones:
        assert zone.present_pages <= zone.spanned_pages


@settings(max_examples=200)
@given(regions)
def test_every_page_is_in_one_zone(rows):
    """Pages with a struct page are present in a zone or unavailable, each once: a model that counts sections."""
    memory = memory_of(rows)
    zones = free_area_init(memory, memory[-1].end >> 12)
    unavailable = sum(count for _, _, count in unavailable_ranges(memory, zones))
    sections = {at for r in memory for at in range(r.base >> 27, (r.end - 1 >> 27) + 1)}
    total = sum(region.size for region in memory) >> 12
    assert total + unavailable == len(sections) << 15


def test_a_guest_with_zone_movable():
    """kernelcore= of a guest with 6 GiB: said in the log, a zone of its own, all of it free."""
    kernel, log = booted(cmdline="kernelcore=3G")
    assert any(line.startswith("  Node 0: 0x000000014") for line in log)
    (zone,) = (zone for zone in kernel.allocator.zones if zone.name == "Movable")
    assert 0 < zone.present_pages - zone.managed_pages < 128 * MIB >> 12  # struct pages and page tables lie there
