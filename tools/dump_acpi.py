"""What ``unaccepted dump acpi`` shows: the ACPI tables that the firmware made for a TD, or those of a file.

The tables are found as a kernel finds them: from the RSDP through XSDT and FADT. Source: ACPI 6.4, section 5.2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bootstub.boot_params import BOOT_PARAMS
from firmware.efi_types import ACPI_20_TABLE_GUID
from firmware.tables import EFI_SYSTEM_TABLE
from guest.errors import FormatError
from guest.records import RecordCopy
from guest.units import SZ_16M, size_text
from tools.files import read_file
from tools.handover import configuration_table
from tools.maps.td import PREFIX, td_boot
from tools.pipeline import Boot

_SOURCE = "ACPI 6.4, section 5.2"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_RSDP = struct.Struct("<8sB6sBIIQB3x")
_MAX_TABLES = 256
_FADT_X_DSDT = 140
_SRAT_MEMORY, _SRAT_MEMORY_SIZE = 1, 40
_MADT_LOCAL_APIC, _MADT_LOCAL_X2APIC = 0, 9


@dataclass(frozen=True, slots=True)
class AcpiTable:
    """A table: its address (in a file, its offset), its bytes, and the fields of its header that people look at."""

    at: int
    data: bytes
    signature: str
    revision: int
    oem: str

    @property
    def checksum_ok(self) -> bool:
        return sum(self.data) % 256 == 0


def read(source: str, numa: str | None = None) -> list[AcpiTable]:
    """The tables of a file, one behind the other, or of ``td:MEMORY[,MACHINE][,OPTION=VALUE]...``.

    Raises ``FormatError`` and ``OSError``.
    """
    if source.startswith(PREFIX):
        return tables_of(_boot(source, numa))
    if numa is not None:
        raise FormatError("--numa", found=source[:60], expected="td:MEMORY", source="unaccepted dump acpi --help")
    return list(_tables_of_file(read_file(source)))


def tables_of(boot: Boot) -> list[AcpiTable]:
    """The tables in guest memory of a boot whose firmware ran, in the order in which they are found."""
    get = boot.physical.read
    rsdp = _RSDP.unpack(get(_rsdp_address(boot), _RSDP.size))
    xsdt = _table(get, rsdp[6])
    tables = [xsdt]
    for (at,) in struct.iter_unpack("<Q", xsdt.data[_HEADER.size :]):
        found = _table(get, at)
        tables.append(found)
        if found.signature == "FACP":
            tables.append(_table(get, int.from_bytes(found.data[_FADT_X_DSDT : _FADT_X_DSDT + 8], "little")))
    return tables


def text(tables: list[AcpiTable]) -> Iterator[str]:
    """A line for each table; under SRAT and SLIT what they say of memory and nodes, under MADT of processors."""
    for each in tables:
        state = "checksum ok" if each.checksum_ok else "checksum WRONG"
        yield f"{each.at:#x} {each.signature} revision {each.revision}, {len(each.data)} bytes, {each.oem}, {state}"
        for row in _affinity(each):
            hotplug = ", hot-plug" if row["hotplug"] else ""
            size = size_text(row["end"] - row["start"])
            yield f"    node {row['node']}: [{row['start']:#x}, {row['end']:#x}) {size}{hotplug}"
        for node, distances in enumerate(_distances(each)):
            yield f"    node {node}: {' '.join(map(str, distances))}"
        if apic_ids := _apic_ids(each):
            yield f"    processors: {len(apic_ids)}, APIC ID {apic_ids[0]} to {apic_ids[-1]}"


def to_json(tables: list[AcpiTable]) -> list[dict[str, object]]:
    """The tables for programs; addresses are text, since JSON readers lose low bits."""
    out = []
    for each in tables:
        row: dict[str, object] = {"at": f"{each.at:#x}", "signature": each.signature, "revision": each.revision}
        row |= {"size": len(each.data), "oem": each.oem, "checksum_ok": each.checksum_ok}
        if each.signature == "SRAT":
            rows = _affinity(each)
            row["memory"] = [r | {"start": f"{r['start']:#x}", "end": f"{r['end']:#x}"} for r in rows]
        if each.signature == "SLIT":
            row["distances"] = [list(distances) for distances in _distances(each)]
        if each.signature == "APIC":
            row["apic_ids"] = _apic_ids(each)
        out.append(row)
    return out


def save(tables: list[AcpiTable], directory: Path) -> None:
    """Write each table into a file of its own, such as ``DSDT.dat``, which iasl reads."""
    directory.mkdir(parents=True, exist_ok=True)
    for each in tables:
        (directory / f"{each.signature}.dat").write_bytes(each.data)


def _boot(source: str, numa: str | None) -> Boot:
    boot = td_boot(source, () if numa is None else (("numa", numa),))
    boot.run("firmware")
    return boot


def _rsdp_address(boot: Boot) -> int:
    """The address that the configuration table gives for ACPI 2.0, or without UEFI, boot_params."""
    if boot.boot_params is not None:
        return int(RecordCopy(boot.boot_params, BOOT_PARAMS)["acpi_rsdp_addr"])
    system_table = boot.physical.read(boot.system_table_gpa, EFI_SYSTEM_TABLE.sizeof())
    found = configuration_table(boot.physical, system_table, ACPI_20_TABLE_GUID)
    assert found is not None
    return found


def _tables_of_file(data: bytes) -> Iterator[AcpiTable]:
    at = 0
    for _ in range(_MAX_TABLES):
        yield (found := _table(lambda start, size: data[start : start + size], at))
        at += len(found.data)
        if at == len(data):
            return
    raise FormatError("ACPI tables", at=at, found="one more", expected=f"at most {_MAX_TABLES}", source=_SOURCE)


def _table(get: Callable[[int, int], bytes], at: int) -> AcpiTable:
    header = get(at, _HEADER.size)
    if len(header) < _HEADER.size:
        raise FormatError("ACPI table", at=at, found=f"{len(header)} bytes", expected="a header of 36", source=_SOURCE)
    signature, size, revision, _, oem, *_ = _HEADER.unpack(header)
    if not all(byte == 0x5F or 0x30 <= byte < 0x3A or 0x41 <= byte < 0x5B for byte in signature):
        expected = "four capital letters or digits"
        raise FormatError("ACPI table.Signature", at=at, found=repr(signature), expected=expected, source=_SOURCE)
    data = get(at, size) if _HEADER.size <= size <= SZ_16M else b""
    if len(data) != size:
        expected = "36 up to 16 MiB, and no more than there is"
        raise FormatError("ACPI table.Length", at=at + 4, found=size, expected=expected, source=_SOURCE)
    return AcpiTable(at, data, signature.decode(), revision, oem.decode("ascii", "replace").rstrip("\0 "))


def _affinity(found: AcpiTable) -> list[dict[str, int]]:
    """The ranges of memory in an SRAT, but for those that it says do not count."""
    rows: list[dict[str, int]] = []
    for entry in _entries(found, "SRAT", 48):
        if (entry[0], len(entry)) == (_SRAT_MEMORY, _SRAT_MEMORY_SIZE):
            node, start, size, flags = struct.unpack_from("<2xI2xQQ4xI", entry)
            if flags & 1:
                rows.append({"node": node, "start": start, "end": start + size, "hotplug": flags >> 1 & 1})
    return rows


def _distances(found: AcpiTable) -> list[bytes]:
    """The rows of a SLIT; none if it has not as many as it says."""
    count = int.from_bytes(found.data[36:44], "little") if found.signature == "SLIT" else 0
    data = found.data[44:]
    return [data[at : at + count] for at in range(0, len(data), count)] if count and len(data) == count * count else []


def _apic_ids(found: AcpiTable) -> list[int]:
    """The processors of a MADT that are enabled."""
    out = []
    for entry in _entries(found, "APIC", 44):
        if (entry[0], len(entry)) == (_MADT_LOCAL_APIC, 8) and entry[4] & 1:
            out.append(entry[3])
        if (entry[0], len(entry)) == (_MADT_LOCAL_X2APIC, 16) and entry[8] & 1:
            out.append(int.from_bytes(entry[4:8], "little"))
    return out


def _entries(found: AcpiTable, signature: str, start: int) -> Iterator[bytes]:
    """The entries, each with type and length in front, of the table ``signature``; what has no length ends them."""
    at, data = start, found.data if found.signature == signature else b""
    while at + 2 <= len(data) and 2 <= data[at + 1] <= len(data) - at:
        yield data[at : at + data[at + 1]]
        at += data[at + 1]
