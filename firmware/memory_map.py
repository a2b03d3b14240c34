"""The firmware's memory map: what each page is used for, and how pages are handed out.

Policy as in edk2 (MdeModulePkg/Core/Dxe/Mem/Page.c): the highest fitting address wins, above the end of the default bin
only if there is none below; address 0 is never handed out; neighbours of one type and attribute are one descriptor; the
map key changes with every change of the map. Ranges that the page allocator does not own (MMIO, unaccepted memory) are
listed behind it, as GetMemoryMap() walks the GCD map last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from firmware.efi_types import CACHEABLE, EfiMemoryAttribute, EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.ranges import Range, RangeMap
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, round_down, round_up

_RUNTIME_TYPES = (EfiMemoryType.EfiRuntimeServicesCode, EfiMemoryType.EfiRuntimeServicesData)


class Use(NamedTuple):
    """What a page is used for: EFI_MEMORY_TYPE and attribute."""

    type: int
    attribute: int


class MemoryMap:
    """The pages that the allocator owns, in ``regions``, and fixed descriptors behind them.

    A region is listed on its own: a descriptor never reaches over its border, and regions keep their order. Each of
    ``owned`` is one; if they are to be ``joined``, those that touch are one together. Memory below ``default_end`` is
    handed out first.
    """

    def __init__(
        self, owned: Iterable[MemoryDescriptor], fixed: Iterable[MemoryDescriptor], joined: bool = False,
        default_end: int = PHYSICAL_ADDRESS_END,
    ) -> None:  # fmt: skip
        self._uses: RangeMap[Use | None] = RangeMap(None)
        self._regions: list[Range] = []
        self._fixed, self._default_end = list(fixed), default_end
        self.key = 1
        for d in owned:
            last = self._regions[-1] if self._regions else None
            if joined and last is not None and last.end == d.start:
                self._regions[-1] = Range(last.start, d.end)
            else:
                self._regions.append(Range(d.start, d.end))
            self._uses.assign(d.start, d.end, Use(d.type, d.attribute))

    def descriptors(self) -> list[MemoryDescriptor]:
        """The map as GetMemoryMap() lists it."""
        owned = [
            MemoryDescriptor.of_range(use.type, start, end, use.attribute)
            for region in self._regions
            for start, end, use in self._uses.runs(*region)
            if use is not None
        ]
        return owned + self._fixed

    def allocate(self, type: int, size: int, below: int, align: int = PAGE_SIZE) -> int | None:
        """Take whole pages for ``size`` bytes whose end is not above ``below``: the highest that there are.

        Memory for a special purpose (EFI_MEMORY_SP) is left alone, as edk2 leaves it. Returns the address, or
        None if no free range fits. The map is unchanged then.
        """
        size = round_up(size, PAGE_SIZE)
        best = self._highest(size, min(below, self._default_end), align)
        if best is None and below > self._default_end:
            best = self._highest(size, below, align)
        if best is not None:
            self.convert(best, best + size, type)
        return best

    def _highest(self, size: int, below: int, align: int) -> int | None:
        """The highest free address but 0 for ``size`` bytes that end at or before ``below``."""
        best = None
        for region in self._regions:
            for start, end, use in self._uses.runs(*region):
                if use is None or use.type != EfiMemoryType.EfiConventionalMemory:
                    continue
                if use.attribute & EfiMemoryAttribute.EFI_MEMORY_SP:
                    continue
                address = round_down(min(end, below) - size, align)
                if address >= max(start, 1) and (best is None or address > best):
                    best = address
        return best

    def allocate_at(self, type: int, start: int, size: int) -> bool:
        """Take the pages of ``[start, start + size)``; False, and no change, unless all of them are free."""
        if self._types(start, size) != {EfiMemoryType.EfiConventionalMemory}:
            return False
        self.convert(start, start + round_up(size, PAGE_SIZE), type)
        return True

    def free(self, start: int, size: int) -> bool:
        """Give pages back; False, and no change, if one of them is not allocated."""
        if self._types(start, size) & {None, EfiMemoryType.EfiConventionalMemory}:
            return False
        self.convert(start, start + round_up(size, PAGE_SIZE), EfiMemoryType.EfiConventionalMemory)
        return True

    def convert(self, start: int, end: int, type: int) -> None:
        """Change the type of allocator memory; attributes stay, but RUNTIME follows the type."""
        for low, high, use in list(self._uses.runs(start, end)):
            attribute = use.attribute if use else CACHEABLE
            attribute &= ~EfiMemoryAttribute.EFI_MEMORY_RUNTIME
            if type in _RUNTIME_TYPES:
                attribute |= EfiMemoryAttribute.EFI_MEMORY_RUNTIME
            self._uses.assign(low, high, Use(type, int(attribute)))
        self.key += 1

    def add(self, fixed: MemoryDescriptor, type: int, attribute: int) -> None:
        """Let the allocator own the range of a ``fixed`` descriptor, which is listed no more, as ``type``."""
        self._fixed.remove(fixed)
        self._regions.append(Range(fixed.start, fixed.end))
        self._uses.assign(fixed.start, fixed.end, Use(type, attribute))
        self.key += 1

    def find(self, type: int, size: int) -> int | None:
        """Start of the first range of ``type`` that has ``size`` bytes, or None."""
        for d in self.descriptors():
            if d.type == type and d.end - d.start >= size:
                return d.start
        return None

    def _types(self, start: int, size: int) -> set[int | None]:
        """Types of the pages of ``size`` bytes at ``start``; None for what is no page of the allocator."""
        end = start + round_up(size, PAGE_SIZE)
        if size == 0 or start % PAGE_SIZE or end > PHYSICAL_ADDRESS_END:
            return {None}
        return {use and use.type for _, _, use in self._uses.runs(start, end)}
