"""Zonelists: in which order a request looks at the zones of all nodes (mm/page_alloc.c, ``build_zonelists``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kernel.buddy import ORDER_BITS, ZoneBuddy
from kernel.gfp import ALLOC_KSWAPD, ALLOC_NOFRAGMENT, ALLOC_WMARK_LOW, Gfp, gfp_migratetype, gfp_zone
from kernel.mmzone import Zone, ZoneType
from kernel.per_cpu_pages import PerCpuPages

LOCAL_DISTANCE, REMOTE_DISTANCE = 10, 20

Distances = Mapping[tuple[int, int], int]
"""SLIT: distance from one node to another. Pairs that are missing are 10 for a node itself and 20 for others."""


def node_distance(distances: Distances, a: int, b: int) -> int:
    """Distance of node ``b`` from node ``a``."""
    return distances.get((a, b), LOCAL_DISTANCE if a == b else REMOTE_DISTANCE)


def fallback_orders(
    nodes: Sequence[int], memory: set[int], cpus: set[int], distances: Distances
) -> dict[int, list[int]]:
    """For each node the nodes with ``memory`` in the order in which it falls back on them.

    Nearer nodes come first; among equals those without CPUs, the next in number, and those that fewer nodes fall back
    on first. Source: find_next_best_node(), build_zonelists().
    """
    load = dict.fromkeys(nodes, 0)

    def penalty(local: int, node: int) -> tuple[int, int]:
        return node_distance(distances, local, node) + (node < local) + (node in cpus), load[node]

    orders = {}
    for local in nodes:
        order: list[int] = []
        left, previous = set(memory), local
        while left:
            ranks = {penalty(local, node): node for node in sorted(left, reverse=True)}
            best = local if local in left else ranks[min(ranks)]
            if node_distance(distances, local, best) != node_distance(distances, local, previous):
                load[best] += 1
            order.append(best)
            left.remove(best)
            previous = best
        orders[local] = order
    return orders


@dataclass(slots=True)
class AllocContext:
    """What a request's flags and node decide (``struct alloc_context``): the zones in order, and the first of them."""

    gfp: int
    migratetype: int
    highest_zoneidx: int
    zonelist: tuple[ZoneBuddy, ...]
    alloc_flags: int
    """Flags of the first attempt: down to the low watermark, without fragmentation if another zone can help."""
    code: int
    """What the table of pages in use says of a single page of the first zone."""
    zone: Zone
    pagesets: list[PerCpuPages]
    """The first zone and its per-CPU lists."""


class Zonelists:
    """The zonelists of all nodes."""

    def __init__(self, buddies: Sequence[ZoneBuddy], cpus: set[int], distances: Distances) -> None:
        self._buddies = [buddy for buddy in buddies if buddy.zone.populated]
        nodes = sorted({buddy.zone.node for buddy in buddies})
        memory = {buddy.zone.node for buddy in self._buddies}
        self.nodes = tuple(nodes)
        self.fallback_order = fallback_orders(nodes, memory, cpus, distances)

    def lines(self) -> list[str]:
        """dmesg: the order of each node."""
        return [
            f"Fallback order for Node {node}: " + "".join(f"{other} " for other in order)
            for node, order in self.fallback_order.items()
        ]

    def context(self, gfp: int, node: int) -> AllocContext | None:
        """Zones for a request on a node; None if it may use no zone that has memory. Source: prepare_alloc_pages()."""
        highest = gfp_zone(gfp)
        nodes = [node] if gfp & Gfp.THISNODE else self.fallback_order[node]
        zonelist = tuple(buddy for n in nodes for buddy in self._of_node(n) if buddy.zone.zone_type <= highest)
        if not zonelist:
            return None
        migratetype, flags = gfp_migratetype(gfp), self._first_flags(gfp, zonelist[0])
        first = zonelist[0]
        code = first.code | migratetype << ORDER_BITS
        return AllocContext(gfp, migratetype, highest, zonelist, flags, code, first.zone, first.pagesets)

    def _of_node(self, node: int) -> list[ZoneBuddy]:
        """Zones of a node that have memory, the highest first."""
        own = [buddy for buddy in self._buddies if buddy.zone.node == node]
        return sorted(own, key=lambda buddy: buddy.zone.zone_type, reverse=True)

    def _first_flags(self, gfp: int, preferred: ZoneBuddy) -> int:
        """``alloc_flags_nofragment``: spread to DMA32 before pageblocks of Normal are mixed."""
        alloc_flags = ALLOC_WMARK_LOW | gfp & ALLOC_KSWAPD
        if preferred.zone.zone_type != ZoneType.ZONE_NORMAL:
            return alloc_flags
        lower = {buddy.zone.zone_type for buddy in self._of_node(preferred.zone.node)}
        if len(self.nodes) > 1 and ZoneType.ZONE_DMA32 not in lower:
            return alloc_flags
        return alloc_flags | ALLOC_NOFRAGMENT
