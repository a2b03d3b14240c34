"""What ``unaccepted dump tdvf`` shows: a firmware image's GUIDed table, TDX and SEV metadata, and MRTD."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from firmware.guid_table import SOURCE, TABLE_FOOTER_GUID, GuidEntry, GuidTable, read_guid_table
from firmware.sev_metadata import SevMetadata, read_sev_metadata
from firmware.tdvf import (
    ATTRIBUTE_MR_EXTEND,
    ATTRIBUTE_PAGE_AUG,
    HOST_TYPES,
    Tdvf,
    TdvfSection,
    find_tdvf,
    tdvf_at,
    variables_left_out,
)
from guest.errors import FormatError
from guest.units import SZ_4G
from tools.output import hex_dump

_NO_TDX = "no TDX metadata: no TD can be built from this image"
_ATTRIBUTES = ((ATTRIBUTE_MR_EXTEND, "MR.EXTEND"), (ATTRIBUTE_PAGE_AUG, "PAGE.AUG"))
_COLUMNS = (
    f"{'section':<16}{'data offset':>11} {'raw size':>10} {'address':>12} {'memory size':>11}  attributes",
    f"{'section':<16}{'base':>12} {'size':>10}",
)


@dataclass(frozen=True, slots=True)
class Metadata:
    """All that an image says; what it lacks is None."""

    image: bytes
    table: GuidTable | None
    tdvf: Tdvf | None
    sev: SevMetadata | None


def read(image: bytes) -> Metadata:
    """The metadata of a firmware image. One without a GUIDed table or a TDX descriptor is a ``FormatError``."""
    table = read_guid_table(image)
    at = find_tdvf(image, table)
    if table is None and at is None:
        raise FormatError(
            "firmware image", at=max(len(image) - 0x30, 0), found="no metadata",
            expected=f"the GUIDed table's footer {TABLE_FOOTER_GUID}", source=SOURCE,
        )  # fmt: skip
    tdvf = tdvf_at(image, at, variables_left_out(image, at)) if at is not None else None
    return Metadata(image, table, tdvf, read_sev_metadata(image, table) if table else None)


def text(found: Metadata) -> Iterator[str]:
    """The metadata, line by line; numbers in front are offsets in the image."""
    yield f"image of {len(found.image):#x} bytes at {SZ_4G - len(found.image):#x}"
    if found.table:
        yield f"{found.table.offset:#x} GUIDed table, {found.table.length} bytes, {len(found.table.entries)} entries"
        yield from (f"  {entry.offset:#x} {_entry_text(entry)}" for entry in found.table.entries)
    if found.sev:
        yield f"{found.sev.offset:#x} SEV descriptor, {found.sev.length} bytes, {len(found.sev.sections)} sections"
        yield f"  {_COLUMNS[1]}"
        for part in found.sev.sections:
            yield f"  {part.type_name:<16}{part.base:>#12x} {part.size:>#10x}"
    if not found.tdvf:
        yield _NO_TDX
        return
    sections = found.tdvf.sections
    yield f"{found.tdvf.offset:#x} TDVF descriptor, {16 + 32 * len(sections)} bytes, {len(sections)} sections"
    yield f"  {_COLUMNS[0]}"
    yield from (f"  {_section_text(section)}" for section in sections)
    if left_out := found.tdvf.left_out:
        yield f"data offsets count from {left_out:#x} bytes of variables that this image leaves out; `boot` needs both"
    if refused := _refused(found.tdvf):
        yield f"QEMU refuses sections of type {', '.join(refused)}"
    yield f"MRTD {_mrtd_text(found.tdvf)}"


def hex_lines(found: Metadata) -> Iterator[str]:
    """The bytes of the metadata, by their offsets in the image."""
    places = []
    if found.tdvf:
        places.append((found.tdvf.offset, 16 + 32 * len(found.tdvf.sections)))
    if found.sev:
        places.append((found.sev.offset, found.sev.length))
    if found.table:
        places.append((found.table.offset, found.table.length))
    for at, length in sorted(places):
        yield from hex_dump(found.image[at : at + length], at)


def to_json(found: Metadata) -> dict[str, object]:
    """The metadata for programs."""
    out: dict[str, object] = {"size": len(found.image), "tdx": None, "sev": None, "mrtd": None}
    if found.table:
        entries = [_entry_json(entry) for entry in found.table.entries]
        out["guid_table"] = {"offset": found.table.offset, "length": found.table.length, "entries": entries}
    if found.sev:
        rows = [{"base": part.base, "size": part.size, "type": part.type_name} for part in found.sev.sections]
        out["sev"] = {"offset": found.sev.offset, "sections": rows}
    if found.tdvf:
        rows = [_section_json(part) for part in found.tdvf.sections]
        out["tdx"] = {"offset": found.tdvf.offset, "left_out": found.tdvf.left_out, "sections": rows}
        mrtd = found.tdvf.mrtd()
        out["mrtd"] = mrtd.hex() if mrtd else None
    return out


def _entry_text(entry: GuidEntry) -> str:
    values = " ".join(f"{name}={value:#x}" for name, value in entry.values().items())
    return f"{entry.guid} {entry.name or 'unknown'}: {values or entry.data.hex()}"


def _entry_json(entry: GuidEntry) -> dict[str, object]:
    name = {"name": entry.name} if entry.name else {}
    return {"guid": str(entry.guid), **name, "offset": entry.offset, "data": entry.data.hex()} | entry.values()


def _section_text(section: TdvfSection) -> str:
    return (
        f"{section.type.name:<16}{section.data_offset:>#11x} {section.raw_size:>#10x} {section.address:>#12x} "
        f"{section.memory_size:>#11x}  {_attributes(section.attributes)}"
    )


def _attributes(value: int) -> str:
    """Names of the bits, then what has none."""
    names = [name for bit, name in _ATTRIBUTES if value & bit]
    rest = value & ~sum(bit for bit, _ in _ATTRIBUTES)
    return " | ".join([*names, f"{rest:#x}"] if rest else names) or "none"


def _section_json(section: TdvfSection) -> dict[str, object]:
    return {
        "type": section.type.name,
        "data_offset": section.data_offset,
        "raw_size": section.raw_size,
        "address": section.address,
        "memory_size": section.memory_size,
        "attributes": section.attributes,
    }


def _refused(tdvf: Tdvf) -> list[str]:
    return list(dict.fromkeys(section.type.name for section in tdvf.sections if section.type not in HOST_TYPES))


def _mrtd_text(tdvf: Tdvf) -> str:
    mrtd = tdvf.mrtd()
    return mrtd.hex() if mrtd else "depends on the host's HOB list, which is measured"
