"""setup_arch: its log line by line, what it reserves, the hole that v9 leaves behind the bitmap."""

from __future__ import annotations

import re
import struct

import pytest

from bootstub.sample_kernel import sample_bzimage
from firmware.memory_descriptor import MemoryDescriptor
from guest.errors import FormatError, MemoryFault
from kernel.kernel import Kernel

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CONVENTIONAL, UNACCEPTED = 7, 15
INITRD = b"\x1f\x8b" * 5000

LOW_E820 = [  # OVMF's RAM below 4 GiB; the last map's page moves with what the stub allocated before it
    "BIOS-e820: [mem 0x0000000000000000-0x000000000009ffff] usable",
    "BIOS-e820: [mem 0x0000000000100000-0x00000000007fffff] usable",
    "BIOS-e820: [mem 0x0000000000800000-0x0000000000805fff] ACPI NVS",
    "BIOS-e820: [mem 0x0000000000806000-0x000000000080afff] usable",
    "BIOS-e820: [mem 0x000000000080b000-0x000000000080cfff] ACPI NVS",
    "BIOS-e820: [mem 0x000000000080d000-0x{0:016x}] usable",
    "BIOS-e820: [mem 0x{1:016x}-0x{2:016x}] ACPI data",
    "BIOS-e820: [mem 0x{3:016x}-0x000000007ea9ffff] usable",
    "BIOS-e820: [mem 0x000000007eaa0000-0x000000007eba1fff] reserved",
    "BIOS-e820: [mem 0x000000007eba2000-0x000000007f4ebfff] usable",
    "BIOS-e820: [mem 0x000000007f4ec000-0x000000007f76bfff] reserved",
    "BIOS-e820: [mem 0x000000007f76c000-0x000000007f77dfff] ACPI data",
    "BIOS-e820: [mem 0x000000007f77e000-0x000000007f7fdfff] ACPI NVS",
    "BIOS-e820: [mem 0x000000007f7fe000-0x000000007fef3fff] usable",
    "BIOS-e820: [mem 0x000000007fef4000-0x000000007ff77fff] reserved",
    "BIOS-e820: [mem 0x000000007ff78000-0x000000007fffffff] ACPI NVS",
    "BIOS-e820: [mem 0x00000000e0000000-0x00000000efffffff] reserved",
    "BIOS-e820: [mem 0x00000000ffc00000-0x00000000ffffffff] reserved",
]


def expected_log(cmdline: str, map_page: int, high_end: int, swiotlb: int) -> list[str]:
    """The whole log of setup_arch for a guest under OVMF."""
    pages = (map_page - 1, map_page, map_page + 0xFFF, map_page + 0x1000)
    return [
        f"Command line: {cmdline}",
        "BIOS-provided physical RAM map:",
        *(line.format(*pages) for line in LOW_E820),
        f"BIOS-e820: [mem 0x0000000100000000-{high_end - 1:#018x}] usable",
        "efi: EFI v2.7 by unaccepted",
        "efi: ACPI 2.0=0x7f76c230 SMBIOS 3.0=0x7eaa05a0 ",
        "efi: Remove mem25: MMIO range=[0xffc00000-0xffffffff] (4MB) from e820 map",
        "e820: remove [mem 0xffc00000-0xffffffff] reserved",
        "e820: update [mem 0x00000000-0x00000fff] usable ==> reserved",
        "e820: remove [mem 0x000a0000-0x000fffff] usable",
        f"last_pfn = {high_end >> 12:#x} max_arch_pfn = 0x10000000000",
        "last_pfn = 0x7fef4 max_arch_pfn = 0x10000000000",
        f"software IO TLB: SWIOTLB bounce buffer size adjusted to {swiotlb}MB",
        "Using GB pages for direct mapping",
    ]


ACPI_LINES = [
    "ACPI: Reserving FACP table memory at [mem 0x7f76c060-0x7f76c173]",
    "ACPI: Reserving DSDT table memory at [mem 0x7f76c000-0x7f76c054]",
    "ACPI: Reserving APIC table memory at [mem 0x7f76c180-0x7f76c1b3]",
    "ACPI: Reserving WAET table memory at [mem 0x7f76c1c0-0x7f76c1e7]",
]


