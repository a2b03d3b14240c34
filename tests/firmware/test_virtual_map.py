"""SetVirtualAddressMap(), as a kernel calls it once it has left boot services."""

from __future__ import annotations

import struct
import zlib

import pytest

from firmware.tables import RUNTIME_SERVICES
from guest.trace import ServiceCall

SUCCESS, INVALID_PARAMETER, UNSUPPORTED, NOT_FOUND = 0, 1 << 63 | 2, 1 << 63 | 3, 1 << 63 | 14
RUNTIME = 1 << 63
MOVED = 0xFFFF_FFFE_0000_0000
MAP_AT, STRIDE = 0x20_0000, 48
VENDOR, RUNTIME_SERVICES_AT, TABLES = 24, 88, 112


def leave(efi) -> list[tuple[int, int, int]]:
    """Exit boot services; returns type, start and pages of what stays the firmware's."""
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS
    return [(d.type, d.start, d.pages) for d in efi.services.memory_map.descriptors() if d.attribute & RUNTIME]


def move(efi, ranges, stride=STRIDE, version=1) -> int:
    """Call the service with ``ranges``, each ``MOVED`` higher."""
    rows = [struct.pack("<IIQQQQ", kind, 0, start, start + MOVED, pages, RUNTIME) for kind, start, pages in ranges]
    efi.memory.write(MAP_AT, b"".join(row.ljust(stride, b"\xa5") for row in rows))
    return efi.call("SetVirtualAddressMap", len(rows) * stride, stride, version, MAP_AT)


def pointers(efi) -> list[int]:
    """The pointers that are to be converted: the runtime services, then three of the system table."""
    runtime = [efi.memory.read_uint(efi.runtime_services + 24 + 8 * n, 8) for n in range(len(RUNTIME_SERVICES))]
    return runtime + [efi.memory.read_uint(efi.system_table + at, 8) for at in (VENDOR, RUNTIME_SERVICES_AT, TABLES)]


def test_pointers_move_and_services_answer_there(efi):
    """All pointers are converted, the tables sealed anew, and a service answers at both of its addresses."""
    ranges, before = leave(efi), pointers(efi)
    assert move(efi, ranges) == SUCCESS
    after = pointers(efi)
    assert after == [pointer + MOVED for pointer in before]
    number = [name for name, _ in RUNTIME_SERVICES].index("GetVariable")
    for address in (before[number], after[number]):
        assert efi.machine.call(address, 0, 0, 0, 0, 0) == INVALID_PARAMETER
        assert efi.machine.trace.records[-1].event == ServiceCall("GetVariable", (0,) * 5, INVALID_PARAMETER)
    for table, size in ((efi.system_table, 120), (efi.runtime_services, 136)):
        data = bytearray(efi.memory.read(table, size))
        crc = int.from_bytes(data[16:20], "little")
        data[16:20] = bytes(4)
        assert crc == zlib.crc32(data)


def test_only_once_and_only_after_boot_services(efi):
    """Before ExitBootServices(), and a second time, it is refused."""
    assert move(efi, [(5, 0, 1)]) == UNSUPPORTED
    ranges = leave(efi)
    assert move(efi, ranges) == SUCCESS
    number = [name for name, _ in RUNTIME_SERVICES].index("SetVirtualAddressMap")
    assert efi.machine.call(pointers(efi)[number], STRIDE * len(ranges), STRIDE, 1, MAP_AT) == UNSUPPORTED


def test_a_map_that_lacks_something_changes_nothing(efi):
    """If a pointer lies in no range of the map, it is refused, and all pointers stay; then it can be repeated."""
    ranges, before = leave(efi), pointers(efi)
    for kind in (5, 6):
        assert move(efi, [row for row in ranges if row[0] != kind]) == NOT_FOUND
        assert pointers(efi) == before
    assert move(efi, ranges) == SUCCESS


@pytest.mark.parametrize("wrong", [{"stride": 0}, {"stride": 39}, {"version": 2}, {"size": 100}, {"size": 1 << 40}])
def test_arguments_that_make_no_map(efi, wrong):
    """A descriptor that is too small, another version, and a size that is no map's are refused."""
    leave(efi)
    values = {"size": 96, "stride": STRIDE, "version": 1} | wrong
    assert efi.call("SetVirtualAddressMap", *values.values(), MAP_AT) == INVALID_PARAMETER


def test_identity_map(efi):
    """A kernel that keeps the physical addresses keeps the pointers."""
    ranges, before = leave(efi), pointers(efi)
    rows = [struct.pack("<IIQQQQ", kind, 0, start, start, pages, RUNTIME).ljust(48) for kind, start, pages in ranges]
    efi.memory.write(MAP_AT, b"".join(rows))
    assert efi.call("SetVirtualAddressMap", 48 * len(rows), 48, 1, MAP_AT) == SUCCESS
    assert pointers(efi) == before
    assert efi.call("GetNextVariableName", 0, 0, 0) == INVALID_PARAMETER
