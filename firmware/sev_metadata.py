"""SEV metadata of a firmware image: which pages of an SNP guest the host prepares. For comparison with TDX's.

Source: edk2 OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from firmware.guid_table import SEV_METADATA_OFFSET_GUID, GuidTable, metadata_at
from guest.errors import FormatError

_SOURCE = "edk2 OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm"
_HEADER, _SECTION = struct.Struct("<4sIII"), struct.Struct("<III")

SEV_SECTION_TYPES = {1: "SNP_SEC_MEM", 2: "SNP_SECRETS", 3: "CPUID", 4: "SVSM_CAA", 0x10: "KERNEL_HASHES"}


@dataclass(frozen=True, slots=True)
class SevSection:
    """``size`` bytes at ``base`` of the guest; ``type`` is a key of ``SEV_SECTION_TYPES`` or unknown to us."""

    base: int
    size: int
    type: int

    @property
    def type_name(self) -> str:
        return SEV_SECTION_TYPES.get(self.type, f"type {self.type:#x}")


@dataclass(frozen=True, slots=True)
class SevMetadata:
    """The descriptor's place and length in the image, and its sections."""

    offset: int
    length: int
    sections: tuple[SevSection, ...]


def read_sev_metadata(image: bytes, table: GuidTable) -> SevMetadata | None:
    """The metadata that ``table`` leads to; None if there is no entry for it. Raises ``FormatError``."""
    entry = table.find(SEV_METADATA_OFFSET_GUID)
    if entry is None:
        return None
    at = metadata_at(image, entry, _HEADER.size)
    signature, length, version, count = _HEADER.unpack_from(image, at)
    for place, name, found, expected in (
        (0, "Signature", signature, b"ASEV"),
        (8, "Version", version, 1),
        (4, "Length", length, _HEADER.size + _SECTION.size * count),
    ):
        if found != expected:
            raise FormatError(f"SEV descriptor {name}", at=at + place, found=found, expected=expected, source=_SOURCE)
    if at + length > len(image):
        raise FormatError(
            "SEV descriptor Length", at=at + 4, found=length, expected="an end inside the image", source=_SOURCE
        )
    rows = _SECTION.iter_unpack(image[at + _HEADER.size : at + length])
    return SevMetadata(at, length, tuple(SevSection(*row) for row in rows))
