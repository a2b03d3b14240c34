"""A kernel of our own: an ELF file with a relocation table, packed into a bzImage.

What a boot uses when it is given no kernel, and what tests take apart. Written with ``struct`` alone: nothing
here knows the parsers. Its contents are text that names the segment and page which it belongs to, so that a dump
of guest memory shows what came from where; there is no code in it but a halt at each entry point.

Sources: ELF-64 Object File Format 1.5; Documentation/arch/x86/boot.rst; arch/x86/boot/header.S; Microsoft PE and
COFF Specification.
"""

from __future__ import annotations

import struct
import sys
from functools import cache

from guest.units import PAGE_SIZE, SZ_1M, SZ_2M, SZ_64K, round_up

LOAD_PHYSICAL_ADDR = 0x1000000
START_KERNEL_MAP = 0xFFFFFFFF80000000
KERNEL_VERSION = "6.3.0-unaccepted (sample) #1"

KERNEL_TOTAL_SIZE = 6 * SZ_1M
"""Bytes of memory from ``_text`` to ``_end``, bss included."""

POINTERS = 16
"""Entries in each of the three lists of the relocation table."""
POINTERS_64_OFFSET = 0x800
"""In the data segment: 64-bit addresses in the text segment, one page apart."""
POINTERS_32_OFFSET = 0x800
"""In the text segment: the low halves of addresses in the data segment, one page apart."""
POINTERS_INVERSE_OFFSET = 0xC00
"""In the text segment: 32-bit distances from the kernel's start, which shrink when the kernel moves up."""

# Where the segments go, from LOAD_PHYSICAL_ADDR on. In the file each lies further on, and as far from a multiple
# of 2 MiB as its virtual address: the decompressor moves them down in place, one after the other.
_SEGMENT_SIZE = SZ_64K
_TEXT = 0
_DATA = SZ_2M
_PERCPU = _DATA + _SEGMENT_SIZE
_INIT = _PERCPU + _SEGMENT_SIZE
_TEXT_FILE_OFFSET = SZ_2M
_DATA_FILE_OFFSET = 2 * SZ_2M
_PERCPU_FILE_OFFSET = 3 * SZ_2M
_INIT_FILE_OFFSET = 3 * SZ_2M + _INIT % SZ_2M
_NOTE = 4 * PAGE_SIZE  # in the text segment

_EHDR_SIZE, _PHDR_SIZE = 64, 56
_ET_EXEC, _EM_X86_64 = 2, 62
_PT_LOAD, _PT_NOTE = 1, 4
_R, _RX, _RW, _RWX = 4, 5, 6, 7

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


def _virtual(offset: int) -> int:
    """Kernel virtual address of an offset from the kernel's start."""
    return START_KERNEL_MAP + LOAD_PHYSICAL_ADDR + offset


def _physical(offset: int) -> int:
    """Physical address of an offset from the kernel's start, if it is not moved."""
    return LOAD_PHYSICAL_ADDR + offset


