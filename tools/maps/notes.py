"""What is odd about a map, in the order of its importance to a kernel with unaccepted memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise

from bootstub.boot_params import E820_MAX_ENTRIES_ZEROPAGE
from bootstub.efi_e820 import e820_type_of
from bootstub.unaccepted_memory import bitmap_size
from firmware.efi_types import EfiMemoryAttribute, EfiMemoryType
from firmware.memory_descriptor import RAM_TYPES, MemoryDescriptor
from guest.ranges import Range, RangeSet
from guest.units import PMD_SIZE, SZ_4G, SZ_16M, round_down, round_up, size_text
from tools.maps.platform_map import PlatformMap
from tools.maps.words import efi_type_name

_SHOWN = 8
"""Notes of one sort; of the others only the number is told."""


def notes(platform: PlatformMap) -> list[str]:
    """One line for each odd thing."""
    out: list[str] = []
    for check in _CHECKS:
        found = check(platform)
        out += islice(found, _SHOWN)
        left = sum(1 for _ in found)
        if left:
            out[-1] += f" (and {left} more of this sort)"
    return out


def _overlaps(platform: PlatformMap) -> Iterator[str]:
    ordered = sorted(platform.descriptors, key=lambda d: d.start)
    low: MemoryDescriptor | None = None
    for high in ordered:
        if low is not None and low.end > high.start:
            both = low.type == high.type == EfiMemoryType.EfiUnacceptedMemoryType
            effect = "of this, what the stub accepts at once is accepted twice" if both else "a boot refuses such a map"
            yield f"overlap: {_text(high)} and {_text(low)}; {effect}"
        if low is None or high.end > low.end:
            low = high


def _edges(platform: PlatformMap) -> Iterator[str]:
    """What process_unaccepted_memory() accepts at once."""
    for d in _of_type(platform, EfiMemoryType.EfiUnacceptedMemoryType):
        first, last = round_up(d.start, PMD_SIZE), round_down(d.end, PMD_SIZE)
        if d.end - d.start < 2 * PMD_SIZE:
            yield f"unaccepted range below 4 MiB: the stub accepts all of {_text(d)} at once"
        elif first != d.start or last != d.end:
            size = size_text(first - d.start + d.end - last)
            yield f"unaccepted edge off 2 MiB: the stub accepts {size} of {_text(d)} at once"


def _low(platform: PlatformMap) -> Iterator[str]:
    for d in _of_type(platform, EfiMemoryType.EfiUnacceptedMemoryType):
        if d.start < SZ_4G:
            yield f"unaccepted memory below 4 GiB, which OVMF accepts itself: {_text(d)}"


def _special(platform: PlatformMap) -> Iterator[str]:
    for d in _of_type(platform, EfiMemoryType.EfiUnacceptedMemoryType):
        if d.attribute & EfiMemoryAttribute.EFI_MEMORY_SP:
            yield f"unaccepted memory for a special purpose becomes plain RAM: {_text(d)}"


def _holes_in_units(platform: PlatformMap) -> Iterator[str]:
    """A unit of the bitmap with unaccepted memory in it and a hole: its bit cannot tell them apart."""
    known = RangeSet((d.start, d.end) for d in platform.descriptors)
    ranges = [(d.start, d.end - 1) for d in _of_type(platform, EfiMemoryType.EfiUnacceptedMemoryType)]
    for unit in sorted({round_down(address, PMD_SIZE) for ends in ranges for address in ends}):
        for gap in known.gaps(unit, unit + PMD_SIZE):
            yield f"hole inside a 2 MiB unit of unaccepted memory: {gap}"


def _end_of_ram(platform: PlatformMap) -> Iterator[str]:
    end = max((d.end for d in platform.descriptors if d.type in RAM_TYPES), default=0)
    if bitmap_size(platform.descriptors) is not None and end % SZ_16M == 0:
        yield (
            f"RAM ends at {end:#x}, a multiple of 16 MiB: the guard's bit behind it needs a byte of its own in the "
            "bitmap"
        )


def _dropped(platform: PlatformMap) -> Iterator[str]:
    for d in platform.descriptors:
        if e820_type_of(d) is None:
            yield f"type {d.type:#x} is none of the specification's; the stub leaves out {_text(d)}"


def _unsorted(platform: PlatformMap) -> Iterator[str]:
    rows = [(d.start, d.end) for d in platform.descriptors] if platform.e820 is None else _e820_ranges(platform)
    count = sum(1 for low, high in pairwise(rows) if high < low)
    if count:
        yield f"not sorted by address: {count} of {len(rows)} start below the one before"


def _many(platform: PlatformMap) -> Iterator[str]:
    count = len(platform.entries())
    if count > E820_MAX_ENTRIES_ZEROPAGE:
        yield f"{count} e820 entries: those beyond 128 go to setup_data (SETUP_E820_EXT)"


def _pages(platform: PlatformMap) -> Iterator[str]:
    for start, end in _e820_ranges(platform):
        if (start | end) % 4096:
            yield f"e820 entry [{start:#x}, {end:#x}) is not of whole pages"


def _nodes(platform: PlatformMap) -> Iterator[str]:
    """RAM that belongs to no node, where there are nodes."""
    if not platform.nodes:
        return
    known = RangeSet((node.start, node.end) for node in platform.nodes)
    for d in platform.descriptors:
        if d.type in RAM_TYPES:
            for gap in known.gaps(d.start, d.end):
                yield f"RAM of no node: {gap}"


_CHECKS = (
    _overlaps, _edges, _low, _special, _holes_in_units, _end_of_ram, _dropped, _unsorted, _many, _pages, _nodes,
)  # fmt: skip


def _of_type(platform: PlatformMap, kind: EfiMemoryType) -> Iterator[MemoryDescriptor]:
    return (d for d in platform.descriptors if d.type == kind)


def _e820_ranges(platform: PlatformMap) -> list[tuple[int, int]]:
    return [(entry.addr, entry.addr + entry.size) for entry in platform.e820 or ()]


def _text(d: MemoryDescriptor) -> str:
    return f"{efi_type_name(d.type)} {Range(d.start, d.end)}"
