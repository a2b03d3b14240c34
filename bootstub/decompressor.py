"""Stage ``decompress``: the bzImage's own code unpacks the kernel, moves it and jumps to it.

It moves itself out of the way, chooses a place by KASLR, accepts that, and only then writes to it.
Source: arch/x86/boot/compressed/head_64.S and misc.c, extract_kernel() and parse_elf() (6.3), with v9 08/14; 6.12 for
the decompressor that is entered without its EFI stub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bootstub.acpi import efi_configuration_table, get_rsdp_addr
from bootstub.boot_params import BOOT_PARAMS
from bootstub.cmdline import find_option_bool, read_command_line
from bootstub.decompressor_image import DecompressorImage
from bootstub.events import KernelPlaced, PagingLevels
from bootstub.kernel_layout import KERNEL_IMAGE_SIZE, LOAD_PHYSICAL_ADDR, MIN_KERNEL_ALIGN, STARTUP_64_OFFSET
from bootstub.payload import output_len
from bootstub.random_location import Located, RandomLocation
from bootstub.relocations import load_kernel
from bootstub.setup_header import LoadFlags, XLoadFlags
from bootstub.unaccepted_memory import Accept, accept_memory
from bootstub.unaccepted_table import EFI_UNACCEPTED_MEMORY, TABLE_VERSION, UnacceptedTable
from bootstub.unpack import Unpacked, unpack
from bootstub.vmlinux import Vmlinux
from firmware.efi_types import LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID
from guest.bitmap import GuestBitmap
from guest.errors import FormatError
from guest.machine import Machine
from guest.records import GuestRecord
from guest.units import round_up
from tdx.guest import PlatformAccept, tdx_accept_memory

_E_ENTRY_OFFSET = 24
_MAX_HEAP = 1 << 46
_LA57 = 1 << 16
_SOURCE = "arch/x86/boot/compressed/misc.c, extract_kernel()"

FindRecord = Callable[[Machine, GuestRecord], Accept | None]
"""Finds the record of unaccepted memory; returns what accepts a range according to it, None without a record."""


def bitmap_of_boot_params(machine: Machine, params: GuestRecord) -> Accept | None:
    """v9's: the bitmap that boot_params points to."""
    if not params["unaccepted_memory"]:
        return None
    bitmap, accept = GuestBitmap(machine.memory, params["unaccepted_memory"]), PlatformAccept(machine)
    return lambda start, end: accept_memory(bitmap, accept, start, end)


def table_of_efi(machine: Machine, params: GuestRecord) -> Accept | None:
    """6.12's: the table that is a configuration table (mem.c, init_unaccepted_memory())."""
    gpa = efi_configuration_table(machine.memory, params, LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID)
    if gpa is None:
        return None
    if GuestRecord(machine.memory, gpa, EFI_UNACCEPTED_MEMORY)["version"] != TABLE_VERSION:
        raise machine.panic("Unknown version of unaccepted memory table")
    table, accept = UnacceptedTable.at(machine.memory, gpa), PlatformAccept(machine, tdx_accept_memory)
    return lambda start, end: table.accept_memory(accept, start, end - start)


@dataclass(frozen=True, slots=True)
class Decompressor:
    """What differs between decompressors.

    ``find_record`` is None in one that was built without unaccepted memory. ``mem_encrypt``: it has the option
    ``mem_encrypt=`` (since 6.9).
    """

    find_record: FindRecord | None
    mem_encrypt: bool = False

    def without_support(self) -> Decompressor:
        """The same code, built without CONFIG_UNACCEPTED_MEMORY."""
        return replace(self, find_record=None)


V9_DECOMPRESSOR = Decompressor(bitmap_of_boot_params)
MAINLINE_DECOMPRESSOR = Decompressor(table_of_efi, mem_encrypt=True)


def decompress(machine: Machine, kind: Decompressor = V9_DECOMPRESSOR) -> None:
    """Run the decompressor: RSI = boot_params, RIP = startup_64, RDX = image_offset.

    It leaves the kernel's entry point in RIP; RSI stays.
    """
    memory, regs = machine.memory, machine.regs
    params = GuestRecord(memory, regs.rsi, BOOT_PARAMS)
    line = read_command_line(memory, params["ext_cmd_line_ptr"] << 32 | params["hdr.cmd_line_ptr"])
    image = _checked_image(machine, params)
    output = _output_address(params, image.startup_32 - regs.rdx)
    levels = _configure_5level_paging(machine, line)
    payload = image.read_payload(memory)
    output_len(payload, at=image.input_data)
    image = image.moved(memory, output, params["hdr.init_size"])
    _tidy_boot_params(machine, params, line, kind)
    if image.end + image.startup_32 > _MAX_HEAP:
        raise machine.panic("Destination address too large")
    unpacked = unpack(payload, image.input_data)
    _check_needed_size(unpacked)
    location = RandomLocation(machine, params, image, line, levels, kind.find_record is not None)
    place = location.choose(output, unpacked.needed_size)
    _load(machine, params, unpacked, place, kind)
    regs.rip = place.output + _entry_offset(unpacked.kernel, unpacked.needed_size)


