"""TDVF metadata: what a firmware image asks the host to put into a TD's memory before it runs.

The image is mapped so that its last byte is at 0xFFFFFFFF. A table of GUIDed entries below the reset vector
leads to the descriptor.
Sources: edk2 OvmfPkg/ResetVector (Ia16/ResetVectorVtf0.asm, X64/IntelTdxMetadata.asm); Intel TDX Virtual
Firmware Design Guide; QEMU hw/i386/tdvf.c for what a host refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import construct as c

from firmware.guid_table import (
    FROM_END,
    TABLE_FOOTER_GUID,
    TDX_METADATA_OFFSET_GUID,
    GuidTable,
    metadata_at,
    read_guid_table,
)
from guest.errors import FormatError
from guest.records import offsets, parse
from guest.units import PAGE_SIZE, SZ_4G
from tdx.measurement import Measurement

ATTRIBUTE_MR_EXTEND = 1 << 0
ATTRIBUTE_PAGE_AUG = 1 << 1
_SIGNATURE = b"TDVF"
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
    PermMem = 4
    """Memory that the host does not add, and the firmware accepts."""
    Payload = 5
    """What the firmware starts, such as a kernel."""
    PayloadParam = 6
    """The payload's parameters, such as a command line."""
    TD_INFO = 7
    """Facts about the firmware, in the image alone."""
    TD_PARAMS = 8
    """Parameters for TDH.MNG.INIT, in the image alone."""


HOST_TYPES = frozenset((SectionType.BFV, SectionType.CFV, SectionType.TD_HOB, SectionType.TempMem))
"""The types that QEMU knows; it refuses an image with another one."""
_NOT_MEMORY = (SectionType.TD_INFO, SectionType.TD_PARAMS)
_WITH_DATA = (SectionType.BFV, SectionType.CFV)
_WITHOUT_DATA = (SectionType.TD_HOB, SectionType.TempMem, SectionType.PermMem)


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

    @property
    def is_added(self) -> bool:
        """Whether the host adds its pages: not those that are accepted later (attribute PAGE.AUG)."""
        return self.type not in _NOT_MEMORY and not self.attributes & ATTRIBUTE_PAGE_AUG


@dataclass(frozen=True, slots=True)
class Tdvf:
    """A firmware image, its sections in the order of the metadata, and where the descriptor lies in the image.

    ``left_out`` is how many bytes of the whole image, its variables, come before ``image`` and are in another file.
    """

    image: bytes
    sections: tuple[TdvfSection, ...]
    offset: int = 0
    left_out: int = 0

    def section_offset(self, number: int) -> int:
        """Where in the image section ``number`` is described."""
        return self.offset + _DESCRIPTOR.sizeof() + number * _SECTION.sizeof()

    def data(self, section: TdvfSection) -> bytes:
        """The section's bytes in the image; none of variables that are left out."""
        start = max(section.data_offset - self.left_out, 0)
        return self.image[start : max(section.data_offset + section.raw_size - self.left_out, 0)]

    def of_type(self, type: SectionType) -> list[TdvfSection]:
        """The sections of one type."""
        return [s for s in self.sections if s.type is type]

    def mrtd(self) -> bytes | None:
        """MRTD of a TD that is built from this image; None if it depends on the host's HOB list."""
        measurement = Measurement()
        for section in self.sections:
            if section.type is SectionType.TD_HOB and section.is_measured:
                return None
            if section.is_added:
                measurement.page_add(section.address, section.end, self.data(section) if section.is_measured else None)
        return measurement.mrtd


def parse_tdvf(image: bytes) -> Tdvf:
    """Find and check the metadata of a firmware image. Raises ``FormatError`` as a host would refuse it."""
    tdvf = read_tdvf(image)
    for number, section in enumerate(tdvf.sections):
        if section.type not in HOST_TYPES:
            raise FormatError(
                f"TDVF section {number} Type", at=tdvf.section_offset(number) + offsets(_SECTION)["Type"],
                found=int(section.type), expected="BFV 0, CFV 1, TD_HOB 2 or TempMem 3", source=_SOURCE,
            )  # fmt: skip
    return tdvf


def read_tdvf(image: bytes) -> Tdvf:
    """The same for sections of all types, as a payload's firmware such as td-shim has them."""
    table = read_guid_table(image)
    offset = find_tdvf(image, table)
    if offset is None:
        raise FormatError(
            "firmware image GUIDed table", at=table.offset if table else max(len(image) - FROM_END - 16, 0),
            found="no TDX metadata entry" if table else "no table footer",
            expected=f"GUID {TDX_METADATA_OFFSET_GUID if table else TABLE_FOOTER_GUID}", source=_SOURCE,
        )  # fmt: skip
    return tdvf_at(image, offset)


