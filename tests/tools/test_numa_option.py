"""NUMA nodes of a machine, from the command line and from maps, down to what a real kernel reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware.srat import NodeRange
from guest.ranges import RangeSet
from guest.trace import Print
from tdx.machine_type import MachineType
from tools.config import add_options, boot_config
from tools.numa import Numa, numa_distances, numa_nodes, parse_numa
from tools.pipeline import REAL_KERNEL_CMDLINE, Boot, BootConfig

GIB, PAGE = 1 << 30, 1 << 12
LOW = (0, 0, 0xA0000), (0, 1 << 20, 2 * GIB)


def nodes_of(*words: str) -> list[tuple[int, ...]]:
    """Nodes of the boot that these options describe; a hot-plug window has a fourth element."""
    import argparse

    parser = argparse.ArgumentParser()
    add_options(parser)
    nodes = boot_config(parser.parse_args(words)).nodes
    return [(n.node, n.start, n.end, *([1] if n.hotplug else [])) for n in nodes]


@pytest.mark.parametrize(
    "words, nodes",
    [
        ([], []),
        (["--numa", "1"], [*LOW, (0, 4 * GIB, 6 * GIB)]),
        (["--numa", "2"], [*LOW, (1, 4 * GIB, 6 * GIB)]),
        (["--numa", "1G,3G"], [(0, 0, 0xA0000), (0, 1 << 20, GIB), (1, GIB, 2 * GIB), (1, 4 * GIB, 6 * GIB)]),
        (["--numa", "3G,1G"], [*LOW, (0, 4 * GIB, 5 * GIB), (1, 5 * GIB, 6 * GIB)]),
        (["--numa", "2,hotplug=8G"], [*LOW, (1, 4 * GIB, 6 * GIB), (1, 6 * GIB, 14 * GIB, 1)]),
        (["--numa", "640K,1408K,2046M", "--memory", "2G"],
         [(0, 0, 0xA0000), (1, 1 << 20, 2 << 20), (2, 2 << 20, 2 * GIB)]),
        (["--numa", "1,hotplug=1G", "--memory", "1G"], [(0, 0, 0xA0000), (0, 1 << 20, GIB), (0, 4 * GIB, 5 * GIB, 1)]),
    ],
)  # fmt: skip
def test_memory_is_divided_as_qemu_divides_it(words, nodes):
    """Nodes are full one after the other, over the hole below 4 GiB; video memory is nobody's."""
    assert nodes_of(*words) == nodes


@pytest.mark.parametrize(
    "text, found",
    [("0", "'0'"), ("129", "'129'"), ("", "''"), ("1G,", "'1G,'"), ("2,2", "0 MiB in 2 nodes"), ("x", "'x'"),
     ("2,hotplug=", "'2,hotplug='"), ("2,hotplug=1", "'2,hotplug=1'"), ("1G,1G", "2048 MiB in 2 nodes"),
     ("1001G", "1025024 MiB in 1 nodes"), ("2,hotplug=4E", "'2,hotplug=4E'"), ("٣", "'٣'"),
     ("hotplug=8G", "'hotplug=8G'"), ("2,hotplug=1G,hotplug=1G", "'2,hotplug=1G,hotplug=1G'"),
     ("2,dist=9", "'2,dist=9'"), ("2,dist=256", "'2,dist=256'"), ("2,dist=٢٢", "'2,dist=٢٢'"),
     ("2,dist=0-0:10", "'2,dist=0-0:10'"), ("2,dist=0-1", "'2,dist=0-1'"), ("2,dist=0-2:21", "dist=0-2"),
     ("2,dist=21,dist=22", "'2,dist=21,dist=22'"), ("2,far=1", "'2,far=1'")],
)  # fmt: skip
def test_nodes_that_make_no_sense_are_refused(refused, text, found):
    """One line that says what was found."""
    if text == "2,2":
        found = "'2,2'"  # 2 bytes are no page
    assert refused("boot", f"--numa={text}").startswith(f"--numa: found {found}, expected ")


def test_numa_needs_a_machine(refused, file):
    """A map that was brought along says its own nodes."""
    path = file("map.json", "[]")
    assert refused("boot", "--numa", "2", "--efi-map", path).startswith("--numa: found with --efi-map")


