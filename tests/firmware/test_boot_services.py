"""Boot and runtime services, called through the pointers in the tables that stand in guest memory."""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise

import pytest

from guest.errors import GuestPanic
from guest.trace import ServiceCall
from tests.firmware.conftest import type_at

SUCCESS = 0
INVALID_PARAMETER, UNSUPPORTED, BUFFER_TOO_SMALL = (1 << 63 | n for n in (2, 3, 5))
OUT_OF_RESOURCES, NOT_FOUND = (1 << 63 | n for n in (9, 14))
ANY, MAX_ADDRESS, ADDRESS = 0, 1, 2
LOADER_DATA, FREE = 2, 7
PAGE = 0x1000
SCRATCH = 0x10_0000
GUIDS = [f"{n:08x}-0000-4000-8000-00000000000{n:x}" for n in range(1, 9)]


def check_crc(efi, table: int, size: int) -> None:
    """The CRC32 of a table is that of its bytes with a zero in its place."""
    data = bytearray(efi.memory.read(table, size))
    (found,) = struct.unpack_from("<I", data, 16)
    data[16:20] = bytes(4)
    assert found == zlib.crc32(data)


def test_tables_are_found_from_the_system_table(efi):
    """Each table has its signature, revision 2.70, its size and a CRC32, and lies in memory of the right type."""
    for table, signature, size, kind in (
        (efi.system_table, b"IBI SYST", 120, 6),
        (efi.boot_services, b"BOOTSERV", 376, 4),
        (efi.runtime_services, b"RUNTSERV", 136, 6),
    ):
        header = struct.unpack("<8sIII", efi.memory.read(table, 20))
        assert header[:3] == (signature, 2 << 16 | 70, size)
        check_crc(efi, table, size)
        assert type_at(efi, table) == kind
        assert table % 8 == 0
    con_out = efi.memory.read_uint(efi.system_table + 64, 8)
    assert type_at(efi, con_out) == 4
    around = efi.memory.read(efi.system_table + 40, 24) + efi.memory.read(efi.system_table + 72, 16)
    assert around == bytes(40)  # no other console
    vendor = efi.memory.read_uint(efi.system_table + 24, 8)
    assert efi.memory.read(vendor, 22) == "unaccepted\0".encode("utf-16-le")


@pytest.mark.parametrize("table, count, kind", [("boot_services", 44, 3), ("runtime_services", 14, 5)])
def test_every_pointer_leads_to_a_gate(efi, table, count, kind):
    """Each function pointer is the address of a gate of its own, with an instruction that stops a real CPU."""
    pointers = struct.unpack(f"<{count}Q", efi.memory.read(getattr(efi, table) + 24, 8 * count))
    assert len(set(pointers)) == count
    for pointer in pointers:
        assert efi.machine.gates.at(pointer) is not None
        assert efi.memory.read(pointer, 2) == b"\x0f\x0b"
        assert type_at(efi, pointer) == kind


@pytest.mark.parametrize("name, args", [("GetTime", 2), ("SetTime", 1), ("UpdateCapsule", 3)])
def test_a_service_that_is_not_offered_says_so(efi, name, args):
    """It answers EFI_UNSUPPORTED, and the trace has the call by its name."""
    assert efi.call(name, *range(args)) == UNSUPPORTED
    assert efi.machine.trace.records[-1].event == ServiceCall(name, tuple(range(args)), UNSUPPORTED)


# AllocatePages, FreePages


def test_any_pages_are_the_highest_free_ones(efi):
    """AllocateAnyPages takes the top of the highest free range, and the next call the pages below."""
    top = max(d.end for d in efi.services.memory_map.descriptors() if d.type == FREE)
    status, address = efi.allocate_pages(ANY, LOADER_DATA, 3)
    assert (status, address) == (SUCCESS, top - 3 * PAGE)
    assert efi.allocate_pages(ANY, LOADER_DATA, 1) == (SUCCESS, top - 4 * PAGE)
    assert type_at(efi, address) == LOADER_DATA
    efi.memory.write(address, bytes(3 * PAGE))


