"""Two maps of one machine, side by side.

Compared is what a kernel gets: dmesg's word for the e820 type, and besides it ``unaccepted`` and ``MMIO`` if both maps
can tell them. Where that agrees and both are EFI maps, the EFI type is compared, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bootstub.e820_types import type_word
from bootstub.efi_e820 import e820_type_of
from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.ranges import RangeMap
from guest.units import SZ_4G
from tools.maps.platform_map import PlatformMap
from tools.maps.reasons import NOTHING, Difference, Reason, reason_for
from tools.maps.words import efi_type_name
from tools.maps.write import kernel_table

_OWN_WORDS = {
    EfiMemoryType.EfiUnacceptedMemoryType: "unaccepted",
    EfiMemoryType.EfiMemoryMappedIO: "MMIO",
    EfiMemoryType.EfiMemoryMappedIOPortSpace: "MMIO",
}
_RAM_WORDS = ("usable", "unaccepted", "ACPI data", "ACPI NVS")


class Use(NamedTuple):
    """What a map says of an address: the kernel's view, and the EFI type where it counts."""

    word: str
    detail: str


_NO_USE = Use(NOTHING, "")


@dataclass(frozen=True, slots=True)
class Row:
    """A range that is one thing in each map."""

    start: int
    end: int
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """``rows``: the kernel's view of both maps, ascending, without what neither mentions. ``differences`` are all."""

    rows: tuple[Row, ...]
    differences: tuple[tuple[Difference, Reason | None], ...]

    @property
    def unexplained(self) -> list[Difference]:
        return [difference for difference, reason in self.differences if reason is None]


def compare(a: PlatformMap, b: PlatformMap) -> Comparison:
    """Compare two maps."""
    only_e820 = a.is_e820 or b.is_e820
    views = [_e820_view(p) if only_e820 else _efi_view(p) for p in (a, b)]
    ends = {_low_end(view) for view in views}
    low_end = ends.pop() if len(ends) == 1 else 0
    pairs: RangeMap[tuple[str, str]] = RangeMap((NOTHING, NOTHING))
    differing: RangeMap[tuple[str, str] | None] = RangeMap(None)
    for start, end, one, other in _joint(*views):
        pairs.assign(start, end, (one.word, other.word))
        if one.word != other.word:
            differing.assign(start, end, (one.word, other.word))
        elif one.detail != other.detail:
            differing.assign(start, end, (one.detail, other.detail))
    rows = tuple(Row(start, end, *words) for start, end, words in pairs.runs() if words != (NOTHING, NOTHING))
    found = [Difference(start, end, *words, low_end) for start, end, words in differing.runs() if words is not None]
    return Comparison(rows, tuple((difference, reason_for(difference)) for difference in found))


def _joint(one: RangeMap[Use], other: RangeMap[Use]) -> Iterator[tuple[int, int, Use, Use]]:
    """The runs of both maps, cut where either changes."""
    for start, end, use in one.runs():
        for low, high, other_use in other.runs(start, end):
            yield low, high, use, other_use


def _efi_view(platform: PlatformMap) -> RangeMap[Use]:
    """By descriptor; where descriptors overlap, the one that stands later counts."""
    view: RangeMap[Use] = RangeMap(_NO_USE)
    for d in platform.descriptors:
        view.assign(d.start, d.end, Use(_word(d), str(efi_type_name(d.type))))
    return view


def _word(d: MemoryDescriptor) -> str:
    kind = e820_type_of(d)
    own = _OWN_WORDS.get(d.type)  # type: ignore[call-overload]  # types > 15 occur
    return own or (NOTHING if kind is None else type_word(kind))


def _e820_view(platform: PlatformMap) -> RangeMap[Use]:
    view: RangeMap[Use] = RangeMap(_NO_USE)
    for entry in kernel_table(platform):
        view.assign(entry.addr, entry.addr + entry.size, Use(type_word(entry.type), ""))
    return view


def _low_end(view: RangeMap[Use]) -> int:
    """End of the last range below 4 GiB that only RAM can be."""
    return max((end for _, end, use in view.runs(0, SZ_4G) if use.word in _RAM_WORDS), default=0)
