"""Nodes: from SRAT, or one for all memory; memblock's regions and each node's data.

Sources: arch/x86/mm/numa.c; mm/numa_memblks.c (6.12), numa_cleanup_meminfo(), numa_register_meminfo(); mm/numa.c,
alloc_node_data().
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from guest.units import PAGE_SIZE, PFN_PHYS, PFN_UP, SZ_1M
from kernel.kernel import Kernel
from kernel.memblock import SMP_CACHE_BYTES
from kernel.memblock_type import NUMA_NO_NODE, PHYS_ADDR_MAX
from kernel.mmzone import nodes_of
from kernel.srat import Srat


@dataclass(frozen=True, slots=True)
class NumaBlock:
    """``[start, end)`` belongs to node ``nid``; whether there is memory is memblock's business."""

    start: int
    end: int
    nid: int


def initmem_init(kernel: Kernel, srat: Srat | None, localities: int = 0) -> None:
    """Give every memory region its node and allocate the nodes' data; without a usable SRAT there is one node.

    ``localities`` is the size of SLIT, whose table of distances is kept.
    """
    numa_off = kernel.early.numa_off
    kernel.max_possible_pfn = kernel.max_pfn
    if not (srat is not None and not numa_off and _numa_init(kernel, _blocks_of_srat(kernel, srat, localities))):
        kernel.memblock.clear_hotplug(0, PHYS_ADDR_MAX)
        end = PFN_PHYS(kernel.max_pfn)
        kernel.machine.print("NUMA turned off" if numa_off else "No NUMA configuration found")
        kernel.machine.print(f"Faking a node at [mem {0:#018x}-{end - 1:#018x}]")
        _numa_init(kernel, [NumaBlock(0, end, 0)])
    kernel.memblock.bottom_up = False


def _blocks_of_srat(kernel: Kernel, srat: Srat, localities: int) -> list[NumaBlock]:
    if srat.bad:
        kernel.machine.print(srat.bad)
        return []
    for affinity in srat.memory:
        kernel.machine.print(affinity.line())
        if affinity.hotplug:
            kernel.memblock.mark_hotplug(affinity.start, affinity.end - affinity.start)
        kernel.max_possible_pfn = max(kernel.max_possible_pfn, PFN_UP(affinity.end - 1))
    if localities and srat.nodes:
        kernel.memblock_alloc(srat.nodes**2, PAGE_SIZE, "numa_alloc_distance")
    return [NumaBlock(affinity.start, affinity.end, affinity.nid) for affinity in srat.memory]


def _numa_init(kernel: Kernel, blocks: Sequence[NumaBlock]) -> bool:
    """Register nodes; False if they do not cover memory or contradict each other."""
    memblock = kernel.memblock
    for array in (memblock.memory, memblock.reserved):
        array.set_node(0, PHYS_ADDR_MAX, NUMA_NO_NODE)
    if not blocks:
        return False
    memblock.bottom_up = False
    cleaned = _cleanup_meminfo(kernel, blocks)
    if cleaned is None:
        return False
    for block in cleaned:
        memblock.set_node(block.start, block.end - block.start, block.nid)
    _clear_kernel_node_hotplug(kernel, cleaned)
    if sum(region.size for region in memblock.memory.regions if region.nid == NUMA_NO_NODE) >= SZ_1M:
        return False
    for nid in nodes_of(memblock.memory.regions):
        _alloc_node_data(kernel, nid)
    memblock.dump_all()
    return True


