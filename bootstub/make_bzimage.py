"""Packing a kernel's ELF file into a bzImage that is an EFI application as well.

Written with ``struct`` alone: nothing here knows the parsers. There is no code in the image but a halt at each entry
point.
Sources: Documentation/arch/x86/boot.rst; arch/x86/boot/header.S; Microsoft PE and COFF Specification.
"""

from __future__ import annotations

import struct

from bootstub.pack_payload import pack
from guest.units import PAGE_SIZE, SZ_1M, SZ_2M, SZ_64K, round_up

LOAD_PHYSICAL_ADDR = 0x1000000

_HALT = b"\xf4\xeb\xfd"  # hlt; jmp to the hlt
_INIT_SIZE_MINUS_END = b"\x8b\x9e\x60\x02\0\0\x81\xeb%s\x48\x01\xeb"
"""movl init_size(%rsi), %ebx; subl $_end, %ebx; addq %rbp, %rbx: where a decompressor moves itself."""
_BUILD_STRING = b"6.3.0-unaccepted (sample@unaccepted) (no compiler) #1\0"
_ENTRY_64 = 0x200
"""From a 32-bit entry point to its 64-bit one, at the start of the code and at ``handover_offset``."""

_SETUP_SIZE = PAGE_SIZE
_KERNEL_VERSION_OFFSET = 0x300
_PAYLOAD_OFFSET = 0x2C0
_PE_OFFSET = 0x40
_FILE_ALIGNMENT = 0x200
_STACK_SIZE = 4 * PAGE_SIZE
_HEAP_SIZES = {"bzip2": 4 * SZ_1M, "zstd": 3 * SZ_64K}
"""BOOT_HEAP_SIZE where it is not 64 KiB (arch/x86/include/asm/boot.h)."""

_HEADER, _HEADER_END = 0x1F1, 0x26C
_HEADER_ENDS = (
    (0x202, 0x22C), (0x203, 0x230), (0x205, 0x238), (0x206, 0x23C), (0x207, 0x248), (0x208, 0x250), (0x209, 0x258),
    (0x20A, 0x264), (0x20B, 0x268), (0x20F, _HEADER_END),
)  # fmt: skip
"""Where the setup header ends, from each boot protocol on that made it longer."""


def _init_size(end: int, input_len: int, output_len: int, total_size: int) -> int:
    """Memory for decompressing in place, or for the kernel itself if that is more (arch/x86/boot/header.S)."""
    extra = (output_len >> 8) + 2 * SZ_64K
    extract_offset = round_up(max(output_len - input_len, 0) + extra, PAGE_SIZE)
    return round_up(max(end + extract_offset, total_size), PAGE_SIZE)


def _protected_mode(payload: bytes, compression: str) -> tuple[bytes, int, int]:
    """The code from startup_32 on around ``payload``; its EFI handover entry's offset; its size with heap and stack.

    Behind the halt at startup_64 stand what a decompressor would move itself by, and the build string.
    """
    entry = _HALT.ljust(_ENTRY_64, b"\0")
    payload_end = round_up(_PAYLOAD_OFFSET + len(payload), _FILE_ALIGNMENT)
    end = payload_end + 3 * _ENTRY_64 + _HEAP_SIZES.get(compression, SZ_64K) + _STACK_SIZE
    startup_64 = _HALT + _INIT_SIZE_MINUS_END % struct.pack("<I", end) + _BUILD_STRING
    code = (entry + startup_64).ljust(_PAYLOAD_OFFSET, b"\0") + payload
    code = code.ljust(payload_end, b"\0") + 3 * entry  # efi32_stub_entry, efi64_stub_entry, efi_pe_entry
    return code, payload_end, end


