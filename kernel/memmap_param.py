"""``mem=`` and ``memmap=``: what the user changes in the e820 table.

Source: arch/x86/kernel/e820.c, parse_memopt(), parse_memmap_one(), parse_memmap_opt().
"""

from __future__ import annotations

from dataclasses import dataclass

from bootstub.e820_types import E820_TYPE_ACPI, E820_TYPE_PRAM, E820_TYPE_RAM, E820_TYPE_RESERVED
from guest.units import U64_MAX, memparse
from kernel.e820 import E820Table, remove_line, update_line

_ADDED = {"@": E820_TYPE_RAM, "#": E820_TYPE_ACPI, "$": E820_TYPE_RESERVED, "!": E820_TYPE_PRAM}


@dataclass(frozen=True, slots=True)
class MapEdit:
    """One change: in ``[start, start + size)`` what is of type ``old`` becomes ``new``.

    Without ``old`` an entry of type ``new`` is added, without ``new`` what is of type ``old`` goes, without both
    everything goes. With ``exactmap`` the whole table goes.
    """

    start: int = 0
    size: int = 0
    old: int | None = None
    new: int | None = None
    exactmap: bool = False

    def apply(self, table: E820Table) -> str | None:
        """Change ``table``; returns what the kernel says of it, if anything."""
        if self.exactmap:
            table.clear()
        elif self.old is not None and self.new is not None:
            if self.old != self.new:  # where the kernel has a BUG_ON
                table.range_update(self.start, self.size, self.old, self.new)
                return update_line(self.start, self.size, self.old, self.new)
        elif self.new is not None:
            table.range_add(self.start, self.size, self.new)
        else:
            table.range_remove(self.start, self.size, self.old)
            return remove_line(self.start, self.size, self.old)
        return None


def above(limit: int) -> MapEdit:
    """RAM from ``limit`` on goes."""
    return MapEdit(limit, U64_MAX - limit, old=E820_TYPE_RAM)


def parse_mem(value: str | None) -> MapEdit | None:
    """``mem=SIZE``; None if it is refused. Text behind the size does not matter."""
    size = memparse(value)[0] if value and value != "nopentium" else 0
    return above(size) if size else None


def parse_memmap(value: str) -> list[MapEdit]:
    """``memmap=ONE[,ONE...]``. What is malformed changes as much as the kernel had done when it saw it."""
    edits = (_parse_memmap_one(text) for text in value.split(","))
    return [edit for edit in edits if edit is not None]


def _parse_memmap_one(text: str) -> MapEdit | None:
    """``SIZE``, ``SIZE@START`` and so on, ``SIZE%START-OLD+NEW`` or ``exactmap``."""
    if text.startswith("exactmap"):
        return MapEdit(exactmap=True)
    size, rest = memparse(text)
    if rest == text:
        return None
    kind, rest = rest[:1], rest[1:]
    if kind in _ADDED:
        return MapEdit(memparse(rest)[0], size, new=_ADDED[kind])
    return _parse_types(size, rest) if kind == "%" else above(size)


def _parse_types(size: int, text: str) -> MapEdit | None:
    """``START-OLD+NEW``, both types optional; 0 is none."""
    start, rest = memparse(text)
    old = new = 0
    if rest.startswith("-"):
        old, rest = memparse(rest[1:])
    if rest.startswith("+"):
        new, rest = memparse(rest[1:])
    if rest:
        return None
    return MapEdit(start, size, old & 0xFFFFFFFF or None, new & 0xFFFFFFFF or None)