def find_tdvf(image: bytes, table: GuidTable | None) -> int | None:
    """Offset of the descriptor: by the entry in ``table``, or by the older place of the offset, 0x20 from the end.

    That older offset counts from either end of the image, and holds only if a descriptor's signature is there.
    None if neither leads anywhere. Raises ``FormatError`` for an entry that leads outside.
    """
    entry = table.find(TDX_METADATA_OFFSET_GUID) if table else None
    if entry is not None:
        return metadata_at(image, entry, _DESCRIPTOR.sizeof())
    number = int.from_bytes(image[-FROM_END:][:4], "little") if len(image) >= FROM_END else 0
    places = (number, len(image) - number)
    return next((at for at in places if at >= 0 and image[at : at + 4] == _SIGNATURE), None)


def tdvf_at(image: bytes, offset: int, left_out: int = 0) -> Tdvf:
    """The sections of the descriptor at ``offset``, with ``left_out`` as in ``Tdvf``. Raises ``FormatError``."""
    header = parse(_DESCRIPTOR, "TDVF descriptor", image[offset : offset + 16], at=offset, source=_SOURCE)
    count = header.NumberOfSectionEntry
    for name, found, expected in (
        ("Signature", header.Signature, _SIGNATURE),
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
    sections = tuple(_section(image, offset + 16 + 32 * n, n, left_out) for n in range(count))
    _check_overlap(sections, offset)
    hobs = [s for s in sections if s.type is SectionType.TD_HOB]
    if len(hobs) != 1:
        raise FormatError("TDVF sections of type TD_HOB", at=offset, found=len(hobs), expected=1, source=_SOURCE)
    return Tdvf(image, sections, offset, left_out)


def variables_left_out(image: bytes, offset: int) -> int:
    """How many bytes of variables an image lacks that has only the code, as OVMF_CODE.fd; 0 for a whole image.

    Its metadata, at ``offset``, are those of the whole: there are variables that end where the code begins.
    """
    first = offset + _DESCRIPTOR.sizeof()
    table = image[first : first + _SECTION.sizeof() * _MAX_SECTIONS]
    for raw in c.GreedyRange(_SECTION).parse(table)[: int.from_bytes(image[first - 4 : first], "little")]:
        if raw.Type == SectionType.CFV and raw.MemoryAddress + raw.RawDataSize == SZ_4G - len(image):
            return int(raw.RawDataSize)
    return 0


def _section(image: bytes, at: int, number: int, left_out: int) -> TdvfSection:
    """Parse and check section ``number``, which stands at ``at``."""
    what = f"TDVF section {number}"
    raw = parse(_SECTION, what, image[at : at + 32], at=at, source=_SOURCE)

    def refuse(field: str, found: object, expected: str) -> FormatError:
        where = at + offsets(_SECTION)[field]
        return FormatError(f"{what} {field}", at=where, found=found, expected=expected, source=_SOURCE)

    try:
        kind = SectionType(raw.Type)
    except ValueError:
        raise refuse("Type", raw.Type, f"0 to {max(SectionType)}") from None
    in_memory = kind not in _NOT_MEMORY
    if raw.MemoryAddress % PAGE_SIZE or raw.MemoryDataSize % PAGE_SIZE or (in_memory and not raw.MemoryDataSize):
        raise refuse("MemoryAddress", f"{raw.MemoryAddress:#x} + {raw.MemoryDataSize:#x}", "whole 4 KiB pages")
    if raw.MemoryAddress + raw.MemoryDataSize > SZ_4G:
        raise refuse("MemoryAddress", f"{raw.MemoryAddress:#x} + {raw.MemoryDataSize:#x}", "an end up to 4 GiB")
    if in_memory and raw.MemoryDataSize < raw.RawDataSize:
        raise refuse("MemoryDataSize", f"{raw.MemoryDataSize:#x}", f"at least RawDataSize {raw.RawDataSize:#x}")
    if (kind in _WITH_DATA and not raw.RawDataSize) or (kind in _WITHOUT_DATA and raw.RawDataSize):
        raise refuse("RawDataSize", f"{raw.RawDataSize:#x}", "data" if kind in _WITH_DATA else "0")
    if kind is SectionType.PermMem and not raw.Attributes & ATTRIBUTE_PAGE_AUG:
        raise refuse("Attributes", f"{raw.Attributes:#x}", "PAGE.AUG, bit 1")
    if raw.DataOffset + raw.RawDataSize > left_out + len(image):
        found = f"{raw.DataOffset:#x} + {raw.RawDataSize:#x}"
        raise refuse("DataOffset", found, f"a range inside the image of {left_out + len(image):#x} bytes")
    return TdvfSection(raw.DataOffset, raw.RawDataSize, raw.MemoryAddress, raw.MemoryDataSize, kind, raw.Attributes)


def _check_overlap(sections: tuple[TdvfSection, ...], at: int) -> None:
    ordered = sorted((s for s in sections if s.type not in _NOT_MEMORY), key=lambda s: s.address)
    for low, high in pairwise(ordered):
        if low.end > high.address:
            found = f"{high.type.name} at {high.address:#x} over {low.type.name} [{low.address:#x}, {low.end:#x})"
            raise FormatError("TDVF sections", at=at, found=found, expected="no overlap", source=_SOURCE)