@pytest.mark.parametrize(
    ("memory", "high_end", "swiotlb"),
    [(4 * GIB, 6 * GIB, 245), (64 * GIB, 66 * GIB, 1024), (5 * GIB + 12 * KIB, 7 * GIB + 12 * KIB, 306)],
)
def test_log(new_boot, log, memory, high_end, swiotlb):
    """Line by line what setup_arch prints for a guest with memory above 4 GiB."""
    boot = new_boot("setup-arch", memory=memory, cmdline="quiet")
    assert log(boot, "setup-arch") == expected_log("quiet", 0x7D8FA000, high_end, swiotlb) + ACPI_LINES


def test_log_with_an_initrd(new_boot, log):
    """The initrd is announced behind the direct map, and it is reserved to the end of its last page."""
    boot = new_boot("setup-arch", initrd=INITRD, cmdline="quiet")
    ramdisk = ["RAMDISK: [mem 0x7d8f8000-0x7d8fafff]"]
    expected = expected_log("quiet", 0x7D8F6000, 6 * GIB, 245) + ramdisk + ACPI_LINES
    at = expected.index(next(line for line in expected if line.startswith("efi: ACPI 2.0=")))
    expected[at] += "INITRD=0x7d8f7000 "  # LINUX_EFI_INITRD_MEDIA_GUID
    assert log(boot, "setup-arch") == expected
    assert all(boot.kernel.memblock.is_reserved(at) for at in (0x7D8F8000, 0x7D8FA70F, 0x7D8FAFFF))
    assert boot.physical.read(0x7D8F8000, len(INITRD)) == INITRD


def test_log_below_4g(new_boot, log):
    """A guest with no memory above 4 GiB has one last_pfn, and nothing to accept."""
    boot = new_boot("setup-arch", memory=GIB)
    lines = log(boot, "setup-arch")
    assert [line for line in lines if line.startswith("last_pfn")] == [
        "last_pfn = 0x3fef4 max_arch_pfn = 0x10000000000"
    ]
    assert boot.kernel.unaccepted.range_contains_unaccepted_memory(0, 4 * GIB) is False


def test_refused_parameter_is_said(new_boot, log):
    """A malformed early parameter is named and changes nothing."""
    boot = new_boot("setup-arch", cmdline="accept_memory=never")
    assert "Malformed early option 'accept_memory'" in log(boot, "setup-arch")
    assert boot.kernel.early.lazy_accept


def test_what_is_reserved(new_boot):
    """Image, first MiB, map, page tables and bitmap are taken; the probe at the top of RAM is free and accepted."""
    boot = new_boot("setup-arch")
    memblock = boot.kernel.memblock
    for start, end in ((0, MIB), (16 * MIB, 16 * MIB + 0x68B000), (6 * GIB - 8 * KIB, 6 * GIB)):
        assert memblock.is_reserved(start)
        assert memblock.is_reserved(end - 1)
    assert not memblock.is_reserved(MIB)
    assert not memblock.is_reserved(16 * MIB + 0x68B000)
    assert not memblock.is_reserved(6 * GIB - 8 * KIB - 1)
    assert memblock.current_limit == 6 * GIB
    assert list(boot.sept.mapped(4 * GIB, 6 * GIB)) == [(6 * GIB - 2 * MIB, 6 * GIB)]


def test_memblock_memory_is_e820_ram(new_boot):
    """Memory is e820's RAM without page 0 and without the ISA hole."""
    boot = new_boot("setup-arch", memory=4 * GIB)
    regions = [(region.base, region.end) for region in boot.kernel.memblock.memory.regions]
    assert regions == [
        (0x1000, 0xA0000), (0x100000, 0x800000), (0x806000, 0x80B000), (0x80D000, 0x7D8FA000),
        (0x7D8FB000, 0x7EAA0000), (0x7EBA2000, 0x7F4EC000), (0x7F7FE000, 0x7FEF4000), (4 * GIB, 6 * GIB),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "cleared", "reserved"),
    [
        (4 * GIB, 385, 384),  # RAM ends at 6 GiB: the guard's bit is the first of byte 384
        (4 * GIB + 14 * MIB, 385, 385),  # it is the last of byte 384
        (4 * GIB + 16 * MIB, 386, 385),
        (62 * GIB, 4097, 4096),  # RAM ends at 64 GiB: it is the first of a page that nobody reserves
        (62 * GIB + 2 * MIB, 4097, 4097),
    ],
)
def test_guard_bit_outside_the_reservation(new_boot, memory, cleared, reserved):
    """v9 reserves the bitmap by the end of RAM: where that is a multiple of 16 MiB, the guard's bit lies outside."""
    boot = new_boot("setup-arch", memory=memory)
    bitmap = struct.unpack_from("<Q", boot.boot_params, 0x78)[0]
    assert (bitmap, bitmap + cleared) in {(start, end) for _, start, end in boot.machine.memory.writes}
    memblock = boot.kernel.memblock
    assert memblock.is_reserved(bitmap + reserved - 1)
    assert not memblock.is_reserved(bitmap + reserved)


