"""What ``memblock=debug`` prints, without offsets behind function names (mm/memblock.c)."""

from __future__ import annotations

from collections.abc import Iterator

from kernel.memblock_type import NUMA_NO_NODE, MemblockType


def range_line(what: str, base: int, size: int, who: str) -> str:
    """A range was added, reserved or freed by the function ``who``."""
    return f"memblock_{what}: [{base:#018x}-{(base + size - 1) % (1 << 64):#018x}] {who}"


def alloc_line(form: str, size: int, align: int, nid: int | None, start: int, end: int, who: str) -> str:
    """The function ``who`` wants memory; without ``nid`` it does not say a node."""
    node = "" if nid is None else f"nid={nid} "
    return f"memblock_{form}: {size} bytes align={align:#x} {node}from={start:#018x} max_addr={end:#018x} {who}"


def doubled_line(array: MemblockType, start: int, size: int) -> str:
    """An array has moved to ``size`` bytes at ``start``."""
    return f"memblock: {array.name} is doubled to {array.max} at [{start:#018x}-{start + size - 1:#018x}]"


def dump_lines(memory: MemblockType, reserved: MemblockType) -> Iterator[str]:
    """What there is and what is taken (``memblock_dump_all``)."""
    yield "MEMBLOCK configuration:"
    yield f" memory size = {memory.total_size:#018x} reserved size = {reserved.total_size:#018x}"
    for array in (memory, reserved):
        yield f" {array.name}.cnt  = {len(array.regions):#x}"
        for number, region in enumerate(array.regions):
            node = "" if region.nid == NUMA_NO_NODE else f" on node {region.nid}"
            where = f"[{region.base:#018x}-{region.end - 1:#018x}]"
            yield f" {array.name}[{number:#x}]\t{where}, {region.size:#018x} bytes{node} flags: {region.flags:#x}"
