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
    """RSDP (both lengths), XSDT and WAET have valid checksums, and each points to the next."""
    rsdp_at = build_acpi(efi.services.arena)
    rsdp = efi.memory.read(rsdp_at, 36)
    signature, _, oem, revision, rsdt, length, xsdt_at, _ = struct.unpack("<8sB6sBIIQB3x", rsdp)
    assert (signature, oem, revision, rsdt, length) == (b"RSD PTR ", b"UNACPT", 2, 0, 36)
    assert sum(rsdp[:20]) % 256 == sum(rsdp) % 256 == 0
    assert rsdp[33:] == bytes(3)
    xsdt = efi.memory.read(xsdt_at, 44)
    assert struct.unpack_from("<4sIB", xsdt) == (b"XSDT", 44, 1)
    waet = efi.memory.read(int.from_bytes(xsdt[36:], "little"), 40)
    assert struct.unpack_from("<4sIB", waet) == (b"WAET", 40, 1)
    assert sum(xsdt) % 256 == sum(waet) % 256 == 0
    assert rsdp_at % 16 == 0
    for address in (rsdp_at, xsdt_at):
        (kind,) = [d.type for d in efi.services.memory_map.descriptors() if d.start <= address < d.end]
        assert kind == EfiMemoryType.EfiACPIReclaimMemory


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
