"""Fixed-layout records: one construct declaration, everything else derived from it.

A module declares its layout with construct, keeps it to itself, and hands out frozen dataclasses. Here is the
only place that catches ``ConstructError``.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from typing import Any, TypeAlias

import construct as c

from guest.errors import FormatError
from guest.memory import GuestMemory

Layout: TypeAlias = "c.Construct[Any, Any]"  # construct itself knows no parameters


def bare(sub: Layout) -> Layout:
    """The construct behind its name and documentation."""
    while isinstance(sub, c.Renamed):
        sub = sub.subcon
    return sub


def offsets(record: Layout, prefix: str = "", base: int = 0) -> dict[str, int]:
    """Byte offset of every named field of a ``Struct``, nested ones as ``hdr.version``."""
    out: dict[str, int] = {}
    for sub in bare(record).subcons:  # type: ignore[attr-defined]  # every Struct has subcons
        if sub.name:
            out[prefix + sub.name] = base
            if isinstance(bare(sub), c.Struct):
                out |= offsets(sub, f"{prefix}{sub.name}.", base)
        base += sub.sizeof()
    return out


@lru_cache
def field_extents(record: Layout) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of every named field that is an integer or raw bytes, by dotted name."""
    out: dict[str, tuple[int, int]] = {}
    base = 0
    for sub in bare(record).subcons:  # type: ignore[attr-defined]  # every Struct has subcons
        inner, size = bare(sub), sub.sizeof()
        if isinstance(inner, c.Struct) and sub.name:
            nested = field_extents(inner).items()
            out |= {f"{sub.name}.{name}": (base + offset, length) for name, (offset, length) in nested}
        elif sub.name:
            out[sub.name] = (base, size)
        base += size
    return out


class GuestRecord:
    """A record in guest memory, one field at a time: ``boot_params["hdr.version"]``.

    Values are unsigned little-endian integers of the field's size. An unknown name is a ``KeyError``, a value
    that does not fit an ``OverflowError``.
    """

    def __init__(self, memory: GuestMemory, gpa: int, record: Layout) -> None:
        self._memory = memory
        self.gpa = gpa
        self._extents = field_extents(record)

    def __getitem__(self, name: str) -> int:
        offset, size = self._extents[name]
        return self._memory.read_uint(self.gpa + offset, size)

    def __setitem__(self, name: str, value: int) -> None:
        offset, size = self._extents[name]
        self._memory.write_uint(self.gpa + offset, value, size)


class RecordCopy:
    """A record that was copied out of guest memory: ``boot_params["hdr.version"]``, read only."""

    def __init__(self, data: bytes, record: Layout) -> None:
        self.data = data
        self._extents = field_extents(record)

    def __getitem__(self, name: str) -> int:
        offset, size = self._extents[name]
        return int.from_bytes(self.data[offset : offset + size], "little")


def fast(record: Layout) -> tuple[struct.Struct, tuple[str, ...]]:
    """The same layout as a ``struct.Struct``, for long arrays; nameless fields become pad bytes.

    Returns the ``Struct`` and the field names in the order of its values. A field that is not a little-endian
    integer is a ``TypeError``.
    """
    fmt = "<"
    names: list[str] = []
    for sub in bare(record).subcons:  # type: ignore[attr-defined]  # every Struct has subcons
        inner = bare(sub)
        if not sub.name:
            fmt += f"{sub.sizeof()}x"
        elif isinstance(inner, c.FormatField) and inner.fmtstr[0] == "<":
            fmt += inner.fmtstr[1:]
            names.append(sub.name)
        else:
            raise TypeError(f"{sub.name}: {type(inner).__name__} has no struct format")
    return struct.Struct(fmt), tuple(names)


def parse(record: Layout, name: str, data: bytes, *, at: int, source: str) -> Any:
    """Parse ``data``, which was found at ``at``; a ``ConstructError`` leaves as ``FormatError``.

    ``name`` is what messages call the record, ``source`` the document that defines it. The result is a
    construct Container; the caller turns it into a value of its own.
    """
    try:
        return record.parse(data)
    except c.ConstructError as error:
        parts = (error.path or "").split(" -> ")[1:]
        offset = offsets(record).get(".".join(parts), 0)
        found, expected = _found_and_expected(str(error).splitlines()[-1])
        raise FormatError(
            ".".join([name, *parts]), at=at + offset, found=found, expected=expected, source=source
        ) from error


def _found_and_expected(text: str) -> tuple[str, str]:
    """What construct's message says was found and expected."""
    if match := re.search(r"expected (.+) but parsed (.+)$", text):
        return match[2], match[1]
    if match := re.search(r"expected (\d+), found (\d+)", text):
        return f"{match[2]} bytes", f"{match[1]} bytes"
    return "bytes that do not parse", text
