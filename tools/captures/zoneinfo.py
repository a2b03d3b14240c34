"""Reading /proc/zoneinfo (mm/vmstat.c, zoneinfo_show_print())."""

from __future__ import annotations

import re
from dataclasses import dataclass

_HEAD = re.compile(r"^Node (\d{1,5}), zone +(\w+)$", re.MULTILINE)
_NUMBERS = ("spanned", "present", "managed", "min", "low", "high")


@dataclass(frozen=True, slots=True)
class CapturedZone:
    """A zone, in pages. ``promo`` is None before 6.2; ``protection`` and what follows are empty where not populated."""

    node: int
    name: str
    start_pfn: int
    spanned: int
    present: int
    managed: int
    marks: tuple[int, ...]
    protection: tuple[int, ...]
    batch: int | None
    pcp_high: int | None


def parse_zoneinfo(text: str) -> list[CapturedZone]:
    """The zones of the file, in its order; numbers that are not there are 0."""
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [_zone(head, text[head.end() : end]) for head, end in zip(heads, ends, strict=True)]


def _zone(head: re.Match[str], text: str) -> CapturedZone:
    numbers = {name: _number(text, rf"^ +{name} +(\d+)$") or 0 for name in _NUMBERS}
    marks = [_number(text, rf"^ +{name} +(\d+)$") for name in ("min", "low", "high", "promo")]
    protection = re.search(r"protection: \(([\d, ]+)\)", text)
    return CapturedZone(
        int(head[1]), head[2], _number(text, r"^ +start_pfn: +(\d+)$") or 0,
        numbers["spanned"], numbers["present"], numbers["managed"],
        tuple(mark for mark in marks if mark is not None),
        tuple(map(int, protection[1].split(","))) if protection else (),
        _number(text, r"^ +batch: +(\d+)$"), _number(text, r"^ +high: +(\d+)$"),
    )  # fmt: skip


def _number(text: str, pattern: str) -> int | None:
    found = re.search(pattern, text, re.MULTILINE)
    return int(found[1][:20]) if found else None