@pytest.mark.parametrize("memory", [4 * GIB, 62 * GIB])
def test_what_a_foreign_byte_behind_the_reservation_does(new_boot, memory):
    """Once that byte is somebody else's, accepted memory looks unaccepted, and accepting it asks for more than RAM."""
    boot = new_boot("mm-init", memory=memory)
    kernel, end = boot.kernel, memory + 2 * GIB
    kernel.unaccepted.accept_memory(end - 64 * MIB, end)
    assert not kernel.unaccepted.range_contains_unaccepted_memory(end - 4 * MIB, end)
    bitmap = struct.unpack_from("<Q", boot.boot_params, 0x78)[0]
    boot.machine.memory.write(bitmap + (end >> 24), b"\xff")
    assert kernel.unaccepted.range_contains_unaccepted_memory(end - 4 * MIB, end)
    with pytest.raises(MemoryFault) as caught:
        kernel.unaccepted.accept_memory(end - 4 * MIB, end)
    assert (caught.value.gpa, caught.value.kind, caught.value.state) == (end, "accept", "no RAM")


def with_setup_data(boot, *nodes: tuple[int, bytes]) -> list[int]:
    """Chain nodes of (type, data) at 64 MiB, one page each, into boot_params; returns their addresses."""
    addresses = [64 * MIB + 0x1000 * number for number in range(len(nodes))]
    for (kind, data), at, following in zip(nodes, addresses, [*addresses[1:], 0], strict=True):
        boot.physical.write(at, struct.pack("<QII", following, kind, len(data)) + data)
    boot.physical.write(boot.machine.regs.rsi + 0x250, addresses[0].to_bytes(8, "little"))
    return addresses


def test_setup_data_is_kept(new_boot, log):
    """Nodes are reserved, marked in e820 and printed; a node of type E820_EXT extends the map first."""
    boot = new_boot("decompress", cmdline="")
    extension = struct.pack("<QQI", 8 * GIB, GIB, 2)
    addresses = with_setup_data(boot, (9, b"seed"), (1, extension))
    boot.run("setup-arch")
    lines = log(boot, "setup-arch")
    assert "extended: [mem 0x0000000200000000-0x000000023fffffff] reserved" in lines
    assert "e820: update [mem 0x04000000-0x04000013] usable ==> usable" in lines
    assert "reserve setup_data: [mem 0x0000000004000000-0x0000000004000013] usable" in lines
    assert "reserve setup_data: [mem 0x0000000004001000-0x0000000004001023] usable" in lines
    assert all(boot.kernel.memblock.is_reserved(at) for at in addresses)
    assert boot.kernel.memblock.is_memory(addresses[0])


def test_indirect_setup_data_is_kept(new_boot, log):
    """What an indirect node points to is reserved and marked as well."""
    boot = new_boot("decompress", cmdline="")
    with_setup_data(boot, (1 << 31, struct.pack("<IIQQ", 3, 0, 0x1800, 80 * MIB)))
    boot.run("setup-arch")
    assert "e820: update [mem 0x05000000-0x050017ff] usable ==> usable" in log(boot, "setup-arch")
    assert boot.kernel.memblock.is_reserved(80 * MIB + 0x17FF)
    assert not boot.kernel.memblock.is_reserved(80 * MIB + 0x1800)


