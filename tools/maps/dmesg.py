"""Maps in a kernel's log: ``efi: mem`` lines (``efi=debug``), ``BIOS-e820`` lines, and NUMA nodes of the SRAT.

Sources: arch/x86/platform/efi/efi.c, efi_print_memmap(); arch/x86/kernel/e820.c, e820__print_table();
drivers/acpi/numa/srat.c, acpi_numa_memory_affinity_init().
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from bootstub.boot_params import BootE820Entry
from bootstub.e820_types import type_of_word
from firmware.memory_descriptor import MemoryDescriptor
from firmware.srat import NodeRange
from guest.errors import FormatError
from guest.units import PAGE_SIZE
from kernel.efi_memmap import ATTRIBUTE_COLUMNS, MEMORY_TYPE_NAMES
from tools.maps.platform_map import MAX_ENTRIES, PlatformMap, e820_map, efi_map
from tools.maps.words import number

EFI_LINES = "efi: mem lines of a kernel's log"
E820_LINES = "BIOS-e820 lines of a kernel's log"
_EFI_BEGIN = re.compile(r"efi: mem[0-9]+:")
_EFI_LINE = re.compile(
    r"efi: mem(?P<number>[0-9]{1,9}): \[(?P<type>[^|]{12,}?)\|(?P<attributes>[^]]*?)\]?"
    r" range=\[(?P<start>0x[0-9a-f]{1,16})-(?P<last>0x[0-9a-f]{1,16})\]"
)
_E820_BEGIN = re.compile(r"(BIOS-(?:e820|e801|88)|extended): \[mem")
_E820_LINE = re.compile(r": \[mem (?P<start>0x[0-9a-f]{1,16})-(?P<last>0x[0-9a-f]{1,16})\] (?P<type>[a-zA-Z0-9 ()]+)")
_SRAT_LINE = re.compile(
    r"SRAT: Node (?P<node>[0-9]{1,5}) PXM [0-9]+ \[mem (?P<start>0x[0-9a-f]{1,16})-(?P<last>0x[0-9a-f]{1,16})\]"
    r"(?P<hotplug> hotplug)?"
)
_UNKNOWN_TYPE = re.compile(r"type=([0-9]{1,10})")
_UNKNOWN_ATTRIBUTE = re.compile(r"attr=(0x[0-9a-f]{1,16})")
_TYPES = {name: kind for kind, name in enumerate(MEMORY_TYPE_NAMES)}
_ATTRIBUTES = {word: flag for flag, word in ATTRIBUTE_COLUMNS}


def is_dmesg(text: str) -> bool:
    """True if a map of a kernel's log is in ``text``."""
    return "efi: mem" in text or _E820_BEGIN.search(text) is not None


def parse_dmesg(text: str, name: str) -> PlatformMap:
    """The EFI map that the log prints, or its e820 table if it prints none. Raises ``FormatError``."""
    nodes = list(_nodes(text))
    descriptors = _efi_lines(text, name)
    if descriptors:
        return efi_map(descriptors, name, EFI_LINES, nodes)
    return e820_map(_e820_lines(text, name), name, E820_LINES, nodes)


def _efi_lines(text: str, name: str) -> list[MemoryDescriptor]:
    """The first map that the log prints; a kernel with runtime services prints a second one later."""
    descriptors: list[MemoryDescriptor] = []
    for line_number, line in enumerate(text.splitlines(), 1):
        if _EFI_BEGIN.search(line) is None:
            continue
        match = _EFI_LINE.search(line)
        if match is None:
            raise _error(name, line_number, line, "a whole line: `efi: mem00: [...] range=[...]`", EFI_LINES)
        if int(match["number"]) != len(descriptors):
            if int(match["number"]) == 0:
                break
            raise _error(name, line_number, f"mem{match['number']}", f"mem{len(descriptors):02}", EFI_LINES)
        start, end = int(match["start"], 16), int(match["last"], 16) + 1
        kind, attribute = _type(match["type"]), _attribute(match["attributes"])
        if kind is None or attribute is None or end < start or (end - start) % PAGE_SIZE:
            raise _error(name, line_number, match[0], "a type, attributes and a range of whole pages", EFI_LINES)
        descriptors.append(MemoryDescriptor.of_range(kind, start, end, attribute))
    return descriptors


def _type(text: str) -> int | None:
    text = text.strip()
    unknown = _UNKNOWN_TYPE.fullmatch(text)
    return number(unknown[1], 32) if unknown else _TYPES.get(text)


def _attribute(text: str) -> int | None:
    if unknown := _UNKNOWN_ATTRIBUTE.fullmatch(text):
        return int(unknown[1], 16)
    words = [word.strip() for word in text.split("|")]
    if any(word and word not in _ATTRIBUTES for word in words):
        return None
    return sum(_ATTRIBUTES[word] for word in words if word)


def _e820_lines(text: str, name: str) -> list[BootE820Entry]:
    """The firmware's table: the one with the entries beyond 128 (SETUP_E820_EXT), if there were such."""
    tables: dict[str, list[BootE820Entry]] = {}
    for line_number, line in enumerate(text.splitlines(), 1):
        begin = _E820_BEGIN.search(line)
        if begin is None:
            continue
        match = _E820_LINE.search(line, begin.end(1))
        kind = type_of_word(match["type"].strip()) if match else None
        if match is None or kind is None:
            raise _error(name, line_number, line, "a whole line: `BIOS-e820: [mem 0x...-0x...] usable`", E820_LINES)
        start, end = int(match["start"], 16), int(match["last"], 16) + 1
        if end < start:
            raise _error(name, line_number, match[0], "a range that ends behind its start", E820_LINES)
        tables.setdefault(begin[1], []).append(BootE820Entry(start, end - start, kind))
    return tables.get("extended") or next(iter(tables.values()), [])


def _nodes(text: str) -> Iterator[NodeRange]:
    for count, match in enumerate(_SRAT_LINE.finditer(text)):
        start, end = int(match["start"], 16), int(match["last"], 16) + 1
        if start < end and count < MAX_ENTRIES:
            yield NodeRange(int(match["node"]), start, end, match["hotplug"] is not None)


def _error(name: str, line: int, found: str, expected: str, source: str) -> FormatError:
    return FormatError(f"{name}, line {line}", found=found[:80], expected=expected, source=source)
