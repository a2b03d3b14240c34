"""The kernel's e820 table: what is RAM, before memblock knows.

Sources: arch/x86/kernel/e820.c; arch/x86/include/asm/e820/types.h. Addresses and sizes are u64 and wrap as in C
where an entry reaches beyond 2^64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import islice, pairwise

from bootstub.boot_params import E820_MAX_ENTRIES_ZEROPAGE, BootE820Entry
from bootstub.e820_types import (
    E820_TYPE_ACPI,
    E820_TYPE_PRAM,
    E820_TYPE_RAM,
    E820_TYPE_SOFT_RESERVED,
    type_word,
)
from guest.units import PAGE_SHIFT, SZ_1M, SZ_4G, SZ_4M

E820_MAX_ENTRIES = E820_MAX_ENTRIES_ZEROPAGE + 3 * 64
"""Capacity of the kernel's table with NODES_SHIFT=6, the default of x86-64."""

LOWMEMSIZE = 0x9F000
HIGH_MEMORY = SZ_1M

RAM_ONLY = frozenset({E820_TYPE_RAM})
"""What counts as RAM for its end: 6.1 and the base of the v9 series."""
RAM_AND_ACPI = frozenset({E820_TYPE_RAM, E820_TYPE_ACPI})
"""What counts as RAM for its end: 6.12."""

_U64_END = 1 << 64
_NOMERGE = frozenset({E820_TYPE_PRAM, E820_TYPE_SOFT_RESERVED})