def _pe_header(code_size: int, efi_pe_entry: int, init_size: int) -> bytes:
    """PE32+ headers of an EFI application with one section, and room behind it to decompress in place."""
    memory_size = init_size + SZ_2M  # to align the kernel in it
    coff = struct.pack(
        "<4sHHIIIHH",
        *(b"PE", 0x8664, 1, 0, 0, 0, 0xA0, 0x206),  # AMD64, one section, size of what follows, executable image
    )
    optional = struct.pack(
        "<HBBIIIIIQIIHHHHHHIIIIHHQQQQII48x",
        *(0x20B, 2, 20, code_size, 0, memory_size - code_size),  # Magic, linker, SizeOfCode, SizeOf*Data
        *(_SETUP_SIZE + efi_pe_entry, _SETUP_SIZE, LOAD_PHYSICAL_ADDR),  # entry point, BaseOfCode, ImageBase
        *(PAGE_SIZE, _FILE_ALIGNMENT),  # SectionAlignment, FileAlignment
        *(0, 0, 1, 0, 0, 0, 0),  # versions: operating system, image, subsystem, Win32
        *(_SETUP_SIZE + memory_size, _SETUP_SIZE, 0),  # SizeOfImage, SizeOfHeaders, CheckSum
        *(10, 0x100),  # Subsystem: EFI application; DllCharacteristics: NX_COMPAT
        *(0, 0, 0, 0, 0, 6),  # stack and heap, LoaderFlags, NumberOfRvaAndSizes: six empty directories
    )
    section = struct.pack(
        "<8sIIIIIIHHI",
        *(b".text", memory_size, _SETUP_SIZE, code_size, _SETUP_SIZE),  # in memory, in the file
        *(0, 0, 0, 0, 0xE0000020),  # no relocations, no line numbers; code, execute, read, write
    )
    return coff + optional + section


def make_bzimage(
    vmlinux: bytes, kernel_version: str, *, compression: str, version: int, kernel_total_size: int
) -> bytes:
    """``vmlinux`` packed into a bzImage of boot protocol ``version``, 2.02 to 2.15.

    ``compression`` is a key of ``pack_payload.PACKERS``; another one is a ``ValueError``. ``kernel_total_size`` is the
    memory from ``_text`` to ``_end`` in bytes. Fields that came after ``version`` are not there.
    """
    payload = pack(vmlinux, compression)
    code, handover, end = _protected_mode(payload, compression)
    init_size = _init_size(end, len(payload), len(vmlinux), kernel_total_size)
    setup = bytearray(_SETUP_SIZE)
    setup[0:2] = b"MZ"
    struct.pack_into("<I", setup, 0x3C, _PE_OFFSET)
    pe_header = _pe_header(len(code), handover + 2 * _ENTRY_64, init_size)
    setup[_PE_OFFSET : _PE_OFFSET + len(pe_header)] = pe_header
    header_end = max(end for since, end in _HEADER_ENDS if since <= version)
    struct.pack_into(
        "<BHIHHHHHIHIHHBBHIIIIHBBIIIBBHIIQIIQQIII",
        setup,
        _HEADER,
        *(_SETUP_SIZE // 512 - 1, 1, len(code) // 16, 0, 0xFFFF, 0, 0xAA55),  # setup_sects ... boot_flag
        *(0xEB | header_end - 0x202 << 8, 0x53726448, version),  # jump behind the header, header, version
        *(0, 0x1000, _KERNEL_VERSION_OFFSET - 0x200),  # realmode_swtch, start_sys_seg, kernel_version
        *(0, 1, 0x8000, 0x100000),  # type_of_loader, loadflags: LOADED_HIGH, setup_move_size, code32_start
        *(0, 0, 0, 0x5C00, 0, 0, 0),  # ramdisk_image, size, bootsect_kludge, heap_end_ptr, loader, cmd_line_ptr
        *(0x7FFFFFFF, SZ_2M, 1),  # initrd_addr_max, kernel_alignment, relocatable_kernel
        *(21 if version >= 0x20A else 0, 0x7F if version >= 0x20C else 0),  # min_alignment, xloadflags
        *(2047, 0, 0, _PAYLOAD_OFFSET, len(payload)),  # cmdline_size, hardware_subarch, data, payload
        *(0, LOAD_PHYSICAL_ADDR, init_size, handover, 0),  # setup_data ... handover_offset, kernel_info_offset
    )
    setup[header_end:_HEADER_END] = b"\xcc" * (_HEADER_END - header_end)  # code of the setup
    text = kernel_version.encode() + b"\0"
    setup[_KERNEL_VERSION_OFFSET : _KERNEL_VERSION_OFFSET + len(text)] = text
    return bytes(setup) + code
