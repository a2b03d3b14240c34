"""Random set-ups for a stub: a memory map and settings of a firmware, in 13 profiles. The same seed, the same set-up.

The fields are those of a recorded case (``tools.conformance.record_stub.SET_UP``).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from firmware.efi_types import EfiMemoryAttribute, EfiMemoryType
from guest.units import DIV_ROUND_UP, PAGE_SHIFT, PAGE_SIZE, SZ_1G, SZ_1M, SZ_2M, SZ_4G

Row = list[int]
"""Memory type, start, pages, attributes."""
_WB, _TIB = 0xF, 1 << 40
_RUNTIME = int(EfiMemoryAttribute.EFI_MEMORY_RUNTIME)
_CONVENTIONAL, _UNACCEPTED = int(EfiMemoryType.EfiConventionalMemory), int(EfiMemoryType.EfiUnacceptedMemoryType)
_RUNTIME_TYPES = (5, 6)
_PAGES = (1, 2, 3, 8, 16, 64, 255, 256, 511, 512, 513, 700)
_LOW_TYPES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14)
_ATTRIBUTES = tuple(
    _WB | int(attribute)
    for attribute in (
        0, EfiMemoryAttribute.EFI_MEMORY_SP, EfiMemoryAttribute.EFI_MEMORY_MORE_RELIABLE,
        EfiMemoryAttribute.EFI_MEMORY_HOT_PLUGGABLE,
    )
)  # fmt: skip
_CMDLINES = ("nokaslr", "nokaslr console=ttyS0", "nokaslr efi=debug", "quiet nokaslr root=/dev/vda1")
_KASLR_CMDLINES = ("", "quiet", "root=/dev/vda1", "x hugepages=4", "memmap=1M$16M", "console=ttyS0 mem=8G")


def set_up(number: int, seed: int) -> dict[str, Any]:
    """The set-up with this number: profiles take turns."""
    profile = list(PROFILES)[number % len(PROFILES)]
    rng = random.Random(f"{seed}/{number}")
    case: dict[str, Any] = {
        "id": number, "profile": profile, "cmdline": rng.choice(_CMDLINES),
        "tdx_max_level": rng.choice((0, 1, 1, 2, 2)), "alloc_limit": rng.choice((SZ_4G, _TIB)),
        "descs": _low(rng, rng.randrange(12)) + _high(rng, rng.randrange(1, 9)),
    }  # fmt: skip
    PROFILES[profile](rng, case)
    return case


def _row(kind: int, start: int, pages: int, attribute: int = _WB) -> Row:
    return [kind, start, pages, attribute | (_RUNTIME if kind in _RUNTIME_TYPES else 0)]


def _low(rng: random.Random, pieces: int) -> list[Row]:
    """Memory below 4 GiB: ``pieces`` of all types from 1 MiB on, then enough that is free."""
    rows, at = [_row(_CONVENTIONAL, 0, 1), _row(_CONVENTIONAL, PAGE_SIZE, 159)], SZ_1M
    for _ in range(pieces):
        rows.append(_row(rng.choice(_LOW_TYPES), at, rng.choice(_PAGES)))
        at = row_end(rows[-1]) + rng.choice((0, 0, PAGE_SIZE, 7 * PAGE_SIZE))
    top = max(rng.choice((SZ_1G // 2, SZ_1G, 2 * SZ_1G, 3 * SZ_1G)), at + SZ_1G // 2)
    return [*rows, _row(_CONVENTIONAL, at, top - at >> PAGE_SHIFT)]


def _high(rng: random.Random, pieces: int, at: int = SZ_4G) -> list[Row]:
    """``pieces`` of unaccepted memory from ``at`` on, some with an end or a hole within a block of 2 MiB."""
    rows: list[Row] = []
    for _ in range(pieces):
        at += rng.choice((0, 0, SZ_2M, rng.randrange(2048) * PAGE_SIZE))
        rows.append(_row(_UNACCEPTED, at, rng.choice((*_PAGES, 1024, 1537, 2048, rng.randrange(1, 65536)))))
        at = row_end(rows[-1])
    return rows


def _blocks(rng: random.Random, pieces: int, at: int = SZ_4G) -> list[Row]:
    """``pieces`` of unaccepted memory from ``at`` on, with whole blocks of 2 MiB in each, most with a hole behind."""
    rows: list[Row] = []
    for _ in range(pieces):
        rows.append(_row(_UNACCEPTED, at, rng.randrange(2048, 65536)))
        at = row_end(rows[-1]) + rng.choice((0, PAGE_SIZE, 9 * SZ_2M, SZ_1G))
    return rows


def row_end(row: Row) -> int:
    """End of the memory of a row, exclusive."""
    return row[1] + (row[2] << PAGE_SHIFT)


def _ovmf(rng: random.Random, case: dict[str, Any]) -> None:
    case["descs"] = [*_low(rng, 0), _row(_UNACCEPTED, SZ_4G, rng.randrange(1, 1 << 22))]


def _unaligned(rng: random.Random, case: dict[str, Any]) -> None:
    case["descs"] = _low(rng, 4) + _high(rng, 12, SZ_4G + rng.randrange(1, 512) * PAGE_SIZE)


def _frag(rng: random.Random, case: dict[str, Any]) -> None:
    case["descs"] = _low(rng, rng.randrange(20, 70)) + _high(rng, rng.randrange(8, 30))


def _e820ext(rng: random.Random, case: dict[str, Any]) -> None:
    case["descs"] = _low(rng, rng.randrange(120, 300)) + _high(rng, rng.randrange(2, 60))


def _huge(rng: random.Random, case: dict[str, Any]) -> None:
    rows = [*_low(rng, 2), _row(_UNACCEPTED, SZ_4G + rng.randrange(4) * PAGE_SIZE, rng.randrange(1 << 28, 1 << 31))]
    case["descs"] = [*rows, _row(_UNACCEPTED, 16 * _TIB + rng.randrange(512) * PAGE_SIZE, rng.choice(_PAGES))]
    case["tdx_max_level"] = rng.choice((1, 2))


def _attrs(rng: random.Random, case: dict[str, Any]) -> None:
    rows, at = _low(rng, 2), SZ_4G
    for _ in range(rng.randrange(2, 16)):
        kind = rng.choice((0, 2, 4, _CONVENTIONAL, _CONVENTIONAL, 14, _UNACCEPTED))
        rows.append(_row(kind, at, rng.choice((512, 1024, 5000, 32768, 65536)), rng.choice(_ATTRIBUTES)))
        at = row_end(rows[-1]) + rng.choice((0, SZ_2M, 3 * PAGE_SIZE))
    case["descs"] = rows
    case["cmdline"] = rng.choice(("nokaslr", "kaslrtest")) + rng.choice(("", " efi=nosoftreserve"))


def _nounacc(rng: random.Random, case: dict[str, Any]) -> None:
    case["descs"] = [*_low(rng, rng.randrange(8)), _row(_CONVENTIONAL, SZ_4G, SZ_1G >> PAGE_SHIFT)]


def _lowunacc(rng: random.Random, case: dict[str, Any]) -> None:
    rows = _low(rng, 2)
    low = _high(rng, rng.randrange(1, 5), row_end(rows[-1]))
    case["descs"] = rows + [row for row in low if row_end(row) < 0xE000_0000] + _high(rng, 2)


def _pretable(rng: random.Random, case: dict[str, Any]) -> None:
    """A table that covers all that is unaccepted, or leaves out some of it below, behind, or both.

    What lies wholly behind a table makes the real stub accept from the table's end on, also what is no RAM: it dies.
    """
    if rng.random() < 0.5:
        case["descs"] = [*_low(rng, 3), *_blocks(rng, rng.randrange(2, 6))]
    rows = [row for row in case["descs"] if row[0] == _UNACCEPTED]
    unit = rng.choice((SZ_1M, SZ_2M, 2 * SZ_2M))
    low, high = rows[0][1] // unit * unit, row_end(rows[-1])
    base, end = low, high
    if rng.random() < 0.5:
        base += unit * rng.randrange(-3, max((high - low) // unit, 1) + 3)
    if rng.random() < 0.5:
        end = base + rng.choice((0, rng.randrange(high - low + 8 * unit)))
    size = max(DIV_ROUND_UP(end - base, unit * 8), 0) + rng.randrange(3)
    case["pretable"] = {
        "version": rng.choice((1, 1, 1, 2)), "unit_size": unit, "phys_base": base, "size": size, "bits": [],
    }  # fmt: skip


def _ebsretry(rng: random.Random, case: dict[str, Any]) -> None:
    case["descs"] = [*_low(rng, 2), _row(_UNACCEPTED, SZ_4G, rng.randrange(65536, 1 << 19))]
    case["ebs_fail"] = rng.choice((1, 1, 1, 2))
    pages = rng.choice((1, 512, 1000))
    case["ebs_mutate"] = [[0, SZ_4G + rng.randrange(60000) * PAGE_SIZE, pages, rng.choice((4, 7, 10))]]


def _descsz(rng: random.Random, case: dict[str, Any]) -> None:
    case["desc_size"] = rng.choice((40, 56, 64, 80))
    case["shuffle"] = rng.getrandbits(30)


def _kaslr(rng: random.Random, case: dict[str, Any]) -> None:
    case["cmdline"], case["tsc0"] = rng.choice(_KASLR_CMDLINES), rng.getrandbits(60)
    if rng.random() < 0.5:
        case["rng"] = rng.randbytes(48).hex()


def _odd(rng: random.Random, case: dict[str, Any]) -> None:
    first = next(row for row in case["descs"] if row[0] == _UNACCEPTED)
    choice = rng.randrange(3)
    if choice == 0:
        case["tdx"] = False
    elif choice == 1:
        case["already_accepted"] = [[first[1], first[1] + PAGE_SIZE]]
    else:
        case["descs"].append(_row(16, 128 * SZ_1G, 1000))


PROFILES: dict[str, Callable[[random.Random, dict[str, Any]], None]] = {
    "ovmf": _ovmf, "unaligned": _unaligned, "frag": _frag, "e820ext": _e820ext, "huge": _huge, "attrs": _attrs,
    "nounacc": _nounacc, "lowunacc": _lowunacc, "pretable": _pretable, "ebsretry": _ebsretry, "descsz": _descsz,
    "kaslr": _kaslr, "odd": _odd,
}  # fmt: skip
"""What a profile changes in a set-up."""
