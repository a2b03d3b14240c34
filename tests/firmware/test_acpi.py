"""ACPI tables, and the arena that they and other tables are put into."""

from __future__ import annotations

import struct

import pytest

from firmware.acpi import build_acpi
from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from firmware.memory_map import MemoryMap
from guest.errors import GuestPanic

PAGE = 0x1000


def test_acpi_tables_add_up_to_zero(efi):
    """RSDP (both lengths), XSDT and what it points to have valid checksums, and lie in ACPI reclaim memory."""
    rsdp_at = build_acpi(efi.services.arena)
    rsdp = efi.memory.read(rsdp_at, 36)
    signature, _, oem, revision, rsdt, length, xsdt_at, _ = struct.unpack("<8sB6sBIIQB3x", rsdp)
    assert (signature, oem, revision, rsdt, length) == (b"RSD PTR ", b"UNACPT", 2, 0, 36)
    assert sum(rsdp[:20]) % 256 == sum(rsdp) % 256 == 0
    assert rsdp[33:] == bytes(3)
    xsdt = table(efi.memory, xsdt_at)
    assert struct.unpack_from("<4sIB", xsdt) == (b"XSDT", 60, 1)
    pointers = struct.unpack("<3Q", xsdt[36:])
    tables = [table(efi.memory, at) for at in pointers]
    assert [struct.unpack_from("<4sIB", entry) for entry in tables] == [
        (b"FACP", 276, 6), (b"APIC", 52, 5), (b"WAET", 40, 1),
    ]  # fmt: skip
    assert rsdp_at % 16 == 0
    for address in (rsdp_at, xsdt_at, *pointers):
        (kind,) = [d.type for d in efi.services.memory_map.descriptors() if d.start <= address < d.end]
        assert kind == EfiMemoryType.EfiACPIReclaimMemory


def table(memory, at):
    """The bytes of the table at an address, whose checksum must be right."""
    data = memory.read(at, int.from_bytes(memory.read(at + 4, 4), "little"))
    assert sum(data) % 256 == 0
    return data


def tables_of(efi):
    """The tables that a new root table points to, by signature."""
    rsdp = efi.memory.read(build_acpi(efi.services.arena), 36)
    xsdt = table(efi.memory, int.from_bytes(rsdp[24:32], "little"))
    return {entry[:4]: entry for entry in (table(efi.memory, at) for (at,) in struct.iter_unpack("<Q", xsdt[36:]))}


def test_the_madt_has_one_processor_and_no_8259(efi):
    """MADT: the usual APIC address, no PCAT_COMPAT, one enabled local APIC with ID 0, and no I/O APIC."""
    assert tables_of(efi)[b"APIC"][36:].hex() == "0000e0fe" + "00000000" + "0008" + "0000" + "01000000"


def test_the_fadt_says_that_there_is_no_acpi_hardware(efi):
    """FADT: HW_REDUCED_ACPI, no fixed buttons, no SCI, no register blocks; both DSDT pointers are the same."""
    fadt = tables_of(efi)[b"FACP"]
    assert struct.unpack_from("<I", fadt, 112) == (1 << 20 | 1 << 5 | 1 << 4 | 1,)
    (dsdt,) = struct.unpack_from("<I", fadt, 40)
    assert struct.unpack_from("<Q", fadt, 140) == (dsdt,)
    assert fadt[44:109] == bytes(65)
    assert fadt[148:] == bytes(128)


def test_the_dsdt_has_a_serial_port_without_an_interrupt(efi):
    r"""DSDT: Scope(\_SB) with Device(COM1): PNP0501 at 0x3F8 to 0x3FF, typed from ACPI 6.4, 20.2 and 6.4.2.5."""
    fadt = tables_of(efi)[b"FACP"]
    dsdt = table(efi.memory, int.from_bytes(fadt[40:44], "little"))
    assert dsdt[:4] == b"DSDT"
    assert dsdt[36:] == (
        b"\x10\x30\\_SB_" b"\x5b\x82\x28COM1"
        b"\x08_HID\x0c\x41\xd0\x05\x01" b"\x08_UID\x00"
        b"\x08_CRS\x11\x0d\x0a\x0a" b"\x47\x01\xf8\x03\xf8\x03\x01\x08" b"\x79\x00"
    )  # fmt: skip


@pytest.fixture
def memory(make_lab):
    """2 MiB of memory."""
    lab = make_lab(1 << 24)
    lab.host.page_add(0, b"", 2 << 20, "RAM")
    return lab.machine.memory


@pytest.fixture
def memory_map():
    """A page of runtime data, 240 free pages, and 20 pages of runtime data."""
    owned = [(6, 1, 1), (7, 16, 240), (6, 256, 20)]
    return MemoryMap([MemoryDescriptor(kind, page * PAGE, pages, 0xF) for kind, page, pages in owned], [])


@pytest.fixture
def arena(memory, memory_map):
    """An arena over ``memory_map``."""
    return Arena(memory, memory_map)


def test_pieces_lie_behind_each_other_in_memory_of_their_type(arena, memory, memory_map):
    """The first range of the type that is large enough is used from its start, 16-byte aligned."""
    kind, key = EfiMemoryType.EfiRuntimeServicesData, memory_map.key
    at = 256 * PAGE
    assert [arena.put(kind, data) for data in (b"abc", b"d" * 17, b"", b"e")] == [at, at + 16, at + 48, at + 48]
    assert memory.read(at, 49) == b"abc".ljust(16, b"\0") + (b"d" * 17).ljust(32, b"\0") + b"e"
    assert memory_map.key == key


def test_new_pages_are_taken_when_a_room_is_full(arena, memory_map):
    """A type without memory, and one whose room is used up, get new pages from the map."""
    kind = EfiMemoryType.EfiRuntimeServicesData
    arena.reserve(kind, 0xFFF8)
    assert arena.reserve(kind, 16) == 240 * PAGE
    assert arena.reserve(EfiMemoryType.EfiBootServicesData, 0x2_0000) == 208 * PAGE
    types = {d.start // PAGE: (d.type, d.pages) for d in memory_map.descriptors()}
    assert types == {1: (6, 1), 16: (7, 192), 208: (4, 32), 240: (6, 16), 256: (6, 20)}


def test_an_arena_without_memory_stops_the_firmware(arena):
    """If there are no pages left, the firmware panics."""
    with pytest.raises(GuestPanic) as died:
        arena.reserve(EfiMemoryType.EfiBootServicesData, 1 << 21)
    assert died.value.text == "no 0x200000 bytes left for tables of type EfiBootServicesData"
