"""struct setup_header: layout typed by hand, flags and loaders by name."""

from __future__ import annotations

import pytest

from bootstub.setup_header import (
    SETUP_HEADER,
    SETUP_HEADER_OFFSET,
    LoadFlags,
    XLoadFlags,
    loader_name,
    version_text,
)
from guest.records import field_extents
from tests.bootstub.conftest import by_hand

# Documentation/arch/x86/boot.rst: offset in the image, size, name
LAYOUT = """
1f1/1 setup_sects        1f2/2 root_flags         1f4/4 syssize            1f8/2 ram_size
1fa/2 vid_mode           1fc/2 root_dev           1fe/2 boot_flag          200/2 jump
202/4 header             206/2 version            208/4 realmode_swtch     20c/2 start_sys_seg
20e/2 kernel_version     210/1 type_of_loader     211/1 loadflags          212/2 setup_move_size
214/4 code32_start       218/4 ramdisk_image      21c/4 ramdisk_size       220/4 bootsect_kludge
224/2 heap_end_ptr       226/1 ext_loader_ver     227/1 ext_loader_type    228/4 cmd_line_ptr
22c/4 initrd_addr_max    230/4 kernel_alignment   234/1 relocatable_kernel 235/1 min_alignment
236/2 xloadflags         238/4 cmdline_size       23c/4 hardware_subarch   240/8 hardware_subarch_data
248/4 payload_offset     24c/4 payload_length     250/8 setup_data         258/8 pref_address
260/4 init_size          264/4 handover_offset    268/4 kernel_info_offset
"""


def test_setup_header_layout() -> None:
    """Every field lies where boot.rst has it, and the header ends at 0x26c."""
    found = {name: (0x1F1 + at, size) for name, (at, size) in field_extents(SETUP_HEADER).items()}
    assert found == by_hand(LAYOUT)
    assert (SETUP_HEADER_OFFSET, SETUP_HEADER.sizeof()) == (0x1F1, 123)


def test_flag_bits() -> None:
    """Flags have the bits of boot.rst."""
    assert LoadFlags["LOADED_HIGH"] | LoadFlags["KASLR_FLAG"] | LoadFlags["QUIET_FLAG"] == 0x23
    assert LoadFlags["KEEP_SEGMENTS"] | LoadFlags["CAN_USE_HEAP"] == 0xC0
    assert [flag.value for flag in XLoadFlags] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert XLoadFlags["XLF_CAN_BE_LOADED_ABOVE_4G"] == 2
    assert XLoadFlags["XLF_MEM_ENCRYPTION"] == 0x80


@pytest.mark.parametrize(
    ("type_of_loader", "ext_loader_type", "name"),
    [
        (0x21, 0, "EFI stub"),
        (0x72, 0, "GRUB"),
        (0xB0, 0, "QEMU"),
        (0xD1, 0, "kexec-tools"),
        (0xE0, 2, "OVMF UEFI virtualization stack"),
        (0xE0, 0x99, "unknown loader 0xa9"),
        (0x60, 0, "unknown loader 0x6"),
        (0xFF, 0, "undefined"),
    ],
)
def test_loader_name(type_of_loader: int, ext_loader_type: int, name: str) -> None:
    """A loader goes by its name in boot.rst; one that is not there goes by its number."""
    assert loader_name(type_of_loader, ext_loader_type) == name


def test_version_text() -> None:
    """Protocol 0x020f is written 2.15, as in boot.rst."""
    assert [version_text(v) for v in (0x0200, 0x020A, 0x020F)] == ["2.00", "2.10", "2.15"]