@pytest.mark.parametrize(
    "limit, address",
    [
        (0x40_0FFF, 0x40_0000),
        (0x40_1000, 0x40_0000),
        (0x40_0FFE, 0x3F_F000),
        ((1 << 64) - 1, None),
        (0x1FFF, 0x1000),
    ],
)
def test_max_address_is_the_last_byte_allowed(efi, limit, address):
    """AllocateMaxAddress keeps the last byte of the pages at or below the given address."""
    highest = max(d.end for d in efi.services.memory_map.descriptors() if d.type == FREE) - PAGE
    found = efi.allocate_pages(MAX_ADDRESS, LOADER_DATA, 1, limit)
    assert found == (SUCCESS, highest if address is None else address)


def test_nothing_below_the_limit_is_out_of_resources(efi):
    """If nothing fits, the status says so and *Memory keeps its value."""
    assert efi.allocate_pages(MAX_ADDRESS, LOADER_DATA, 1, 0xFFE) == (OUT_OF_RESOURCES, 0xFFE)
    assert efi.allocate_pages(ANY, LOADER_DATA, 1 << 20, 5) == (OUT_OF_RESOURCES, 5)
    assert efi.allocate_pages(ANY, LOADER_DATA, (1 << 64) - 1, 5) == (OUT_OF_RESOURCES, 5)


def test_a_given_address_is_taken_once(efi):
    """AllocateAddress gives the very pages if they are free, and EFI_NOT_FOUND if one of them is not."""
    assert efi.allocate_pages(ADDRESS, LOADER_DATA, 2, 0x40_0000) == (SUCCESS, 0x40_0000)
    for address, pages in ((0x40_0000, 1), (0x40_1000, 2), (0x3F_F000, 2), (0x3F_F000, 3)):
        assert efi.allocate_pages(ADDRESS, LOADER_DATA, pages, address)[0] == NOT_FOUND
    assert efi.allocate_pages(ADDRESS, LOADER_DATA, 1, 0x40_2000)[0] == SUCCESS


@pytest.mark.parametrize(
    "address, pages",
    [(0x40_0800, 1), (0x40_0000, 0), (0xE000_0000, 1), (1 << 32, 1), (1 << 52, 1), ((1 << 64) - PAGE, 1),
     ((1 << 64) - PAGE, 2), (0x40_0000, 1 << 52), (0x40_0000, (1 << 64) - 1), (0x80_0000, 1)],
)  # fmt: skip
def test_an_address_that_is_not_free_memory_is_not_found(efi, address, pages):
    """Parts of pages, no pages, MMIO, unaccepted memory, and ranges that wrap are not found."""
    key = efi.key()
    assert efi.allocate_pages(ADDRESS, LOADER_DATA, pages, address) == (NOT_FOUND, address)
    assert efi.key() == key


@pytest.mark.parametrize(
    "kind, memory_type, pages",
    [(3, LOADER_DATA, 1), (1 << 32, LOADER_DATA, 1), (ANY, FREE, 1), (ANY, 14, 1), (ANY, 15, 1), (ANY, 16, 1),
     (ADDRESS, 15, 1), (MAX_ADDRESS, FREE, 1)],
)  # fmt: skip
def test_wrong_types_are_invalid_parameters(efi, kind, memory_type, pages):
    """An unknown kind of allocation, and memory types that nobody can allocate, change nothing."""
    key = efi.key()
    assert efi.allocate_pages(kind, memory_type, pages, 0x40_0000) == (INVALID_PARAMETER, 0x40_0000)
    assert efi.key() == key


def test_pages_are_given_back(efi):
    """FreePages() makes any part of an allocation free again, and only once."""
    before = efi.memory_map()[5]
    _, address = efi.allocate_pages(ANY, LOADER_DATA, 4)
    assert efi.call("FreePages", address + PAGE, 2) == SUCCESS
    assert [type_at(efi, address + n * PAGE) for n in range(4)] == [LOADER_DATA, FREE, FREE, LOADER_DATA]
    assert efi.call("FreePages", address, 4) == NOT_FOUND
    assert efi.call("FreePages", address, 1) == SUCCESS
    assert efi.call("FreePages", address + 3 * PAGE, 1) == SUCCESS
    assert efi.memory_map()[5] == before


