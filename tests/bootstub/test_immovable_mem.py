"""ACPI as the decompressor reads it: the RSDP, and memory that stays."""

from __future__ import annotations

import struct

import pytest

from bootstub.acpi import MAX_IMMOVABLE, get_rsdp_addr, immovable_mem
from bootstub.boot_params import BOOT_PARAMS
from bootstub.slots import MemVector
from guest.errors import GuestPanic
from guest.records import GuestRecord

AT, GIB = 0x200_0000, 1 << 30
HOT = 2


def affinity(start: int, size: int, flags: int = 0, kind: int = 1, length: int = 40) -> bytes:
    """A memory affinity structure."""
    return struct.pack("<BBIHQQII8x", kind, length, 0, 0, start, size, 0, flags | 1)


def rsdp(xsdt: int, rsdt: int = 0, revision: int = 2) -> bytes:
    """An RSDP with good checksums."""
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"TESTER", revision, rsdt, 36, xsdt, 0))
    data[8] = -sum(data[:20]) % 256
    data[32] = -sum(data) % 256
    return bytes(data)


@pytest.fixture
def guest(new_boot):
    """``guest(structures, line)``: what stays according to a SRAT of these structures, found through the XSDT."""
    boot = new_boot("efi-stub")
    memory = boot.machine.memory
    params = GuestRecord(memory, boot.machine.regs.rsi, BOOT_PARAMS)

    def find(structures: bytes, line: bytes = b"") -> list[MemVector]:
        memory.write(AT, rsdp(AT + 0x100, AT + 0x200))
        memory.write(AT + 0x100, struct.pack("<4sI28xQQ", b"XSDT", 52, AT, AT + 0x300))
        memory.write(AT + 0x200, struct.pack("<4sI28xI", b"RSDT", 40, AT))
        memory.write(AT + 0x300, struct.pack("<4sI40x", b"SRAT", 48 + len(structures)) + structures)
        params["acpi_rsdp_addr"] = AT
        return immovable_mem(memory, params, line)

    find.boot, find.params = boot, params
    return find


def test_what_is_not_hot_pluggable_stays(guest):
    """Ranges of memory that are not hot-pluggable and not empty, in the table's order; other structures are skipped."""
    structures = affinity(4 * GIB, GIB) + affinity(0, GIB, HOT) + affinity(0, 0) + affinity(8, 9, 0, kind=0, length=40)
    assert guest(structures + affinity(0, 3 * GIB)) == [MemVector(4 * GIB, GIB), MemVector(0, 3 * GIB)]


@pytest.mark.parametrize(
    ("line", "found"), [(b"acpi=off", 0), (b"acpi=rsdt", 0), (b"acpi=noirq", 1), (b"acpi_rsdp=2000000", 1)]
)
def test_options(guest, line, found):
    """acpi=off hides the table, acpi=rsdt looks into the other list, where this one is not."""
    assert len(guest(affinity(0, GIB), line)) == found


def test_tables_that_say_nothing(guest):
    """A structure without length, or too many of them: as if there were none."""
    assert guest(affinity(0, GIB) + bytes(40)) == []
    assert len(guest(b"".join(affinity(n * GIB, GIB) for n in range(MAX_IMMOVABLE - 1)))) == MAX_IMMOVABLE - 1
    assert guest(b"".join(affinity(n * GIB, GIB) for n in range(MAX_IMMOVABLE))) == []


def test_where_the_rsdp_is(guest):
    """boot_params first, then EFI's table, then the BIOS's memory."""
    boot, params = guest.boot, guest.params
    params["acpi_rsdp_addr"] = 0x1234
    assert get_rsdp_addr(boot.machine, params) == 0x1234
    params["acpi_rsdp_addr"] = 0
    assert boot.physical.read(get_rsdp_addr(boot.machine, params), 8) == b"RSD PTR "
    params["efi_info.efi_systab"] = 0
    with pytest.raises(GuestPanic, match="unable to locate system table"):
        get_rsdp_addr(boot.machine, params)


def test_the_rsdp_of_a_bios(guest):
    """In the EBDA or from 0xE0000 on, on a border of 16 bytes, with good checksums."""
    boot, params = guest.boot, guest.params
    params["efi_info.efi_loader_signature"] = params["acpi_rsdp_addr"] = 0
    assert get_rsdp_addr(boot.machine, params) == 0
    boot.physical.write(0xF0010, rsdp(0))
    assert get_rsdp_addr(boot.machine, params) == 0xF0010
    boot.physical.write(0xF0010, rsdp(0)[:-1] + b"\1")
    assert get_rsdp_addr(boot.machine, params) == 0
    boot.physical.write(0x40E, (0x9FC0).to_bytes(2, "little"))
    boot.physical.write(0x9FC20, rsdp(0))
    assert get_rsdp_addr(boot.machine, params) == 0x9FC20
