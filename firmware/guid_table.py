"""The table of GUIDed entries below a firmware image's reset vector: where a host finds what the image tells it.

The table's footer, a GUID, ends 0x20 bytes before the end of the image. Entries lie below it and are read downwards:
each is its data, ``u16 length`` and a GUID, and the length counts all three.
Sources: edk2 OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm; QEMU hw/i386/pc_sysfw_ovmf.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from uuid import UUID

from guest.errors import FormatError

TABLE_FOOTER_GUID = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
TDX_METADATA_OFFSET_GUID = UUID("e47a6535-984a-4798-865e-4685a7bf8ec2")
SEV_METADATA_OFFSET_GUID = UUID("dc886566-984a-4798-a75e-5585a7bf67cc")
FROM_END = 0x20
"""Bytes between the footer's end and the end of the image. Before there was a table, an offset stood there."""
SOURCE = "edk2 OvmfPkg/ResetVector; QEMU hw/i386/pc_sysfw_ovmf.c"
_TRAILER = struct.Struct("<H16s")

KNOWN_ENTRIES: dict[UUID, tuple[str, tuple[str, ...]]] = {
    TDX_METADATA_OFFSET_GUID: ("TDX metadata offset", ("from_end",)),
    SEV_METADATA_OFFSET_GUID: ("SEV metadata offset", ("from_end",)),
    UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e"): ("SEV-ES reset block", ("reset_address",)),
    UUID("4c2eb361-7d9b-4cc3-8081-127c90d3d294"): ("SEV launch secret area", ("base", "size")),
    UUID("7255371f-3a3b-4b04-927b-1da6efa8d454"): ("SEV hash table area", ("base", "size")),
    UUID("784fa70e-3176-4677-8a20-04b68699e374"): ("IGVM parameter metadata offset", ("from_end",)),
}
"""Names of the entries, and of the 32-bit values in their data."""


@dataclass(frozen=True, slots=True)
class GuidEntry:
    """One entry: its GUID, where its data lies in the image, and the data."""

    guid: UUID
    offset: int
    data: bytes

    @property
    def name(self) -> str:
        """What the entry is called; empty if nobody here knows it."""
        return KNOWN_ENTRIES[self.guid][0] if self.guid in KNOWN_ENTRIES else ""

    def values(self) -> dict[str, int]:
        """The values in the data of a known entry, by name; an unknown entry has none. Raises ``FormatError``."""
        names = KNOWN_ENTRIES.get(self.guid, ("", ()))[1]
        if not names:
            return {}
        if len(self.data) != 4 * len(names):
            raise FormatError(
                f"GUIDed table entry {self.name!r}", at=self.offset, found=f"{len(self.data)} bytes of data",
                expected=f"{4 * len(names)} bytes", source=SOURCE,
            )  # fmt: skip
        return dict(zip(names, struct.unpack(f"<{len(names)}I", self.data), strict=True))


@dataclass(frozen=True, slots=True)
class GuidTable:
    """The table: its first byte and its length with the footer, and its entries from the footer downwards."""

    offset: int
    length: int
    entries: tuple[GuidEntry, ...]

    def find(self, guid: UUID) -> GuidEntry | None:
        """The first entry with ``guid``."""
        return next((entry for entry in self.entries if entry.guid == guid), None)


def read_guid_table(image: bytes) -> GuidTable | None:
    """The table of a firmware image; None if it has none. Raises ``FormatError``."""
    footer = len(image) - FROM_END - 16
    if footer < 2 or image[footer : footer + 16] != TABLE_FOOTER_GUID.bytes_le:
        return None
    (total,) = struct.unpack_from("<H", image, footer - 2)
    end, start = footer - 2, footer + 16 - total
    if not 0 <= start <= end:
        raise FormatError(
            "GUIDed table length", at=end, found=total, expected=f"{_TRAILER.size} to {footer + 16}", source=SOURCE
        )
    entries = []
    while end - _TRAILER.size >= start:
        at = end - _TRAILER.size
        length, guid = _TRAILER.unpack_from(image, at)
        if length < _TRAILER.size or end - length < start:
            raise FormatError(
                "GUIDed table entry length", at=at, found=length, expected="an entry inside the table", source=SOURCE
            )
        end -= length
        entries.append(GuidEntry(UUID(bytes_le=guid), end, image[end:at]))
    return GuidTable(start, total, tuple(entries))


def metadata_at(image: bytes, entry: GuidEntry, size: int) -> int:
    """The place that the offset in ``entry`` leads to, which has room for ``size`` bytes. Raises ``FormatError``."""
    from_end = entry.values()["from_end"]
    if not size <= from_end <= len(image):
        raise FormatError(
            entry.name, at=entry.offset, found=f"{from_end:#x} bytes before the end",
            expected=f"a place inside the image of {len(image):#x} bytes", source=SOURCE,
        )  # fmt: skip
    return len(image) - from_end
