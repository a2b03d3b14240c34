"""ACPI's SRAT: which memory and which processors belong together.

Sources: ACPI 6.4, section 5.2.16; drivers/acpi/numa/srat.c, acpi_parse_memory_affinity(), acpi_map_pxm_to_node();
arch/x86/mm/srat.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kernel.version import MAX_NUMNODES

_FIRST_ENTRY = 48
_REVISION = 8
_PROCESSOR, _MEMORY, _X2APIC = 0, 1, 2
_ENABLED, _HOT_PLUGGABLE, _NON_VOLATILE = 1, 2, 4
NR_NODE_MEMBLKS = 2 * MAX_NUMNODES
_SIZES = {_PROCESSOR: 16, _MEMORY: 40, _X2APIC: 24}


@dataclass(frozen=True, slots=True)
class MemoryAffinity:
    """Memory ``[start, end)`` of node ``nid``, which firmware calls proximity domain ``pxm``."""

    nid: int
    pxm: int
    start: int
    end: int
    hotplug: bool = False
    non_volatile: bool = False

    def line(self) -> str:
        """What the kernel prints of it."""
        tail = " hotplug" * self.hotplug + " non-volatile" * self.non_volatile
        return f"ACPI: SRAT: Node {self.nid} PXM {self.pxm} [mem {self.start:#010x}-{self.end - 1:#010x}]{tail}"


@dataclass(frozen=True, slots=True)
class Srat:
    """What a table says: ``memory`` in its order, ``cpus`` as (APIC ID, node); ``bad`` if the kernel gives it up."""

    memory: tuple[MemoryAffinity, ...]
    cpus: tuple[tuple[int, int], ...]
    bad: str | None = None

    @property
    def nodes(self) -> int:
        """One more than the highest node that is named."""
        return max([*(m.nid for m in self.memory), *(nid for _, nid in self.cpus)], default=-1) + 1


def parse_srat(data: bytes) -> Srat:
    """Read a whole table. Nodes are numbered as their proximity domains come up, processors first."""
    nodes: dict[int, int] = {}
    revision = data[_REVISION] if len(data) > _REVISION else 0
    entries = list(_entries(data))
    cpus, memory = [], []
    for kind, entry in entries:
        if kind != _MEMORY and (cpu := _processor(kind, entry, revision)) is not None:
            cpus.append((cpu[0], nodes.setdefault(cpu[1], len(nodes))))
    for kind, entry in entries:
        if kind != _MEMORY:
            continue
        pxm, start, size, flags = struct.unpack_from("<I2xQQ4xI", entry, 2)
        pxm &= 0xFF if revision <= 1 else 0xFFFFFFFF
        if not flags & _ENABLED:
            continue
        nid = nodes.setdefault(pxm, len(nodes))
        if nid >= MAX_NUMNODES:
            return Srat((), (), "SRAT: Too many proximity domains.")
        end = start + size
        if size and end <= 1 << 64:
            memory.append(
                MemoryAffinity(nid, pxm, start, end, bool(flags & _HOT_PLUGGABLE), bool(flags & _NON_VOLATILE))
            )
            if len(memory) > NR_NODE_MEMBLKS:
                return Srat((), (), "too many memblk ranges")
    return Srat(tuple(memory), tuple(cpus))


def _entries(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and bytes of the entries that are of use, up to one that has no length or does not fit."""
    at = _FIRST_ENTRY
    while at + 2 <= len(data):
        kind, size = data[at], data[at + 1]
        if size < 2 or at + size > len(data):
            return
        if size >= _SIZES.get(kind, 256):
            yield kind, data[at : at + size]
        at += size


def _processor(kind: int, entry: bytes, revision: int) -> tuple[int, int] | None:
    """APIC ID and proximity domain of a processor that is there."""
    if kind == _PROCESSOR:
        pxm = entry[2] | (int.from_bytes(entry[9:12], "little") << 8 if revision >= 2 else 0)
        apic, flags = entry[3], int.from_bytes(entry[4:8], "little")
    elif kind == _X2APIC:
        pxm, apic, flags = struct.unpack_from("<III", entry, 4)
    else:
        return None
    return (apic, pxm) if flags & _ENABLED else None