def _pages(name: str) -> bytearray:
    """A segment's contents: lines of 16 bytes, each with the segment's name and the page's number."""
    lines = (f"{name:7} {page:7}\n" for page in range(_SEGMENT_SIZE // PAGE_SIZE))
    return bytearray().join(line.encode() * (PAGE_SIZE // 16) for line in lines)


def _text() -> bytearray:
    text = _pages("text")
    text[: len(_HALT)] = _HALT
    text[_NOTE : _NOTE + len(_note())] = _note()
    for i in range(POINTERS):
        page = i * PAGE_SIZE
        struct.pack_into("<I", text, POINTERS_32_OFFSET + 4 * i, _virtual(_DATA + page) & 0xFFFFFFFF)
        struct.pack_into("<I", text, POINTERS_INVERSE_OFFSET + 4 * i, (page - _virtual(0)) & 0xFFFFFFFF)
    return text


def _data() -> bytearray:
    data = _pages("data")
    addresses = [_virtual(_TEXT + i * PAGE_SIZE) for i in range(POINTERS)]
    struct.pack_into(f"<{POINTERS}Q", data, POINTERS_64_OFFSET, *addresses)
    return data


def _relocation_table() -> bytes:
    """0, 64-bit list, 0, inverse list, 0, 32-bit list (CONFIG_X86_NEED_RELOCS): it is read backwards."""
    lists = (
        [_DATA + POINTERS_64_OFFSET + 8 * i for i in range(POINTERS)],
        [_TEXT + POINTERS_INVERSE_OFFSET + 4 * i for i in range(POINTERS)],
        [_TEXT + POINTERS_32_OFFSET + 4 * i for i in range(POINTERS)],
    )
    table = [entry for places in lists for entry in (0, *(_virtual(place) & 0xFFFFFFFF for place in places))]
    return struct.pack(f"<{len(table)}I", *table)


def _note() -> bytes:
    """An ELF note of Linux with the kernel's version, of a type that means nothing to anybody else."""
    text = KERNEL_VERSION.encode() + b"\0"
    return struct.pack("<III8s", 6, len(text), 0, b"Linux") + text.ljust(round_up(len(text), 4), b"\0")


_LZ4_MAGIC, _LZ4_BLOCK = bytes.fromhex("02214c18"), 8 * SZ_1M


def build_vmlinux(*, kernel_total_size: int = KERNEL_TOTAL_SIZE) -> bytes:
    """The kernel's ELF file and the relocation table behind it: what a payload decompresses to.

    ``kernel_total_size`` is the memory from ``_text`` to ``_end`` in bytes, bss included.
    """
    bss = kernel_total_size - _INIT - _SEGMENT_SIZE
    if bss < 0:
        raise ValueError(f"kernel_total_size {kernel_total_size:#x}: the segments are {-bss:#x} bytes larger")
    size, note_size = _SEGMENT_SIZE, len(_note())
    phdrs = (
        # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
        (_PT_LOAD, _RX, _TEXT_FILE_OFFSET, _virtual(_TEXT), _physical(_TEXT), size, size, SZ_2M),
        (_PT_LOAD, _RW, _DATA_FILE_OFFSET, _virtual(_DATA), _physical(_DATA), size, size, SZ_2M),
        (_PT_LOAD, _RW, _PERCPU_FILE_OFFSET, 0, _physical(_PERCPU), size, size, SZ_2M),
        (_PT_LOAD, _RWX, _INIT_FILE_OFFSET, _virtual(_INIT), _physical(_INIT), size, size + bss, SZ_2M),
        (_PT_NOTE, _R, _TEXT_FILE_OFFSET + _NOTE, _virtual(_NOTE), _physical(_NOTE), note_size, note_size, 4),
    )
    ehdr = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", _ET_EXEC, _EM_X86_64, 1),  # e_ident, e_type, e_machine, e_version
        *(_physical(_TEXT), _EHDR_SIZE, 0, 0),  # e_entry, e_phoff, e_shoff, e_flags
        *(_EHDR_SIZE, _PHDR_SIZE, len(phdrs), 0, 0, 0),  # e_ehsize, e_phentsize, e_phnum; no sections
    )
    return _join(
        (0, ehdr + b"".join(struct.pack("<IIQQQQQQ", *phdr) for phdr in phdrs)),
        (_TEXT_FILE_OFFSET, _text()),
        (_DATA_FILE_OFFSET, _data()),
        (_PERCPU_FILE_OFFSET, _pages("percpu")),
        (_INIT_FILE_OFFSET, _pages("init") + _relocation_table()),
    )


def _join(*parts: tuple[int, bytes | bytearray]) -> bytes:
    """One file of ``parts`` at ascending offsets, with less than 2 MiB of zeros before each."""
    zeros = memoryview(bytes(SZ_2M))
    pieces: list[bytes | bytearray | memoryview] = []
    end = 0
    for offset, contents in parts:
        pieces += (zeros[: offset - end], contents)
        end = offset + len(contents)
    return b"".join(pieces)


def _compress(data: bytes, compression: str) -> bytes:
    """``data`` as the kernel's build packs it: with its size appended, which gzip's own trailer has already."""
    size = struct.pack("<I", len(data))
    match compression:
        case "gzip":
            import zlib

            return zlib.compress(data, 1, wbits=31)
        case "bzip2":
            import bz2

            return bz2.compress(data, 1) + size
        case "lzma":
            import lzma

            lzma1 = {"id": lzma.FILTER_LZMA1, "preset": 0, "dict_size": 16 * SZ_1M}
            return lzma.compress(data, lzma.FORMAT_ALONE, filters=[lzma1]) + size
        case "xz":
            import lzma

            filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 32 * SZ_1M}]
            return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters) + size
        case "zstd":
            if sys.version_info >= (3, 14):
                from compression import zstd
            else:
                from backports import zstd

            return zstd.compress(data, 1) + size
        case "lz4":
            from lz4 import block

            pieces = [data[at : at + _LZ4_BLOCK] for at in range(0, len(data), _LZ4_BLOCK)]
            blocks = [block.compress(piece, store_size=False) for piece in pieces]
            return b"".join([_LZ4_MAGIC, *(struct.pack("<I", len(each)) + each for each in blocks), size])
    raise ValueError(f"compression {compression!r}: expected gzip, bzip2, lzma, xz, zstd or lz4")


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


