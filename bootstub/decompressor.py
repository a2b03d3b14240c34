"""Stage ``decompress``: the bzImage's own code unpacks the kernel and jumps to it.

Source: arch/x86/boot/compressed/misc.c, extract_kernel() and parse_elf() (6.3), with v9 08/14: the output range is
accepted before anything is written to it. The kernel goes where ``nokaslr`` puts it.
"""

from __future__ import annotations

from bootstub.boot_params import BOOT_PARAMS
from bootstub.events import KernelPlaced
from bootstub.kernel_layout import KERNEL_IMAGE_SIZE, LOAD_PHYSICAL_ADDR, MIN_KERNEL_ALIGN, STARTUP_64_OFFSET
from bootstub.payload import decompress as decompress_payload
from bootstub.payload import output_len
from bootstub.unaccepted_memory import accept_memory
from bootstub.vmlinux import Vmlinux, load_segments, place_segments
from guest.bitmap import GuestBitmap
from guest.errors import FormatError
from guest.machine import Machine
from guest.records import GuestRecord
from guest.units import round_up
from tdx.guest import PlatformAccept

_E_ENTRY_OFFSET = 24
_SOURCE = "arch/x86/boot/compressed/misc.c, extract_kernel()"


def decompress(machine: Machine) -> None:
    """Run the decompressor: RSI = boot_params, RIP = startup_64, RDX = image_offset.

    It leaves the kernel's entry point in RIP; RSI stays.
    """
    memory, regs = machine.memory, machine.regs
    params = GuestRecord(memory, regs.rsi, BOOT_PARAMS)
    startup_32 = regs.rip - STARTUP_64_OFFSET
    payload_at = startup_32 + params["hdr.payload_offset"]
    payload = memory.read(payload_at, _payload_length(params))
    output = _output_address(params, startup_32 - regs.rdx)
    needed = _needed_size(params, output_len(payload, at=payload_at))
    text = "Decompressing Linux... "
    if params["unaccepted_memory"]:
        text += "Accepting memory... "
        bitmap = GuestBitmap(memory, params["unaccepted_memory"])
        accept_memory(bitmap, PlatformAccept(machine), output, output + needed)
    vmlinux = decompress_payload(payload, at=payload_at)
    memory.write(output, vmlinux)
    kernel = load_segments(vmlinux)
    _check_segments(kernel, needed)
    place_segments(memory, kernel, output)
    machine.print(text + "Parsing ELF... No relocation needed... done.")
    machine.print("Booting the kernel.")
    machine.trace.add(KernelPlaced(output, LOAD_PHYSICAL_ADDR, len(kernel.segments)))
    regs.rip = output + _entry_offset(kernel, needed)


def _payload_length(params: GuestRecord) -> int:
    """Bytes of the payload, which must end inside the image's memory."""
    offset, length, init_size = (params[f"hdr.{name}"] for name in ("payload_offset", "payload_length", "init_size"))
    if offset + length > init_size:
        raise FormatError(
            "setup_header.payload_length", at=params.gpa + 0x24C, found=f"{length:#x} bytes from {offset:#x} on",
            expected=f"an end inside init_size, {init_size:#x}", source="Documentation/arch/x86/boot.rst",
        )  # fmt: skip
    return length


def _output_address(params: GuestRecord, image: int) -> int:
    """Where the kernel goes: the start of its image's memory, aligned, but not below LOAD_PHYSICAL_ADDR."""
    alignment = params["hdr.kernel_alignment"]
    if alignment < MIN_KERNEL_ALIGN or alignment & alignment - 1:
        raise FormatError(
            "setup_header.kernel_alignment", at=params.gpa + 0x230, found=f"{alignment:#x}",
            expected="a power of two, at least 2 MiB", source="Documentation/arch/x86/boot.rst",
        )  # fmt: skip
    return max(round_up(image, alignment), LOAD_PHYSICAL_ADDR)


def _needed_size(params: GuestRecord, output_len: int) -> int:
    """Bytes of memory for the kernel. ``init_size`` stands for its total size, which only its linker knows."""
    needed = round_up(max(output_len, params["hdr.init_size"]), MIN_KERNEL_ALIGN)
    if needed > KERNEL_IMAGE_SIZE:
        raise FormatError(
            "kernel size", at=params.gpa + 0x260, found=f"{needed:#x} bytes",
            expected=f"at most {KERNEL_IMAGE_SIZE:#x}", source=_SOURCE,
        )  # fmt: skip
    return needed


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
