"""The PE header of a kernel image, as ``unaccepted dump kernel`` shows it.

Source: Microsoft PE and COFF Specification; what LoadImage() needs of it, ``firmware.pe`` checks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from firmware.pe import parse_pe

_PE_OFFSET_AT = 0x3C
_COFF, _SECTION = struct.Struct("<4sHH12xHH"), struct.Struct("<8sIIII12xI")
_SUBSYSTEM = struct.Struct("<HH")
_SECTION_ALIGNMENT_AT, _SUBSYSTEM_AT = 32, 68
_EFI_APPLICATION = 10


@dataclass(frozen=True, slots=True)
class PeSection:
    """A section: addresses in the loaded image, offsets in the file."""

    name: str
    address: int
    size: int
    offset: int
    raw_size: int
    flags: int


@dataclass(frozen=True, slots=True)
class PeHeader:
    """The essentials. ``offset`` and ``end`` are those of the headers in the file."""

    offset: int
    end: int
    machine: int
    characteristics: int
    entry_point: int
    image_base: int
    size_of_image: int
    section_alignment: int
    subsystem: int
    dll_characteristics: int
    sections: tuple[PeSection, ...]


def read_pe_header(data: bytes) -> PeHeader | None:
    """The PE header of ``data``, None if it is no such file at all. A broken one is a ``FormatError``."""
    if not data.startswith(b"MZ"):
        return None
    image = parse_pe(data)
    at = int.from_bytes(data[_PE_OFFSET_AT : _PE_OFFSET_AT + 4], "little")
    _, machine, count, optional_size, characteristics = _COFF.unpack_from(data, at)
    optional = at + _COFF.size
    table = optional + optional_size
    subsystem, dll_characteristics = _SUBSYSTEM.unpack(
        data[optional + _SUBSYSTEM_AT :][: _SUBSYSTEM.size].ljust(_SUBSYSTEM.size, b"\0")
    )
    alignment_at = optional + _SECTION_ALIGNMENT_AT
    return PeHeader(
        offset=at,
        end=table + count * _SECTION.size,
        machine=machine,
        characteristics=characteristics,
        entry_point=image.entry_point,
        image_base=image.image_base,
        size_of_image=image.size_of_image,
        section_alignment=int.from_bytes(data[alignment_at : alignment_at + 4], "little"),
        subsystem=subsystem,
        dll_characteristics=dll_characteristics,
        sections=tuple(_section(data, table + number * _SECTION.size) for number in range(count)),
    )


def pe_text(pe: PeHeader | None) -> Iterator[str]:
    """The header and a line for each section."""
    if pe is None:
        yield "no PE header: no EFI stub"
        return
    what = "EFI application" if pe.subsystem == _EFI_APPLICATION else f"subsystem {pe.subsystem}"
    yield (
        f"{pe.offset:#x} PE32+ {what}, machine {pe.machine:#x}, entry {pe.entry_point:#x}, ImageBase "
        f"{pe.image_base:#x}, SizeOfImage {pe.size_of_image:#x}, DllCharacteristics {pe.dll_characteristics:#x}"
    )
    yield f"  {'section':<9}{'address':>11} {'size':>11} {'offset':>11} {'raw size':>11}  flags"
    for part in pe.sections:
        numbers = " ".join(f"{value:>#11x}" for value in (part.address, part.size, part.offset, part.raw_size))
        yield f"  {part.name:<9}{numbers}  {part.flags:#010x}"


def pe_json(pe: PeHeader | None) -> dict[str, object] | None:
    """The header for programs."""
    return asdict(pe) if pe is not None else None


def _section(data: bytes, at: int) -> PeSection:
    raw_name, size, address, raw_size, offset, flags = _SECTION.unpack_from(data, at)
    name = "".join(chr(byte) if 0x20 < byte < 0x7F else "?" for byte in raw_name.rstrip(b"\0"))
    return PeSection(name, address, size, offset, raw_size, flags)
