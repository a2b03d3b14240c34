"""struct setup_header: what kernel image and boot loader tell each other, at 0x1f1 of both.

Sources: arch/x86/include/uapi/asm/bootparam.h; Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
"""

from __future__ import annotations

from enum import IntFlag

import construct as c

SETUP_HEADER_OFFSET = 0x1F1
"""Where the header lies in a bzImage and in boot_params, in bytes."""

BOOT_FLAG = 0xAA55
HEADER_MAGIC = 0x53726448
"""``HdrS`` as a little-endian integer."""

EFI_STUB_LOADER = 0x21
"""``type_of_loader`` as the EFI stub fills it in (drivers/firmware/efi/libstub/x86-stub.c)."""


class LoadFlags(IntFlag):
    """Bits of ``loadflags``."""

    LOADED_HIGH = 1 << 0
    KASLR_FLAG = 1 << 1
    QUIET_FLAG = 1 << 5
    KEEP_SEGMENTS = 1 << 6
    CAN_USE_HEAP = 1 << 7


class XLoadFlags(IntFlag):
    """Bits of ``xloadflags``."""

    XLF_KERNEL_64 = 1 << 0
    XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1
    XLF_EFI_HANDOVER_32 = 1 << 2
    XLF_EFI_HANDOVER_64 = 1 << 3
    XLF_EFI_KEXEC = 1 << 4
    XLF_5LEVEL = 1 << 5
    XLF_5LEVEL_ENABLED = 1 << 6
    XLF_MEM_ENCRYPTION = 1 << 7


LOADERS = {
    0x0: "LILO",
    0x1: "Loadlin",
    0x2: "bootsect-loader",
    0x3: "Syslinux",
    0x4: "Etherboot/gPXE/iPXE",
    0x5: "ELILO",
    0x7: "GRUB",
    0x8: "U-Boot",
    0x9: "Xen",
    0xA: "Gujin",
    0xB: "QEMU",
    0xC: "Arcturus Networks uCbootloader",
    0xD: "kexec-tools",
    0x11: "Minimal Linux Bootloader",
    0x12: "OVMF UEFI virtualization stack",
    0x13: "barebox",
}
"""Boot loader identities; those from 0x10 on are an ``ext_loader_type``, less 0x10."""

_LOADER_EXTENDED = 0xE
_LOADER_UNDEFINED = 0xFF

SETUP_HEADER = c.Struct(
    "setup_sects" / c.Int8ul,
    "root_flags" / c.Int16ul,
    "syssize" / c.Int32ul,
    "ram_size" / c.Int16ul,
    "vid_mode" / c.Int16ul,
    "root_dev" / c.Int16ul,
    "boot_flag" / c.Int16ul,
    "jump" / c.Int16ul,
    "header" / c.Int32ul,
    "version" / c.Int16ul,
    "realmode_swtch" / c.Int32ul,
    "start_sys_seg" / c.Int16ul,
    "kernel_version" / c.Int16ul,
    "type_of_loader" / c.Int8ul,
    "loadflags" / c.Int8ul,
    "setup_move_size" / c.Int16ul,
    "code32_start" / c.Int32ul,
    "ramdisk_image" / c.Int32ul,
    "ramdisk_size" / c.Int32ul,
    "bootsect_kludge" / c.Int32ul,
    "heap_end_ptr" / c.Int16ul,
    "ext_loader_ver" / c.Int8ul,
    "ext_loader_type" / c.Int8ul,
    "cmd_line_ptr" / c.Int32ul,
    "initrd_addr_max" / c.Int32ul,
    "kernel_alignment" / c.Int32ul,
    "relocatable_kernel" / c.Int8ul,
    "min_alignment" / c.Int8ul,
    "xloadflags" / c.Int16ul,
    "cmdline_size" / c.Int32ul,
    "hardware_subarch" / c.Int32ul,
    "hardware_subarch_data" / c.Int64ul,
    "payload_offset" / c.Int32ul,
    "payload_length" / c.Int32ul,
    "setup_data" / c.Int64ul,
    "pref_address" / c.Int64ul,
    "init_size" / c.Int32ul,
    "handover_offset" / c.Int32ul,
    "kernel_info_offset" / c.Int32ul,
)

SINCE = {
    "syssize": 0x204,
    "initrd_addr_max": 0x203,
    "kernel_alignment": 0x205,
    "relocatable_kernel": 0x205,
    "min_alignment": 0x20A,
    "xloadflags": 0x20C,
    "cmdline_size": 0x206,
    "hardware_subarch": 0x207,
    "hardware_subarch_data": 0x207,
    "payload_offset": 0x208,
    "payload_length": 0x208,
    "setup_data": 0x209,
    "pref_address": 0x20A,
    "init_size": 0x20A,
    "handover_offset": 0x20B,
    "kernel_info_offset": 0x20F,
}
"""The boot protocol that brought a field, or that made it reliable; the others are in every header from 2.02 on."""

DEFAULTS = {"initrd_addr_max": 0x37FF_FFFF, "cmdline_size": 255, "pref_address": 0x10_0000}
"""What holds where a header is too old for a field; 0, which means none, for those without a line here.

The first two stand with their fields in boot.rst; a bzImage without a preferred address is loaded at 1 MiB
(LOADED_HIGH).
"""


def flag_names(flags: type[IntFlag], value: int) -> str:
    """Names of the set bits, lowest first, then what has no name, in hexadecimal."""
    names = [flag.name or "" for flag in flags if flag & value]
    rest = value & ~sum(flags)
    return " | ".join([*names, f"{rest:#x}"] if rest else names) or "none"


def loader_name(type_of_loader: int, ext_loader_type: int) -> str:
    """Who loaded the kernel, in words (boot.rst, field ``type_of_loader``)."""
    if type_of_loader == EFI_STUB_LOADER:
        return "EFI stub"
    if type_of_loader == _LOADER_UNDEFINED:
        return "undefined"
    identity = type_of_loader >> 4
    if identity == _LOADER_EXTENDED:
        identity = ext_loader_type + 0x10
    return LOADERS.get(identity, f"unknown loader {identity:#x}")


def version_text(version: int) -> str:
    """The boot protocol's version for people: 0x020f is ``2.15``."""
    return f"{version >> 8}.{version & 0xFF:02d}"
