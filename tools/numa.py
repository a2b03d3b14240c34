"""``--numa``: memory of a machine divided among NUMA nodes, as QEMU divides it.

``--numa 2`` makes nodes of one size; ``--numa 1G,3G`` says each node's memory; ``hotplug=8G`` behind either adds a
window above all RAM, in the last node, where memory may appear; ``dist=21`` says how far nodes are from each other, and
``dist=0-1:21`` how far two of them are, to and fro. A map that was brought along says its nodes itself.
Source: QEMU hw/i386/acpi-build.c, build_srat(), hw/i386/pc.c for the place of the window, and hw/core/numa.c,
set_numa_options(), for the limits of distances.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from firmware.srat import LOCAL_DISTANCE, MAX_NODES, NO_WAY, REMOTE_DISTANCE, Distances, NodeRange
from guest.errors import FormatError
from guest.ranges import RangeSet
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_1G, SZ_1M, SZ_2M, SZ_4G, memparse, round_up

_SOURCE = "unaccepted boot --help"
_VGA = 0xA_0000, SZ_1M
_PAIR = re.compile(r"([0-9]{1,3})-([0-9]{1,3}):([0-9]{1,3})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Numa:
    """What ``--numa`` says: bytes of each node, or how many nodes; bytes of the hot-plug window; and distances.

    ``remote`` is the distance of any two nodes, ``pairs`` are (node, other node, distance).
    """

    sizes: tuple[int, ...] = ()
    count: int = 0
    hotplug: int = 0
    remote: int | None = None
    pairs: tuple[tuple[int, int, int], ...] = ()


def parse_numa(text: str) -> Numa:
    """A number of nodes or their sizes, and perhaps ``hotplug=SIZE`` and distances. Raises ``FormatError``."""
    words = text.split(",")
    found: dict[str, Any] = {"pairs": ()}
    while words and "=" in words[-1]:
        key, _, value = words.pop().partition("=")
        pair = _PAIR.fullmatch(value)
        if key == "hotplug" and key not in found:
            found[key] = _size(text, value)
        elif key == "dist" and pair is not None:
            found["pairs"] = (*_pair(text, pair), *found["pairs"])
        elif key == "dist" and "remote" not in found:
            found["remote"] = _distance(text, value)
        else:
            raise _refusal(text)
    return replace(_nodes_of(text, words), **found)


def _nodes_of(text: str, words: list[str]) -> Numa:
    """How the nodes are given: how many there are, or the size of each."""
    if len(words) == 1 and words[0].isascii() and words[0].isdecimal() and len(words[0]) <= 3:
        count = int(words[0])
        if not 0 < count <= MAX_NODES:
            raise _refusal(text)
        return Numa(count=count)
    if not 0 < len(words) <= MAX_NODES:
        raise _refusal(text)
    return Numa(tuple(_size(text, word) for word in words))


def numa_nodes(numa: Numa, ram: RangeSet) -> tuple[NodeRange, ...]:
    """Memory affinity of a machine's RAM. Sizes that do not add up to it are a ``FormatError``."""
    total = ram.total()
    sizes = numa.sizes or tuple(_even(total, numa.count))
    if sum(sizes) != total or not all(sizes):
        found = f"{sum(sizes) >> 20} MiB in {len(sizes)} nodes"
        raise FormatError("--numa", found=found, expected=f"{total >> 20} MiB, some for each", source=_SOURCE)
    nodes = tuple(_divide(ram, sizes))
    if numa.hotplug:
        start = round_up(max(SZ_4G, nodes[-1].end), SZ_1G)
        if start + numa.hotplug > PHYSICAL_ADDRESS_END:
            found = f"a window up to {start + numa.hotplug:#x}"
            raise FormatError("--numa", found=found, expected="an end up to 2^52", source=_SOURCE)
        nodes += (NodeRange(len(sizes) - 1, start, start + numa.hotplug, hotplug=True),)
    return nodes


def numa_distances(numa: Numa, nodes: Iterable[NodeRange]) -> Distances:
    """The distance of each pair of nodes; none if nobody asked. A pair of other nodes is a ``FormatError``."""
    if numa.remote is None and not numa.pairs:
        return ()
    count = 1 + max(r.node for r in nodes)
    remote = REMOTE_DISTANCE if numa.remote is None else numa.remote
    rows = [[LOCAL_DISTANCE if a == b else remote for b in range(count)] for a in range(count)]
    for a, b, distance in numa.pairs:
        if max(a, b) >= count:
            raise FormatError("--numa", found=f"dist={a}-{b}", expected=f"nodes below {count}", source=_SOURCE)
        rows[a][b] = rows[b][a] = distance
    return tuple(tuple(row) for row in rows)


def check_nodes(nodes: Iterable[NodeRange], name: str) -> tuple[NodeRange, ...]:
    """The nodes of a map that was brought along, if ACPI tables can have them. Raises ``FormatError``."""
    nodes = tuple(nodes)
    for number, r in enumerate(nodes):
        if r.node >= MAX_NODES or r.end > PHYSICAL_ADDRESS_END:
            found = f"node {r.node}, an end at {r.end:#x}"
            expected = f"a node below {MAX_NODES}, an end up to 2^52"
            raise FormatError(f"{name}: node {number}", found=found, expected=expected, source="ACPI 6.4, 5.2.16")
    return nodes


def _even(total: int, count: int) -> Iterator[int]:
    """``total`` in ``count`` parts of whole 2 MiB; the last one has the rest."""
    part = total // count // SZ_2M * SZ_2M
    yield from [part] * (count - 1)
    yield total - part * (count - 1)


def _divide(ram: RangeSet, sizes: Iterable[int]) -> Iterator[NodeRange]:
    """RAM in ascending order, cut where a node is full; what video memory hides counts, but belongs to nobody."""
    parts = iter(ram)
    start = end = 0
    for node, size in enumerate(sizes):
        left = size
        while left:
            if start == end:
                start, end = next(parts)
            cut = min(end, start + left)
            for low, high in ((start, min(cut, _VGA[0])), (max(start, _VGA[1]), cut)):
                if low < high:
                    yield NodeRange(node, low, high)
            left, start = left - (cut - start), cut


def _size(text: str, word: str) -> int:
    size, rest = memparse(word)
    if rest or not word or not 0 < size <= PHYSICAL_ADDRESS_END or size % PAGE_SIZE:
        raise _refusal(text)
    return size


def _pair(text: str, pair: re.Match[str]) -> tuple[tuple[int, int, int]]:
    """Two nodes and how far they are from each other."""
    a, b = int(pair[1]), int(pair[2])
    if a == b:
        raise _refusal(text)
    return ((a, b, _distance(text, pair[3])),)


def _distance(text: str, word: str) -> int:
    """A distance that a byte has, and that is none of a node from itself."""
    if not (word.isascii() and word.isdecimal() and len(word) <= 3 and LOCAL_DISTANCE <= int(word) <= NO_WAY):
        raise _refusal(text)
    return int(word)


def _refusal(text: str) -> FormatError:
    expected = (
        f"1 to {MAX_NODES} nodes, or their sizes such as 1G,3G; then perhaps ,hotplug=SIZE ,dist=21 and ,dist=0-1:31, "
        "distances from 10 to 255"
    )
    return FormatError("--numa", found=repr(text[:60]), expected=expected, source=_SOURCE)
