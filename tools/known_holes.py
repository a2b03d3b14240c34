"""Known holes of the boot code itself: what a boot of this shape does wrong though nobody attacks it.

All of them are in the table ``HOLES``. They are told at the end of a boot, by name; they are no findings of the
sanitizer, since the code does what its authors wrote. The memory that a kernel without support loses has a line of its
own there, ``lost:`` (without CONFIG_UNACCEPTED_MEMORY, setup_e820() leaves out what is unaccepted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bootstub.unaccepted_memory import split_range
from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.ranges import TOP, RangeSet
from guest.units import BITS_PER_BYTE, DIV_ROUND_UP, PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from tools.handover import memory_map_of, unaccepted_table

if TYPE_CHECKING:
    from tools.pipeline import Boot


@dataclass(frozen=True, slots=True)
class Hole:
    """``find`` yields where a boot has the hole; ``text`` says why it is one, ``source`` in whose code."""

    name: str
    text: str
    source: str
    find: Callable[[Boot], Iterator[str]]


def hole_lines(boot: Boot) -> list[str]:
    """A line for each place where ``boot`` has a known hole, also if the boot died of it."""
    return [f"known hole {h.name}: {found}: {h.text} [{h.source}]" for h in HOLES for found in h.find(boot)]


def _guard_bit(boot: Boot) -> Iterator[str]:
    """RAM that ends at a multiple of 16 MiB: its guard's bit is in the first byte behind what v9's kernel reserves.

    The stub sized the bitmap by the end of RAM and one unit more, e820__memblock_setup() reserves by the end of RAM.
    """
    kernel = boot.kernel
    bitmap = kernel.params["unaccepted_memory"] if kernel is not None else 0
    if kernel is None or not bitmap:
        return
    end = kernel.max_pfn << PAGE_SHIFT
    reserved, byte = DIV_ROUND_UP(end, PMD_SIZE * BITS_PER_BYTE), end // PMD_SIZE // BITS_PER_BYTE
    if byte < reserved:
        return
    own_page = (bitmap + byte) // PAGE_SIZE != (bitmap + reserved - 1) // PAGE_SIZE
    value = boot.physical.read(bitmap + byte, 1)[0]
    yield (
        f"RAM ends at {end:#x}; the bit of the guard behind it is at {bitmap + byte:#x}, "
        f"{'in the page' if own_page else 'the byte'} behind what the kernel reserves of the bitmap"
        + (f", and was overwritten with {value:#04x}" if value else "")
    )


def _unreserved(boot: Boot) -> Iterator[str]:
    """The kernel's RAM ends before the unaccepted memory does (``mem=``, ``memmap=``): so does what it reserves."""
    kernel = boot.kernel
    bitmap = kernel.params["unaccepted_memory"] if kernel is not None else 0
    if kernel is None or not bitmap:
        return
    end = kernel.max_pfn << PAGE_SHIFT
    top = max((d.end for d in _unaccepted(boot)), default=0)
    reserved, used = (DIV_ROUND_UP(at, PMD_SIZE * BITS_PER_BYTE) for at in (end, top))
    if reserved < used:
        yield (
            f"RAM ends at {end:#x} for the kernel, unaccepted memory at {top:#x}; the bitmap's bytes "
            f"[{bitmap + reserved:#x}, {bitmap + used:#x}) are not reserved"
        )


def _behind_the_bitmap(boot: Boot) -> Iterator[str]:
    """Memory that was added after boot: its bits would be behind the bitmap, which ends with the memory of boot."""
    kernel = boot.kernel
    bitmap = kernel.params["unaccepted_memory"] if kernel is not None else 0
    for start, end in kernel.hotplugged if kernel is not None and bitmap else ():
        first, last = start // PMD_SIZE // BITS_PER_BYTE, DIV_ROUND_UP(end, PMD_SIZE * BITS_PER_BYTE)
        yield f"the bits of [{start:#x}, {end:#x}) are looked up at [{bitmap + first:#x}, {bitmap + last:#x})"


def _overlap(boot: Boot) -> Iterator[str]:
    """What lies in two unaccepted descriptors, and of one of them is accepted at once."""
    seen, twice, at_once = RangeSet(), RangeSet(), RangeSet()
    for d in _unaccepted(boot):
        for low, high in list(seen.within(d.start, d.end)):
            twice.add(low, high)
        seen.add(d.start, d.end)
        split_range(at_once.add, d.start, d.end)
    for start, end in twice:
        for low, high in at_once.within(start, end):
            yield f"[{low:#x}, {high:#x}) is listed twice"


def _above_the_table(boot: Boot) -> Iterator[str]:
    """Unaccepted memory that begins behind the end of a table that the stub did not make for it."""
    table = unaccepted_table(boot)
    if table is None or not table.unit_size:
        return
    for d in _unaccepted(boot):
        whole = split_range(lambda start, end: None, d.start, d.end, table.unit_size)
        if whole is not None and whole[0] > table.described_end:
            yield (
                f"[{d.start:#x}, {d.end:#x}) lies above the table's end {table.described_end:#x}, "
                f"[{table.described_end:#x}, {whole[0]:#x}) was to be accepted with it"
            )


def _unaccepted(boot: Boot) -> list[MemoryDescriptor]:
    kind = EfiMemoryType.EfiUnacceptedMemoryType
    return [d for d in memory_map_of(boot) if d.type == kind and d.start < d.end <= TOP]


HOLES = (
    Hole(
        "guard-bit",
        "whoever is given it makes accepted memory look unaccepted, and the next accept go beyond RAM",
        "v9 09/14 and 11/14",
        _guard_bit,
    ),
    Hole(
        "unreserved-bits",
        "they are free memory, and whoever is given it overwrites them",
        "v9 09/14",
        _unreserved,
    ),
    Hole(
        "behind-the-bitmap",
        "there is no check of its end: other data are taken for bits, and memory for unaccepted that is accepted or is "
        "no RAM",
        "v9 10/14",
        _behind_the_bitmap,
    ),
    Hole(
        "overlapping-unaccepted",
        "for one descriptor it is accepted at once, for the other once more, which the TDX module refuses",
        "v9 07/14; drivers/firmware/efi/libstub/unaccepted_memory.c (6.12)",
        _overlap,
    ),
    Hole(
        "above-reused-table",
        "what the table cannot describe is accepted from the table's end on, not from the region's start",
        "drivers/firmware/efi/libstub/unaccepted_memory.c (6.12)",
        _above_the_table,
    ),
)
"""Every known hole: its name, why it is one, and whose it is."""
