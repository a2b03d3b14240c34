"""TDVF metadata: what a firmware image asks the host to put into a TD's memory before it runs.

The image is mapped so that its last byte is at 0xFFFFFFFF. A table of GUIDed entries below the reset vector
leads to the descriptor.
Sources: edk2 OvmfPkg/ResetVector (Ia16/ResetVectorVtf0.asm, X64/IntelTdxMetadata.asm); Intel TDX Virtual
Firmware Design Guide; QEMU hw/i386/tdvf.c for what a host refuses.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from uuid import UUID

import construct as c

from guest.errors import FormatError
from guest.records import offsets, parse
from guest.units import PAGE_SIZE, SZ_4G

TABLE_FOOTER_GUID = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
TDX_METADATA_OFFSET_GUID = UUID("e47a6535-984a-4798-865e-4685a7bf8ec2")
ATTRIBUTE_MR_EXTEND = 1 << 0
_FOOTER_FROM_END = 0x20
_ENTRY_TRAILER = 18  # u16 length, 16 bytes GUID
_MAX_SECTIONS = 64
_SOURCE = "TDVF design guide, 11; QEMU hw/i386/tdvf.c"

_DESCRIPTOR = c.Struct(
    "Signature" / c.Bytes(4), "Length" / c.Int32ul, "Version" / c.Int32ul, "NumberOfSectionEntry" / c.Int32ul
)
_SECTION = c.Struct(
    "DataOffset" / c.Int32ul,
    "RawDataSize" / c.Int32ul,
    "MemoryAddress" / c.Int64ul,
    "MemoryDataSize" / c.Int64ul,
    "Type" / c.Int32ul,
    "Attributes" / c.Int32ul,
)


class SectionType(IntEnum):
    """Type of a TDVF section."""

    BFV = 0
    """Boot firmware volume: code."""
    CFV = 1
    """Configuration firmware volume: variables."""
    TD_HOB = 2
    """Where the host puts the HOB list."""
    TempMem = 3
    """Zeroed memory for the firmware's first steps."""


@dataclass(frozen=True, slots=True)
class TdvfSection:
    """One section: ``data_offset`` and ``raw_size`` in the image, ``address`` and ``memory_size`` in the guest."""

    data_offset: int
    raw_size: int
    address: int
    memory_size: int
    type: SectionType
    attributes: int

    @property
    def end(self) -> int:
        return self.address + self.memory_size

    @property
    def is_measured(self) -> bool:
        """Whether its contents go into MRTD (attribute MR.EXTEND)."""
        return bool(self.attributes & ATTRIBUTE_MR_EXTEND)


@dataclass(frozen=True, slots=True)
class Tdvf:
    """A firmware image and its sections, in the order of the metadata."""

    image: bytes
    sections: tuple[TdvfSection, ...]

    def data(self, section: TdvfSection) -> bytes:
        """The section's bytes in the image."""
        return self.image[section.data_offset : section.data_offset + section.raw_size]

    def of_type(self, type: SectionType) -> list[TdvfSection]:
        """The sections of one type."""
        return [s for s in self.sections if s.type is type]


def parse_tdvf(image: bytes) -> Tdvf:
    """Find and check the metadata of a firmware image. Raises ``FormatError`` as a host would refuse it."""
    offset = _metadata_offset(image)
    header = parse(_DESCRIPTOR, "TDVF descriptor", image[offset : offset + 16], at=offset, source=_SOURCE)
    count = header.NumberOfSectionEntry
    for name, found, expected in (
        ("Signature", header.Signature, b"TDVF"),
        ("Version", header.Version, 1),
        ("Length", header.Length, 16 + 32 * count),
    ):
        if found != expected:
            at = offset + offsets(_DESCRIPTOR)[name]
            raise FormatError(f"TDVF descriptor {name}", at=at, found=found, expected=expected, source=_SOURCE)
    if not 2 <= count <= _MAX_SECTIONS:
        raise FormatError(
            "TDVF descriptor NumberOfSectionEntry",
            at=offset + 12,
            found=count,
            expected=f"2 to {_MAX_SECTIONS}",
            source=_SOURCE,
        )
    sections = tuple(_section(image, offset + 16 + 32 * n, n) for n in range(count))
    _check_overlap(sections, offset)
    hobs = [s for s in sections if s.type is SectionType.TD_HOB]
    if len(hobs) != 1:
        raise FormatError("TDVF sections of type TD_HOB", at=offset, found=len(hobs), expected=1, source=_SOURCE)
    return Tdvf(image, sections)


