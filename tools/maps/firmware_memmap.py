"""The table that a running kernel shows under /sys/firmware/memmap: directories with start, end and type; or as JSON.

The JSON form is a list of objects with the three files' values. Source: drivers/firmware/memmap.c;
arch/x86/kernel/e820.c, e820_type_to_string().
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bootstub.boot_params import BootE820Entry
from bootstub.e820_types import (
    E820_TYPE_ACPI,
    E820_TYPE_NVS,
    E820_TYPE_PMEM,
    E820_TYPE_PRAM,
    E820_TYPE_RAM,
    E820_TYPE_RESERVED,
    E820_TYPE_SOFT_RESERVED,
    E820_TYPE_UNUSABLE,
)
from guest.errors import FormatError
from tools.maps.platform_map import MAX_ENTRIES, PlatformMap, e820_map
from tools.maps.words import number

FORM = "/sys/firmware/memmap"
_UNKNOWN = "Unknown E820 type"
_TYPES = {
    "System RAM": E820_TYPE_RAM,
    "ACPI Tables": E820_TYPE_ACPI,
    "ACPI Non-volatile Storage": E820_TYPE_NVS,
    "Unusable memory": E820_TYPE_UNUSABLE,
    "Persistent Memory (legacy)": E820_TYPE_PRAM,
    "Persistent Memory": E820_TYPE_PMEM,
    "Soft Reserved": E820_TYPE_SOFT_RESERVED,
    "Reserved": E820_TYPE_RESERVED,
    "reserved": E820_TYPE_RESERVED,
    _UNKNOWN: E820_TYPE_RESERVED,
}
"""A type that the kernel does not know has no number here; the kernel itself treats it as reserved."""
_KEYS = ("start", "end", "type")
_MAX_VALUE = 64


def is_firmware_memmap(data: Any) -> bool:
    """True if ``data``, out of JSON, is a list of objects with an ``end``, which our own form does not have."""
    return isinstance(data, list) and bool(data) and isinstance(data[0], dict) and "end" in data[0]


def from_rows(rows: Iterable[Any], name: str) -> PlatformMap:
    """The map of rows with ``start``, inclusive ``end`` and ``type``. Raises ``FormatError``."""
    return e820_map([_entry(row, f"{name}: entry {count}") for count, row in enumerate(rows)], name, FORM)


def to_rows(entries: Iterable[BootE820Entry]) -> list[dict[str, str]]:
    """The rows that a kernel with this table shows; empty entries have none."""
    words = {kind: word for word, kind in reversed(_TYPES.items())}
    return [
        {"start": f"{e.addr:#x}", "end": f"{e.addr + e.size - 1:#x}", "type": words.get(e.type, _UNKNOWN)}
        for e in entries
        if e.size
    ]


def read_tree(directory: Path) -> PlatformMap:
    """The map of a copy of /sys/firmware/memmap, or of the thing itself. Raises ``FormatError`` and ``OSError``."""
    numbers = sorted(int(p.name) for p in directory.iterdir() if p.name.isascii() and p.name.isdecimal())
    if not numbers or len(numbers) > MAX_ENTRIES:
        expected = f"1 to {MAX_ENTRIES} directories with start, end and type, named by numbers"
        raise FormatError(str(directory), found=len(numbers), expected=expected, source=FORM)
    rows = [{key: _value(directory / str(entry) / key) for key in _KEYS} for entry in numbers]
    return from_rows(rows, str(directory))


def _value(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MAX_VALUE).decode("utf-8", errors="replace").strip()


def _entry(row: Any, where: str) -> BootE820Entry:
    if not isinstance(row, dict):
        raise FormatError(where, found=type(row).__name__, expected="an object", source=FORM)
    for key in _KEYS:
        value = row.get(key)
        known = isinstance(value, str) and value in _TYPES if key == "type" else number(value, 64) is not None
        if not known:
            expected = "a type of memory" if key == "type" else "a number of 64 bits"
            raise FormatError(f"{where}, {key}", found=repr(value)[:40], expected=expected, source=FORM)
    start, last = number(row["start"], 64), number(row["end"], 64)
    assert start is not None and last is not None
    if last < start:
        raise FormatError(where, at=start, found=f"an end at {last:#x}", expected="an end behind it", source=FORM)
    return BootE820Entry(start, last + 1 - start, _TYPES[row["type"]])
