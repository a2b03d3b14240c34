"""The first chunk of per-CPU memory (mm/percpu.c, pcpu_embed_first_chunk(); arch/x86/kernel/setup_percpu.c)."""

from __future__ import annotations

from collections.abc import Sequence

from guest.units import DIV_ROUND_UP, PAGE_SIZE, PMD_SIZE, SZ_16M, round_up
from kernel.kernel import Kernel
from kernel.memblock import SMP_CACHE_BYTES

RESERVED_SIZE, DYNAMIC_SIZE = 8192, 28_672
"""PERCPU_FIRST_CHUNK_RESERVE, and what is left of 20 + 8 KiB for dynamic areas."""
_SLOTS_SIZE = 23 * 16
_MIN_ALLOC_SIZE, _BLOCK_SIZE = 4, 32
_POINTER = 8


def setup_per_cpu_areas(kernel: Kernel, cpu_nodes: Sequence[int]) -> None:
    """Allocate a unit for each CPU, those of a node together; the unused ends go back.

    ``cpu_nodes`` is the node of each CPU.
    """
    memblock, used = kernel.memblock, kernel.version.percpu_static + RESERVED_SIZE + DYNAMIC_SIZE
    who = "pcpu_embed_first_chunk"
    info = kernel.memblock_alloc(PAGE_SIZE, PAGE_SIZE, "pcpu_build_alloc_info")
    areas = kernel.memblock_alloc(PAGE_SIZE, SMP_CACHE_BYTES, who)
    nodes = list(dict.fromkeys(cpu_nodes))
    groups = [cpu_nodes.count(nid) for nid in nodes]
    per_alloc = _units_per_alloc(groups, used)
    unit = PMD_SIZE // per_alloc
    places = []
    for nid, cpus in zip(nodes, groups, strict=True):
        size = round_up(cpus, per_alloc) * unit
        places.append(kernel.memblock_alloc(size, PMD_SIZE, "pcpu_fc_alloc", SZ_16M, nid=nid))
    for place, cpus in zip(places, groups, strict=True):
        for number in range(round_up(cpus, per_alloc)):
            kept = used if number < cpus else 0
            memblock.phys_free(place + number * unit + kept, unit - kept, who=who)
    pages = used // PAGE_SIZE
    sizes = f"s{kernel.version.percpu_static} r{RESERVED_SIZE} d{DYNAMIC_SIZE} u{unit}"
    kernel.machine.print(f"percpu: Embedded {pages} pages/cpu {sizes}")
    _setup_first_chunk(kernel, len(groups), len(cpu_nodes))
    for page in (info, areas):
        memblock.phys_free(page, PAGE_SIZE, who=who)


def _units_per_alloc(groups: Sequence[int], used: int) -> int:
    """How many CPUs share 2 MiB: as many as leave few units empty (pcpu_build_alloc_info())."""
    best, last_allocs = 1, 1 << 30
    for units in range(PMD_SIZE // used, 0, -1):
        if PMD_SIZE % units or PMD_SIZE // units % PAGE_SIZE:
            continue
        allocs = sum(DIV_ROUND_UP(cpus, units) for cpus in groups)
        if allocs * units - sum(groups) > sum(groups) // 3:
            continue
        if allocs > last_allocs:
            break
        best, last_allocs = units, allocs
    return best


def _setup_first_chunk(kernel: Kernel, groups: int, cpus: int) -> None:
    """Small tables about the groups, then two chunks: the reserved part and the dynamic one."""
    for size in (groups * _POINTER, groups * _POINTER, cpus * 4, cpus * _POINTER, _SLOTS_SIZE):
        kernel.memblock_alloc(size, SMP_CACHE_BYTES, "pcpu_setup_first_chunk")
    for region in (RESERVED_SIZE, DYNAMIC_SIZE):
        bits, blocks = region // _MIN_ALLOC_SIZE, region // PAGE_SIZE
        sizes = (
            kernel.version.pcpu_chunk, _bitmap_size(bits), _bitmap_size(bits + 1), blocks * _BLOCK_SIZE
        )  # fmt: skip
        for size in sizes:
            kernel.memblock_alloc(size, SMP_CACHE_BYTES, "pcpu_alloc_first_chunk")


def _bitmap_size(bits: int) -> int:
    return DIV_ROUND_UP(bits, 64) * 8
