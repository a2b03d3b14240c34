"""NUMA: which memory and which processor belong to which node, as ACPI tells it.

SRAT has a row for each processor and each range of memory; SLIT has the distances between nodes, and is there only if
they are given, as QEMU has it (-numa dist). A node is a proximity domain of the same number. Sources: ACPI 6.4,
sections 5.2.16 (SRAT) and 5.2.17 (SLIT); QEMU hw/i386/acpi-build.c, build_srat() and acpi_build().
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

MAX_NODES = 128
"""QEMU's limit (include/sysemu/numa.h, MAX_NODES): a node's number is below it."""
REVISION = 3
SLIT_REVISION = 1

_LOCAL_APIC, _MEMORY, _LOCAL_X2APIC = 0, 1, 2
_ENABLED, _HOT_PLUGGABLE = 1, 2
_LAST_APIC_ID = 0xFE
LOCAL_DISTANCE, REMOTE_DISTANCE, NO_WAY = 10, 20, 255
"""Distances of a node from itself, and from another if nothing else is said; 255 means that there is no way."""

Distances = tuple[tuple[int, ...], ...]
"""A row for each node: its distance from each node."""


@dataclass(frozen=True, slots=True)
class NodeRange:
    """Memory affinity of ``[start, end)``, as a row of the SRAT has it: the NUMA node.

    ``hotplug``: a window in which memory may appear or go, whether or not some is there now.
    """

    node: int
    start: int
    end: int
    hotplug: bool = False


def srat(nodes: Sequence[NodeRange], processors: Sequence[tuple[int, int]]) -> bytes:
    """Body of the SRAT; ``processors`` are (APIC ID, node). An ID above 254 gets a row of an x2APIC."""
    rows = [_processor(apic_id, node) for apic_id, node in processors]
    rows += [_memory(r) for r in nodes]
    return struct.pack("<IQ", 1, 0) + b"".join(rows)


def slit(distances: Distances) -> bytes:
    """Body of the SLIT: how many localities there are, and the distance of each pair, row by row."""
    return struct.pack("<Q", len(distances)) + b"".join(bytes(row) for row in distances)


def _processor(apic_id: int, node: int) -> bytes:
    if apic_id <= _LAST_APIC_ID:
        high = node >> 8
        return struct.pack(
            "<BBBBIB3sI", _LOCAL_APIC, 16, node & 0xFF, apic_id, _ENABLED, 0, high.to_bytes(3, "little"), 0
        )
    return struct.pack("<BB2xIII8x", _LOCAL_X2APIC, 24, node, apic_id, _ENABLED)


def _memory(r: NodeRange) -> bytes:
    flags = _ENABLED | (_HOT_PLUGGABLE if r.hotplug else 0)
    return struct.pack("<BBI2xQQ4xI8x", _MEMORY, 40, r.node, r.start, r.end - r.start, flags)
