"""The firmware stage as a whole: from the HOB list to the kernel's entry point."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest

from firmware.launch import launch_td
from firmware.load_image import FwCfg
from firmware.memory_descriptor import MemoryDescriptor, check_map, unpack_map
from firmware.ovmf_layout import BUILT_IN
from firmware.platform_init import firmware
from guest.errors import FormatError, GuestPanic, MemoryFault
from guest.ranges import Range, RangeSet
from tdx.machine_type import MachineType

SZ_2G, SZ_4G = 1 << 31, 1 << 32
SECTIONS = [(0x800, 0x1000, 0x800, b"k" * 0x800)]
ACPI_20 = "8868e871-e4f1-11d3-bc22-0080c73c8881"


def boot(lab, kernel, *, given_map=None, private=(), **fw_cfg):
    """Launch and run the firmware; returns the machine."""
    launch_td(lab.host, BUILT_IN, private, lab.machine.regs)
    firmware(lab.machine, FwCfg(bytes(kernel), **fw_cfg), given_map)
    return lab.machine


def memory_map_of(machine) -> list[MemoryDescriptor]:
    """GetMemoryMap() through the table that RDX leads to."""
    boot_services = machine.memory.read_uint(machine.regs.rdx + 96, 8)
    get_memory_map = machine.memory.read_uint(boot_services + 56, 8)
    scratch = machine.regs.rsp - 0x4000
    machine.memory.write_uint(scratch, 0x3000, 8)
    assert machine.call(get_memory_map, scratch, scratch + 0x100, 0, 0, 0) == 0
    size = machine.memory.read_uint(scratch, 8)
    return unpack_map(machine.memory.read(scratch + 0x100, size), 48, at=scratch)


def test_the_kernel_is_entered_as_an_efi_application(make_lab, pe_image):
    """RIP is the entry point, RCX the image's handle, RDX the system table, RSP the top of 128 KiB of stack."""
    machine = boot(make_lab(4 << 30), pe_image(SECTIONS, AddressOfEntryPoint=0x1020), cmdline="quiet")
    regs = machine.regs
    assert regs.rip == 0x100_1020
    assert machine.memory.read(regs.rdx, 8) == b"IBI SYST"
    assert regs.rsp % 16 == 8  # the return address is on the stack
    with pytest.raises(GuestPanic, match="returned to the firmware"):
        machine.call(machine.memory.read_uint(regs.rsp, 8))
    bottom = regs.rsp + 8 - 0x2_0000
    machine.memory.write(bottom, bytes(0x2_0000))
    (stack,) = [d for d in memory_map_of(machine) if d.start <= bottom < d.end]
    assert stack.type == 4
    assert stack.end >= regs.rsp
    boot_services = machine.memory.read_uint(regs.rdx + 96, 8)
    machine.memory.write(regs.rsp - 16, UUID("5b1b31a1-9562-11d2-8e3f-00a0c969723b").bytes_le)
    handle_protocol = machine.memory.read_uint(boot_services + 152, 8)
    assert machine.call(handle_protocol, regs.rcx, regs.rsp - 16, regs.rsp - 24) == 0


@pytest.mark.parametrize("memory", [1 << 28, SZ_2G, 4 << 30, 64 << 30])
def test_the_map_covers_all_ram_once(make_lab, pe_image, memory):
    """RAM below 4 GiB is accepted and in the map, RAM above stands last, as one unaccepted descriptor."""
    lab = make_lab(memory)
    machine = boot(lab, pe_image(SECTIONS))
    found = memory_map_of(machine)
    check_map(found, "GetMemoryMap")
    ram = MachineType().ram(memory)
    high = [MemoryDescriptor(15, part.start, part.size >> 12, 0) for part in ram.within(SZ_4G, 1 << 52)]
    assert [d for d in found if d.type == 15] == found[len(found) - len(high) :] == high
    low = RangeSet(ram.within(0, SZ_4G))
    assert list(lab.host.sept.mapped(0, 0xE000_0000)) == list(low)
    assert not lab.host.sept.mapped(SZ_4G)
    low.remove(0xA_0000, 0x10_0000)
    assert RangeSet((d.start, d.end) for d in found if d.end <= 0xE000_0000) == low
    with pytest.raises(MemoryFault):
        machine.memory.read(SZ_4G, 1)


