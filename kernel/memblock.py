"""memblock: the allocator of early boot (mm/memblock.c).

Two arrays: ``memory`` is what there is, ``reserved`` what is taken. Functions keep the kernel's names without
the prefix ``memblock_``. Addresses and sizes are bytes. ``who`` is the function that calls, for ``memblock=debug``;
``nid`` is a node, ``NUMA_NO_NODE`` any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from guest.errors import BootError, GuestPanic
from guest.ranges import TOP, Range
from guest.units import PAGE_SIZE, PFN_DOWN, PFN_UP, round_down, round_up
from kernel.memblock_debug import alloc_line, doubled_line, dump_lines, range_line
from kernel.memblock_iter import free_mem_ranges, free_mem_ranges_reverse
from kernel.memblock_type import (
    NUMA_NO_NODE,
    PHYS_ADDR_MAX,
    MemblockFlags,
    MemblockRegion,
    MemblockType,
    memblock_cap_size,
)

MEMBLOCK_ALLOC_ACCESSIBLE = 0
MEMBLOCK_ALLOC_NOLEAKTRACE = 1
MEMBLOCK_ALLOC_ANYWHERE = PHYS_ADDR_MAX
SMP_CACHE_BYTES = 64
MEMBLOCK_REGION_SIZE = 24
"""sizeof(struct memblock_region)."""
_PANIC = partial(GuestPanic, "memblock")


@dataclass(frozen=True, slots=True)
class MemblockVersion:
    """What differs between versions of mm/memblock.c when a region array is full.

    ``accepts_array``: the place of a doubled array is accepted before it is written. ``panics_when_full``: before
    memblock_allow_resize() a full array is a panic; otherwise the call fails with -ENOMEM, which few callers read.
    """

    accepts_array: bool
    panics_when_full: bool


V9_MEMBLOCK = MemblockVersion(accepts_array=False, panics_when_full=False)
"""Before 6.5, with v9 02/14, which accepts what memblock_alloc_range_nid() hands out, and nothing else."""
MAINLINE_MEMBLOCK = MemblockVersion(accepts_array=True, panics_when_full=True)
"""6.12."""


class Memblock:
    """Memory and reservations of early boot.

    ``accept_memory(start, end)`` is called for each allocated block before it is handed out (v9 02/14), and
    ``clear_memory(start, end)`` where a doubled region array is written to memory; what it holds stays here.
    ``panic(text)`` is the exception to raise where the kernel panics.
    ``movable_node`` and ``mirrored_kernelcore`` are the boot parameters ``movable_node`` and
    ``kernelcore=mirror``. ``debug``, if set, gets the lines that ``memblock=debug`` prints, without offsets behind
    the function names. ``accepted`` is what was given to ``accept_memory``, in order.
    """

    def __init__(
        self,
        accept_memory: Callable[[int, int], None],
        *,
        clear_memory: Callable[[int, int], None],
        panic: Callable[[str], BootError] = _PANIC,
        version: MemblockVersion = V9_MEMBLOCK,
        movable_node: bool = False,
        mirrored_kernelcore: bool = False,
    ) -> None:
        self.memory = MemblockType("memory", self._double_array)
        self.reserved = MemblockType("reserved", self._double_array)
        self.bottom_up = False
        self.current_limit = MEMBLOCK_ALLOC_ANYWHERE
        self.version = version
        self._accept_memory = accept_memory
        self._clear_memory = clear_memory
        self._panic = panic
        self._can_resize = False
        self._array_at: dict[str, Range] = {}
        self.movable_node = movable_node
        self.mirrored_kernelcore = mirrored_kernelcore
        self._has_mirror = False
        self.debug: Callable[[str], None] | None = None
        self.accepted: list[Range] = []

    # Registering memory. The result is 0, or -ENOMEM if a region array is full: then nothing has changed.

    def add(self, base: int, size: int, flags: MemblockFlags = MemblockFlags.MEMBLOCK_NONE, *, who: str = "") -> int:
        """There is memory at ``base``. Nothing is accepted."""
        self._say_range("add", base, size, who)
        return self.memory.add_range(base, size, int(flags))

    def remove(self, base: int, size: int, *, who: str = "") -> int:
        """There is no memory in the range any more."""
        self._say_range("remove", base, size, who)
        return self.memory.remove_range(base, size)

    def reserve(self, base: int, size: int, *, who: str = "") -> int:
        """Take the range, whether there is memory or not. Nothing is accepted."""
        self._say_range("reserve", base, size, who)
        return self.reserved.add_range(base, size)

    def phys_free(self, base: int, size: int, *, who: str = "") -> int:
        """Give the range back."""
        self._say_range("phys_free", base, size, who)
        return self.reserved.remove_range(base, size)

    def set_node(self, base: int, size: int, nid: int) -> int:
        """The memory of the range belongs to node ``nid``."""
        return self.memory.set_node(base, size, nid)

    # Flags.

    def mark_hotplug(self, base: int, size: int) -> int:
        """The range can be unplugged: no allocations there if ``movable_node``."""
        return self.memory.setclr_flag(base, size, True, MemblockFlags.MEMBLOCK_HOTPLUG)

    def clear_hotplug(self, base: int, size: int) -> int:
        """Undo :meth:`mark_hotplug`."""
        return self.memory.setclr_flag(base, size, False, MemblockFlags.MEMBLOCK_HOTPLUG)

    def mark_mirror(self, base: int, size: int) -> int:
        """The range is mirrored: allocations prefer it. Nothing happens without ``mirrored_kernelcore``."""
        if not self.mirrored_kernelcore:
            return 0
        self._has_mirror = True
        return self.memory.setclr_flag(base, size, True, MemblockFlags.MEMBLOCK_MIRROR)

    def mark_nomap(self, base: int, size: int) -> int:
        """The range is memory that the direct map leaves out: never allocated."""
        return self.memory.setclr_flag(base, size, True, MemblockFlags.MEMBLOCK_NOMAP)

    def clear_nomap(self, base: int, size: int) -> int:
        """Undo :meth:`mark_nomap`."""
        return self.memory.setclr_flag(base, size, False, MemblockFlags.MEMBLOCK_NOMAP)

    def reserved_mark_noinit(self, base: int, size: int) -> int:
        """The struct pages of the reserved range stay uninitialised."""
        return self.reserved.setclr_flag(base, size, True, MemblockFlags.MEMBLOCK_RSRV_NOINIT)

    # Limits.

    def trim_memory(self, align: int) -> None:
        """Shrink every memory region to multiples of ``align``; the total is not corrected, as in the kernel."""
        kept: list[MemblockRegion] = []
        for region in self.memory.regions:
            start, end = round_up(region.base, align), round_down(region.end, align)
            if start < end:
                kept.append(region._replace(base=start, size=end - start))
            else:
                self.memory.total_size -= region.size
        self.memory.regions[:] = kept

    def enforce_memory_limit(self, limit: int) -> None:
        """Keep the first ``limit`` bytes of memory, counted from below, and forget what is reserved above."""
        max_addr = self._find_max_addr(limit)
        if limit and max_addr != PHYS_ADDR_MAX:
            self.memory.remove_range(max_addr, PHYS_ADDR_MAX)
            self.reserved.remove_range(max_addr, PHYS_ADDR_MAX)

    def cap_memory_range(self, base: int, size: int) -> None:
        """Keep memory inside the range only; NOMAP memory stays everywhere."""
        if not size or not self.memory.total_size:
            return
        isolated = self.memory.isolate_range(base, size)
        if isolated is None:
            return
        first, last = isolated
        for index in reversed(range(len(self.memory.regions))):
            outside = not first <= index < last
            if outside and not self.memory.regions[index].flags & MemblockFlags.MEMBLOCK_NOMAP:
                self.memory.remove_regions(index, index + 1)
        self.reserved.remove_range(0, base)
        self.reserved.remove_range(memblock_cap_size(base, size), PHYS_ADDR_MAX)

    def mem_limit_remove_map(self, limit: int) -> None:
        """As :meth:`enforce_memory_limit`, but NOMAP memory above the limit stays."""
        max_addr = self._find_max_addr(limit)
        if limit and max_addr != PHYS_ADDR_MAX:
            self.cap_memory_range(0, max_addr)

    def _find_max_addr(self, limit: int) -> int:
        for region in self.memory.regions:
            if limit <= region.size:
                return region.base + limit
            limit -= region.size
        return PHYS_ADDR_MAX

    # Questions.

    def is_memory(self, address: int) -> bool:
        """True if there is memory at ``address``."""
        return self.memory.search(address) is not None

    def is_map_memory(self, address: int) -> bool:
        """True if there is memory at ``address`` and the direct map has it."""
        region = self.memory.search(address)
        return region is not None and not region.flags & MemblockFlags.MEMBLOCK_NOMAP

    def is_reserved(self, address: int) -> bool:
        """True if ``address`` is taken."""
        return self.reserved.search(address) is not None

    def is_region_memory(self, base: int, size: int) -> bool:
        """True if the whole range lies in one region of memory."""
        region = self.memory.search(base)
        return region is not None and region.end >= memblock_cap_size(base, size)

    def is_region_reserved(self, base: int, size: int) -> bool:
        """True if any address of the range is taken."""
        return self.reserved.overlaps_region(base, size)

    def start_of_DRAM(self) -> int:
        """Lowest address of memory."""
        return self.memory.regions[0].base if self.memory.regions else 0

    def end_of_DRAM(self) -> int:
        """End of memory, exclusive."""
        return self.memory.regions[-1].end if self.memory.regions else 0

    def phys_mem_size(self) -> int:
        """Bytes of memory, as the kernel keeps count (see :meth:`trim_memory`)."""
        return self.memory.total_size

    def reserved_size(self) -> int:
        """Bytes that are taken."""
        return self.reserved.total_size

    def free_ranges(self, flags: MemblockFlags = MemblockFlags.MEMBLOCK_NONE) -> Iterator[Range]:
        """Memory that is not taken, ascending (``for_each_free_mem_range``). Do not change memblock meanwhile.

        With ``MEMBLOCK_MIRROR`` mirrored memory only.
        """
        return free_mem_ranges(self.memory, self.reserved, flags, self.movable_node)

    # Allocation.

    def phys_alloc_range(self, size: int, align: int, start: int, end: int, *, who: str = "") -> int:
        """Reserve and accept ``size`` bytes in ``[start, end)``; returns the address, 0 if there is no room.

        ``end`` may be ``MEMBLOCK_ALLOC_ACCESSIBLE``: the current limit. Top-down unless ``bottom_up``. The
        first page is never given out. ``align`` is a power of two, 0 for a cache line.
        Source: memblock_phys_alloc_range().
        """
        if self.debug:
            self.debug(alloc_line("phys_alloc_range", size, align, None, start, end, who))
        return self.alloc_range_nid(size, align, start, end)

    def alloc_range_nid(
        self, size: int, align: int, start: int, end: int, nid: int = NUMA_NO_NODE, exact_nid: bool = False
    ) -> int:
        """As :meth:`phys_alloc_range`, on node ``nid``; elsewhere if it is full, unless ``exact_nid``.

        Source: memblock_alloc_range_nid().
        """
        align = align or SMP_CACHE_BYTES
        nodes = (nid,) if exact_nid or nid == NUMA_NO_NODE else (nid, NUMA_NO_NODE)
        for flags in self._choose_flags():
            for node in nodes:
                found = self._find_in_range_node(size, align, start, end, flags, node)
                if found and not self.reserve(found, size, who="memblock_alloc_range_nid"):
                    self._accept(found, found + size)
                    return found
        return 0

    def alloc_try_nid(
        self, size: int, align: int, min_addr: int = 0, max_addr: int = MEMBLOCK_ALLOC_ACCESSIBLE,
        nid: int = NUMA_NO_NODE, *, who: str = "", form: str = "alloc_try_nid",
    ) -> int:  # fmt: skip
        """Allocate and clear; without room at ``min_addr`` or above below it, too; 0 if there is none.

        ``form`` is the kernel's function: with ``_raw`` nothing is cleared, with ``_exact_nid`` no other node will do.
        Source: memblock_alloc_try_nid(), memblock_alloc_internal().
        """
        if self.debug:
            self.debug(alloc_line(form, size, align, nid, min_addr, max_addr, who))
        max_addr = min(max_addr or self.current_limit, self.current_limit)
        for start in (min_addr, 0) if min_addr else (0,):
            found = self.alloc_range_nid(size, align, start, max_addr, nid, "exact_nid" in form)
            if found:
                if not form.endswith("_raw"):
                    self._clear_memory(found, found + size)
                return found
        return 0

    def _accept(self, start: int, end: int) -> None:
        self.accepted.append(Range(start, end))
        self._accept_memory(start, end)

    def _choose_flags(self) -> list[MemblockFlags]:
        """The kinds of memory to look for, one after the other (choose_memblock_flags())."""
        mirror = [MemblockFlags.MEMBLOCK_MIRROR] if self._has_mirror else []
        return [*mirror, MemblockFlags.MEMBLOCK_NONE]

    def _find_in_range(self, size: int, align: int, start: int, end: int) -> int:
        """A free place, mirrored if there is such; 0 if there is none."""
        places = (self._find_in_range_node(size, align, start, end, flags) for flags in self._choose_flags())
        return next(filter(None, places), 0)

    def _find_in_range_node(
        self, size: int, align: int, start: int, end: int, flags: MemblockFlags, nid: int = NUMA_NO_NODE
    ) -> int:
        """Lowest or highest free place, 0 if there is none (``memblock_find_in_range_node``)."""
        if end in (MEMBLOCK_ALLOC_ACCESSIBLE, MEMBLOCK_ALLOC_NOLEAKTRACE):
            end = self.current_limit
        start = max(start, PAGE_SIZE)
        end = max(start, end)
        arrays = (self.memory, self.reserved, flags, self.movable_node, nid)
        below = end if size else TOP  # nothing fits into no room
        for free, taken in free_mem_ranges(*arrays) if self.bottom_up else free_mem_ranges_reverse(*arrays, below):
            if taken - free < size:
                continue
            low, high = min(max(free, start), end), min(max(taken, start), end)
            if self.bottom_up:
                found = round_up(low, align)
                fits = found < high and found + size <= high
            else:
                found = round_down(high - size, align)
                fits = low <= found
            if fits:
                return found
        return 0

    # memblock=debug.

    def dump_all(self) -> None:
        """Say what there is and what is taken."""
        if self.debug:
            for line in dump_lines(self.memory, self.reserved):
                self.debug(line)

    def _say_range(self, what: str, base: int, size: int, who: str) -> None:
        if self.debug:
            self.debug(range_line(what, base, size, who))

    # Room for regions.

    def allow_resize(self) -> None:
        """From now on a full region array is moved to memory, with twice the room."""
        self._can_resize = True

    def _double_array(self, array: MemblockType, base: int, size: int) -> bool:
        """Move ``array`` to a place of twice the size, and reserve that; False if there is none.

        The place is not in the range ``base``, ``size`` that is just being reserved, and above it if possible.
        Source: memblock_double_array(), up to where the slab allocator is there.
        """
        if not self._can_resize:
            if self.version.panics_when_full:
                raise self._panic(f"memblock: cannot resize {array.name} array")
            return False
        new_size = 2 * array.max * MEMBLOCK_REGION_SIZE
        room, limit = round_up(new_size, PAGE_SIZE), self.current_limit
        if array is not self.reserved:
            base = size = 0
        found = self._find_in_range(room, PAGE_SIZE, base + size, limit)
        if not found and size:
            found = self._find_in_range(room, PAGE_SIZE, 0, min(base, limit))
        if not found:
            return False
        if self.version.accepts_array:
            self._accept(found, found + room)
        self._clear_memory(found, found + new_size)
        array.max *= 2
        who = "memblock_double_array"
        if self.debug:
            self.debug(doubled_line(array, found, new_size))
        old, self._array_at[array.name] = self._array_at.get(array.name), Range(found, found + room)
        if old is not None:
            self.phys_free(old.start, old.size, who=who)
        if self.reserve(found, room, who=who):
            raise self._panic("kernel BUG at mm/memblock.c: BUG_ON(memblock_reserve(addr, new_alloc_size))")
        return True

    # Handing over to the page allocator.

    def discard(self) -> list[Range]:
        """Where doubled region arrays lie, which nobody needs any more (``memblock_discard``)."""
        places, self._array_at = list(self._array_at.values()), {}
        return places

    def free_all(self, max_low_pfn: int) -> list[Range]:
        """What the page allocator gets: free memory as ranges of page frame numbers, ascending, whole pages only.

        Hotplug flags are cleared first. Source: memblock_free_all(), free_low_memory_core_early().
        """
        self.clear_hotplug(0, PHYS_ADDR_MAX)
        pages = [Range(PFN_UP(r.start), min(PFN_DOWN(r.end), max_low_pfn)) for r in self.free_ranges()]
        return [r for r in pages if r.start < r.end]
