"""Memory, checksums, time, counters; and the tables' own checksums, which a parser of its own verifies."""

from __future__ import annotations

import struct
import zlib

import pytest

from firmware.service_table import NOT_OFFERED
from guest.errors import GuestPanic, MemoryFault
from tests.firmware.conftest import BOOT_SERVICES, RUNTIME_SERVICES

SUCCESS = 0
INVALID_PARAMETER, UNSUPPORTED, NOT_FOUND = (1 << 63 | n for n in (2, 3, 14))
UNACCEPTED = 5 << 30
GUID = "0000000a-0000-4000-8000-000000000001"
SIGNATURES = {b"IBI SYST": 120, b"BOOTSERV": 376, b"RUNTSERV": 136}


def check_tables(efi) -> None:
    """Each table has a known signature, its size, and the CRC32 of its bytes with a zero in its place."""
    for table in (efi.system_table, efi.boot_services, efi.runtime_services):
        signature, _, size, crc, reserved = struct.unpack("<8sIIII", efi.memory.read(table, 24))
        assert (size, reserved) == (SIGNATURES[signature], 0)
        data = efi.memory.read(table, size)
        assert crc == zlib.crc32(data[:16] + bytes(4) + data[20:])


def test_tables_are_sealed_after_each_change(efi):
    """After installing, replacing and removing a table, after the exit, and after the virtual address change."""
    check_tables(efi)
    for table in (0x5000, 0x6000, 0):
        assert efi.call("InstallConfigurationTable", efi.id(GUID), table) == SUCCESS
        check_tables(efi)
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS
    check_tables(efi)
    ranges = [d for d in efi.services.memory_map.descriptors() if d.attribute >> 63]
    rows = [struct.pack("<I4xQQQQ", d.type, d.start, d.start + (1 << 40), d.pages, d.attribute) for d in ranges]
    assert efi.call("SetVirtualAddressMap", 40 * len(rows), 40, 1, efi.put(b"".join(rows))) == SUCCESS
    check_tables(efi)


def test_the_exit_takes_boot_services_out_of_the_system_table(efi):
    """Consoles and boot services are null then; vendor, runtime services and configuration tables stay."""
    before = struct.unpack("<12Q", efi.memory.read(efi.system_table + 24, 96))
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS
    after = struct.unpack("<12Q", efi.memory.read(efi.system_table + 24, 96))
    gone = set(range(2, 8)) | {9}
    assert after == tuple(0 if n in gone else value for n, value in enumerate(before))


def test_a_configuration_table_needs_a_guid(efi):
    """A null GUID is an invalid parameter."""
    assert efi.call("InstallConfigurationTable", 0, 0x5000) == INVALID_PARAMETER


def test_every_service_is_offered_or_listed(efi):
    """Those of the list answer EFI_UNSUPPORTED to anything; each other one answers something else to nulls."""
    nargs = {"Reserved": 0}
    ends = {"ExitBootServices", "ResetSystem", "RaiseTPL", "RestoreTPL"}
    void = {"CopyMem", "SetMem", "Stall", "SetWatchdogTimer"}
    at_runtime = {"SetVirtualAddressMap"}
    for name, offset in (BOOT_SERVICES | RUNTIME_SERVICES).items():
        table = efi.boot_services if name in BOOT_SERVICES else efi.runtime_services
        gate = efi.machine.gates.at(efi.load(table + offset))
        assert gate is not None and gate.name == name
        if name in ends:
            continue
        args = [0] * nargs.get(name, gate.nargs + gate.variadic)
        status = efi.call(name, *args)
        if name in NOT_OFFERED or name in at_runtime:
            assert status == UNSUPPORTED
        elif name in void:
            assert status == SUCCESS
        else:
            assert status == INVALID_PARAMETER, name


@pytest.mark.parametrize("size", [1, 9, 0x1001])
def test_crc32(efi, size):
    """The checksum of zlib, in 32 bits."""
    data = bytes(n * 7 & 0xFF for n in range(size))
    crc = efi.word(0xA5A5_A5A5_0000_0000)
    assert efi.call("CalculateCrc32", efi.put(data), size, crc) == SUCCESS
    assert efi.load(crc) == 0xA5A5_A5A5 << 32 | zlib.crc32(data)


@pytest.mark.parametrize("null", range(3))
def test_crc32_needs_its_arguments(efi, null):
    """Null pointers, and no bytes."""
    args = [efi.word(), 8, efi.word()]
    args[null] = 0
    assert efi.call("CalculateCrc32", *args) == INVALID_PARAMETER


@pytest.mark.parametrize("distance", [-0x1000, -3, 0, 3, 0x1000])
def test_copies_may_overlap(efi, distance):
    """Upwards and downwards the bytes arrive as they were."""
    data = bytes(n % 251 for n in range(0x800))
    source = efi.put(bytes(0x2000) + data + bytes(0x2000)) + 0x2000
    efi.call("CopyMem", source + distance, source, len(data))
    assert efi.memory.read(source + distance, len(data)) == data


def test_large_copies_overlap_too(efi):
    """A copy that is done in pieces does not overwrite what it still has to read."""
    size, source = 0x280_0000, 0x1000_0000
    efi.memory.write(source, b"first")
    efi.memory.write(source + size - 4, b"last")
    for target in (source + 0x1000, source):
        efi.call("CopyMem", target, source if target != source else source + 0x1000, size)
        assert efi.memory.read(target, 5) == b"first"
        assert efi.memory.read(target + size - 4, 4) == b"last"