def test_acpi_is_in_the_configuration_table(make_lab, pe_image):
    """The first configuration table is the RSDP; SMBIOS is the other one."""
    machine = boot(make_lab(4 << 30), pe_image(SECTIONS))
    count, at = struct.unpack("<QQ", machine.memory.read(machine.regs.rdx + 104, 16))
    assert count == 2
    guid, rsdp = struct.unpack("<16sQ", machine.memory.read(at, 24))
    assert str(UUID(bytes_le=guid)) == ACPI_20
    assert machine.memory.read(rsdp, 8) == b"RSD PTR "


def test_firmware_says_what_it_accepts(make_lab, pe_image):
    """Each unaccepted range below 4 GiB is announced, in the order of the HOB list."""
    lab = make_lab(4 << 30)
    boot(lab, pe_image(SECTIONS))
    assert lab.prints() == [
        "AcceptMemory under address of 4G",
        "MpAccept : 0x0 - 0x800000 (0x800000)",
        "MpAccept : 0x806000 - 0x809000 (0x3000)",
        "MpAccept : 0x80d000 - 0x810000 (0x3000)",
        "MpAccept : 0x820000 - 0x80000000 (0x7f7e0000)",
    ]


GIVEN = [
    MemoryDescriptor(15, 0x2000_0000, 0x1000, 0),
    MemoryDescriptor(7, 0x100_0000, 0x4000, 0xF),
    MemoryDescriptor(0, 0xA_0000, 0x60, 0),
    MemoryDescriptor(4, 0x800_0000, 0x100, 0xF),
    MemoryDescriptor(6, 0x900_0000, 0x40, 0xF | 1 << 63),
    MemoryDescriptor(9, 0xA00_0000, 0x10, 0xF),
    MemoryDescriptor(3, 0xB00_0000, 0x10, 0xF),
    MemoryDescriptor(5, 0xC00_0000, 0x10, 0xF | 1 << 63),
]


def test_a_given_map_is_published_and_nothing_accepted(make_lab, pe_image):
    """With a map of its own the firmware accepts nothing; owned ranges come first, in the given order."""
    lab = make_lab(1 << 30)
    private = [Range(d.start, d.end) for d in GIVEN if d.type not in (0, 15)]
    machine = boot(lab, pe_image(SECTIONS, ImageBase=0), given_map=GIVEN, private=private)
    assert lab.accepts() == []
    assert lab.prints() == []
    found = memory_map_of(machine)
    assert found[-2:] == [GIVEN[0], GIVEN[2]]
    assert found[0] == MemoryDescriptor(7, 0x100_0000, found[0].pages, 0xF)
    assert RangeSet((d.start, d.end) for d in found) == RangeSet((d.start, d.end) for d in GIVEN)
    kinds = {(d.type, d.start) for d in found}
    assert {(d.type, d.start) for d in GIVEN} <= kinds
    assert {kind for kind, start in kinds if 0x100_0000 < start < 0x500_0000} == {1, 4}


def test_a_given_map_without_room_stops_the_firmware(make_lab, pe_image):
    """A map without free memory has no room for the tables."""
    lab = make_lab(1 << 30)
    with pytest.raises(GuestPanic, match="left for tables"):
        boot(lab, pe_image(SECTIONS), given_map=[MemoryDescriptor(0, 0x1000, 1, 0)])


def test_too_little_ram_is_refused(make_lab, pe_image):
    """A machine without room for the firmware's own ranges is told so by the HOB list."""
    with pytest.raises(FormatError, match="RAM below 4 GiB"):
        boot(make_lab(32 << 20), pe_image(SECTIONS))


def test_the_same_machine_boots_to_the_same_bytes(make_lab, pe_image):
    """Two runs with the same input have the same trace, registers and memory."""
    runs = []
    for _ in range(2):
        lab = make_lab(1 << 28)
        machine = boot(lab, pe_image(SECTIONS), cmdline="quiet", initrd=b"initrd")
        contents = [machine.memory.read(low, high - low) for low, high in machine_ranges(lab)]
        runs.append((machine.trace.records, machine.regs, machine.clock.ns, machine.memory.writes, contents))
    assert runs[0] == runs[1]


def machine_ranges(lab):
    """The top 32 MiB of a 256 MiB machine, and what lies at 8 MiB."""
    assert lab.host.sept.mapped().covers(0, 1 << 28)
    return [(0xE00_0000, 1 << 28), (0x80_0000, 0x100_4000)]
