"""struct boot_params: layout typed by hand; its e820 table; files that are none."""

from __future__ import annotations

import struct

import pytest

from bootstub.boot_params import (
    BOOT_E820_ENTRY,
    BOOT_PARAMS,
    EDD_INFO,
    BootE820Entry,
    build_e820_table,
    e820_table_of,
    parse_e820_table,
)
from bootstub.e820_types import (
    E820_TYPE_ACPI,
    E820_TYPE_NVS,
    E820_TYPE_PMEM,
    E820_TYPE_PRAM,
    E820_TYPE_RAM,
    E820_TYPE_RESERVED,
    E820_TYPE_RESERVED_KERN,
    E820_TYPE_SOFT_RESERVED,
    E820_TYPE_UNUSABLE,
    type_word,
)
from guest.clock import VirtualClock
from guest.errors import FormatError
from guest.memory import AccessKind, GuestMemory, PhysicalMemory
from guest.records import GuestRecord, field_extents
from guest.trace import Trace
from tests.bootstub.conftest import by_hand

# Documentation/arch/x86/zero-page.rst and the headers it names: offset, size, name
LAYOUT = """
058/8 tboot_addr               070/8 acpi_rsdp_addr           078/8 unaccepted_memory
080/16 hd0_info                090/16 hd1_info                0c0/4 ext_ramdisk_image
0c4/4 ext_ramdisk_size         0c8/4 ext_cmd_line_ptr         13c/4 cc_blob_address
1e0/4 alt_mem_k                1e4/4 scratch                  1e8/1 e820_entries
1e9/1 eddbuf_entries           1ea/1 edd_mbr_sig_buf_entries  1eb/1 kbd_status
1ec/1 secure_boot              1ef/1 sentinel                 290/64 edd_mbr_sig_buffer
2d0/2560 e820_table            d00/492 eddbuf

054/4 _pad2   0cc/112 _pad4   1ed/2 _pad5   1f0/1 _pad6   26c/36 _pad7   cd0/48 _pad8   eec/276 _pad9

000/1 screen_info.orig_x             001/1 screen_info.orig_y             002/2 screen_info.ext_mem_k
004/2 screen_info.orig_video_page    006/1 screen_info.orig_video_mode    007/1 screen_info.orig_video_cols
008/1 screen_info.flags              009/1 screen_info.unused2            00a/2 screen_info.orig_video_ega_bx
00c/2 screen_info.unused3            00e/1 screen_info.orig_video_lines   00f/1 screen_info.orig_video_isVGA
010/2 screen_info.orig_video_points  012/2 screen_info.lfb_width          014/2 screen_info.lfb_height
016/2 screen_info.lfb_depth          018/4 screen_info.lfb_base           01c/4 screen_info.lfb_size
020/2 screen_info.cl_magic           022/2 screen_info.cl_offset          024/2 screen_info.lfb_linelength
026/1 screen_info.red_size           027/1 screen_info.red_pos            028/1 screen_info.green_size
029/1 screen_info.green_pos          02a/1 screen_info.blue_size          02b/1 screen_info.blue_pos
02c/1 screen_info.rsvd_size          02d/1 screen_info.rsvd_pos           02e/2 screen_info.vesapm_seg
030/2 screen_info.vesapm_off         032/2 screen_info.pages              034/2 screen_info.vesa_attributes
036/4 screen_info.capabilities       03a/4 screen_info.ext_lfb_base       03e/2 screen_info._reserved

040/2 apm_bios_info.version   042/2 apm_bios_info.cseg         044/4 apm_bios_info.offset
048/2 apm_bios_info.cseg_16   04a/2 apm_bios_info.dseg         04c/2 apm_bios_info.flags
04e/2 apm_bios_info.cseg_len  050/2 apm_bios_info.cseg_16_len  052/2 apm_bios_info.dseg_len

060/4 ist_info.signature   064/4 ist_info.command   068/4 ist_info.event   06c/4 ist_info.perf_level
0a0/2 sys_desc_table.length   0a2/14 sys_desc_table.table   140/128 edid_info.dummy
0b0/4 olpc_ofw_header.ofw_magic    0b4/4 olpc_ofw_header.ofw_version
0b8/4 olpc_ofw_header.cif_handler  0bc/4 olpc_ofw_header.irq_desc_table

1c0/4 efi_info.efi_loader_signature  1c4/4 efi_info.efi_systab       1c8/4 efi_info.efi_memdesc_size
1cc/4 efi_info.efi_memdesc_version   1d0/4 efi_info.efi_memmap       1d4/4 efi_info.efi_memmap_size
1d8/4 efi_info.efi_systab_hi         1dc/4 efi_info.efi_memmap_hi

1f1/1 hdr.setup_sects       202/4 hdr.header           211/1 hdr.loadflags       218/4 hdr.ramdisk_image
228/4 hdr.cmd_line_ptr      236/2 hdr.xloadflags       250/8 hdr.setup_data      268/4 hdr.kernel_info_offset
"""