@pytest.mark.parametrize(
    "text, distances",
    [
        ("2", ()),
        ("2,hotplug=8G", ()),
        ("2,dist=21", ((10, 21), (21, 10))),
        ("3,dist=0-2:40,dist=21", ((10, 21, 40), (21, 10, 21), (40, 21, 10))),
        ("3,hotplug=8G,dist=2-1:255,dist=0-1:12", ((10, 12, 20), (12, 10, 255), (20, 255, 10))),
        ("2,dist=0-1:11,dist=1-0:12", ((10, 12), (12, 10))),
    ],
)
def test_distances_are_there_if_they_are_given(text, distances):
    """One for all pairs, others for pairs of nodes, to and fro; 20 is what nobody says, and no table if nothing is."""
    numa = parse_numa(text)
    assert numa_distances(numa, numa_nodes(numa, MachineType().ram(4 * GIB))) == distances


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=9))
def test_every_page_of_ram_has_one_node(pages):
    """Whatever the sizes, each node has its share, in ascending order, and all RAM but video memory is divided."""
    ram = MachineType().ram(sum(pages) * PAGE)
    nodes = numa_nodes(Numa(tuple(n * PAGE for n in pages)), ram)
    hidden = RangeSet([(0xA0000, 1 << 20)])
    covered = RangeSet()
    for n in nodes:
        assert ram.covers(n.start, n.end)
        assert not covered.overlaps(n.start, n.end)
        assert not hidden.overlaps(n.start, n.end)
        covered.add(n.start, n.end)
    ram.remove(0xA0000, 1 << 20)
    assert covered == ram
    assert [n.node for n in nodes] == sorted(n.node for n in nodes)
    assert [n.start for n in nodes] == sorted(n.start for n in nodes)


PIECES = [
    "",
    "2",
    "0",
    "1G",
    "3K",
    "x",
    "hotplug=",
    "hotplug=8G",
    "dist=",
    "dist=21",
    "dist=0-1:31",
    "dist=0-999:1",
    "=",
]


@given(st.text(alphabet="0123456789KMGT,hotplug=", max_size=20) | st.lists(st.sampled_from(PIECES)).map(",".join))
def test_any_text_is_nodes_or_refused(text):
    """Whatever is written there."""
    from guest.errors import FormatError

    try:
        numa = parse_numa(text)
    except FormatError:
        return
    assert numa.count or numa.sizes


MAP = """
[[descriptors]]
type = "Conventional"
start = 0
size = "640K"
[[descriptors]]
type = "Conventional"
start = "1M"
size = "2047M"
[[descriptors]]
type = "Unaccepted"
start = "4G"
size = "2G"
[[nodes]]
node = 0
start = 0
size = "2G"
[[nodes]]
node = {node}
start = "4G"
size = "2G"
hotplug = true
"""


def test_nodes_of_a_map_reach_the_boot(command, refused, file):
    """A description's nodes become rows of the SRAT; a node that no table can hold is refused."""
    assert nodes_of("--efi-map", str(file("two.toml", MAP.format(node=1)))) == [
        (0, 0, 2 * GIB),
        (1, 4 * GIB, 6 * GIB, 1),
    ]
    path = file("many.toml", MAP.format(node=128))
    assert refused("boot", "--efi-map", path) == (
        f"{path}: node 1: found node 128, an end at 0x180000000, expected a node below 128, an end up to 2^52 "
        "[ACPI 6.4, 5.2.16]"
    )


def test_a_real_kernel_reads_the_nodes(debian_kernel: Path) -> None:
    """The real kernel prints each row of the SRAT, and allocates data for two nodes."""
    nodes = numa_nodes(parse_numa("2,hotplug=8G"), MachineType().ram(4 * GIB))
    assert nodes[-1] == NodeRange(1, 6 * GIB, 14 * GIB, hotplug=True)
    config = BootConfig(
        debian_kernel.read_bytes(), nodes=nodes, run="kernel", cmdline=REAL_KERNEL_CMDLINE, until="Zone ranges:"
    )
    boot = Boot(config)
    boot.run()
    lines = [r.event.text for r in boot.trace.records if isinstance(r.event, Print) and r.stage == "kernel"]
    rows = [line.split("SRAT: ")[1] for line in lines if "ACPI: SRAT: Node" in line]
    assert rows == [
        "Node 0 PXM 0 [mem 0x00000000-0x0009ffff]",
        "Node 0 PXM 0 [mem 0x00100000-0x7fffffff]",
        "Node 1 PXM 1 [mem 0x100000000-0x17fffffff]",
        "Node 1 PXM 1 [mem 0x180000000-0x37fffffff] hotplug",
    ]
    found = [line.split("NODE_DATA(")[1][0] for line in lines if "NODE_DATA(" in line]
    assert found == ["0", "1"]
    assert any("SMBIOS 3.0.0 present." in line for line in lines)
    assert any("DMI: unaccepted trust domain, BIOS 0 01/01/1970" in line for line in lines)
