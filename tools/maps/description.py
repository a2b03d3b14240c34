"""Maps that people write: JSON and TOML, one structure for both.

A list of descriptors, or an object with that list under ``descriptors``:

    {"type": "Unaccepted", "start": "4G", "size": "60G", "attribute": "WB|SP"}

``type`` is a number, the kernel's name or the specification's; ``pages`` may stand instead of ``size``; numbers may be
text, with ``0x`` or a suffix K to E; ``attribute`` is a number or words with ``|`` between them, and 0 if missing.
An object may have ``e820`` instead of ``descriptors`` (``type`` is a number or dmesg's word, ``start``, ``size``), and
also ``holes`` (``start``, ``size``), which are cut out of the descriptors, and ``nodes`` (``node``, ``start``,
``size``, ``hotplug``), memory affinity as in the SRAT.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from bootstub.boot_params import BootE820Entry
from bootstub.e820_types import type_of_word, type_word
from firmware.memory_descriptor import MemoryDescriptor
from firmware.srat import NodeRange
from guest.errors import FormatError
from guest.ranges import RangeSet
from guest.units import PAGE_SIZE
from tools.maps.platform_map import MAX_ENTRIES, PlatformMap, e820_map, efi_map
from tools.maps.words import efi_attribute, efi_attribute_text, efi_type, efi_type_name, number

JSON_FORM = "the JSON form of a map"
TOML_FORM = "the TOML form of a map"
_TOML_LINE = re.compile(r"\[\[(descriptors|e820|holes|nodes)\]\]\s*(#.*)?|[\w-]+\s*=.*", re.ASCII)
_NODE_BITS = 16

T = TypeVar("T")


def is_toml(text: str) -> bool:
    """True if the first line that is no comment is one of TOML: a table's head or a key."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return _TOML_LINE.fullmatch(first) is not None


def parse_toml(text: str, name: str) -> PlatformMap:
    """The map of a TOML text. Raises ``FormatError``."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for a number that Python will not read
        raise FormatError(name, found=str(error)[:200], expected="TOML", source=TOML_FORM) from error
    return from_data(data, name, TOML_FORM)


def load_json(text: str, name: str) -> Any:
    """JSON's values; what is none is a ``FormatError``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{name}, line {getattr(error, 'lineno', 1)}"
        raise FormatError(where, found="text that is no JSON", expected="JSON", source=JSON_FORM) from error


def from_data(data: Any, name: str, form: str) -> PlatformMap:
    """The map of a structure as JSON or TOML has it. Raises ``FormatError`` that names row and key."""
    tables = data if isinstance(data, dict) else {"descriptors": data}
    rows = _Rows(tables, name, form)
    nodes = rows.read("nodes", _node)
    if "e820" in tables and "descriptors" not in tables:
        return e820_map(rows.read("e820", _entry), name, form, nodes)
    if not isinstance(tables.get("descriptors"), list):
        raise FormatError(
            f"{name}, line 1", found="no list of descriptors", expected="a list, or an object with `descriptors`",
            source=form,
        )  # fmt: skip
    holes = RangeSet(rows.read("holes", _hole))
    return efi_map(_without(rows.read("descriptors", _descriptor), holes), name, form, nodes)


class _Rows:
    """The tables of a description, row by row."""

    def __init__(self, tables: dict[Any, Any], name: str, form: str) -> None:
        self._tables, self._name, self._form = tables, name, form

    def read(self, table: str, make: Callable[[_Row], T]) -> list[T]:
        rows = self._tables.get(table, [])
        if not isinstance(rows, list) or len(rows) > MAX_ENTRIES:
            found = len(rows) if isinstance(rows, list) else type(rows).__name__
            where, expected = f"{self._name}: {table}", f"a list of at most {MAX_ENTRIES} descriptors"
            if isinstance(rows, list) and table == "descriptors":
                where, expected = self._name, f"at most {MAX_ENTRIES} descriptors"
            raise FormatError(where, found=found, expected=expected, source=self._form)
        what = "entry" if table == "e820" else table.removesuffix("s")
        return [make(_Row(row, f"{self._name}: {what} {count}", self._form)) for count, row in enumerate(rows)]