def _cleanup_meminfo(kernel: Kernel, blocks: Sequence[NumaBlock]) -> list[NumaBlock] | None:
    """Blocks cut to what there is, those of a node joined unless another node lies between; None if nodes overlap."""
    memblock = kernel.memblock
    low, high = 0, PFN_PHYS(kernel.max_pfn)
    if kernel.version.trims_numa_to_dram:
        low, high = memblock.start_of_DRAM(), memblock.end_of_DRAM()
    kept = [
        NumaBlock(max(block.start, low), min(block.end, high), block.nid)
        for block in blocks
        if memblock.memory.overlaps_region(block.start, block.end - block.start)
    ]
    kept = [block for block in kept if block.start < block.end]
    contradiction = _contradiction(kept)
    if contradiction:
        one, two = contradiction
        kernel.machine.print(f"node {one.nid} {_mem(one)} overlaps with node {two.nid} {_mem(two)}")
        return None
    return _joined(kernel, kept)


def _contradiction(blocks: Sequence[NumaBlock]) -> tuple[NumaBlock, NumaBlock] | None:
    """Two blocks of different nodes that share an address."""
    furthest: list[NumaBlock] = []  # of two nodes, the one that reaches furthest last
    for block in sorted(blocks, key=lambda block: block.start):
        for other in furthest:
            if other.nid != block.nid and other.end > block.start:
                return other, block
        ends = {other.nid: other for other in sorted([*furthest, block], key=lambda other: other.end)}
        furthest = sorted(ends.values(), key=lambda other: other.end)[-2:]
    return None


def _joined(kernel: Kernel, blocks: list[NumaBlock]) -> list[NumaBlock]:
    """Blocks of a node as one, unless memory of another node lies between them."""
    runs, joined = _runs(blocks), dict[int, NumaBlock]()
    members: dict[int, list[NumaBlock]] = {}
    for block in blocks:
        members.setdefault(runs[block], []).append(block)
    for run, (first, *others) in members.items():
        one = first
        for two in others:
            both = NumaBlock(min(one.start, two.start), max(one.end, two.end), one.nid)
            if one.end > two.start and one.start < two.end:
                kernel.machine.print(f"Warning: node {one.nid} {_mem(one)} overlaps with itself {_mem(two)}")
            kernel.machine.print(f"NUMA: Node {one.nid} {_mem(one)} + {_mem(two)} -> {_mem(both)}")
            one = both
        joined[run] = one
    return list(joined.values())


def _runs(blocks: Sequence[NumaBlock]) -> dict[NumaBlock, int]:
    """A number for each block: equal for those of a node that no other node's block lies between, by address."""
    ordered = sorted(blocks, key=lambda block: block.start)
    numbers = accumulate((int(a.nid != b.nid) for a, b in pairwise(ordered)), initial=0)
    return dict(zip(ordered, numbers, strict=False))


def _mem(block: NumaBlock) -> str:
    return f"[mem {block.start:#010x}-{block.end - 1:#010x}]"


def _clear_kernel_node_hotplug(kernel: Kernel, blocks: Sequence[NumaBlock]) -> None:
    """Nodes with memory that is taken already cannot be unplugged (numa_clear_kernel_node_hotplug())."""
    memblock = kernel.memblock
    for block in blocks:
        memblock.reserved.set_node(block.start, block.end - block.start, block.nid)
    taken = {region.nid for region in memblock.reserved.regions}
    for block in blocks:
        if block.nid in taken:
            memblock.clear_hotplug(block.start, block.end - block.start)


def _alloc_node_data(kernel: Kernel, nid: int) -> None:
    """pg_data_t, on the node if there is room."""
    size = kernel.version.node_data
    found = kernel.memblock.alloc_range_nid(size, SMP_CACHE_BYTES, 0, 0, nid)
    if not found:
        raise kernel.machine.panic(f"Cannot allocate {size} bytes for node {nid} data")
    kernel.machine.memory.clear(found, found + size)
    kernel.machine.print(f"NODE_DATA({nid}) allocated [mem {found:#010x}-{found + size - 1:#010x}]")
    region = kernel.memblock.memory.search(found)
    if region is not None and region.nid != nid:
        kernel.machine.print(f"    NODE_DATA({nid}) on node {region.nid}")
    kernel.node_data[nid] = found
