"""SRAT and SLIT, typed from ACPI 6.4, sections 5.2.16 and 5.2.17."""

from __future__ import annotations

import struct

from firmware.acpi import build_acpi
from firmware.srat import NodeRange, slit, srat

NODES = (NodeRange(3, 0, 0xA0000), NodeRange(3, 1 << 20, 2 << 30), NodeRange(0x1234, 4 << 30, 6 << 30, hotplug=True))


def test_rows_of_memory_have_node_range_and_flags():
    """Type 1, 40 bytes: proximity domain, base and length in two halves each, enabled and perhaps hot-pluggable."""
    body = srat(NODES, [])
    assert body[:12] == b"\x01" + bytes(11)
    assert body[12:52] == (
        b"\x01\x28" b"\x03\0\0\0" b"\0\0" b"\0\0\0\0" b"\0\0\0\0" b"\0\0\x0a\0" b"\0\0\0\0" b"\0\0\0\0"
        b"\x01\0\0\0" + bytes(8)
    )  # fmt: skip
    rows = list(struct.iter_unpack("<BBI2xIIII4xI8x", body[12:]))
    assert rows[1] == (1, 40, 3, 1 << 20, 0, (2 << 30) - (1 << 20), 0, 1)
    assert rows[2] == (1, 40, 0x1234, 0, 1, 2 << 30, 0, 3)


def test_a_processor_has_a_row_by_the_width_of_its_id():
    """Up to ID 254 a local APIC's row with the node in two places; above it an x2APIC's."""
    body = srat([], [(0xFE, 0x123456), (0xFF, 0x123456)])[12:]
    assert body[:16] == b"\x00\x10\x56\xfe\x01\0\0\0\0\x34\x12\0" + bytes(4)
    assert body[16:] == b"\x02\x18\0\0\x56\x34\x12\0\xff\0\0\0\x01\0\0\0" + bytes(8)


def test_distances_stand_row_by_row():
    """The number of localities in 64 bits, then a byte for each pair."""
    assert slit(((10, 31), (21, 10))) == b"\x02" + bytes(7) + bytes([10, 31, 21, 10])


def test_the_root_table_names_them_if_there_are_nodes(efi):
    """SRAT is there with nodes, SLIT with distances, as QEMU has them. The processor is in the lowest node."""
    found = tables(efi.memory, build_acpi(efi.services.arena, NODES, 1, ((10,),)))
    assert list(found) == [b"FACP", b"APIC", b"WAET", b"SRAT", b"SLIT"]
    assert list(tables(efi.memory, build_acpi(efi.services.arena, NODES))) == [b"FACP", b"APIC", b"WAET", b"SRAT"]
    assert found[b"SRAT"][36:] == srat(NODES, [(0, 3)])
    assert found[b"SRAT"][8] == 3
    assert list(tables(efi.memory, build_acpi(efi.services.arena))) == [b"FACP", b"APIC", b"WAET"]


def tables(memory, rsdp):
    """What the root table points to, by signature; checksums must be right."""
    read = memory.read
    root = read(rsdp + 24, 8)
    out = {}
    for at in (int.from_bytes(root, "little"),):
        size = int.from_bytes(read(at + 4, 4), "little")
        for (entry,) in struct.iter_unpack("<Q", read(at + 36, size - 36)):
            data = read(entry, int.from_bytes(read(entry + 4, 4), "little"))
            assert sum(data) % 256 == 0
            out[data[:4]] = data
    return out
