"""Compare kernel.memblock with one recorded sequence of calls of the kernel's own code.

A case is a dict: ``id``, ``name``, ``movable_node``, ``mirrored_kernelcore`` (boot parameters, 0 or 1), ``resize``
(1: memblock_allow_resize() came first), ``ops``, calls one after the other, each ``[name, arguments..., record]``,
and ``v61``, what 6.1 with v9 02/14 does with the same calls: ``"same"``, ``"skipped"``,
``{"acc": [[number, accepts or null], ...]}`` or ``{"from": number, "ops": [...]}``, which replaces the end of ``ops``.

A record has, all optional: ``r`` return value; ``list`` result list; ``acc`` accepted ``[start, size, ...]``;
``panic`` text, which ends the sequence; the ``memory`` array if it changed, in ``m``, whole as
``[base, size, flags, ...]``, or in ``ms``, ``[at, removed, base, size, flags, ...]`` in regions; its new capacity in
``mmax``; its total size in ``mt``, if that is not the sum; and the ``reserved`` array likewise: ``v``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from guest.errors import GuestPanic
from kernel.free_area import page_blocks
from kernel.memblock import MAINLINE_MEMBLOCK, V9_MEMBLOCK, Memblock, MemblockVersion
from kernel.memblock_type import INIT_MEMBLOCK_REGIONS, MemblockType

_MAX_BLOCKS = 1 << 20
"""Blocks of free_all to look at: memory up to 2^64 would have 2^42, and no record says so many."""


def run_case(case: dict[str, Any]) -> list[str]:
    """The differences between our results and the recorded ones, of both versions; empty if they agree."""
    ops = case["ops"]
    differences = _play(case, MAINLINE_MEMBLOCK, ops)
    if case["v61"] != "skipped":
        differences += [f"v61 {line}" for line in _play(case, V9_MEMBLOCK, _ops_of_v61(ops, case["v61"]))]
    return differences


def _ops_of_v61(ops: list[Any], v61: Any) -> list[Any]:
    """The operations with the records of 6.1."""
    if v61 == "same":
        return ops
    if "from" in v61:
        return [*ops[: v61["from"]], *v61["ops"]]
    changed = dict(v61["acc"])
    return [
        [*call, {**record, "acc": changed[number] or []}] if number in changed else [*call, record]
        for number, (*call, record) in enumerate(ops)
    ]


def _play(case: dict[str, Any], version: MemblockVersion, ops: list[Any]) -> list[str]:
    """Make the calls, one after the other, up to the first that differs: what follows would differ with it."""
    accepted: list[int] = []
    memblock = Memblock(
        lambda start, end: accepted.extend((start, end - start)),
        clear_memory=lambda start, end: None,
        version=version,
        movable_node=bool(case["movable_node"]),
        mirrored_kernelcore=bool(case["mirrored_kernelcore"]),
    )
    if case["resize"]:
        memblock.allow_resize()
    arrays = [_Followed(memblock.memory, "m"), _Followed(memblock.reserved, "v")]
    for number, (name, *args, record) in enumerate(ops):
        accepted.clear()
        found = {"r": 0, "list": [], "panic": ""}
        try:
            found |= _call(memblock, name, args)
        except GuestPanic as panic:
            found["panic"] = panic.text
        found["acc"] = accepted
        differences = list(_compare(found, record))
        for array in arrays:
            differences += array.compare(record)
        if differences or found["panic"]:
            return [f"ops[{number}] {name} {line}" for line in differences]
    return []


def _compare(found: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    """A line for each result that is not the recorded one; what the record does not have is 0 or empty."""
    for key, value in found.items():
        expected = record.get(key, type(value)())
        if value != expected:
            yield f"{key}: found {value}, expected {expected}"


class _Followed:
    """One region array beside what the records say of it, with keys that start with ``letter``."""

    def __init__(self, array: MemblockType, letter: str) -> None:
        self._array, self._letter = array, letter
        self._regions: list[int] = []
        self._max = INIT_MEMBLOCK_REGIONS

    def compare(self, record: dict[str, Any]) -> Iterator[str]:
        """Take in the changes that ``record`` tells, and give a line for each difference."""
        letter, array = self._letter, self._array
        self._regions = record.get(letter, self._regions)
        if letter + "s" in record:
            at, removed, *inserted = record[letter + "s"]
            self._regions = [*self._regions[: 3 * at], *inserted, *self._regions[3 * (at + removed) :]]
        self._max = record.get(letter + "max", self._max)
        total = record.get(letter + "t", sum(self._regions[1::3]))
        found = [number for region in array.regions for number in region[:3]], array.max, array.total_size
        names = (letter, letter + "max", letter + "t")
        for name, ours, expected in zip(names, found, (self._regions, self._max, total), strict=True):
            if ours != expected:
                yield f"{name}: found {ours}, expected {expected}"


def _call(memblock: Memblock, name: str, args: list[int]) -> dict[str, Any]:
    """The results of one call, by the key that they have in a record."""
    result = _OPERATIONS[name](memblock, *args)
    if isinstance(result, list):
        return {"list": result}
    return {"r": int(result or 0)}


def _set_bottom_up(memblock: Memblock, bottom_up: int) -> None:
    memblock.bottom_up = bool(bottom_up)


def _set_current_limit(memblock: Memblock, limit: int) -> None:
    memblock.current_limit = limit


def _alloc_nid(memblock: Memblock, size: int, align: int, start: int, end: int, nid: int, exact: int) -> int:
    return memblock.alloc_range_nid(size, align, start, end, nid, bool(exact))


def _free_all(memblock: Memblock, max_low_pfn: int) -> list[int]:
    blocks = (block for pages in memblock.free_all(max_low_pfn) for block in page_blocks(*pages))
    return [number for block in islice(blocks, _MAX_BLOCKS) for number in block]


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": Memblock.add,
    "remove": Memblock.remove,
    "reserve": Memblock.reserve,
    "free": Memblock.phys_free,
    "alloc": Memblock.phys_alloc_range,
    "alloc_nid": _alloc_nid,
    "mark_hotplug": Memblock.mark_hotplug,
    "clear_hotplug": Memblock.clear_hotplug,
    "mark_mirror": Memblock.mark_mirror,
    "mark_nomap": Memblock.mark_nomap,
    "clear_nomap": Memblock.clear_nomap,
    "rsrv_noinit": Memblock.reserved_mark_noinit,
    "bottom_up": _set_bottom_up,
    "limit": _set_current_limit,
    "trim": Memblock.trim_memory,
    "enforce": Memblock.enforce_memory_limit,
    "cap": Memblock.cap_memory_range,
    "limit_map": Memblock.mem_limit_remove_map,
    "is_memory": Memblock.is_memory,
    "is_map_memory": Memblock.is_map_memory,
    "is_reserved": Memblock.is_reserved,
    "region_memory": Memblock.is_region_memory,
    "region_reserved": Memblock.is_region_reserved,
    "start_dram": Memblock.start_of_DRAM,
    "end_dram": Memblock.end_of_DRAM,
    "phys_size": Memblock.phys_mem_size,
    "rsv_size": Memblock.reserved_size,
    "free_ranges": lambda memblock: [address for free in memblock.free_ranges() for address in free],
    "free_all": _free_all,
}