class _Row:
    """One row: its values by key, checked."""

    def __init__(self, row: Any, where: str, form: str) -> None:
        self._where, self._form = where, form
        if not isinstance(row, dict):
            raise FormatError(where, found=type(row).__name__, expected="an object", source=form)
        self._row = row

    def __contains__(self, key: str) -> bool:
        return key in self._row

    def get(self, key: str, read: Callable[[Any], int | None], expected: str, default: object = None) -> int:
        """The value of ``key`` as ``read`` understands it; None from ``read`` is an error."""
        value = self._row.get(key, default)
        found = read(value)
        if found is None:
            raise FormatError(f"{self._where}, {key}", found=repr(value)[:40], expected=expected, source=self._form)
        return found

    def number(self, key: str, bits: int = 64) -> int:
        return self.get(key, lambda value: number(value, bits), f"a number of {bits} bits")

    def range(self) -> tuple[int, int]:
        """``start`` and the end that ``size`` gives."""
        start = self.number("start")
        return start, start + self.number("size")


def _descriptor(row: _Row) -> MemoryDescriptor:
    kind = row.get("type", efi_type, "a number of 32 bits, or the name of an EFI memory type")
    start = row.number("start")
    pages = row.number("pages") if "pages" in row or "size" not in row else _pages(row)
    attribute = row.get("attribute", efi_attribute, "a number of 64 bits, or names of attributes", 0)
    return MemoryDescriptor(kind, start, pages, attribute)


def _pages(row: _Row) -> int:
    def read(value: object) -> int | None:
        size = number(value, 64)
        return None if size is None or size % PAGE_SIZE else size // PAGE_SIZE

    return row.get("size", read, "a size of whole 4 KiB pages")


def _entry(row: _Row) -> BootE820Entry:
    kind = row.get(
        "type", lambda v: type_of_word(v) if isinstance(v, str) and type_of_word(v) is not None else number(v, 32),
        "a number of 32 bits, or dmesg's word for an e820 type",
    )  # fmt: skip
    return BootE820Entry(row.number("start"), row.number("size"), kind)


def _hole(row: _Row) -> tuple[int, int]:
    start, end = row.range()
    return start, min(end, 1 << 64)


def _node(row: _Row) -> NodeRange:
    hotplug = row.get("hotplug", lambda v: int(v) if isinstance(v, bool) else None, "true or false", False)
    return NodeRange(row.number("node", _NODE_BITS), *row.range(), bool(hotplug))


def _without(descriptors: Iterable[MemoryDescriptor], holes: RangeSet) -> Iterator[MemoryDescriptor]:
    """The descriptors with the holes cut out, in their order. Cuts are at pages, and never leave part of a hole."""
    cuts = RangeSet((start // PAGE_SIZE * PAGE_SIZE, -(-end // PAGE_SIZE) * PAGE_SIZE) for start, end in holes)
    for d in descriptors:
        if d.end > 1 << 64 or not cuts.overlaps(d.start, d.end):
            yield d
            continue
        for start, end in cuts.gaps(d.start, d.end):
            yield MemoryDescriptor.of_range(d.type, start, end, d.attribute)


def to_data(platform: PlatformMap) -> dict[str, list[dict[str, Any]]]:
    """The structure that :func:`from_data` reads; addresses as text, since JSON readers lose low bits."""
    out: dict[str, list[dict[str, Any]]] = {}
    if platform.e820 is not None:
        out["e820"] = [_entry_row(entry) for entry in platform.e820]
    else:
        out["descriptors"] = [_descriptor_row(d) for d in platform.descriptors]
    if platform.nodes:
        out["nodes"] = [
            {"node": n.node, "start": f"{n.start:#x}", "size": f"{n.end - n.start:#x}", "hotplug": n.hotplug}
            for n in platform.nodes
        ]
    return out


def _entry_row(entry: BootE820Entry) -> dict[str, Any]:
    word = type_word(entry.type)
    kind = word if type_of_word(word) == entry.type else entry.type
    return {"type": kind, "start": f"{entry.addr:#x}", "size": f"{entry.size:#x}"}


def _descriptor_row(d: MemoryDescriptor) -> dict[str, Any]:
    row: dict[str, Any] = {"type": efi_type_name(d.type), "start": f"{d.start:#x}", "pages": d.pages}
    return row | ({"attribute": efi_attribute_text(d.attribute)} if d.attribute else {})


def toml_text(platform: PlatformMap) -> str:
    """The map as TOML."""
    blocks = []
    for table, rows in to_data(platform).items():
        for row in rows:
            lines = [f"{key} = {json.dumps(value)}" for key, value in row.items()]
            blocks.append("\n".join([f"[[{table}]]", *lines]))
    return "\n\n".join(blocks) + "\n"
