"""The kernel's ELF file: entry point, and the segments that the decompressor puts into place.

Source: arch/x86/boot/compressed/misc.c, parse_elf(). It reads the ELF header and the program headers and nothing
else; so do we, through pyelftools' declarations. What the kernel refuses is refused with the kernel's words.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.structs import ELFStructs

from bootstub.kernel_layout import LOAD_PHYSICAL_ADDR
from guest.errors import FormatError
from guest.memory import GuestMemory
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_2M, round_up

_PARSE_ELF = "arch/x86/boot/compressed/misc.c, parse_elf()"
_ELF_SPEC = "ELF-64 Object File Format, version 1.5"

_IDENT = b"\x7fELF\x02\x01\x01"
"""Magic, ELFCLASS64, ELFDATA2LSB, EV_CURRENT."""
_EHDR_SIZE = 64
_PHDR_SIZE = 56
_E_MACHINE_OFFSET = 18
_E_SHOFF = slice(40, 48)
_E_PHENTSIZE_OFFSET = 54


@dataclass(frozen=True, slots=True)
class Segment:
    """A PT_LOAD program header; offset and sizes in bytes, ``p_paddr`` where it goes without KASLR."""

    p_flags: int
    p_offset: int
    p_vaddr: int
    p_paddr: int
    p_filesz: int
    p_memsz: int
    p_align: int


@dataclass(frozen=True, slots=True)
class Vmlinux:
    """A kernel as parse_elf() sees it.

    ``entry`` is a physical address, as the kernel's linker script has it. ``elf_end`` is the offset behind the
    last byte of the ELF file: the relocation table of CONFIG_X86_NEED_RELOCS begins there, if there is one.
    """

    entry: int
    segments: tuple[Segment, ...]
    elf_end: int


def load_segments(data: bytes) -> Vmlinux:
    """Read the ELF file at the start of ``data``, the decompressed payload of a bzImage.

    ``at`` of a ``FormatError`` is an offset in ``data``.
    """
    _check_ident(data)
    structs = _structs()
    stream = io.BytesIO(data)
    ehdr = structs.Elf_Ehdr.parse_stream(stream)
    _check_ehdr(ehdr)
    ends = [
        _check_extent("program headers", ehdr.e_phoff, ehdr.e_phnum * _PHDR_SIZE, data),
        _check_extent("section headers", ehdr.e_shoff, ehdr.e_shnum * ehdr.e_shentsize, data),
    ]
    stream.seek(ehdr.e_phoff)
    phdrs = [structs.Elf_Phdr.parse_stream(stream) for _ in range(ehdr.e_phnum)]
    segments = tuple(_segments(phdrs, ehdr.e_phoff, data))
    if not segments:
        raise FormatError("e_phnum", at=ehdr.e_phoff, found="no PT_LOAD", expected="one or more", source=_PARSE_ELF)
    ends += [segment.p_offset + segment.p_filesz for segment in segments]
    return Vmlinux(ehdr.e_entry, segments, max(ends))


@cache
def _structs() -> ELFStructs:
    structs = ELFStructs(little_endian=True, elfclass=64)
    structs.create_basic_structs()
    structs.create_advanced_structs()
    return structs


def place_segments(memory: GuestMemory, kernel: Vmlinux, output: int) -> None:
    """Move each segment from its place in the file unpacked at ``output`` to its place in memory, in order."""
    for segment in kernel.segments:
        data = memory.read(output + segment.p_offset, segment.p_filesz)
        memory.write(output + segment.p_paddr - LOAD_PHYSICAL_ADDR, data)


def kernel_total_size(data: bytes, kernel: Vmlinux) -> int:
    """Bytes from ``_text`` to ``_end``, which the linker of the decompressor knows as a constant.

    ``_end`` lies behind the section ``.brk``; in some kernels scratch space follows it, which has no use in memory
    once they run. A file without that section ends with its last segment.
    """
    start = min(segment.p_paddr for segment in kernel.segments)
    try:
        brk = _section(data, ".brk")
    except (ELFError, ConstructError, UnicodeDecodeError, OverflowError) as error:
        raise FormatError(
            "section headers", at=0, found=f"{type(error).__name__}: {error}"[:80], expected="names of sections",
            source=_ELF_SPEC,
        ) from error  # fmt: skip
    if brk is None:
        return max(segment.p_paddr + segment.p_memsz for segment in kernel.segments) - start
    text = min(segment.p_vaddr for segment in kernel.segments if segment.p_paddr == start)
    return round_up(brk["sh_addr"] + brk["sh_size"], PAGE_SIZE) - text


def _section(data: bytes, name: str) -> Any:
    """The section of that name, or None."""
    if not any(data[_E_SHOFF]):
        return None
    from elftools.elf.elffile import ELFFile  # slow to import: all that it knows of debugging information comes along

    return ELFFile(io.BytesIO(data)).get_section_by_name(name)


def _check_ident(data: bytes) -> None:
    found = bytes(data[: len(_IDENT)])
    if found[:4] != _IDENT[:4] or len(data) < _EHDR_SIZE:
        raise FormatError(
            "Kernel is not a valid ELF file: e_ident",
            at=0,
            found=f"{found[:4]!r} and {len(data)} bytes",
            expected=f"{_IDENT[:4]!r} and at least {_EHDR_SIZE} bytes",
            source=_PARSE_ELF,
        )
    if found != _IDENT:
        expected = f"{_IDENT[4:].hex()} (64 bits, little endian, version 1)"
        raise FormatError("e_ident", at=4, found=found[4:].hex(), expected=expected, source=_ELF_SPEC)


def _check_ehdr(ehdr: Any) -> None:
    if ehdr.e_machine != "EM_X86_64":
        raise FormatError(
            "e_machine", at=_E_MACHINE_OFFSET, found=ehdr.e_machine, expected="EM_X86_64", source=_ELF_SPEC
        )
    if ehdr.e_phentsize != _PHDR_SIZE:
        raise FormatError(
            "e_phentsize", at=_E_PHENTSIZE_OFFSET, found=ehdr.e_phentsize, expected=_PHDR_SIZE, source=_PARSE_ELF
        )


def _check_extent(what: str, offset: int, size: int, data: bytes) -> int:
    """Refuse ``size`` bytes from ``offset`` that do not all lie in ``data``; return the offset behind them."""
    if size and offset + size > len(data):
        expected = f"all of it inside the {len(data)} bytes of the file"
        raise FormatError(what, at=offset, found=f"{size} bytes", expected=expected, source=_PARSE_ELF)
    return offset + size if size else 0


def _segments(phdrs: list[Any], phoff: int, data: bytes) -> Iterator[Segment]:
    for index, phdr in enumerate(phdrs):
        if phdr.p_type != "PT_LOAD":
            continue
        segment = Segment(**{name: phdr[name] for name in Segment.__slots__})
        at = phoff + index * _PHDR_SIZE
        if segment.p_align % SZ_2M:
            raise FormatError(
                "Alignment of LOAD segment isn't multiple of 2MB: p_align",
                at=at,
                found=f"{segment.p_align:#x}",
                expected=f"a multiple of {SZ_2M:#x}",
                source=_PARSE_ELF,
            )
        _check_extent(f"PT_LOAD segment of program header {index}", segment.p_offset, segment.p_filesz, data)
        if segment.p_filesz > segment.p_memsz or segment.p_paddr + segment.p_memsz > PHYSICAL_ADDRESS_END:
            raise FormatError(
                f"PT_LOAD segment of program header {index}: p_memsz",
                at=at,
                found=f"{segment.p_memsz:#x}",
                expected=f"at least p_filesz ({segment.p_filesz:#x}) and an end below {PHYSICAL_ADDRESS_END:#x}",
                source=_ELF_SPEC,
            )
        yield segment
