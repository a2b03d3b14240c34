"""A kernel of our own: an ELF file with a relocation table, packed into a bzImage.

What a boot uses when it is given no kernel, and what tests take apart. Written with ``struct`` alone: nothing
here knows the parsers. Its contents are text that names the segment and page which it belongs to, so that a dump
of guest memory shows what came from where; there is no code in it but a halt at each entry point.

Source: ELF-64 Object File Format 1.5.
"""

from __future__ import annotations

import struct
import zlib
from functools import cache

from bootstub.make_bzimage import make_bzimage
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
_CONFIG = 5 * PAGE_SIZE  # in the text segment, if there is one

_EHDR_SIZE, _PHDR_SIZE = 64, 56
_ET_EXEC, _EM_X86_64 = 2, 62
_PT_LOAD, _PT_NOTE = 1, 4
_R, _RX, _RW, _RWX = 4, 5, 6, 7

_HALT = b"\xf4\xeb\xfd"  # hlt; jmp to the hlt


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


def _text(config: str | None) -> bytearray:
    text = _pages("text")
    if config is not None:  # as kernel/configs.c has it, CONFIG_IKCONFIG
        packed = b"IKCFG_ST" + zlib.compress(config.encode(), wbits=31) + b"IKCFG_ED"
        text[_CONFIG : _CONFIG + len(packed)] = packed
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


def build_vmlinux(*, kernel_total_size: int = KERNEL_TOTAL_SIZE, config: str | None = None) -> bytes:
    """The kernel's ELF file and the relocation table behind it: what a payload decompresses to.

    ``kernel_total_size`` is the memory from ``_text`` to ``_end`` in bytes, bss included. ``config`` is the text of
    the configuration that the kernel carries with it, if any.
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
        (_TEXT_FILE_OFFSET, _text(config)),
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


def build_bzimage(
    vmlinux: bytes,
    *,
    compression: str = "zstd",
    version: int = 0x20F,
    kernel_total_size: int = KERNEL_TOTAL_SIZE,
) -> bytes:
    """``vmlinux`` packed into a bzImage by ``make_bzimage()``; ``kernel_total_size`` is what it was built with."""
    return make_bzimage(
        vmlinux, KERNEL_VERSION, compression=compression, version=version, kernel_total_size=kernel_total_size
    )


@cache
def sample_bzimage() -> bytes:
    """The kernel that is booted when none is given; the same bytes every time."""
    return build_bzimage(build_vmlinux())