SETUP_HEADER_FIELDS = 39


def page(entries: int = 0, table: bytes = b"") -> bytes:
    """A boot_params page with nothing but an e820 table."""
    out = bytearray(4096)
    out[0x1E8] = entries
    out[0x2D0 : 0x2D0 + len(table)] = table
    return bytes(out)


def test_boot_params_layout() -> None:
    """Every field lies where zero-page.rst has it, and the record is one page without holes."""
    found = field_extents(BOOT_PARAMS)
    expected = by_hand(LAYOUT)
    header = {name for name in found if name.startswith("hdr.")}
    assert len(header) == SETUP_HEADER_FIELDS
    assert {name: found[name] for name in expected} == expected
    assert set(found) == set(expected) | header
    assert BOOT_PARAMS.sizeof() == sum(size for _, size in found.values()) == 4096


class Everything:
    """A gate that admits every access."""

    def admit(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        return 0, 1 << 52


def test_fields_in_guest_memory() -> None:
    """A stage reads and writes single fields by name; nothing around them changes."""
    memory = GuestMemory(PhysicalMemory(), Everything(), Trace(VirtualClock()))
    record = GuestRecord(memory, 0x90000, BOOT_PARAMS)
    record["hdr.cmd_line_ptr"] = 0x12345678
    record["unaccepted_memory"] = 0x7DA1_0000_0000
    assert (record["hdr.cmd_line_ptr"], record["unaccepted_memory"]) == (0x12345678, 0x7DA1_0000_0000)
    assert memory.read(0x90000 + 0x228, 4) == bytes.fromhex("78563412")
    assert sum(memory.read(0x90000, 4096)) == 0x12 + 0x34 + 0x56 + 0x78 + 0x7D + 0xA1


def test_small_record_layouts() -> None:
    """struct boot_e820_entry is 20 bytes, struct edd_info 82."""
    assert (field_extents(BOOT_E820_ENTRY), BOOT_E820_ENTRY.sizeof()) == (
        {"addr": (0, 8), "size": (8, 8), "type": (16, 4)},
        20,
    )
    assert field_extents(EDD_INFO) == {
        "device": (0, 1),
        "version": (1, 1),
        "interface_support": (2, 2),
        "legacy_max_cylinder": (4, 2),
        "legacy_max_head": (6, 1),
        "legacy_sectors_per_track": (7, 1),
        "params": (8, 74),
    }


def test_e820_table_keeps_its_order() -> None:
    """The table is read as it lies there: unsorted, with empty entries and unknown types."""
    raw = struct.pack("<QQIQQIQQI", 1 << 32, 4096, 1, 0, 0, 0, 0, (1 << 64) - 1, 0xEFFFFFFF)
    entries = [
        BootE820Entry(1 << 32, 4096, 1),
        BootE820Entry(0, 0, 0),
        BootE820Entry(0, (1 << 64) - 1, 0xEFFFFFFF),
    ]
    assert parse_e820_table(raw) == entries
    assert e820_table_of(page(3, raw)) == entries
    assert e820_table_of(page(2, raw)) == entries[:2]
    assert build_e820_table(entries) == raw


def test_e820_table_of_odd_length() -> None:
    """A table that ends within an entry is refused, and the message says where."""
    with pytest.raises(FormatError) as caught:
        parse_e820_table(bytes(45))
    assert (caught.value.what, caught.value.at, caught.value.found) == (
        "boot_e820_entry",
        40,
        "a table of 45 bytes",
    )


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 8192])
def test_size_of_boot_params(size: int) -> None:
    """A boot_params file that is not one page is refused with the size found and the size expected."""
    with pytest.raises(FormatError) as caught:
        e820_table_of(bytes(size))
    assert (caught.value.found, caught.value.expected) == (f"{size} bytes", "4096 bytes")


def test_more_entries_than_the_page_holds() -> None:
    """128 entries fit; a count of 129 is refused at its offset."""
    assert len(e820_table_of(page(128))) == 128
    with pytest.raises(FormatError) as caught:
        e820_table_of(page(129))
    assert (caught.value.at, caught.value.found, caught.value.expected) == (0x1E8, 129, "at most 128")


def test_e820_types() -> None:
    """Types have the numbers of e820/types.h and the words of e820_print_type()."""
    assert {n: type_word(n) for n in (1, 2, 3, 4, 5, 7, 12, 128, 0xEFFFFFFF)} == {
        E820_TYPE_RAM: "usable",
        E820_TYPE_RESERVED: "reserved",
        E820_TYPE_ACPI: "ACPI data",
        E820_TYPE_NVS: "ACPI NVS",
        E820_TYPE_UNUSABLE: "unusable",
        E820_TYPE_PMEM: "persistent (type 7)",
        E820_TYPE_PRAM: "persistent (type 12)",
        E820_TYPE_RESERVED_KERN: "usable",
        E820_TYPE_SOFT_RESERVED: "soft reserved",
    }
    assert [type_word(n) for n in (0, 6, 20)] == ["type 0", "type 6", "type 20"]
