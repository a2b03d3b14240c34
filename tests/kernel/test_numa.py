"""Nodes: SRAT, what memblock and zones make of it, and tables that contradict themselves."""

from __future__ import annotations

import random

import pytest

from kernel.mm_init import mm_init
from kernel.setup_arch import setup_arch
from kernel.srat import parse_srat
from kernel.version import V6_1, V6_12
from tests.kernel.plain_guest import (
    GIB,
    HIGH,
    IMAGE_SIZE,
    LOW,
    MIB,
    TABLES,
    booted,
    machine_with,
    madt,
    srat,
    table,
)
from tests.refusals import value_or_refusal

TWO_NODES = srat(
    (0, 0, 640 << 10, 1), (0, MIB, 2 * GIB - MIB, 1), (1, 4 * GIB, 4 * GIB, 1), cpus=((0, 0), (1, 1))
)  # fmt: skip


def lines_with(log: list[str], *starts: str) -> list[str]:
    return [line for line in log if line.startswith(starts)]


def test_two_nodes():
    """Each node has its data and its struct pages on itself, and its own zones."""
    kernel, log = booted(acpi=[TWO_NODES, madt(0, 1)])
    assert lines_with(log, "ACPI: SRAT", "NUMA", "No NUMA", "Initmem") == [
        "ACPI: SRAT: Node 0 PXM 0 [mem 0x00000000-0x0009ffff]",
        "ACPI: SRAT: Node 0 PXM 0 [mem 0x00100000-0x7fffffff]",
        "ACPI: SRAT: Node 1 PXM 1 [mem 0x100000000-0x1ffffffff]",
        "NUMA: Node 0 [mem 0x00001000-0x0009ffff] + [mem 0x00100000-0x7fffffff] -> [mem 0x00001000-0x7fffffff]",
        "Initmem setup node 0 [mem 0x0000000000001000-0x000000007fffffff]",
        "Initmem setup node 1 [mem 0x0000000100000000-0x00000001ffffffff]",
    ]
    assert kernel.node_data[0] < 2 * GIB < 4 * GIB <= kernel.node_data[1]
    assert [(zone.node, zone.name, zone.spanned_pages, zone.present_pages) for zone in kernel.allocator.zones] == [
        (0, "DMA", 4095, 3998), (0, "DMA32", (2 * GIB >> 12) - 4096, (2 * GIB >> 12) - 4096), (0, "Normal", 0, 0),
        (1, "DMA", 0, 0), (1, "DMA32", 0, 0), (1, "Normal", 4 * GIB >> 12, 4 * GIB >> 12),
    ]  # fmt: skip


def test_every_cpu_has_its_memory_on_its_node():
    """Per-CPU areas of two nodes are two pieces of 2 MiB, each on its node."""
    _, log = booted(cmdline="memblock=debug", acpi=[TWO_NODES, madt(0, 1)])
    calls = [line for line in log if "pcpu_fc_alloc" in line]
    assert [line.split(" nid=")[1][0] for line in calls] == ["0", "1"]


def test_numa_off_and_no_table():
    """numa=off makes one node of all, as does a guest without SRAT."""
    _, log = booted(cmdline="numa=off", acpi=[TWO_NODES])
    assert lines_with(log, "NUMA turned off", "Initmem") == [
        "NUMA turned off", "Initmem setup node 0 [mem 0x0000000000001000-0x00000001ffffffff]"
    ]  # fmt: skip
    _, log = booted()
    assert "No NUMA configuration found" in log


@pytest.mark.parametrize(
    "memory",
    [
        [(0, 0, 2 * GIB, 1)],  # 4 GiB belong to nobody
        [(0, 0, 5 * GIB, 1), (1, 4 * GIB, 4 * GIB, 1)],  # two nodes claim 1 GiB
        [(0, 0, 8 * GIB, 0)],  # nothing is enabled
        [(0, 0, 2 * GIB, 3)],  # what could be unplugged cannot any more
        [],
    ],
)
def test_a_table_that_cannot_be_used(memory):
    """Memory without a node, or with two, makes the kernel ignore SRAT."""
    kernel, log = booted(acpi=[srat(*memory)])
    assert "No NUMA configuration found" in log
    assert {(region.nid, region.flags) for region in kernel.memblock.memory.regions} == {(0, 0)}