def _metadata_offset(image: bytes) -> int:
    """Offset of the descriptor, by the table of GUIDed entries, which is read from its end."""
    footer = len(image) - _FOOTER_FROM_END - 16
    if footer < 2 or image[footer : footer + 16] != TABLE_FOOTER_GUID.bytes_le:
        raise FormatError(
            "firmware image GUIDed table", at=max(footer, 0), found="no table footer",
            expected=f"GUID {TABLE_FOOTER_GUID}", source=_SOURCE,
        )  # fmt: skip
    (total,) = struct.unpack_from("<H", image, footer - 2)
    end, start = footer - 2, footer + 16 - total
    while end - _ENTRY_TRAILER >= max(start, 0):
        length, guid = struct.unpack_from("<H16s", image, end - _ENTRY_TRAILER)
        if length < _ENTRY_TRAILER or end - length < max(start, 0):
            raise FormatError(
                "GUIDed table entry length", at=end - _ENTRY_TRAILER, found=length,
                expected="an entry inside the table", source=_SOURCE,
            )  # fmt: skip
        if guid == TDX_METADATA_OFFSET_GUID.bytes_le and length == _ENTRY_TRAILER + 4:
            return _from_end(image, end - length)
        end -= length
    raise FormatError(
        "firmware image GUIDed table", at=max(start, 0), found="no TDX metadata entry",
        expected=f"GUID {TDX_METADATA_OFFSET_GUID}", source=_SOURCE,
    )  # fmt: skip


def _from_end(image: bytes, at: int) -> int:
    """The metadata offset that stands at ``at``, counted from the end of the image."""
    (from_end,) = struct.unpack_from("<I", image, at)
    offset: int = len(image) - from_end
    if not 0 <= offset <= len(image) - 16:
        raise FormatError(
            "TDX metadata offset", at=at, found=f"{from_end:#x} bytes before the end",
            expected=f"a place inside the image of {len(image):#x} bytes", source=_SOURCE,
        )  # fmt: skip
    return offset


def _section(image: bytes, at: int, number: int) -> TdvfSection:
    """Parse and check section ``number``, which stands at ``at``."""
    what = f"TDVF section {number}"
    raw = parse(_SECTION, what, image[at : at + 32], at=at, source=_SOURCE)

    def refuse(field: str, found: object, expected: str) -> FormatError:
        where = at + offsets(_SECTION)[field]
        return FormatError(f"{what} {field}", at=where, found=found, expected=expected, source=_SOURCE)

    try:
        kind = SectionType(raw.Type)
    except ValueError:
        raise refuse("Type", raw.Type, "BFV 0, CFV 1, TD_HOB 2 or TempMem 3") from None
    has_data = kind in (SectionType.BFV, SectionType.CFV)
    if raw.MemoryAddress % PAGE_SIZE or raw.MemoryDataSize % PAGE_SIZE or not raw.MemoryDataSize:
        raise refuse("MemoryAddress", f"{raw.MemoryAddress:#x} + {raw.MemoryDataSize:#x}", "whole 4 KiB pages")
    if raw.MemoryAddress + raw.MemoryDataSize > SZ_4G:
        raise refuse("MemoryAddress", f"{raw.MemoryAddress:#x} + {raw.MemoryDataSize:#x}", "an end up to 4 GiB")
    if raw.MemoryDataSize < raw.RawDataSize:
        raise refuse("MemoryDataSize", f"{raw.MemoryDataSize:#x}", f"at least RawDataSize {raw.RawDataSize:#x}")
    if has_data != (raw.RawDataSize != 0):
        raise refuse("RawDataSize", f"{raw.RawDataSize:#x}", "data" if has_data else "0")
    if raw.DataOffset + raw.RawDataSize > len(image):
        found = f"{raw.DataOffset:#x} + {raw.RawDataSize:#x}"
        raise refuse("DataOffset", found, f"a range inside the image of {len(image):#x} bytes")
    return TdvfSection(raw.DataOffset, raw.RawDataSize, raw.MemoryAddress, raw.MemoryDataSize, kind, raw.Attributes)


def _check_overlap(sections: tuple[TdvfSection, ...], at: int) -> None:
    ordered = sorted(sections, key=lambda s: s.address)
    for low, high in pairwise(ordered):
        if low.end > high.address:
            found = f"{high.type.name} at {high.address:#x} over {low.type.name} [{low.address:#x}, {low.end:#x})"
            raise FormatError("TDVF sections", at=at, found=found, expected="no overlap", source=_SOURCE)
