"""PE32+ images: what LoadImage() needs of the kernel file.

Source: Microsoft PE/COFF specification; edk2 MdeModulePkg/Core/Dxe/Image/Image.c, CoreLoadPeImage().
"""

from __future__ import annotations

from dataclasses import dataclass

import construct as c

from guest.errors import FormatError
from guest.records import parse
from guest.units import SZ_1G

_SOURCE = "PE/COFF specification"
_IMAGE_FILE_MACHINE_AMD64 = 0x8664
_PE32_PLUS = 0x20B
_PE_OFFSET_AT = 0x3C
_MAX_SECTIONS = 96
"""What the Windows loader takes; without a limit a small file could ask for a copy of itself 65535 times."""

_COFF = c.Struct(
    "Signature" / c.Bytes(4),
    "Machine" / c.Int16ul,
    "NumberOfSections" / c.Int16ul,
    c.Padding(12),
    "SizeOfOptionalHeader" / c.Int16ul,
    "Characteristics" / c.Int16ul,
)
_OPTIONAL = c.Struct(
    "Magic" / c.Int16ul,
    c.Padding(14),
    "AddressOfEntryPoint" / c.Int32ul,
    c.Padding(4),
    "ImageBase" / c.Int64ul,
    "SectionAlignment" / c.Int32ul,
    c.Padding(20),
    "SizeOfImage" / c.Int32ul,
    "SizeOfHeaders" / c.Int32ul,
)
_SECTION = c.Struct(
    c.Padding(8),
    "VirtualSize" / c.Int32ul,
    "VirtualAddress" / c.Int32ul,
    "SizeOfRawData" / c.Int32ul,
    "PointerToRawData" / c.Int32ul,
    c.Padding(16),
)


@dataclass(frozen=True, slots=True)
class PeImage:
    """A checked image: ``pieces`` are (offset in the loaded image, bytes), the headers first."""

    image_base: int
    size_of_image: int
    entry_point: int
    pieces: tuple[tuple[int, bytes], ...]


def parse_pe(data: bytes) -> PeImage:
    """Check a PE32+ image for x86-64 and cut it into what goes where. Raises ``FormatError``."""
    if data[:2] != b"MZ":
        raise FormatError("PE image", at=0, found=data[:2], expected=b"MZ", source=_SOURCE)
    at = int.from_bytes(data[_PE_OFFSET_AT : _PE_OFFSET_AT + 4], "little")
    coff = parse(_COFF, "COFF header", data[at : at + _COFF.sizeof()], at=at, source=_SOURCE)
    _expect("COFF header Signature", at, coff.Signature, b"PE\0\0")
    _expect("COFF header Machine", at + 4, coff.Machine, _IMAGE_FILE_MACHINE_AMD64)
    if coff.NumberOfSections > _MAX_SECTIONS:
        raise FormatError(
            "COFF header NumberOfSections", at=at + 6, found=coff.NumberOfSections,
            expected=f"up to {_MAX_SECTIONS}", source=_SOURCE,
        )  # fmt: skip
    at += _COFF.sizeof()
    optional = parse(_OPTIONAL, "optional header", data[at : at + _OPTIONAL.sizeof()], at=at, source=_SOURCE)
    _expect("optional header Magic", at, optional.Magic, _PE32_PLUS)
    size = optional.SizeOfImage
    if not 0 < optional.SizeOfHeaders <= min(size, len(data)) or size > SZ_1G:
        found = f"SizeOfImage {size:#x}, SizeOfHeaders {optional.SizeOfHeaders:#x}"
        raise FormatError(
            "optional header", at=at, found=found, expected="headers in image, up to 1 GiB", source=_SOURCE
        )
    at += coff.SizeOfOptionalHeader
    pieces = [(0, data[: optional.SizeOfHeaders])]
    pieces += [_section(data, at + n * _SECTION.sizeof(), n, size) for n in range(coff.NumberOfSections)]
    return PeImage(optional.ImageBase, size, optional.AddressOfEntryPoint, tuple(pieces))


def _section(data: bytes, at: int, number: int, size_of_image: int) -> tuple[int, bytes]:
    """Offset in the image and bytes of section ``number``; what is beyond its raw data stays zero."""
    what = f"PE section {number}"
    raw = parse(_SECTION, what, data[at : at + _SECTION.sizeof()], at=at, source=_SOURCE)
    start, size = raw.PointerToRawData, min(raw.SizeOfRawData, raw.VirtualSize)
    if start + size > len(data) or raw.VirtualAddress + size > size_of_image:
        found = f"{size:#x} bytes from {start:#x} to {raw.VirtualAddress:#x}"
        raise FormatError(what, at=at, found=found, expected="a range inside file and image", source=_SOURCE)
    return raw.VirtualAddress, data[start : start + size]


def _expect(what: str, at: int, found: object, expected: object) -> None:
    if found != expected:
        raise FormatError(what, at=at, found=found, expected=expected, source=_SOURCE)
