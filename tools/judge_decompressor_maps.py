"""Random set-ups for a decompressor that is entered by a boot loader, in 12 profiles. The same seed, the same set-up.

The fields are those of a recorded case (``tools.conformance.decompressor_set_up``).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from bootstub.setup_data import SetupDataType
from firmware.efi_types import EfiMemoryAttribute, EfiMemoryType
from guest.units import (
    BITS_PER_BYTE,
    DIV_ROUND_UP,
    PAGE_SHIFT,
    PAGE_SIZE,
    SZ_1G,
    SZ_1M,
    SZ_2M,
    SZ_4G,
    SZ_16M,
    round_down,
    round_up,
)
from tools.judge_maps import Row, row_end

_WB, _RUNTIME = 0xF, int(EfiMemoryAttribute.EFI_MEMORY_RUNTIME)
_LOADER, _BOOT, _FREE = (
    int(EfiMemoryType.EfiLoaderData), int(EfiMemoryType.EfiBootServicesData), int(EfiMemoryType.EfiConventionalMemory),
)  # fmt: skip
_RUNTIME_DATA, _UNACCEPTED = int(EfiMemoryType.EfiRuntimeServicesData), int(EfiMemoryType.EfiUnacceptedMemoryType)
_SPECIAL, _RELIABLE, _PLUGGABLE = (
    int(EfiMemoryAttribute.EFI_MEMORY_SP), int(EfiMemoryAttribute.EFI_MEMORY_MORE_RELIABLE),
    int(EfiMemoryAttribute.EFI_MEMORY_HOT_PLUGGABLE),
)  # fmt: skip
_HOT_PLUGGABLE_NODE = 1 << 1
_LINE_AT, _PARAMS_AT, _SRAT_AT, _DATA_PAGES = PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE, 4
_MAP_PAGES, _FIRMWARE_PAGES = 16, 64


def set_up(number: int, seed: int, init_size: int) -> dict[str, Any]:
    """The set-up with this number for an image that needs ``init_size`` bytes: profiles take turns."""
    profile = list(PROFILES)[number % len(PROFILES)]
    rng = random.Random(f"decompressor {seed}/{number}")
    rows, load = _low(rng, init_size)
    rows += _high(rng, rng.randrange(7))
    case: dict[str, Any] = {
        "id": number, "profile": profile, "cmdline": rng.choice(("", "quiet", "earlyprintk=serial,ttyS0,115200")),
        "descs": rows, "memmap": rows, "max_level": rng.choice((0, 1, 1, 2)), "tsc0": rng.getrandbits(60), "load": load,
    }  # fmt: skip
    PROFILES[profile](rng, case)
    _add_loader_data(case, round_up(load, SZ_2M) + init_size)
    return case


def _row(kind: int, start: int, pages: int, attribute: int = _WB) -> Row:
    return [kind, start, pages, attribute]


def _low(rng: random.Random, init_size: int) -> tuple[list[Row], int]:
    """Memory below 4 GiB, with an image somewhere in it: the rows and where the image was loaded."""
    load = rng.choice((SZ_16M, SZ_16M, SZ_16M + 3 * SZ_2M, SZ_16M + 5 * PAGE_SIZE, 41 * SZ_16M))
    end = round_up(load, SZ_2M) + init_size
    rows = [_row(_FREE, PAGE_SIZE, 159), _row(_FREE, SZ_1M, load - SZ_1M >> PAGE_SHIFT)]
    rows.append(_row(_LOADER, load, end - load >> PAGE_SHIFT))
    for _ in range(rng.randrange(12)):
        start = row_end(rows[-1]) + rng.choice((0, 0, PAGE_SIZE, SZ_2M))
        kind = rng.choice((0, 1, _LOADER, _BOOT, _FREE, _FREE, _FREE, _UNACCEPTED, 10))
        rows.append(_row(kind, start, rng.choice((1, 512, 14336, 15000, rng.randrange(1, 40000)))))
    rows.append(_row(_FREE, row_end(rows[-1]), rng.randrange(256, 100_000)))
    return rows, load


def _high(rng: random.Random, pieces: int, at: int = SZ_4G) -> list[Row]:
    """Free and unaccepted memory from ``at`` on."""
    rows: list[Row] = []
    for _ in range(pieces):
        at += rng.choice((0, 0, SZ_2M, rng.randrange(2048) * PAGE_SIZE))
        kind = rng.choice((_UNACCEPTED, _UNACCEPTED, _UNACCEPTED, _FREE, _BOOT))
        rows.append(_row(kind, at, rng.choice((1, 512, 14336, 14337, rng.randrange(1, 1 << 20)))))
        at = row_end(rows[-1])
    return rows


def _add_loader_data(case: dict[str, Any], after: int) -> None:
    """Room for the loader's data and the firmware's in the last free row below 4 GiB behind ``after``."""
    table_size = 24 + _table_size(case["memmap"])
    pages = _MAP_PAGES + (round_up(table_size, PAGE_SIZE) >> PAGE_SHIFT) + _DATA_PAGES
    row = next(row for row in reversed(case["memmap"]) if row[0] == _FREE and after <= row[1] < SZ_4G and row[2] >= 256)
    row[2] -= pages + _FIRMWARE_PAGES
    index, at = case["memmap"].index(row) + 1, row_end(row)
    firmware = at + (pages << PAGE_SHIFT)
    added = [
        _row(_LOADER, at, pages), _row(_RUNTIME_DATA, firmware, 4, _WB | _RUNTIME),
        _row(_BOOT, firmware + 4 * PAGE_SIZE, _FIRMWARE_PAGES - 4),
    ]  # fmt: skip
    case["memmap"] = case["descs"] = [*case["memmap"][:index], *added, *case["memmap"][index:]]
    data = firmware - _DATA_PAGES * PAGE_SIZE
    case["table"] = _table(case["memmap"], at + _MAP_PAGES * PAGE_SIZE) if table_size > 24 else None
    case["cmdline_pa"], case["boot_params_pa"] = data + _LINE_AT, data + _PARAMS_AT
    if "srat" in case:
        case["srat"] = {"at": data + _SRAT_AT, "nodes": case["srat"]}


def _unaccepted(rows: list[Row]) -> list[tuple[int, int]]:
    return [(row[1], row_end(row)) for row in rows if row[0] == _UNACCEPTED]


def _table_size(rows: list[Row]) -> int:
    """Bytes of the bitmap for what is unaccepted, 0 without any."""
    ranges = _unaccepted(rows)
    if not ranges:
        return 0
    base, end = round_down(min(ranges)[0], SZ_2M), max(end for _, end in ranges)
    return DIV_ROUND_UP(round_up(end, SZ_2M) - base, SZ_2M * BITS_PER_BYTE)


def _table(rows: list[Row], at: int) -> dict[str, Any]:
    """The table that a stub leaves: a bit for each whole unit."""
    ranges = _unaccepted(rows)
    base = round_down(min(ranges)[0], SZ_2M)
    units = [((round_up(start, SZ_2M) - base) // SZ_2M, (end - base) // SZ_2M) for start, end in ranges]
    bits = [[first, last] for first, last in units if first < last]
    return {"pa": at, "unit_size": SZ_2M, "phys_base": base, "size": _table_size(rows), "bits_before": bits}


def _option(case: dict[str, Any], text: str) -> None:
    case["cmdline"] = f"{case['cmdline']} {text}".strip()


def _somewhere(rng: random.Random, case: dict[str, Any], kinds: tuple[int, ...] = (_FREE, _UNACCEPTED)) -> int:
    """An address, of a whole page, in a row of these kinds."""
    rows: list[Row] = [row for row in case["memmap"] if row[0] in kinds and row[1] >= SZ_1M and row[2] > 300]
    row = rng.choice(rows)
    return row[1] + (rng.randrange(row[2] - 300) << PAGE_SHIFT)


def _plain(rng: random.Random, case: dict[str, Any]) -> None:
    if rng.random() < 0.7:
        case["initrd"] = [_somewhere(rng, case), rng.choice((0, 1, PAGE_SIZE, 5 * SZ_16M, SZ_1G))]


def _frag(rng: random.Random, case: dict[str, Any]) -> None:
    """More pieces that fit than there are slot areas."""
    rows, at = case["memmap"], SZ_4G
    rows[:] = [row for row in rows if row_end(row) <= SZ_4G]
    for _ in range(rng.randrange(60, 160)):
        at += rng.choice((PAGE_SIZE, SZ_2M))
        rows.append(_row(rng.choice((_UNACCEPTED, _FREE)), at, rng.randrange(13000, 20000)))
        at = row_end(rows[-1])


def _attrs(rng: random.Random, case: dict[str, Any]) -> None:
    for row in case["memmap"]:
        row[3] |= rng.choice((0, 0, 0, _SPECIAL, _PLUGGABLE, rng.choice((0, _RELIABLE))))


def _mem(rng: random.Random, case: dict[str, Any]) -> None:
    sizes = ("1G", "4G", "5G", "0x140000000", "100M", "0", "nopentium", "4294967296k", "3000M", "72M")
    _option(case, f"mem={rng.choice(sizes)} mem={rng.choice(sizes)}")


def _memmap(rng: random.Random, case: dict[str, Any]) -> None:
    for _ in range(rng.randrange(1, 4)):
        regions = []
        for _ in range(rng.randrange(1, 4)):
            size, sign = rng.choice(("64K", "0", "1M", "70M", "1G", "3")), rng.choice("$#!@")
            regions.append(f"{size}{sign}{rng.choice((_somewhere(rng, case), SZ_4G, 0)):#x}")
        regions += rng.choice(([], [], ["6G"], ["exactmap"], ["nonsense"]))
        _option(case, f"memmap={','.join(regions)}")


def _hugepages(rng: random.Random, case: dict[str, Any]) -> None:
    case["memmap"][:] = [row for row in case["memmap"] if row_end(row) <= SZ_4G]
    case["memmap"] += [*_high(rng, 4), _row(_UNACCEPTED, 16 * SZ_1G + SZ_2M, rng.randrange(1 << 18, 1 << 21))]
    _option(case, f"hugepagesz={rng.choice(('1G', '1024M', '2M'))} hugepages={rng.choice((1, 2, 5, '0x2', 100))}")
    if rng.random() < 0.3:
        _option(case, f"hugepagesz={rng.choice(('1G', '2M'))} hugepages={rng.randrange(4)}")


def _setup_data(rng: random.Random, case: dict[str, Any]) -> None:
    nodes: list[list[Any]] = []
    for _ in range(rng.randrange(1, 5)):
        at, indirect = _somewhere(rng, case, (_FREE,)), rng.random() < 0.5
        if any(abs(at - node[0]) < PAGE_SIZE for node in nodes):
            continue
        if indirect:
            kind = rng.choice((int(SetupDataType.SETUP_E820_EXT), int(SetupDataType.SETUP_INDIRECT)))
            target = [kind, rng.choice((1, SZ_2M, 80 * SZ_1M)), _somewhere(rng, case)]
            nodes.append([at, int(SetupDataType.SETUP_INDIRECT), 24, target])
        else:
            nodes.append([at, rng.choice((1, 2, 3, 9)), rng.choice((0, 20, SZ_1M, 30 * SZ_1M)), None])
    case["setup_data"] = nodes


def _srat(rng: random.Random, case: dict[str, Any]) -> None:
    top = max(map(row_end, case["memmap"]))
    nodes: list[Row] = []
    at = 0
    while at < top and len(nodes) < 60:
        size = rng.choice((SZ_1G // 2, SZ_1G, 3 * SZ_1G, 100 * SZ_1M + PAGE_SIZE, 0))
        nodes.append([at, size, rng.choice((0, 0, _HOT_PLUGGABLE_NODE))])
        at += size + rng.choice((0, 0, SZ_16M))
    case["srat"] = nodes
    _option(case, rng.choice(("", "", "movable_node", "acpi=off", "acpi=rsdt", "acpi=noirq")))


def _e820(rng: random.Random, case: dict[str, Any]) -> None:
    """A loader that knows no EFI: all that is RAM is so in its table, and nothing is unaccepted."""
    for row in case["memmap"]:
        if row[0] == _UNACCEPTED:
            row[0] = _FREE
    case["e820"] = [
        [row[1], row[2] << PAGE_SHIFT, 1 if row[0] in (_LOADER, _BOOT, _FREE) else 2] for row in case["memmap"]
    ]
    _plain(rng, case)


def _nokaslr(rng: random.Random, case: dict[str, Any]) -> None:
    _option(case, rng.choice(("nokaslr", "nokaslr mem=1G", "nokaslrx", "x=nokaslr", '"nokaslr"')))


def _none(rng: random.Random, case: dict[str, Any]) -> None:
    """No room for the kernel but where it is."""
    case["memmap"][:] = [row for row in case["memmap"] if row_end(row) <= SZ_4G]
    for row in case["memmap"]:
        if row[0] in (_FREE, _UNACCEPTED) and row[2] > 14_000:
            row[2] = rng.randrange(1000, 14_000)


def _odd(rng: random.Random, case: dict[str, Any]) -> None:
    texts = (
        "mem_encrypt=on", "mem_encrypt=off", "-- mem=1G", 'x="a mem=2G" mem=8G', "memmap", "mem hugepages", "no5lvl",
        '"mem=3G"', "=mem=1G", "hugepages=3", 'mem="5G"',
    )  # fmt: skip
    for text in rng.sample(texts, 3):
        _option(case, text)


PROFILES: dict[str, Callable[[random.Random, dict[str, Any]], None]] = {
    "plain": _plain, "frag": _frag, "attrs": _attrs, "mem": _mem, "memmap": _memmap, "hugepages": _hugepages,
    "setup_data": _setup_data, "srat": _srat, "e820": _e820, "nokaslr": _nokaslr, "none": _none, "odd": _odd,
}  # fmt: skip
"""What a profile changes in a set-up."""