class E820Table:
    """struct e820_table: entries in array order, at most ``capacity``.

    A table is sorted and free of overlaps only after :meth:`update_table`. Ranges are ``start`` and ``size`` or
    half open ``start`` and ``end``, in bytes.
    """

    def __init__(self, entries: Iterable[BootE820Entry] = (), capacity: int = E820_MAX_ENTRIES) -> None:
        self.capacity = capacity
        self._entries: list[BootE820Entry] = []
        for entry in entries:
            self.range_add(entry.addr, entry.size, entry.type)

    def __iter__(self) -> Iterator[BootE820Entry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def copy(self) -> E820Table:
        """A table of its own with the same entries."""
        table = E820Table(capacity=self.capacity)
        table._entries = list(self._entries)
        return table

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()

    def range_add(self, start: int, size: int, e820_type: int) -> bool:
        """Append an entry. A full table ignores it and answers False (``e820__range_add``)."""
        if len(self._entries) >= self.capacity:
            return False
        self._entries.append(BootE820Entry(start, size, e820_type))
        return True

    def append_table(self, entries: Iterable[BootE820Entry]) -> int:
        """Append entries up to the first one that ends beyond 2^64; that one gives -1, none of them 0.

        ``__append_e820_table``, for the table in boot_params and for SETUP_E820_EXT.
        """
        for entry in entries:
            if entry.addr + entry.size > _U64_END:
                return -1
            self.range_add(entry.addr, entry.size, entry.type)
        return 0

    def range_update(self, start: int, size: int, old_type: int, new_type: int) -> int:
        """Turn what is ``old_type`` in the range into ``new_type``; returns the bytes turned.

        New pieces go to the end of the table (``e820__range_update``). Equal types are a ``ValueError``, where
        the kernel has a BUG_ON.
        """
        if old_type == new_type:
            raise ValueError(f"range_update: found old and new type {old_type}, expected two types")
        return self._carve(start, size, old_type, new_type)

    def range_remove(self, start: int, size: int, old_type: int | None = None) -> int:
        """Take ``old_type``, or any type, out of the range; returns the bytes taken out.

        An entry that goes wholly stays as a zero entry until the next update (``e820__range_remove``).
        """
        return self._carve(start, size, old_type, None)

    def update_table(self) -> int:
        """Sort; where entries overlap the larger type wins; join equal neighbours (``e820__update_table``).

        Returns 0. A table with fewer than two entries, or with one that wraps, stays as it is and gives -1.
        PRAM and soft reserved neighbours stay apart; empty entries and type 0 vanish; what exceeds the
        capacity is lost.
        """
        if len(self._entries) < 2 or any(_end(entry) < entry.addr for entry in self._entries):
            return -1
        self._entries = list(islice(_merged(_winners(self._entries)), self.capacity))
        return 0

    def end_of_ram_pfn(self, limit_pfn: int, types: Collection[int] = RAM_ONLY) -> int:
        """The page frame after the last whole one of ``types``, at most ``limit_pfn``, 0 if there is none.

        With MAX_ARCH_PFN as the limit this is ``e820__end_of_ram_pfn``: 46 bits of address, or 52 with 5-level
        page tables.
        """
        last_pfn = 0
        for entry in self._entries:
            if entry.type in types and entry.addr >> PAGE_SHIFT < limit_pfn:
                last_pfn = max(last_pfn, _end(entry) >> PAGE_SHIFT)
        return min(last_pfn, limit_pfn)

    def end_of_low_ram_pfn(self, types: Collection[int] = RAM_ONLY) -> int:
        """The same below 4 GiB (``e820__end_of_low_ram_pfn``)."""
        return self.end_of_ram_pfn(SZ_4G >> PAGE_SHIFT, types)

    def mapped_any(self, start: int, end: int, e820_type: int | None = None) -> bool:
        """True if an entry of ``e820_type``, or of any, meets ``[start, end)`` (``e820__mapped_any``)."""
        return any(True for _ in self._meeting(start, end, e820_type))

    def mapped_all(self, start: int, end: int, e820_type: int | None = None) -> bool:
        """True if ``[start, end)`` is covered by entries of ``e820_type``, or of any, in table order.

        Right on a sorted table only, as in the kernel (``e820__mapped_all``).
        """
        return self._last_of_cover(start, end, e820_type) is not None

    def get_entry_type(self, start: int, end: int) -> int | None:
        """Type of the entry that completes the cover of ``[start, end)``; None where the kernel has -EINVAL."""
        entry = self._last_of_cover(start, end, None)
        return None if entry is None else entry.type

    def print_lines(self, who: str) -> list[str]:
        """The table as dmesg has it, last addresses inclusive (``e820__print_table``).

        An empty entry has its start less one as its end, as in the kernel; at 0 that wraps to 2^64 - 1.
        """
        return [
            f"{who}: [mem {entry.addr:#018x}-{(entry.addr + entry.size - 1) % _U64_END:#018x}] {type_word(entry.type)}"
            for entry in self._entries
        ]

    def search_gap(self, max_pfn: int) -> tuple[int, int]:
        """Start and size of the largest gap below 4 GiB, the lowest of equal ones, at least 4 MiB.

        Without one, the place 1 MiB behind RAM (``e820__setup_pci_gap``, ``e820_search_gap``). Of a table that is
        not sorted only what lies below all entries already looked at, from the last one on, counts as a gap.
        """
        size, start, last = SZ_4M, (max_pfn << PAGE_SHIFT) + SZ_1M, SZ_4G
        for entry in reversed(self._entries):
            end = _end(entry)
            if last > end and last - end >= size:
                size, start = last - end, end
            last = min(last, entry.addr)
        return start, size

    def _meeting(self, start: int, end: int, e820_type: int | None) -> Iterator[BootE820Entry]:
        for entry in self._entries:
            if e820_type in (None, entry.type) and entry.addr < end and _end(entry) > start:
                yield entry

    def _last_of_cover(self, start: int, end: int, e820_type: int | None) -> BootE820Entry | None:
        """``__e820__mapped_all``: each entry that meets the rest of the range shortens it from below."""
        for entry in self._entries:
            if e820_type not in (None, entry.type) or entry.addr >= end or _end(entry) <= start:
                continue
            if entry.addr <= start:
                start = _end(entry)
            if start >= end:
                return entry
        return None

    def _carve(self, start: int, size: int, old_type: int | None, new_type: int | None) -> int:
        """Give ``new_type`` to what is ``old_type`` (None: any) in the range; a new type of None removes it."""
        end = min(start + size, _U64_END - 1)
        changed = 0
        for index, entry in enumerate(self._entries):  # pieces that are appended on the way are visited, too
            if old_type not in (None, entry.type):
                continue
            entry_end = _end(entry)
            low, high = max(start, entry.addr), min(end, entry_end)
            if start <= entry.addr and entry_end <= end:
                self._entries[index] = BootE820Entry(0, 0, 0) if new_type is None else replace(entry, type=new_type)
                changed += entry.size
            elif low < high or entry.addr < start <= end < entry_end:
                self._entries[index] = self._split(entry, low, high, new_type)
                changed += high - low
        return changed % _U64_END  # the sum of odd entries wraps, too

    def _split(self, entry: BootE820Entry, low: int, high: int, new_type: int | None) -> BootE820Entry:
        """Append the pieces that ``[low, high)`` makes of ``entry``; returns what stays in its place."""
        if new_type is not None:
            self.range_add(low, high - low, new_type)
        tail = BootE820Entry(high, _end(entry) - high, entry.type)
        if entry.addr == low:
            return tail
        if tail.size:
            self.range_add(tail.addr, tail.size, tail.type)
        return replace(entry, size=low - entry.addr)


def memory_setup(
    entries: Sequence[BootE820Entry], alt_mem_k: int, ext_mem_k: int, capacity: int = E820_MAX_ENTRIES
) -> tuple[str, E820Table]:
    """The first table of a boot, updated, and who it is from (``e820__memory_setup_default``).

    ``entries`` is e820_table of boot_params. With fewer than two entries, or one that ends beyond 2^64, the
    kernel makes up two ranges of RAM from the sizes in KiB, boot_params' ``alt_mem_k`` (``BIOS-e801``) or
    ``screen_info.ext_mem_k`` (``BIOS-88``), whichever is more.
    """
    who = "BIOS-e820"
    table = E820Table(capacity=capacity)
    if len(entries) < 2 or table.append_table(entries) < 0:
        who = "BIOS-88" if alt_mem_k < ext_mem_k else "BIOS-e801"
        table = E820Table(capacity=capacity)
        table.range_add(0, LOWMEMSIZE, E820_TYPE_RAM)
        table.range_add(HIGH_MEMORY, max(alt_mem_k, ext_mem_k) << 10, E820_TYPE_RAM)
    table.update_table()
    return who, table


def update_line(start: int, size: int, old_type: int, new_type: int) -> str:
    """What ``e820__range_update`` prints."""
    return f"e820: update {_mem_text(start, size)} {type_word(old_type)} ==> {type_word(new_type)}"


def remove_line(start: int, size: int, old_type: int | None) -> str:
    """What ``e820__range_remove`` prints; nothing behind the range if any type goes."""
    return f"e820: remove {_mem_text(start, size)} {'' if old_type is None else type_word(old_type)}"


def _mem_text(start: int, size: int) -> str:
    return f"[mem {start:#010x}-{(start + size - 1) % _U64_END:#010x}]"


def _end(entry: BootE820Entry) -> int:
    return (entry.addr + entry.size) % _U64_END


def _winners(entries: Iterable[BootE820Entry]) -> Iterator[BootE820Entry]:
    """The space between neighbouring starts and ends, each with the largest type there, or 0 for a gap."""
    waiting = sorted((e for e in entries if e.size), key=lambda e: e.addr, reverse=True)
    points = sorted({e.addr for e in waiting} | {_end(e) for e in waiting})
    present: list[tuple[int, int]] = []  # heap of (-type, end); ended entries leave when they reach the top
    for start, end in pairwise(points):
        while waiting and waiting[-1].addr == start:
            entry = waiting.pop()
            heappush(present, (-entry.type, _end(entry)))
        while present and present[0][1] <= start:
            heappop(present)
        yield BootE820Entry(start, end - start, -present[0][0] if present else 0)


def _merged(pieces: Iterable[BootE820Entry]) -> Iterator[BootE820Entry]:
    """Touching pieces of equal type as one entry, except the types that do not merge; gaps left out."""
    last = BootE820Entry(0, 0, 0)
    for piece in pieces:
        if piece.type == last.type and piece.type not in _NOMERGE:
            last = replace(last, size=last.size + piece.size)
            continue
        if last.type:
            yield last
        last = piece
    if last.type:
        yield last