@pytest.mark.parametrize(
    "address, pages, status",
    [(0x40_0000, 1, NOT_FOUND), (1 << 32, 1, NOT_FOUND), ((1 << 64) - PAGE, 1, NOT_FOUND),
     (0, (1 << 64) - 1, NOT_FOUND), (0x40_0000, 0, INVALID_PARAMETER), (0x800, 1, INVALID_PARAMETER)],
)  # fmt: skip
def test_what_was_not_allocated_cannot_be_freed(efi, address, pages, status):
    """Free, foreign and impossible pages are not found; parts of a page and no page are invalid parameters."""
    key = efi.key()
    assert efi.call("FreePages", address, pages) == status
    assert efi.key() == key


# GetMemoryMap, ExitBootServices


def test_a_buffer_that_is_too_small_learns_the_size(efi):
    """Without room the size comes back, nothing is stored in the buffer; with exactly that room it is filled."""
    for room in (0, 48):
        status, size, key, stride, version, buffer = efi.memory_map(room)
        assert (status, stride, version) == (BUFFER_TOO_SMALL, 48, 1)
        assert buffer == b"\xa5" * len(buffer)
    assert size % 48 == 0
    assert efi.memory_map(size - 1)[0] == BUFFER_TOO_SMALL
    status, exact, same_key, _, _, buffer = efi.memory_map(size)
    assert (status, exact, same_key) == (SUCCESS, size, key)
    assert b"\xa5" not in buffer[:4]
    assert buffer[size:] == b"\xa5" * (len(buffer) - size)


def test_the_map_in_the_buffer_is_the_firmwares(efi):
    """Descriptors stand 48 bytes apart, with the map's types, ranges and attributes, and no virtual address."""
    _, size, _, stride, _, buffer = efi.memory_map()
    rows = [struct.unpack_from("<I4xQQQQ", buffer, at) for at in range(0, size, stride)]
    wanted = [(d.type, d.start, 0, d.pages, d.attribute) for d in efi.services.memory_map.descriptors()]
    assert rows == wanted


def test_descriptors_may_stand_further_apart(efi):
    """Another DescriptorSize is told to the caller, and is the distance in the buffer."""
    _, size, _, _, _, buffer = efi.memory_map()
    efi.services.descriptor_size = 64
    status, wide_size, _, stride, _, wide = efi.memory_map()
    assert (status, stride, wide_size) == (SUCCESS, 64, size // 48 * 64)
    rows = [wide[at : at + 40] for at in range(0, wide_size, 64)]
    assert rows == [buffer[at : at + 40] for at in range(0, size, 48)]


def test_nothing_is_allocated_above_the_limit(efi):
    """Where the firmware allocates only so far up, pages and pools are the highest below that."""
    efi.services.top = 0x100_0000
    assert efi.allocate_pages(ANY, LOADER_DATA, 2) == (SUCCESS, 0xFF_E000)
    assert efi.allocate_pages(MAX_ADDRESS, LOADER_DATA, 1, (1 << 64) - 1) == (SUCCESS, 0xFF_D000)
    assert efi.allocate_pool(LOADER_DATA, 1) == (SUCCESS, 0xFF_C000)


def test_optional_results_may_be_null(efi):
    """Null pointers for key, descriptor size and version are left out."""
    efi.memory.write_uint(SCRATCH, 0x8000, 8)
    assert efi.call("GetMemoryMap", SCRATCH, SCRATCH + PAGE, 0, 0, 0) == SUCCESS
    assert efi.memory.read(SCRATCH + 8, 24) == bytes(24)


def test_a_stale_key_does_not_exit(efi):
    """ExitBootServices() with the key of an older map is refused, boot services stay, and the new key works."""
    key = efi.key()
    efi.allocate_pool(LOADER_DATA, 1)
    assert efi.call("ExitBootServices", 0, key) == INVALID_PARAMETER
    fresh = efi.key()
    assert fresh != key
    assert efi.call("ExitBootServices", 0, fresh) == SUCCESS


def test_after_a_failed_exit_only_map_and_exit_are_left(efi):
    """Once ExitBootServices() failed, another boot service kills the guest; the map, and another try, do not."""
    assert efi.call("ExitBootServices", 0, efi.key() + 1) == INVALID_PARAMETER
    with pytest.raises(GuestPanic) as died:
        efi.call("AllocatePool", LOADER_DATA, 1, SCRATCH)
    assert died.value.text == "boot service AllocatePool called after ExitBootServices failed"
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS


def test_the_key_survives_what_changes_no_map(efi):
    """Reading the map, refused calls and configuration tables leave the key as it is."""
    key = efi.key()
    efi.memory_map(0)
    efi.allocate_pages(ADDRESS, LOADER_DATA, 1, 1 << 32)
    efi.call("FreePages", 0x40_0000, 1)
    efi.call("FreePool", 0x1234)
    efi.call("InstallConfigurationTable", efi.guid(GUIDS[0]), 0x5000)
    assert efi.key() == key


def test_boot_services_are_gone_after_exit(efi):
    """A boot service after ExitBootServices() kills the guest; runtime services still answer."""
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS
    with pytest.raises(GuestPanic) as died:
        efi.call("FreePool", 0)
    assert died.value.text == "boot service FreePool called after ExitBootServices"
    with pytest.raises(GuestPanic, match="SetTimer"):
        efi.call("SetTimer", 0, 0, 0)
    assert efi.call("GetVariable", 0, 0, 0, 0, 0) == INVALID_PARAMETER
    assert efi.call("GetTime", 0, 0) == UNSUPPORTED


# AllocatePool, FreePool


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1])
def test_pools_do_not_overlap_and_come_back(efi, size):
    """Each pool has room of its own in memory of its type, and freeing it restores the map."""
    before = efi.memory_map()[5]
    pools = [efi.allocate_pool(LOADER_DATA, size) for _ in range(3)]
    assert {status for status, _ in pools} == {SUCCESS}
    addresses = sorted(address for _, address in pools)
    assert all(high - low >= max(size, 1) for low, high in pairwise(addresses))
    assert {type_at(efi, address + size - 1 if size else address) for address in addresses} == {LOADER_DATA}
    for address in addresses:
        assert efi.call("FreePool", address) == SUCCESS
        assert efi.call("FreePool", address) == INVALID_PARAMETER
    assert efi.memory_map()[5] == before


