"""struct boot_params, the "zero page": all that a boot loader hands to the kernel.

With ``unaccepted_memory`` in the hole at 0x078, as "[PATCHv9 07/14] efi/x86: Add unaccepted memory support" has
it; a kernel without the series calls the same bytes ``_pad3``.

Sources: arch/x86/include/uapi/asm/bootparam.h, setup_data.h; include/uapi/linux/{screen_info,apm_bios,edd}.h;
Documentation/arch/x86/zero-page.rst.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import construct as c

from bootstub.setup_header import SETUP_HEADER
from guest.errors import FormatError
from guest.records import fast, field_extents
from guest.units import PAGE_SIZE

BOOT_PARAMS_SIZE = PAGE_SIZE
E820_MAX_ENTRIES_ZEROPAGE = 128
EDDMAXNR = 6
EDD_MBR_SIG_MAX = 16

EFI32_LOADER_SIGNATURE = int.from_bytes(b"EL32", "little")
EFI64_LOADER_SIGNATURE = int.from_bytes(b"EL64", "little")

SECURE_BOOT_MODES = {0: "unset", 1: "unknown", 2: "disabled", 3: "enabled"}
"""Values of ``secure_boot`` (include/linux/efi.h, enum efi_secureboot_mode)."""

_SCREEN_INFO = c.Struct(
    "orig_x" / c.Int8ul,
    "orig_y" / c.Int8ul,
    "ext_mem_k" / c.Int16ul,
    "orig_video_page" / c.Int16ul,
    "orig_video_mode" / c.Int8ul,
    "orig_video_cols" / c.Int8ul,
    "flags" / c.Int8ul,
    "unused2" / c.Int8ul,
    "orig_video_ega_bx" / c.Int16ul,
    "unused3" / c.Int16ul,
    "orig_video_lines" / c.Int8ul,
    "orig_video_isVGA" / c.Int8ul,
    "orig_video_points" / c.Int16ul,
    "lfb_width" / c.Int16ul,
    "lfb_height" / c.Int16ul,
    "lfb_depth" / c.Int16ul,
    "lfb_base" / c.Int32ul,
    "lfb_size" / c.Int32ul,
    "cl_magic" / c.Int16ul,
    "cl_offset" / c.Int16ul,
    "lfb_linelength" / c.Int16ul,
    "red_size" / c.Int8ul,
    "red_pos" / c.Int8ul,
    "green_size" / c.Int8ul,
    "green_pos" / c.Int8ul,
    "blue_size" / c.Int8ul,
    "blue_pos" / c.Int8ul,
    "rsvd_size" / c.Int8ul,
    "rsvd_pos" / c.Int8ul,
    "vesapm_seg" / c.Int16ul,
    "vesapm_off" / c.Int16ul,
    "pages" / c.Int16ul,
    "vesa_attributes" / c.Int16ul,
    "capabilities" / c.Int32ul,
    "ext_lfb_base" / c.Int32ul,
    "_reserved" / c.Bytes(2),
)

_APM_BIOS_INFO = c.Struct(
    "version" / c.Int16ul,
    "cseg" / c.Int16ul,
    "offset" / c.Int32ul,
    "cseg_16" / c.Int16ul,
    "dseg" / c.Int16ul,
    "flags" / c.Int16ul,
    "cseg_len" / c.Int16ul,
    "cseg_16_len" / c.Int16ul,
    "dseg_len" / c.Int16ul,
)

_IST_INFO = c.Struct(
    "signature" / c.Int32ul,
    "command" / c.Int32ul,
    "event" / c.Int32ul,
    "perf_level" / c.Int32ul,
)

_SYS_DESC_TABLE = c.Struct("length" / c.Int16ul, "table" / c.Bytes(14))

_OLPC_OFW_HEADER = c.Struct(
    "ofw_magic" / c.Int32ul,
    "ofw_version" / c.Int32ul,
    "cif_handler" / c.Int32ul,
    "irq_desc_table" / c.Int32ul,
)

_EDID_INFO = c.Struct("dummy" / c.Bytes(128))

_EFI_INFO = c.Struct(
    "efi_loader_signature" / c.Int32ul,
    "efi_systab" / c.Int32ul,
    "efi_memdesc_size" / c.Int32ul,
    "efi_memdesc_version" / c.Int32ul,
    "efi_memmap" / c.Int32ul,
    "efi_memmap_size" / c.Int32ul,
    "efi_systab_hi" / c.Int32ul,
    "efi_memmap_hi" / c.Int32ul,
)

BOOT_E820_ENTRY = c.Struct("addr" / c.Int64ul, "size" / c.Int64ul, "type" / c.Int32ul)

EDD_INFO = c.Struct(
    "device" / c.Int8ul,
    "version" / c.Int8ul,
    "interface_support" / c.Int16ul,
    "legacy_max_cylinder" / c.Int16ul,
    "legacy_max_head" / c.Int8ul,
    "legacy_sectors_per_track" / c.Int8ul,
    "params" / c.Bytes(74),
)

BOOT_PARAMS = c.Struct(
    "screen_info" / _SCREEN_INFO,
    "apm_bios_info" / _APM_BIOS_INFO,
    "_pad2" / c.Bytes(4),
    "tboot_addr" / c.Int64ul,
    "ist_info" / _IST_INFO,
    "acpi_rsdp_addr" / c.Int64ul,
    "unaccepted_memory" / c.Int64ul,
    "hd0_info" / c.Bytes(16),
    "hd1_info" / c.Bytes(16),
    "sys_desc_table" / _SYS_DESC_TABLE,
    "olpc_ofw_header" / _OLPC_OFW_HEADER,
    "ext_ramdisk_image" / c.Int32ul,
    "ext_ramdisk_size" / c.Int32ul,
    "ext_cmd_line_ptr" / c.Int32ul,
    "_pad4" / c.Bytes(112),
    "cc_blob_address" / c.Int32ul,
    "edid_info" / _EDID_INFO,
    "efi_info" / _EFI_INFO,
    "alt_mem_k" / c.Int32ul,
    "scratch" / c.Int32ul,
    "e820_entries" / c.Int8ul,
    "eddbuf_entries" / c.Int8ul,
    "edd_mbr_sig_buf_entries" / c.Int8ul,
    "kbd_status" / c.Int8ul,
    "secure_boot" / c.Int8ul,
    "_pad5" / c.Bytes(2),
    "sentinel" / c.Int8ul,
    "_pad6" / c.Bytes(1),
    "hdr" / SETUP_HEADER,
    "_pad7" / c.Bytes(36),
    "edd_mbr_sig_buffer" / c.Array(EDD_MBR_SIG_MAX, c.Int32ul),
    "e820_table" / c.Array(E820_MAX_ENTRIES_ZEROPAGE, BOOT_E820_ENTRY),
    "_pad8" / c.Bytes(48),
    "eddbuf" / c.Array(EDDMAXNR, EDD_INFO),
    "_pad9" / c.Bytes(276),
)

_ENTRY, _ = fast(BOOT_E820_ENTRY)
_SOURCE = "Documentation/arch/x86/zero-page.rst"


@dataclass(frozen=True, slots=True)
class BootE820Entry:
    """struct boot_e820_entry: ``size`` bytes of ``type`` from ``addr``; ``__u64``, ``__u64``, ``__u32``."""

    addr: int
    size: int
    type: int


def parse_e820_table(data: bytes) -> list[BootE820Entry]:
    """The entries of a raw table of struct boot_e820_entry, in its own order.

    A length that is no multiple of 20 bytes is a ``FormatError``.
    """
    if len(data) % _ENTRY.size:
        raise FormatError(
            "boot_e820_entry",
            at=len(data) // _ENTRY.size * _ENTRY.size,
            found=f"a table of {len(data)} bytes",
            expected=f"a multiple of {_ENTRY.size} bytes",
            source="arch/x86/include/uapi/asm/bootparam.h",
        )
    return [BootE820Entry(*fields) for fields in _ENTRY.iter_unpack(data)]


def build_e820_table(entries: Iterable[BootE820Entry]) -> bytes:
    """The raw table of ``entries``: the reverse of :func:`parse_e820_table`."""
    return b"".join(_ENTRY.pack(*astuple(entry)) for entry in entries)


def check_size(data: bytes) -> None:
    """Refuse a boot_params file that is not one page, with a ``FormatError``."""
    if len(data) != BOOT_PARAMS_SIZE:
        raise FormatError(
            "boot_params", at=0, found=f"{len(data)} bytes", expected=f"{BOOT_PARAMS_SIZE} bytes", source=_SOURCE
        )


def e820_table_of(data: bytes) -> list[BootE820Entry]:
    """The first ``e820_entries`` entries of ``e820_table`` in the boot_params page ``data``, unsorted.

    A page of the wrong size or more than 128 entries is a ``FormatError``.
    """
    check_size(data)
    extents = field_extents(BOOT_PARAMS)
    at, _ = extents["e820_entries"]
    count = data[at]
    if count > E820_MAX_ENTRIES_ZEROPAGE:
        expected = f"at most {E820_MAX_ENTRIES_ZEROPAGE}"
        raise FormatError("boot_params.e820_entries", at=at, found=count, expected=expected, source=_SOURCE)
    start, _ = extents["e820_table"]
    return parse_e820_table(data[start : start + count * _ENTRY.size])
