"""struct pages: sections of 128 MiB, and the memory that describes them.

Source: mm/sparse.c, memblocks_present(), sparse_init_nid(); mm/sparse-vmemmap.c; arch/x86/mm/init_64.c.
"""

from __future__ import annotations

from collections.abc import Iterator

from guest.ranges import Range, RangeSet
from guest.units import DIV_ROUND_UP, PAGE_SIZE, PMD_SIZE, SZ_1G, SZ_16M, SZ_128M, round_down
from kernel.events import STRUCT_PAGE_SIZE
from kernel.kernel import MAX_PHYSMEM_BITS, MAX_PHYSMEM_BITS_LA57, Kernel
from kernel.memblock import SMP_CACHE_BYTES
from kernel.mmzone import node_of, nodes_of

SECTION_SIZE = SZ_128M
SECTIONS_PER_ROOT = 256
MEMMAP_PER_SECTION = SECTION_SIZE // PAGE_SIZE * STRUCT_PAGE_SIZE
USEMAP_PER_SECTION = 56
"""struct mem_section_usage: subsection map, flags of 64 page blocks, RCU head."""
_POINTER_SIZE = 8
_PUD_SIZE, _PGD_SIZE, _P4D_SIZE = SZ_1G, SZ_1G << 9, SZ_1G << 18


def sparse_init(kernel: Kernel) -> None:
    """Allocate what describes sections, and struct pages node by node: 2 MiB a section, in one piece if possible."""
    bits = MAX_PHYSMEM_BITS_LA57 if kernel.la57 else MAX_PHYSMEM_BITS
    roots = (1 << bits) // SECTION_SIZE // SECTIONS_PER_ROOT
    kernel.memblock_alloc(roots * _POINTER_SIZE, SMP_CACHE_BYTES, "sparse_init")
    sections = _memblocks_present(kernel)
    vmemmap = _Vmemmap(kernel)
    for nid, present in sections.items():
        _sparse_init_nid(kernel, nid, present, vmemmap)


def _memblocks_present(kernel: Kernel) -> dict[int, RangeSet]:
    """Numbers of the sections with memory by node, and a page for each root of 256 sections that has one.

    A section with memory of two nodes belongs to the first.
    """
    regions = kernel.memblock.memory.regions
    present: dict[int, RangeSet] = {nid: RangeSet() for nid in nodes_of(regions)}
    taken, roots = RangeSet(), RangeSet()
    for region in regions:
        start, end = region.base // SECTION_SIZE, DIV_ROUND_UP(region.end, SECTION_SIZE)
        for free in list(taken.gaps(start, end)):
            present[node_of(region)].add(*free)
        taken.add(start, end)
        wanted = (start // SECTIONS_PER_ROOT, DIV_ROUND_UP(end, SECTIONS_PER_ROOT))
        for fresh in list(roots.gaps(*wanted)):
            for _ in range(fresh.size):
                kernel.memblock_alloc(PAGE_SIZE, SMP_CACHE_BYTES, "sparse_index_alloc", nid=node_of(region))
        roots.add(*wanted)
    return {nid: sections for nid, sections in present.items() if sections}


def _sparse_init_nid(kernel: Kernel, nid: int, sections: RangeSet, vmemmap: _Vmemmap) -> None:
    count = sections.total()
    _alloc_usemaps(kernel, nid, count * USEMAP_PER_SECTION)
    memmap, memblock = count * MEMMAP_PER_SECTION, kernel.memblock
    form, who = "alloc_exact_nid_raw", "sparse_init_nid"
    buffer = memblock.alloc_try_nid(memmap, PMD_SIZE, SZ_16M, 0, nid, who=who, form=form)
    if buffer:
        kernel.machine.memory.clear(buffer, buffer + memmap)
    for run in sections:
        vmemmap.populate(run, nid, bool(buffer))


def _alloc_usemaps(kernel: Kernel, nid: int, size: int) -> None:
    """In the section of the node's own data if there is room, since both are removed together."""
    goal = round_down(kernel.node_data.get(nid, 0), SECTION_SIZE)
    limit = goal + SECTION_SIZE
    owner = kernel.memblock.memory.search(goal)
    node = node_of(owner) if owner is not None else nid
    for end in (limit, 0):
        if kernel.memblock.alloc_try_nid(size, SMP_CACHE_BYTES, goal, end, node, who="sparse_init_nid"):
            return


class _Vmemmap:
    """Page tables for the array of struct pages: a page for each 64 GiB of memory, and one above those."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._tables: set[tuple[int, int]] = set()

    def populate(self, sections: Range, nid: int, has_buffer: bool) -> None:
        """Map the struct pages of a run of sections; without a buffer each takes its 2 MiB alone."""
        start, end = sections.start * MEMMAP_PER_SECTION, sections.end * MEMMAP_PER_SECTION
        for gib in range(round_down(start, _PUD_SIZE), end, _PUD_SIZE):
            for at, covers in self._levels(gib):
                if (at, covers) not in self._tables:
                    self._tables.add((at, covers))
                    self._alloc(PAGE_SIZE, PAGE_SIZE, nid)
            for _ in range(max(gib, start), min(gib + _PUD_SIZE, end), PMD_SIZE) if not has_buffer else ():
                self._alloc(PMD_SIZE, PMD_SIZE, nid)

    def _levels(self, gib: int) -> Iterator[tuple[int, int]]:
        if self._kernel.la57:
            yield round_down(gib, _P4D_SIZE), _P4D_SIZE
        yield round_down(gib, _PGD_SIZE), _PGD_SIZE
        yield gib, _PUD_SIZE

    def _alloc(self, size: int, align: int, nid: int) -> None:
        kernel, who = self._kernel, "vmemmap_alloc_block_zero"
        found = kernel.memblock_alloc(size, align, who, SZ_16M, nid=nid, form="alloc_try_nid_raw")
        kernel.machine.memory.clear(found, found + size)
