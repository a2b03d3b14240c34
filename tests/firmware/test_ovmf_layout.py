"""OVMF's use of low memory."""

from __future__ import annotations

import pytest

from firmware.hob import Resource
from firmware.memory_descriptor import check_map
from firmware.ovmf_layout import BUILT_IN_SECTIONS, accepted_ram, low_memory, mmio
from guest.errors import FormatError
from guest.ranges import RangeMap, RangeSet
from tdx.machine_type import MachineType

UNACCEPTED, SYSTEM, RESERVED = 7, 0, 5
RUNTIME = 1 << 63
SZ_1M, SZ_2G, SZ_4G = 1 << 20, 1 << 31, 1 << 32


def resources_of(ram: RangeSet) -> list[Resource]:
    """RAM as a host describes it, with a range in it that the host added."""
    added = RangeSet([(0x80_0000, 0x82_0000)])
    found = [Resource(UNACCEPTED, *gap) for part in ram for gap in added.gaps(*part)]
    return [*found, Resource(SYSTEM, 0x80_0000, 0x82_0000)]


@pytest.mark.parametrize("mib", [128, 256, 1024, 2048, 2815, 2816, 4096, 65536])
def test_the_map_covers_low_ram_exactly(mib):
    """Every page of RAM below 4 GiB but the VGA and BIOS hole is in one descriptor, and nothing else is."""
    ram = MachineType().ram(mib << 20)
    descriptors = low_memory(accepted_ram(resources_of(ram)))
    check_map([*descriptors, *mmio(True)], "low memory")
    assert descriptors == sorted(descriptors, key=lambda d: d.start)
    wanted = RangeSet(ram.within(0, SZ_4G))
    wanted.remove(0xA_0000, SZ_1M)
    assert RangeSet((d.start, d.end) for d in descriptors) == wanted
    for d in descriptors:
        assert d.attribute == (0xF | RUNTIME if d.type in (5, 6) else 0xF)


DEBIAN_E820 = [
    (0x0010_0000, 0x7EAA_0000, "usable"),
    (0x7EAA_0000, 0x7EBA_2000, "reserved"),
    (0x7EBA_2000, 0x7F4E_C000, "usable"),
    (0x7F4E_C000, 0x7F76_C000, "reserved"),
    (0x7F76_C000, 0x7F77_E000, "ACPI data"),
    (0x7F77_E000, 0x7F7F_E000, "ACPI NVS"),
    (0x7F7F_E000, 0x7FEF_4000, "usable"),
    (0x7FEF_4000, 0x7FF7_8000, "reserved"),
    (0x7FF7_8000, 0x8000_0000, "ACPI NVS"),
]
"""dmesg of a 2 GiB q35 machine with Debian's OVMF 2022.11 and its 6.12 kernel, without the ranges at 8 MiB."""

E820_NAME = {0: "reserved", 5: "reserved", 6: "reserved", 9: "ACPI data", 10: "ACPI NVS"}


def test_the_top_of_low_ram_is_as_in_a_real_boot():
    """As the kernel prints it, what lies at the top of 2 GiB is what Debian's OVMF leaves there."""
    found: RangeMap[str | None] = RangeMap(None)
    for d in low_memory(MachineType().ram(SZ_2G)):
        found.assign(d.start, d.end, E820_NAME.get(d.type, "usable"))
    found.assign(0x80_0000, 0x90_0000, "usable")
    assert list(found.runs(SZ_1M, SZ_2G)) == DEBIAN_E820


def test_low_pages_have_the_types_of_the_metadata():
    """Page 0 is boot services code; page tables, work area and mailbox are NVS; the rest below them is free."""
    found = [(d.type, d.start, d.end) for d in low_memory(MachineType().ram(SZ_2G)) if d.start < 0x80_D000]
    assert found == [
        (3, 0, 0x1000), (7, 0x1000, 0xA_0000), (7, 0x10_0000, 0x80_0000), (10, 0x80_0000, 0x80_6000),
        (7, 0x80_6000, 0x80_B000), (10, 0x80_B000, 0x80_D000),
    ]  # fmt: skip


def test_flash_and_configuration_space_are_listed():
    """PCIe configuration space, if there is any, is reserved; the flash is MMIO that the runtime services use."""
    assert mmio(False) == mmio(True)[1:]
    assert [(d.type, d.start, d.end, d.attribute) for d in mmio(True)] == [
        (0, 0xE000_0000, 0xF000_0000, 0), (11, 0xFFC0_0000, SZ_4G, RUNTIME)
    ]  # fmt: skip


def test_sections_of_the_built_in_firmware_are_those_of_the_4m_build():
    """Code and variables fill the flash below 4 GiB; the rest lies in the MEMFD, without overlap."""
    assert [(s.address, s.memory_size, s.type, s.attributes) for s in BUILT_IN_SECTIONS] == [
        (0xFFC8_4000, 0x37_C000, 0, 1), (0xFFC0_0000, 0x8_4000, 1, 0), (0x81_0000, 0x1_0000, 3, 0),
        (0x80_B000, 0x2000, 3, 0), (0x80_9000, 0x2000, 2, 0), (0x80_0000, 0x6000, 3, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(0, 32 << 20)],
        [(0, 0x80_D000)],
        [(SZ_4G, 2 * SZ_4G)],
        [(0x1000, SZ_2G)],  # page 0 is missing
        [(0, 0x80_0000), (0x82_0000, SZ_2G)],  # the MEMFD is missing
        [(0, SZ_2G - (16 << 20)), (SZ_2G, SZ_2G + SZ_1M)],  # the highest part has no room
        [(0, SZ_1M), (SZ_2G, SZ_2G + SZ_1M)],
    ],
)
def test_ram_without_room_for_the_firmware_is_refused(ranges):
    """If RAM lacks one of the firmware's own ranges, the HOB list is refused and no map claims what is no RAM."""
    with pytest.raises(FormatError) as refused:
        low_memory(RangeSet(ranges))
    assert (refused.value.what, refused.value.source) == ("RAM below 4 GiB", "TD HOB list")


@pytest.mark.parametrize("end", [32 << 20, 0x2EE_F000])
def test_a_small_machine_is_told_how_much_it_needs(end):
    """If only the size is wrong, the error says where RAM ends and where it should."""
    with pytest.raises(FormatError) as refused:
        low_memory(RangeSet([(0, end)]))
    error = refused.value
    assert (error.at, error.found) == (end, f"an end at {end:#x}")
    assert error.expected == "at least 0x2ef0000 for the firmware"
    assert low_memory(RangeSet([(0, 0x2EF_0000)]))[-1].end == 0x2EF_0000


def test_other_resources_are_no_ram():
    """MMIO, reserved and unknown resources do not enter the map."""
    resources = resources_of(MachineType().ram(SZ_2G))
    others = [Resource(kind, 0x9000_0000, 0x9100_0000) for kind in (1, RESERVED, 99)]
    assert accepted_ram([*resources, *others]) == accepted_ram(resources)