@pytest.mark.parametrize(
    "memory_type, size, status",
    [(FREE, 1, INVALID_PARAMETER), (14, 1, INVALID_PARAMETER), (15, 1, INVALID_PARAMETER),
     (16, 1, INVALID_PARAMETER),
     (LOADER_DATA, 1 << 32, OUT_OF_RESOURCES), (LOADER_DATA, (1 << 64) - 1, OUT_OF_RESOURCES)],
)  # fmt: skip
def test_a_pool_that_cannot_be_is_refused(efi, memory_type, size, status):
    """A type that nobody can allocate or more than there is leaves the buffer's address alone."""
    assert efi.allocate_pool(memory_type, size) == (status, 0)


# Configuration tables


def test_configuration_tables_are_installed_replaced_and_removed(efi):
    """The table has each GUID once, the count and CRC32 follow, and a null pointer takes an entry out."""
    for n, guid in enumerate(GUIDS[:3]):
        assert efi.call("InstallConfigurationTable", efi.guid(guid), 0x1000 * (n + 1)) == SUCCESS
        check_crc(efi, efi.system_table, 120)
    assert efi.tables() == [(GUIDS[0], 0x1000), (GUIDS[1], 0x2000), (GUIDS[2], 0x3000)]
    assert efi.call("InstallConfigurationTable", efi.guid(GUIDS[1]), 0x9000) == SUCCESS
    assert efi.tables() == [(GUIDS[0], 0x1000), (GUIDS[1], 0x9000), (GUIDS[2], 0x3000)]
    assert efi.call("InstallConfigurationTable", efi.guid(GUIDS[0]), 0) == SUCCESS
    assert efi.tables() == [(GUIDS[1], 0x9000), (GUIDS[2], 0x3000)]
    check_crc(efi, efi.system_table, 120)
    assert efi.call("InstallConfigurationTable", efi.guid(GUIDS[0]), 0) == NOT_FOUND
    assert type_at(efi, efi.memory.read_uint(efi.system_table + 112, 8)) == 6


def test_a_full_configuration_table_is_out_of_resources(efi):
    """There is room for 32 tables; a further one is refused and the others stay."""
    for n in range(32):
        guid = f"{n:08x}-0000-4000-8000-000000000000"
        assert efi.call("InstallConfigurationTable", efi.guid(guid), n + 1) == SUCCESS
    before = efi.tables()
    assert efi.call("InstallConfigurationTable", efi.guid(GUIDS[0].replace("4000", "5000")), 1) == OUT_OF_RESOURCES
    assert efi.tables() == before
    assert len(before) == 32