def _load(machine: Machine, params: GuestRecord, unpacked: Unpacked, place: Located, kind: Decompressor) -> None:
    """Accept the kernel's memory, put the kernel there, and relocate it."""
    text = "Decompressing Linux... "
    accept = kind.find_record and kind.find_record(machine, params)
    if accept is not None:
        text += "Accepting memory... "
        accept(place.output, place.output + unpacked.needed_size)
    kernel = unpacked.kernel
    _check_segments(kernel, unpacked.needed_size)
    load_kernel(machine.memory, unpacked.vmlinux, kernel, place.output, place.virtual)
    relocating = "No relocation needed" if place.virtual == LOAD_PHYSICAL_ADDR else "Performing relocations"
    machine.print(f"{text}Parsing ELF... {relocating}... done.")
    machine.print("Booting the kernel.")
    machine.trace.add(KernelPlaced(place.output, place.virtual, len(kernel.segments)))


def _checked_image(machine: Machine, params: GuestRecord) -> DecompressorImage:
    """The image that is running; its payload must end inside the image's memory."""
    offset, length, init_size = (params[f"hdr.{name}"] for name in ("payload_offset", "payload_length", "init_size"))
    if offset + length > init_size:
        raise FormatError(
            "setup_header.payload_length", at=params.gpa + 0x24C, found=f"{length:#x} bytes from {offset:#x} on",
            expected=f"an end inside init_size, {init_size:#x}", source="Documentation/arch/x86/boot.rst",
        )  # fmt: skip
    return DecompressorImage.at(machine.memory, machine.regs.rip - STARTUP_64_OFFSET, params)


def _output_address(params: GuestRecord, image: int) -> int:
    """Where the kernel goes: the start of its image's memory, aligned, but not below LOAD_PHYSICAL_ADDR."""
    alignment = params["hdr.kernel_alignment"]
    if alignment < MIN_KERNEL_ALIGN or alignment & alignment - 1:
        raise FormatError(
            "setup_header.kernel_alignment", at=params.gpa + 0x230, found=f"{alignment:#x}",
            expected="a power of two, at least 2 MiB", source="Documentation/arch/x86/boot.rst",
        )  # fmt: skip
    return max(round_up(image, alignment), LOAD_PHYSICAL_ADDR)


def _configure_5level_paging(machine: Machine, line: bytes) -> int:
    """configure_5level_paging(): how many levels the page tables are to have."""
    cpuid = machine.platform.cpuid
    la57 = cpuid(0)[0] >= 7 and bool(cpuid(7)[2] & _LA57)
    levels = 5 if la57 and not find_option_bool(line, b"no5lvl") else 4
    machine.trace.add(PagingLevels(levels, la57))
    return levels


def _tidy_boot_params(machine: Machine, params: GuestRecord, line: bytes, kind: Decompressor) -> None:
    """What extract_kernel() changes before it chooses: flags that are the kernel's own, and where the RSDP is."""
    params["hdr.loadflags"] &= ~int(LoadFlags.KASLR_FLAG)
    if kind.mem_encrypt and find_option_bool(line, b"mem_encrypt=on") > find_option_bool(line, b"mem_encrypt=off"):
        params["hdr.xloadflags"] |= XLoadFlags.XLF_MEM_ENCRYPTION
    params["acpi_rsdp_addr"] = get_rsdp_addr(machine, params)


def _check_needed_size(unpacked: Unpacked) -> None:
    """The kernel must fit into the mapping that it will be given."""
    needed, room = unpacked.needed_size, KERNEL_IMAGE_SIZE - LOAD_PHYSICAL_ADDR
    if needed > room:
        raise FormatError("kernel size", found=f"{needed:#x} bytes", expected=f"at most {room:#x}", source=_SOURCE)


def _check_segments(kernel: Vmlinux, needed: int) -> None:
    """Refuse a segment outside the memory that the kernel needs."""
    for segment in kernel.segments:
        offset = segment.p_paddr - LOAD_PHYSICAL_ADDR
        if not 0 <= offset <= offset + segment.p_filesz <= needed:
            found = f"[{segment.p_paddr:#x}, {segment.p_paddr + segment.p_filesz:#x})"
            expected = f"a place inside the {needed:#x} bytes from {LOAD_PHYSICAL_ADDR:#x} on"
            raise FormatError("PT_LOAD", at=segment.p_offset, found=found, expected=expected, source=_SOURCE)


def _entry_offset(kernel: Vmlinux, needed: int) -> int:
    """From the start of the kernel to its entry point. The kernel's own code jumps without looking."""
    offset = kernel.entry - LOAD_PHYSICAL_ADDR
    if not 0 <= offset < needed:
        expected = f"a place inside the {needed:#x} bytes from {LOAD_PHYSICAL_ADDR:#x} on"
        raise FormatError("e_entry", at=_E_ENTRY_OFFSET, found=f"{kernel.entry:#x}", expected=expected, source=_SOURCE)
    return offset
