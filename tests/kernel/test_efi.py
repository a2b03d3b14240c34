"""The kernel's look at EFI: lines of the map, MMIO that leaves e820, boot services memory."""

from __future__ import annotations

import struct

import pytest

from firmware.memory_descriptor import MemoryDescriptor
from guest.errors import FormatError
from kernel.efi_memmap import efi_md_typeattr_format, memmap_lines

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BOOT_CODE, BOOT_DATA, CONVENTIONAL, MMIO = 3, 4, 7, 11


def given_map(*rows: tuple[int, int, int]) -> dict[str, object]:
    rows = ((CONVENTIONAL, 0x1000, 0xA0000), (CONVENTIONAL, MIB, GIB), *rows)
    return {"efi_map": tuple(MemoryDescriptor.of_range(*row, 0xF) for row in rows), "cmdline": ""}


@pytest.mark.parametrize(
    ("kind", "attribute", "text"),
    [
        (7, 0xF, "[Conventional|   |  |  |  |  |  |  |  |  |  |   |WB|WT|WC|UC]"),
        (0, 0, "[Reserved    |   |  |  |  |  |  |  |  |  |  |   |  |  |  |  ]"),
        (5, 1 << 63 | 0xF, "[Runtime Code|RUN|  |  |  |  |  |  |  |  |  |   |WB|WT|WC|UC]"),
        (15, 0, "[Unaccepted  |   |  |  |  |  |  |  |  |  |  |   |  |  |  |  ]"),
        (11, 0x8000000000027011, "[MMIO        |RUN|  |  |  |  |  |XP|RP|WP|RO|UCE|  |  |  |UC]"),
        (14, 0x1D8000, "[Persistent  |   |HP|MR|CC|SP|NV|  |  |  |  |   |  |  |  |  ]"),
        (0, 0x10000000000000F, "[Reserved    |attr=0x010000000000000f]"),
        (16, 0xF, "[type=16     |   |  |  |  |  |  |  |  |  |  |   |WB|WT|WC|UC]"),
        (0x70000001, 0xF, "[type=1879048193|   |  |  |  |  |  |  |  |  |  |   |WB|WT|WC|UC"),  # cut at 63 characters
    ],
)
def test_type_and_attributes(kind, attribute, text):
    """The kernel's columns, cut as its buffer of 64 characters cuts them."""
    assert efi_md_typeattr_format(MemoryDescriptor(kind, 0, 1, attribute)) == text


def test_lines_of_a_map():
    """Numbers have two digits or more, ends are inclusive, sizes are whole MiB."""
    rows = [MemoryDescriptor(7, n << 32, 0x1FF + n, 0xF) for n in range(101)]
    lines = list(memmap_lines(rows))
    columns = "[Conventional|   |  |  |  |  |  |  |  |  |  |   |WB|WT|WC|UC]"
    assert lines[0] == f"efi: mem00: {columns} range=[0x0000000000000000-0x00000000001fefff] (1MB)"
    assert lines[100] == f"efi: mem100: {columns} range=[0x0000006400000000-0x0000006400262fff] (2MB)"


@pytest.mark.parametrize(("cmdline", "shown"), [("efi=debug", 27), ("efi=noruntime,debug", 27), ("", 0), ("debug", 0)])
def test_efi_debug(new_boot, log, cmdline, shown):
    """The map is printed if the command line asks for it, after the tables and the removed MMIO."""
    lines = log(new_boot("setup-arch", cmdline=cmdline), "setup-arch")
    assert sum(line.startswith("efi: mem") for line in lines) == shown
    at = lines.index("efi: EFI v2.7 by unaccepted")
    assert lines[at + 1 : at + 4] == [
        "efi: ACPI 2.0=0x7f76c230 SMBIOS 3.0=0x7eaa05a0 ",
        "efi: Remove mem25: MMIO range=[0xffc00000-0xffffffff] (4MB) from e820 map",
        "e820: remove [mem 0xffc00000-0xffffffff] reserved",
    ]


@pytest.mark.parametrize(("size", "removed"), [(256 * KIB, True), (256 * KIB - 4 * KIB, False), (GIB, True)])
def test_mmio_leaves_e820_from_256_kib_on(new_boot, size, removed):
    """Large MMIO ranges leave e820 for PCI to use; small ones may be flash or the like and stay reserved."""
    boot = new_boot("setup-arch", **given_map((MMIO, 4 * GIB, 4 * GIB + size)))
    entries = [(entry.addr, entry.type) for entry in boot.kernel.e820]
    assert ((4 * GIB, 2) in entries) != removed


