"""``memmap=`` on the kernel's command line: a whole e820 table in words.

Source: Documentation/admin-guide/kernel-parameters.txt, memmap=; arch/x86/kernel/e820.c, parse_memmap_one().
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from bootstub.boot_params import BootE820Entry
from bootstub.e820_types import (
    E820_TYPE_ACPI,
    E820_TYPE_PRAM,
    E820_TYPE_RAM,
    E820_TYPE_RESERVED,
)
from guest.errors import FormatError
from guest.units import size_text
from tools.maps.platform_map import MAX_ENTRIES, PlatformMap, e820_map
from tools.maps.words import number

FORM = "memmap= parameters"
_SIGNS = {"@": E820_TYPE_RAM, "#": E820_TYPE_ACPI, "$": E820_TYPE_RESERVED, "!": E820_TYPE_PRAM}
_SIGN_OF = {e820_type: sign for sign, e820_type in _SIGNS.items()}
_PIECE = re.compile(r"(?P<size>\w+)(?P<sign>[@#$!%])(?P<start>\w+)(?:\+(?P<type>[0-9]{1,10}))?", re.ASCII)


def is_memmap_args(text: str) -> bool:
    """True if the text is a command line with ``memmap=exactmap``."""
    return "exactmap" in _pieces(text)


def parse_memmap_args(text: str, name: str) -> PlatformMap:
    """The table that a kernel makes of ``memmap=exactmap`` and the ranges behind it, in their order.

    Ranges are ``SIZE@START`` RAM, ``#`` ACPI data, ``$`` reserved, ``!`` persistent (type 12), and
    ``SIZE%START+TYPE`` for any type. Raises ``FormatError``.
    """
    pieces = _pieces(text)
    ranges = pieces[pieces.index("exactmap") + 1 :]
    if len(ranges) > MAX_ENTRIES:
        raise FormatError(name, found=len(ranges), expected=f"at most {MAX_ENTRIES} ranges", source=FORM)
    return e820_map([_entry(piece, name) for piece in ranges], name, FORM)


def _pieces(text: str) -> list[str]:
    """The values of all ``memmap=`` parameters, which may have several each, with commas between."""
    return [piece for word in text.split() if word.startswith("memmap=") for piece in word[7:].split(",")]


def _entry(piece: str, name: str) -> BootE820Entry:
    match = _PIECE.fullmatch(piece)
    size, start = (number(match["size"], 64), number(match["start"], 64)) if match else (None, None)
    if match is None or size is None or start is None or (match["sign"] == "%") != (match["type"] is not None):
        raise FormatError(
            f"{name}, memmap=", found=repr(piece[:40]), expected="SIZE@START, with #, $ or ! for @, or SIZE%START+TYPE",
            source=FORM,
        )  # fmt: skip
    kind = number(match["type"], 32) if match["type"] else _SIGNS[match["sign"]]
    if kind is None:
        raise FormatError(f"{name}, memmap=", found=repr(piece[:40]), expected="a type of 32 bits", source=FORM)
    return BootE820Entry(start, size, kind)


def memmap_args(entries: Iterable[BootE820Entry]) -> str:
    """The words that give a kernel exactly this table; empty entries are left out."""
    words = ["memmap=exactmap"]
    for entry in entries:
        sign, suffix = (_SIGN_OF[entry.type], "") if entry.type in _SIGN_OF else ("%", f"+{entry.type}")
        if entry.size:
            words.append(f"memmap={_size(entry.size)}{sign}{entry.addr:#x}{suffix}")
    return " ".join(words)


def _size(size: int) -> str:
    """``640K``: memparse's suffixes, or hexadecimal where no suffix fits."""
    text = size_text(size)
    return text.replace(" ", "").removesuffix("iB") if text.endswith("iB") else f"{size:#x}"
