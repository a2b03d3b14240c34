"""What the host builds before the TD runs."""

from __future__ import annotations

import struct

import pytest

from firmware.hob import Resource, read_hob_list
from firmware.launch import launch_td, sections_for_map
from firmware.memory_descriptor import MemoryDescriptor
from firmware.ovmf_layout import BUILT_IN
from firmware.tdvf import parse_tdvf
from guest.errors import FormatError, MemoryFault
from guest.ranges import Range, RangeSet
from tdx.events import PageAdd

UNACCEPTED, SYSTEM = 7, 0
SZ_4G = 1 << 32

HOBS_OF_4G = [
    Resource(UNACCEPTED, 0, 0x80_0000),
    Resource(SYSTEM, 0x80_0000, 0x80_6000),
    Resource(UNACCEPTED, 0x80_6000, 0x80_9000),
    Resource(SYSTEM, 0x80_9000, 0x80_B000),
    Resource(SYSTEM, 0x80_B000, 0x80_D000),
    Resource(UNACCEPTED, 0x80_D000, 0x81_0000),
    Resource(SYSTEM, 0x81_0000, 0x82_0000),
    Resource(UNACCEPTED, 0x82_0000, 0x8000_0000),
    Resource(UNACCEPTED, SZ_4G, 6 << 30),
]


def test_the_hob_list_says_what_is_there(make_lab):
    """Each added section in RAM is system memory, the rest is unaccepted; RCX and R8 lead to the list."""
    lab = make_lab(4 << 30)
    resources = launch_td(lab.host, BUILT_IN, [], lab.machine.regs)
    assert resources == HOBS_OF_4G
    assert lab.machine.regs.rcx == lab.machine.regs.r8 == 0x80_9000
    assert read_hob_list(lab.machine.memory, 0x80_9000) == HOBS_OF_4G


def test_only_the_sections_are_mapped(make_lab):
    """The host adds the sections' pages, zero but for the HOB list, and leaves all other RAM absent."""
    lab = make_lab(4 << 30)
    launch_td(lab.host, BUILT_IN, [], lab.machine.regs)
    assert list(lab.host.sept.mapped()) == [
        (0x80_0000, 0x80_6000), (0x80_9000, 0x80_D000), (0x81_0000, 0x82_0000), (0xFFC0_0000, SZ_4G)
    ]  # fmt: skip
    assert lab.machine.memory.read(0x81_0000, 0x1_0000) == bytes(0x1_0000)
    with pytest.raises(MemoryFault, match="FREE"):
        lab.machine.memory.read(0x1000, 1)
    added = [r.event for r in lab.machine.trace.records if isinstance(r.event, PageAdd)]
    assert [event.what for event in added] == ["BFV", "CFV", "TempMem", "TempMem", "TD_HOB", "TempMem"]


def test_sections_with_data_are_copied(make_lab, tdvf_image):
    """Code and variables of an image are in guest memory, filled up with zeros."""
    rows = [
        (0x1000, 0x6800, 0xFFFF_9000, 0x7000, 0, 1),
        (0, 0x1000, 0xFFFF_8000, 0x1000, 1, 0),
        (0, 0, 0x9000, 0x2000, 2, 0),
    ]
    image = bytes(tdvf_image(rows))
    lab = make_lab(1 << 28)
    launch_td(lab.host, parse_tdvf(image), [], lab.machine.regs)
    assert lab.machine.memory.read(0xFFFF_8000, 0x8000) == image[:0x7800].ljust(0x8000, b"\0")
    assert lab.machine.regs.rcx == 0x9000


@pytest.mark.parametrize("kind", [list, tuple, RangeSet, iter])
def test_private_ranges_are_added_as_system_memory(make_lab, kind):
    """Memory of an earlier life is mapped and zero, and the HOB list says so, also around the sections."""
    lab = make_lab(4 << 30)
    private = kind([Range(0x10_0000, 0x81_1000), Range(SZ_4G, SZ_4G + 0x1000)])
    resources = launch_td(lab.host, BUILT_IN, private, lab.machine.regs)
    assert [(r.type, r.start, r.end) for r in resources if r.start < 0x80_6000 or r.start >= SZ_4G] == [
        (UNACCEPTED, 0, 0x10_0000), (SYSTEM, 0x10_0000, 0x80_0000), (SYSTEM, 0x80_0000, 0x80_6000),
        (SYSTEM, SZ_4G, SZ_4G + 0x1000), (UNACCEPTED, SZ_4G + 0x1000, 6 << 30),
    ]  # fmt: skip
    assert list(lab.host.sept.mapped()) == [(0x10_0000, 0x82_0000), (0xFFC0_0000, SZ_4G + 0x1000)]


@pytest.mark.parametrize("memory", [0, 0x80_0000, 0x80_A000, 0x81_F000])
def test_a_section_outside_ram_is_refused(make_lab, memory):
    """A host without RAM for a section refuses the firmware, and nothing was added."""
    lab = make_lab(memory)
    with pytest.raises(FormatError) as refused:
        launch_td(lab.host, BUILT_IN, [], lab.machine.regs)
    assert refused.value.what in ("TDVF section TempMem", "TDVF section TD_HOB")
    assert (refused.value.found, refused.value.expected) == ("no RAM there", "RAM for the whole section")
    assert lab.machine.trace.records == []


def test_a_hob_list_that_does_not_fit_is_refused(make_lab):
    """More resources than the section has room for are a FormatError with both sizes."""
    lab = make_lab(4 << 30)
    private = [Range(0x100_0000 + n * 0x2000, 0x100_1000 + n * 0x2000) for n in range(85)]
    with pytest.raises(FormatError) as refused:
        launch_td(lab.host, BUILT_IN, private, lab.machine.regs)
    size = 56 + 48 * (9 + 2 * 85) + 8
    error = refused.value
    assert (error.what, error.at, error.found) == ("TD HOB list", 0x80_9000, f"{size} bytes")
    assert error.expected == "at most 8192"


def test_a_map_of_ones_own_has_room_for_the_hob_list():
    """The first conventional range of 64 KiB that is not at address 0 takes the HOB list, and there is no image."""
    rows = [(7, 0, 64), (7, 0x20_0000, 15), (4, 0x30_0000, 64), (7, 0x90_0000, 16), (7, 0x40_0000, 64)]
    tdvf = sections_for_map([MemoryDescriptor(kind, start, pages, 0xF) for kind, start, pages in rows])
    assert [(s.address, s.memory_size, s.type) for s in tdvf.sections] == [(0x90_0000, 0x1_0000, 2)]
    assert tdvf.image == b""
    with pytest.raises(FormatError, match="no conventional memory of 64 KiB"):
        sections_for_map([MemoryDescriptor(kind, start, pages, 0xF) for kind, start, pages in rows[:3]])


def test_the_list_ends_where_the_handoff_says(make_lab):
    """The handoff HOB's end pointer is the address behind the end HOB."""
    lab = make_lab(4 << 30)
    launch_td(lab.host, BUILT_IN, [], lab.machine.regs)
    end = struct.unpack("<Q", lab.machine.memory.read(0x80_9000 + 48, 8))[0]
    assert end == 0x80_9000 + 56 + 48 * len(HOBS_OF_4G) + 8
    assert lab.machine.memory.read(end - 8, 8) == bytes.fromhex("ffff080000000000")
