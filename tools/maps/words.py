"""Words and numbers that stand in maps: types, attributes, addresses."""

from __future__ import annotations

import re

from firmware.efi_types import EfiMemoryAttribute, EfiMemoryType
from kernel.efi_memmap import ATTRIBUTE_COLUMNS, MEMORY_TYPE_NAMES

_NUMBER = re.compile(r"(?:0x(?P<hex>[0-9a-fA-F]{1,17})|(?P<decimal>[0-9]{1,20}))(?P<suffix>[KMGTPE]?)", re.ASCII)
_TYPES = {name.lower(): number for number, name in enumerate(MEMORY_TYPE_NAMES)} | {
    kind.name.lower(): int(kind) for kind in EfiMemoryType
}
_ATTRIBUTES = {word: flag for flag, word in ATTRIBUTE_COLUMNS} | {
    flag.name: int(flag) for flag in EfiMemoryAttribute if flag.name
}


def number(value: object, bits: int) -> int | None:
    """``value`` as an unsigned number of ``bits``, or None: an integer, or text such as ``0x100000`` or ``4G``."""
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value)):
        value = int(match["hex"], 16) if match["hex"] else int(match["decimal"])
        value <<= 10 * (" KMGTPE".index(match["suffix"] or " "))
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << bits
    return value if fits else None  # type: ignore[return-value]


def efi_type(value: object) -> int | None:
    """An EFI_MEMORY_TYPE: a number, the kernel's name (``Boot Data``) or the specification's, in any case."""
    return _TYPES.get(value.lower(), number(value, 32)) if isinstance(value, str) else number(value, 32)


def efi_type_name(kind: int) -> str | int:
    """The kernel's name of a type, or the number that it is."""
    return MEMORY_TYPE_NAMES[kind] if kind < len(MEMORY_TYPE_NAMES) else kind


def efi_attribute(value: object) -> int | None:
    """An attribute: a number, or words with ``|`` between them (``WB|SP``, ``EFI_MEMORY_MORE_RELIABLE``, ``0x10``)."""
    if not isinstance(value, str):
        return number(value, 64)
    parts = [_ATTRIBUTES.get(word.strip(), number(word.strip(), 64)) for word in value.split("|") if word.strip()]
    out = 0
    for part in parts:
        if part is None:
            return None
        out |= part
    return out


def efi_attribute_text(attribute: int) -> str:
    """The attribute in words; what has no word is a number."""
    rest = attribute & ~sum(flag for flag, _ in ATTRIBUTE_COLUMNS)
    words = [word for flag, word in ATTRIBUTE_COLUMNS if attribute & flag]
    return "|".join([*words, f"{rest:#x}"] if rest else words)