@pytest.mark.parametrize("value, byte", [(0, b"\0"), (0x5A, b"\x5a"), (0xFF5A, b"\x5a")])
def test_memory_is_set(efi, value, byte):
    """One byte, all over the buffer and nowhere else."""
    at = efi.put(b"\xa5" * 0x30)
    efi.call("SetMem", at + 0x10, 0x10, value)
    assert efi.memory.read(at, 0x30) == b"\xa5" * 0x10 + byte * 0x10 + b"\xa5" * 0x10
    efi.call("SetMem", at, 0, value)
    assert efi.memory.read(at, 1) == b"\xa5"


@pytest.mark.parametrize(
    "name, args",
    [
        ("CopyMem", (UNACCEPTED, 0x10_0000, 8)),
        ("CopyMem", (0x10_0000, UNACCEPTED, 8)),
        ("SetMem", (UNACCEPTED, 8, 1)),
        ("SetMem", (UNACCEPTED, 1 << 50, 0)),
        ("CalculateCrc32", (UNACCEPTED, 8, 0x10_0000)),
        ("CalculateCrc32", (0x10_0000, 8, UNACCEPTED)),
        ("CalculateCrc32", (0x10_0000, 1 << 40, 0x10_0000)),
        ("GetNextMonotonicCount", (UNACCEPTED,)),
        ("GetVariable", (UNACCEPTED, 0x10_0000, 0, 0x10_0000, 0)),
    ],
)
def test_unaccepted_memory_is_fatal(efi, name, args):
    """A service that touches what is not accepted ends the guest as its own access would."""
    with pytest.raises(MemoryFault):
        efi.call(name, *args)


def test_time_passes(efi):
    """Stall() lets virtual time pass, in microseconds, and no other time."""
    before = efi.machine.clock.ns
    assert efi.call("Stall", 1_500_000) == SUCCESS
    assert efi.machine.clock.ns - before == 1_500_000_000


def test_the_watchdog_ends_a_guest_that_is_slow(efi):
    """After its time the next boot service ends the guest; set to 0, it never does."""
    assert efi.call("SetWatchdogTimer", 300, 1, 0, 0) == INVALID_PARAMETER
    assert efi.call("SetWatchdogTimer", 300, 0x1_0000, 0, 0) == SUCCESS
    efi.call("Stall", 299_999_999)
    assert efi.call("SetWatchdogTimer", 0, 0, 0, 0) == SUCCESS
    efi.call("Stall", 300_000_000)
    assert efi.call("SetWatchdogTimer", 5, 0, 0, 0) == SUCCESS
    efi.call("Stall", 5_000_000)
    with pytest.raises(GuestPanic, match="the watchdog timer expired"):
        efi.key()


def test_counts_never_come_again(efi):
    """The low half grows by one; the high half grows, and the low half begins again."""
    at = efi.word()
    counts = []
    for _ in range(2):
        assert efi.call("GetNextMonotonicCount", at) == SUCCESS
        counts.append(efi.load(at))
    assert counts[1] == counts[0] + 1
    high = efi.word(0xA5A5_A5A5_0000_0000)
    assert efi.call("GetNextHighMonotonicCount", high) == SUCCESS
    assert efi.load(high) == 0xA5A5_A5A5 << 32 | (counts[0] >> 32) + 1
    efi.call("GetNextMonotonicCount", at)
    assert efi.load(at) == ((counts[0] >> 32) + 1 << 32) + 1


def test_a_reset_ends_the_guest(efi):
    """ResetSystem() is not come back from; kind and status are told."""
    for kind, name in ((2, "EfiResetShutdown"), (9, "0x9")):
        with pytest.raises(GuestPanic) as died:
            efi.call("ResetSystem", kind, 0, 0, 0)
        assert died.value.text == f"the guest called ResetSystem({name}) with EFI_SUCCESS"


def test_pointers_are_converted_during_the_change(efi):
    """A function of the virtual address change converts pointers, as the map says; at other times none is found."""
    distance, runtime = 0xFFFF_FF00_0000_0000, efi.runtime_services
    pointer, null, found = efi.word(runtime + 8), efi.word(), []

    def change(event: int, context: int) -> int:
        found.append(efi.call("ConvertPointer", 0, pointer))
        found.append(efi.call("ConvertPointer", 0, null))
        found.append(efi.call("ConvertPointer", 1, null))
        found.append(efi.call("ConvertPointer", 0, efi.word(0x1234)))
        return 0

    assert efi.call("CreateEvent", 0x6000_0202, 8, efi.function(change), 0, efi.word()) == SUCCESS
    assert efi.call("ConvertPointer", 0, pointer) == NOT_FOUND
    assert efi.call("ConvertPointer", 0, 0) == INVALID_PARAMETER
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS
    ranges = [d for d in efi.services.memory_map.descriptors() if d.attribute >> 63]
    rows = [struct.pack("<I4xQQQQ", d.type, d.start, d.start + distance, d.pages, d.attribute) for d in ranges]
    assert efi.call("SetVirtualAddressMap", 40 * len(rows), 40, 1, efi.put(b"".join(rows))) == SUCCESS
    assert found == [SUCCESS, INVALID_PARAMETER, SUCCESS, NOT_FOUND]
    assert efi.load(pointer) == runtime + 8 + distance