def build_bzimage(
    vmlinux: bytes,
    *,
    compression: str = "zstd",
    version: int = 0x20F,
    kernel_total_size: int = KERNEL_TOTAL_SIZE,
) -> bytes:
    """``vmlinux`` packed into a bzImage of boot protocol ``version``, which is an EFI application as well.

    ``compression`` is one of gzip, bzip2, lzma, xz, zstd and lz4; another one is a ``ValueError``.
    ``kernel_total_size`` is what ``vmlinux`` was built with.
    """
    payload = _compress(vmlinux, compression)
    code, handover, end = _protected_mode(payload, compression)
    init_size = _init_size(end, len(payload), len(vmlinux), kernel_total_size)
    setup = bytearray(_SETUP_SIZE)
    setup[0:2] = b"MZ"
    struct.pack_into("<I", setup, 0x3C, _PE_OFFSET)
    pe_header = _pe_header(len(code), handover + 2 * _ENTRY_64, init_size)
    setup[_PE_OFFSET : _PE_OFFSET + len(pe_header)] = pe_header
    struct.pack_into(
        "<BHIHHHHHIHIHHBBHIIIIHBBIIIBBHIIQIIQQIII",
        setup,
        0x1F1,
        *(_SETUP_SIZE // 512 - 1, 1, len(code) // 16, 0, 0xFFFF, 0, 0xAA55),  # setup_sects ... boot_flag
        *(0x6AEB, 0x53726448, version, 0, 0x1000, _KERNEL_VERSION_OFFSET - 0x200),  # jump ... kernel_version
        *(0, 1, 0x8000, 0x100000),  # type_of_loader, loadflags: LOADED_HIGH, setup_move_size, code32_start
        *(0, 0, 0, 0x5C00, 0, 0, 0),  # ramdisk_image, size, bootsect_kludge, heap_end_ptr, loader, cmd_line_ptr
        *(0x7FFFFFFF, SZ_2M, 1, 21, 0x7F),  # initrd_addr_max, alignment, relocatable, min_alignment, xloadflags
        *(2047, 0, 0, _PAYLOAD_OFFSET, len(payload)),  # cmdline_size, hardware_subarch, data, payload
        *(0, LOAD_PHYSICAL_ADDR, init_size, handover, 0),  # setup_data ... handover_offset, kernel_info_offset
    )
    text = KERNEL_VERSION.encode() + b"\0"
    setup[_KERNEL_VERSION_OFFSET : _KERNEL_VERSION_OFFSET + len(text)] = text
    return bytes(setup) + code


@cache
def sample_bzimage() -> bytes:
    """The kernel that is booted when none is given; the same bytes every time."""
    return build_bzimage(build_vmlinux())
