"""Memory maps that users bring along: ``efi: mem`` lines of a dmesg, or JSON.

The JSON form is a list of descriptors, or an object with that list under ``descriptors``:

    {"type": 15, "start": "0x100000000", "pages": 524288, "attribute": "0xf"}

``type`` is a number or the kernel's name for it; numbers may be text with ``0x``; ``attribute`` is 0 if missing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from firmware.memory_descriptor import MemoryDescriptor, check_map
from guest.errors import FormatError
from guest.units import PAGE_SIZE
from kernel.efi import ATTRIBUTE_COLUMNS, MEMORY_TYPE_NAMES

_SOURCE = "efi=debug lines of dmesg, or the JSON form of a map"
_MAX_DESCRIPTORS = 65536
_BEGIN = re.compile(r"efi: mem[0-9]+:")
_LINE = re.compile(
    r"efi: mem(?P<number>[0-9]{1,9}): \[(?P<type>[^|]{12,}?)\|(?P<attributes>[^]]*?)\]?"
    r" range=\[(?P<start>0x[0-9a-f]{1,16})-(?P<last>0x[0-9a-f]{1,16})\]"
)
_UNKNOWN_TYPE = re.compile(r"type=([0-9]{1,10})")
_UNKNOWN_ATTRIBUTE = re.compile(r"attr=(0x[0-9a-f]{1,16})")
_BITS = {"type": 32, "start": 64, "pages": 64, "attribute": 64}
_TYPES = {name: number for number, name in enumerate(MEMORY_TYPE_NAMES)}
_ATTRIBUTES = {word: int(flag) for flag, word in ATTRIBUTE_COLUMNS}


def parse_efi_map(text: str, name: str) -> tuple[MemoryDescriptor, ...]:
    """The map in ``text``, in its order, checked. ``name`` is what messages call it. Raises ``FormatError``."""
    is_json = text.lstrip()[:1] in ("[", "{") and "efi: mem" not in text  # dmesg lines begin with [ too
    descriptors = _from_json(text, name) if is_json else _from_dmesg(text, name)
    if not descriptors:
        raise FormatError(
            name, found="no memory descriptor", expected="`efi: mem00: [...] range=[...]` lines or JSON",
            source=_SOURCE,
        )  # fmt: skip
    if len(descriptors) > _MAX_DESCRIPTORS:
        expected = f"at most {_MAX_DESCRIPTORS} descriptors"
        raise FormatError(name, found=len(descriptors), expected=expected, source=_SOURCE)
    check_map(descriptors, name)
    return tuple(descriptors)


def _from_dmesg(text: str, name: str) -> list[MemoryDescriptor]:
    """The first map that the log prints; a kernel with runtime services prints a second one later."""
    descriptors: list[MemoryDescriptor] = []
    for number, line in enumerate(text.splitlines(), 1):
        if _BEGIN.search(line) is None:
            continue
        match = _LINE.search(line)
        if match is None:
            raise _error(name, number, line, "a whole line: `efi: mem00: [...] range=[...]`")
        if int(match["number"]) != len(descriptors):
            if int(match["number"]) == 0:
                break
            raise _error(name, number, f"mem{match['number']}", f"mem{len(descriptors):02}")
        start, end = int(match["start"], 16), int(match["last"], 16) + 1
        kind, attribute = _type(match["type"]), _attribute(match["attributes"])
        if kind is None or attribute is None or end < start or (end - start) % PAGE_SIZE:
            raise _error(name, number, match[0], "a type, attributes and a range of whole pages")
        descriptors.append(MemoryDescriptor.of_range(kind, start, end, attribute))
    return descriptors


def _type(text: str) -> int | None:
    text = text.strip()
    unknown = _UNKNOWN_TYPE.fullmatch(text)
    return _unsigned(int(unknown[1]), _BITS["type"]) if unknown else _TYPES.get(text)


def _attribute(text: str) -> int | None:
    if unknown := _UNKNOWN_ATTRIBUTE.fullmatch(text):
        return int(unknown[1], 16)
    words = [word.strip() for word in text.split("|")]
    if any(word and word not in _ATTRIBUTES for word in words):
        return None
    return sum(_ATTRIBUTES[word] for word in words if word)


def _from_json(text: str, name: str) -> list[MemoryDescriptor]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(name, getattr(error, "lineno", 1), "text that is no JSON", "JSON") from error
    rows = data.get("descriptors") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise _error(name, 1, "no list of descriptors", "a list, or an object with `descriptors`")
    return [_descriptor(row, number, name) for number, row in enumerate(rows)]


def _descriptor(row: Any, number: int, name: str) -> MemoryDescriptor:
    where = f"{name}: descriptor {number}"
    if not isinstance(row, dict):
        raise FormatError(where, found=type(row).__name__, expected="an object", source=_SOURCE)
    values = {"attribute": 0} | row | {"type": _TYPES.get(str(row.get("type")), row.get("type"))}
    numbers = []
    for key, bits in _BITS.items():
        value = _number(values.get(key), bits)
        if value is None:
            found = repr(values.get(key))[:40]
            raise FormatError(f"{where}, {key}", found=found, expected=f"a number of {bits} bits", source=_SOURCE)
        numbers.append(value)
    return MemoryDescriptor(*numbers)


def _number(value: object, bits: int) -> int | None:
    """``value`` as an unsigned number of ``bits``, or None."""
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            return None
    return _unsigned(value, bits) if isinstance(value, int) and not isinstance(value, bool) else None


def _unsigned(value: int, bits: int) -> int | None:
    """``value`` if it fits, else None."""
    return value if 0 <= value < 1 << bits else None


def _error(name: str, line: int, found: str, expected: str) -> FormatError:
    return FormatError(f"{name}, line {line}", found=found[:80], expected=expected, source=_SOURCE)
