"""Slots: the aligned places in free memory among which the decompressor's KASLR draws one.

Numbers are u64 and wrap as in C, since command line and memory map may say anything.
Source: arch/x86/boot/compressed/kaslr.c, process_mem_region(), mem_avoid_overlap(), process_gb_huge_pages() and
store_slot_info().
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from guest.errors import FormatError
from guest.units import PUD_SHIFT, PUD_SIZE, U64_MAX, round_down, round_up

MAX_SLOT_AREA = 100
_SOURCE = "arch/x86/boot/compressed/kaslr.c, __process_mem_region()"


class MemVector(NamedTuple):
    """struct mem_vector: ``size`` bytes from ``start`` on."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """The address behind it, of 64 bits."""
        return self.start + self.size & U64_MAX

    def overlaps(self, other: MemVector) -> bool:
        """mem_overlaps(): an empty region overlaps one that it lies inside of."""
        return self.end > other.start and self.start < other.end


class SlotArea(NamedTuple):
    """``num`` places for the kernel, the first at ``addr``, one alignment apart."""

    addr: int
    num: int


def slot_address(areas: Iterable[SlotArea], align: int, number: int) -> int | None:
    """The place with this number, counted through ``areas`` in their order; None behind the last one."""
    for area in areas:
        if number < area.num:
            return area.addr + number * align
        number -= area.num
    return None


class Slots:
    """The places for a kernel of ``image_size`` bytes from ``minimum`` up to ``limit``, none of them over ``avoid``.

    ``align`` is CONFIG_PHYSICAL_ALIGN; ``gb_huge_pages`` pages of 1 GiB are skipped, the lowest that are met.
    ``immovable``, if there is any, is the only memory that counts.
    """

    def __init__(
        self, image_size: int, align: int, minimum: int, limit: int, avoid: Sequence[MemVector],
        gb_huge_pages: int = 0, immovable: Sequence[MemVector] = (),
    ) -> None:  # fmt: skip
        self._size, self._align, self._minimum, self._limit = image_size, align, minimum, limit
        self._avoid, self._gb_huge_pages, self._immovable = avoid, gb_huge_pages, immovable
        self.areas: list[SlotArea] = []

    @property
    def full(self) -> bool:
        """Whether there is room for no further area."""
        return len(self.areas) == MAX_SLOT_AREA

    def process(self, region: MemVector) -> bool:
        """process_mem_region(): count the places in a region of free memory; true if no further one can count."""
        if not self._immovable:
            self._process(region)
            return self.full
        for node in self._immovable:
            if region.overlaps(node):
                start, stop = (min(max(address, node.start), node.end) for address in (region.start, region.end))
                self._process(MemVector(start, stop - start & U64_MAX))
                if self.full:
                    return True
        return False

    def _process(self, entry: MemVector) -> None:
        start, end = max(entry.start, self._minimum), min(entry.end, self._limit)
        while not self.full:
            start = self._aligned(start)
            if start > end or end - start < self._size:
                return
            region = MemVector(start, end - start)
            overlap = self._overlap(region)
            if overlap is None:
                self._skip_huge_pages(region)
                return
            if overlap.start >= start + self._size:
                self._skip_huge_pages(MemVector(start, overlap.start - start))
            start = overlap.end

    def _aligned(self, address: int) -> int:
        aligned = round_up(address, self._align)
        if aligned > U64_MAX:
            raise FormatError(
                "region of memory", at=address, found="a start in the last bytes of 64-bit addresses",
                expected="one that can be aligned", source=_SOURCE,
            )  # fmt: skip
        return aligned

    def _overlap(self, region: MemVector) -> MemVector | None:
        """The lowest region to avoid that overlaps; of those that start together, the first."""
        overlaps = [avoid for avoid in self._avoid if region.overlaps(avoid)]
        return min(overlaps, key=lambda avoid: avoid.start, default=None)

    def _skip_huge_pages(self, region: MemVector) -> None:
        """process_gb_huge_pages(): the places before and behind as many whole pages of 1 GiB as are still wanted."""
        pud_start, pud_end = round_up(region.start, PUD_SIZE), round_down(region.end, PUD_SIZE)
        if not self._gb_huge_pages or pud_start >= pud_end:
            self._store(region)
            return
        if pud_start >= region.start + self._size:
            self._store(MemVector(region.start, pud_start - region.start))
        skipped = min(pud_end - pud_start >> PUD_SHIFT, self._gb_huge_pages)
        self._gb_huge_pages -= skipped
        pud_end = pud_start + (skipped << PUD_SHIFT)
        if region.end >= pud_end + self._size:
            self._store(MemVector(pud_end, region.end - pud_end))

    def _store(self, region: MemVector) -> None:
        if not self.full:
            self.areas.append(SlotArea(region.start, 1 + (region.size - self._size) // self._align))