def test_nodes_by_turns():
    """A node whose memory lies on both sides of another's keeps two blocks; zones of both span it."""
    entries = [(5, 0, 2 * GIB, 1), (9, 4 * GIB, GIB, 1), (5, 5 * GIB, GIB, 1), (9, 6 * GIB, 2 * GIB, 1)]
    kernel, log = booted(acpi=[srat(*entries)])
    assert not lines_with(log, "NUMA: Node")
    assert [(r.base, r.nid) for r in kernel.memblock.memory.regions][-4:] == [
        (MIB, 0), (4 * GIB, 1), (5 * GIB, 0), (6 * GIB, 1)
    ]  # fmt: skip
    normal = {z.node: (z.spanned_pages, z.present_pages) for z in kernel.allocator.zones if z.name == "Normal"}
    assert normal == {0: (2 * GIB >> 12, GIB >> 12), 1: (4 * GIB >> 12, 3 * GIB >> 12)}


def test_old_kernels_trim_to_page_0():
    """6.1 cuts node ranges to 0 and max_pfn, and rounds pg_data_t to pages."""
    kernel, log = booted(acpi=[TWO_NODES], version=V6_1)
    assert (
        "NUMA: Node 0 [mem 0x00000000-0x0009ffff] + [mem 0x00100000-0x7fffffff] -> [mem 0x00000000-0x7fffffff]" in log
    )
    assert all(at % 4096 == 0 for at in kernel.node_data.values())


def test_hotplug_ranges_and_movable_node():
    """Memory that can be unplugged makes bounce buffers necessary, and movable_node keeps the kernel out of it."""
    entries = [(0, 0, 2 * GIB, 1), (1, 4 * GIB, 4 * GIB, 3)]
    kernel, log = booted(cmdline="movable_node", acpi=[srat(*entries)])
    assert "ACPI: SRAT: Node 1 PXM 1 [mem 0x100000000-0x1ffffffff] hotplug" in log
    assert [(z.node, z.present_pages) for z in kernel.allocator.zones if z.name == "Movable"] == [(1, 4 * GIB >> 12)]
    assert not kernel.memblock.is_region_reserved(4 * GIB, 4 * GIB)
    for place, lines in ((4 * GIB, 1), (3 * GIB, 0)):
        _, log = booted(e820=LOW, acpi=[srat((0, 0, 2 * GIB, 1), (0, place, GIB, 3))])
        assert len(lines_with(log, "software IO TLB: mapped")) == lines


def test_proximity_domains_are_numbered_as_they_come():
    """Processors first, then memory; revision 1 has eight bits of domain."""
    found = parse_srat(srat((7, 0, GIB, 1), (3, GIB, GIB, 1), cpus=((4, 3),)))
    assert [(m.nid, m.pxm) for m in found.memory] == [(1, 7), (0, 3)]
    assert found.cpus == ((4, 0),)
    assert [m.pxm for m in parse_srat(srat((0x107, 0, GIB, 1), revision=1)).memory] == [7]


def test_slit_takes_a_page():
    """Distances are kept before nodes have their data."""
    slit = table(b"SLIT", (2).to_bytes(8, "little") + bytes((10, 21, 21, 10)))
    _, log = booted(cmdline="memblock=debug", acpi=[TWO_NODES, slit])
    assert any(line.endswith("numa_alloc_distance") and ": 4 bytes" in line for line in log)


def test_random_tables():
    """Any bytes as SRAT, MADT, SLIT or what leads to them: a boot, or an error of ours, never another."""
    chance = random.Random(7)
    for _ in range(60):
        tables = [
            bytearray(t) for t in (TWO_NODES, madt(0, 1, 2), table(b"SLIT", bytes(12)), table(b"FACP", bytes(240)))
        ]
        for data in tables:
            for _ in range(chance.randrange(4)):
                data[chance.randrange(4, len(data))] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        with value_or_refusal():
            booted((*LOW, HIGH), acpi=[bytes(data) for data in tables])


def test_a_table_of_tables_that_is_anything():
    """RSDP and XSDT with changed bytes: tables are left out, or the guest's own errors come of it."""
    chance = random.Random(8)
    for _ in range(60):
        machine = machine_with(acpi=[TWO_NODES, madt(0)])
        for _ in range(4):
            at = TABLES + chance.choice((chance.randrange(36), 0x100 + chance.randrange(52)))
            machine.memory.write(at, bytes((chance.randrange(256),)))
        with value_or_refusal():
            mm_init(setup_arch(machine, V6_12, IMAGE_SIZE))


def test_many_ranges_cost_no_more_than_a_second():
    """As many ranges as the kernel takes, of two nodes by turns; one more makes it ignore the table."""
    ranges = [(n % 2, 4 * GIB + n * MIB, MIB, 1) for n in range(2046)]
    kernel, _ = booted(acpi=[srat((0, 0, 2 * GIB, 1), *ranges)], e820=(*LOW, (4 * GIB, 2046 * MIB, 1)))
    assert len(kernel.memblock.memory.regions) == 2 + 2046
    _, log = booted(acpi=[srat(*[(0, 0, GIB, 1)] * 2049)])
    assert "too many memblk ranges" in log
    assert "No NUMA configuration found" in log
