"""SMBIOS: entry point and structures, read by a parser that knows only DSP0134's layout."""

from __future__ import annotations

import struct

import pytest

from firmware.smbios import build_smbios
from guest.ranges import RangeSet

GIB, TIB = 1 << 30, 1 << 40
RUNTIME_DATA = 6


def structures(read, entry):
    """(type, formatted bytes, strings) of each structure; entry point and table must be as the specification has it."""
    point = read(entry, 24)
    anchor, _, length, major, minor, _, revision, zero, size, table = struct.unpack("<5sBBBBBBBIQ", point)
    assert (anchor, length, major, minor, revision, zero) == (b"_SM3_", 24, 3, 0, 1, 0)
    assert sum(point) % 256 == 0
    data, out, handles = read(table, size), [], set()
    while data:
        kind, length, handle = struct.unpack_from("<BBH", data)
        assert length >= 4
        assert handle not in handles
        handles.add(handle)
        end = data.index(b"\0\0", length) + 2
        text = data[length : end - 2]
        out.append((kind, data[:length], text.split(b"\0") if text else []))
        data = data[end:]
    assert out[-1][0] == 127
    return out


def build(efi, ram):
    return structures(efi.memory.read, build_smbios(efi.services.arena, RangeSet(ram)))


def test_a_machine_has_what_the_specification_asks_for(efi):
    """BIOS, system, chassis, processor, memory, boot status and the end, with lengths of SMBIOS 3.0."""
    found = build(efi, [(0, 2 * GIB), (4 * GIB, 6 * GIB)])
    assert [(kind, len(data)) for kind, data, _ in found] == [
        (0, 24), (1, 27), (3, 22), (4, 48), (16, 23), (17, 40), (19, 31), (19, 31), (32, 11), (127, 4),
    ]  # fmt: skip
    names = {kind: strings for kind, _, strings in found}
    assert names[0] == [b"unaccepted", b"0", b"01/01/1970"]
    assert names[1] == [b"unaccepted", b"trust domain"]
    for kind, data, strings in found:
        assert all(string for string in strings), kind
        assert all(data[at] <= len(strings) for at in STRINGS.get(kind, ())), kind


STRINGS = {0: (4, 5, 8), 1: (4, 5, 6, 7, 25, 26), 3: (4, 6, 7, 8), 4: (4, 7, 16, 32, 33, 34), 17: (16, 17, 23, 24, 25)}
"""Where string numbers stand (DSP0134, section 7)."""


@pytest.mark.parametrize(
    "ram, capacity, size",
    [
        ([(0, GIB)], (GIB >> 10, 0), (1024, 0)),
        ([(0, 32 * GIB - (2 << 20))], ((32 * GIB - (2 << 20)) >> 10, 0), (0x7FFE, 0)),
        ([(0, 32 * GIB)], (32 * GIB >> 10, 0), (0x7FFF, 32 * 1024)),
        ([(0, 2 * TIB)], (0x8000_0000, 2 * TIB), (0x7FFF, 2 << 20)),
    ],
)
def test_sizes_that_do_not_fit_have_another_field(efi, ram, capacity, size):
    """Type 16 counts KiB, type 17 MiB, up to what their first fields can hold."""
    found = {kind: data for kind, data, _ in build(efi, ram)}
    assert (struct.unpack_from("<I", found[16], 7)[0], struct.unpack_from("<Q", found[16], 15)[0]) == capacity
    assert (struct.unpack_from("<H", found[17], 12)[0], struct.unpack_from("<I", found[17], 28)[0]) == size


def test_ranges_are_kib_or_bytes(efi):
    """Type 19 has first and last KiB, or -1 twice and bytes above 4 TiB."""
    rows = [data for kind, data, _ in build(efi, [(0, 2 * GIB), (4 * TIB, 5 * TIB)]) if kind == 19]
    assert struct.unpack_from("<II", rows[0], 4) == (0, (2 * GIB >> 10) - 1)
    assert struct.unpack_from("<IIHBQQ", rows[1], 4) == ((1 << 32) - 1, (1 << 32) - 1, 0x1000, 1, 4 * TIB, 5 * TIB - 1)


def test_very_many_ranges_are_cut(efi):
    """A map of thousands of pieces still has a table."""
    found = build(efi, [(n << 21, (n << 21) + 4096) for n in range(70_000)])
    assert sum(kind == 19 for kind, _, _ in found) == 256


def test_it_is_a_configuration_table_in_runtime_memory(make_boot):
    """The system table names it by SMBIOS3_TABLE_GUID; entry point and table outlive boot services."""
    boot = make_boot("firmware")
    read = boot.physical.read
    count, table = struct.unpack("<QQ", read(boot.machine.regs.rdx + 104, 16))
    rows = dict(struct.unpack("<16sQ", read(table + 24 * n, 24)) for n in range(count))
    entry = rows[bytes.fromhex("4415fdf294972c4a992ee5bbcf20e394")]
    assert structures(read, entry)[4][1][7:11] == struct.pack("<I", 4 * GIB >> 10)
    for address in (entry, struct.unpack("<Q", read(entry + 16, 8))[0]):
        (kind,) = [d.type for d in boot.firmware_map.descriptors() if d.start <= address < d.end]
        assert kind == RUNTIME_DATA


@pytest.fixture
def make_boot():
    """A function that boots 4 GiB up to a stage."""
    from bootstub.sample_kernel import sample_bzimage
    from tools.pipeline import Boot, BootConfig

    def make(until: str) -> Boot:
        boot = Boot(BootConfig(sample_bzimage()))
        boot.run(until)
        return boot

    return make