def test_mirrored_memory(new_boot, log):
    """Memory that EFI calls more reliable is mirrored; kernelcore=mirror leaves the rest to zone Movable."""
    rows = [
        (CONVENTIONAL, 0x1000, 0xA0000, 0x1000F),
        (CONVENTIONAL, MIB, GIB, 0x1000F),
        (CONVENTIONAL, 4 * GIB, 5 * GIB, 0x1000F),
        (CONVENTIONAL, 5 * GIB, 6 * GIB, 0xF),
    ]
    efi_map = tuple(MemoryDescriptor.of_range(*row) for row in rows)
    boot = new_boot("mm-init", efi_map=efi_map, cmdline="kernelcore=mirror")
    (line,) = (line for line in log(boot, "setup-arch") if "mirrored memory" in line)
    mirrored, total = re.fullmatch(r"efi: Memory: (\d+)M/(\d+)M mirrored memory", line).groups()
    assert GIB // MIB <= int(mirrored) <= int(total) - 1000
    assert "  Node 0: 0x0000000140000000" in log(boot, "mm-init")
    (movable,) = (zone for zone in boot.kernel.allocator.zones if zone.name == "Movable")
    assert (movable.zone_start_pfn, movable.end_pfn) == (5 * GIB >> 12, boot.kernel.max_pfn)


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ([(1, b"x" * 19)], "boot_e820_entry"),
        ([(1, bytes(41))], "boot_e820_entry"),
    ],
)
def test_extension_of_a_wrong_size(new_boot, nodes, text):
    """An extension that is no whole number of entries is refused."""
    boot = new_boot("decompress")
    with_setup_data(boot, *nodes)
    with pytest.raises(FormatError, match=text):
        boot.run("setup-arch")


def test_setup_data_in_a_circle(new_boot):
    """A list that comes back to itself is refused, not followed for ever."""
    boot = new_boot("decompress")
    (at,) = with_setup_data(boot, (9, b""))
    boot.physical.write(at, at.to_bytes(8, "little"))
    with pytest.raises(FormatError, match="for the second time"):
        boot.run("setup-arch")


def test_setup_data_in_unaccepted_memory(new_boot):
    """A node where nothing was accepted kills the guest."""
    boot = new_boot("decompress")
    boot.physical.write(boot.machine.regs.rsi + 0x250, (5 * GIB).to_bytes(8, "little"))
    with pytest.raises(MemoryFault):
        boot.run("setup-arch")


def test_more_entries_than_the_table_has(new_boot):
    """e820_entries above 128 is refused by its field."""
    boot = new_boot("decompress")
    boot.physical.write(boot.machine.regs.rsi + 0x1E8, b"\x81")
    with pytest.raises(FormatError, match=r"boot_params\.e820_entries"):
        boot.run("setup-arch")


def test_image_that_e820_does_not_have(new_boot, log):
    """The kernel's own image is RAM whatever the table says, and the kernel complains."""
    boot = new_boot("decompress", cmdline="nokaslr")
    page = boot.machine.regs.rsi
    boot.physical.write(page + 0x2D0 + 5 * 20 + 16, b"\x02")  # the entry from 0x80d000 on: reserved
    boot.run("setup-arch")
    assert ".text .data .bss are not marked as E820_TYPE_RAM!" in log(boot, "setup-arch")
    assert boot.kernel.memblock.is_memory(16 * MIB)
    assert not boot.kernel.memblock.is_memory(15 * MIB)


def test_soft_reserved_memory(new_boot, log):
    """Soft reserved memory is no RAM to the kernel, and reserved."""
    rows = [
        (CONVENTIONAL, 0x1000, 0xA0000, 0xF),
        (CONVENTIONAL, MIB, GIB, 0xF),
        (CONVENTIONAL, 4 * GIB, 5 * GIB, 0x4000F),
    ]
    efi_map = tuple(MemoryDescriptor.of_range(*row) for row in rows)
    boot = new_boot("setup-arch", efi_map=efi_map)
    assert "BIOS-e820: [mem 0x0000000100000000-0x000000013fffffff] soft reserved" in log(boot, "setup-arch")
    assert boot.kernel.memblock.is_reserved(4 * GIB)
    assert not boot.kernel.memblock.is_memory(4 * GIB)
    assert boot.kernel.max_pfn == GIB >> 12


def test_stage_needs_nothing_but_memory_and_registers(new_boot):
    """The kernel is entered with RSI and RIP alone: other registers may hold anything."""
    boot = new_boot("decompress")
    regs = boot.machine.regs
    for name in set(regs.as_dict()) - {"rsi", "rip"}:
        setattr(regs, name, 0xDEAD_BEEF_DEAD_BEEF)
    boot.run("setup-arch")
    assert isinstance(boot.kernel, Kernel)
    assert boot.kernel.image.size == struct.unpack_from("<I", sample_bzimage(), 0x260)[0]