def test_map_buffer_is_reserved(new_boot):
    """The map that the stub left is read in its order, and its buffer is taken."""
    boot = new_boot("setup-arch")
    at, size = struct.unpack_from("<II", boot.boot_params, 0x1D0)
    assert len(boot.kernel.efi_memmap) == size // 48 == 27
    assert boot.kernel.efi_memmap[-1] == MemoryDescriptor(15, 4 * GIB, 2 * GIB >> 12, 0)
    assert boot.kernel.memblock.is_reserved(at)
    assert boot.kernel.memblock.is_reserved(at + size - 1)


@pytest.mark.parametrize(
    ("offset", "fmt", "value", "text"),
    [
        (0x1C8, "I", 0, "DescriptorSize"),
        (0x1C8, "I", 39, "DescriptorSize"),
        (0x1C8, "I", 41, "a multiple of 41"),
        (0x1D4, "I", 1343, "a multiple of 48"),
    ],
)
def test_map_that_does_not_follow_its_layout(new_boot, offset, fmt, value, text):
    """A descriptor size below 40, or one that does not divide the map, is refused."""
    boot = new_boot("decompress")
    boot.physical.write(boot.machine.regs.rsi + offset, struct.pack("<" + fmt, value))
    with pytest.raises(FormatError, match=text):
        boot.run("setup-arch")


@pytest.mark.parametrize(("offset", "value"), [(0x1D0, 0), (0x1D4, 0xFFFF_FFFF)])
def test_map_that_is_not_there(new_boot, offset, value):
    """A null pointer, or a map of absurd size, leaves the kernel without one; e820 serves it well enough."""
    boot = new_boot("decompress")
    boot.physical.write(boot.machine.regs.rsi + offset, struct.pack("<I", value))
    boot.run()
    assert boot.kernel.efi_memmap == []


def test_without_a_system_table(new_boot, log):
    """A null system table pointer: not a word about EFI."""
    boot = new_boot("decompress", cmdline="")
    boot.physical.write(boot.machine.regs.rsi + 0x1C4, bytes(4))
    boot.run("setup-arch")
    assert not [line for line in log(boot, "setup-arch") if line.startswith("efi:")]


def test_boot_services_memory_is_kept_and_freed_later(new_boot):
    """Boot services code and data are reserved in setup_arch and are the page allocator's after mm_init."""
    rows = ((BOOT_DATA, GIB, GIB + 8 * MIB), (BOOT_CODE, GIB + 8 * MIB, GIB + 9 * MIB))
    boot = new_boot("setup-arch", **given_map(*rows))
    kernel = boot.kernel
    assert set(kernel.boot_services) >= {(GIB, GIB + 8 * MIB), (GIB + 8 * MIB, GIB + 9 * MIB)}
    assert kernel.memblock.is_reserved(GIB)
    assert kernel.memblock.is_reserved(GIB + 9 * MIB - 1)
    boot.run("mm-init")
    assert not kernel.memblock.is_reserved(GIB)
    managed = sum(zone.managed_pages for zone in kernel.allocator.zones)
    assert managed == sum(pages.size for pages in kernel.memblock.free_all(kernel.max_pfn))


def test_boot_services_memory_that_somebody_has(new_boot):
    """A range that the kernel's image or a reservation touches is left alone: it is not freed later."""
    rows = [(CONVENTIONAL, 0x1000, 0xA0000), (BOOT_DATA, MIB, 256 * MIB), (CONVENTIONAL, 256 * MIB, GIB)]
    efi_map = tuple(MemoryDescriptor.of_range(*row, 0xF) for row in rows)
    boot = new_boot("decompress", efi_map=efi_map, cmdline="")
    image = boot.machine.regs.rip
    assert image > 256 * MIB
    boot.machine.regs.rip = 16 * MIB  # a loader that puts the kernel there
    boot.run("setup-arch")
    assert (MIB, 256 * MIB) not in boot.kernel.boot_services
    assert not boot.kernel.memblock.is_reserved(128 * MIB)
