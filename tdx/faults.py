"""Faults: how a hostile host, or a module that works for it, treats a guest. What is said here is done in inject.py.

A rule is ``KIND[:ARGUMENT][@CONDITION,...]``, such as ``busy@accept=17,n=3`` or ``replay@gpa=4G-5G,p=0.01,seed=7``. All
its conditions must hold:

    accept=N      the N-th TDG.MEM.PAGE.ACCEPT of the boot or a later one, counted from 1, refused ones too
    tdvmcall=N    the N-th TDG.VP.VMCALL or a later one; mapgpa=N counts those with sub-function MapGPA alone
    gpa=A-B       a page of the call lies in [A, B); of a HOB fault, the resource starts there
    stage=NAME    the call is made in that stage
    p=P, seed=S   each call with probability P, by a generator that starts from S (0)
    n=N           at most N times (once; with p= without a limit)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from guest.errors import FormatError
from guest.ranges import Range
from guest.units import memparse
from tdx.sept import LEVEL_2M, LEVEL_4K, PIECES

_SOURCE = "unaccepted boot --help, --fault"
_NUMBER = re.compile(r"[0-9]{1,18}|0x[0-9a-f]{1,16}")
_PROBABILITY = re.compile(r"[0-9]{0,3}\.?[0-9]{1,12}")
_STAGE = re.compile(r"[a-z-]{1,32}")


class Place(Enum):
    """Which calls a fault can meet; the value is the conditions that can be asked of them."""

    ACCEPT = frozenset({"accept", "gpa", "stage", "p", "seed", "n"})
    MAPGPA = frozenset({"mapgpa", "tdvmcall", "gpa", "stage", "p", "seed", "n"})
    TDVMCALL = frozenset({"tdvmcall", "mapgpa", "stage", "p", "seed", "n"})
    HOB = frozenset({"gpa"})


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault. ``argument`` is its default, with ``limit`` as the largest one; None: it takes none."""

    name: str
    place: Place
    text: str
    argument: int | None = None
    limit: int = 0
    levels: tuple[int, ...] = (LEVEL_4K, LEVEL_2M)


_A, _M, _V, _H = Place
_ONLY_2M = (LEVEL_2M,)
KINDS = {
    kind.name: kind
    for kind in (
        Kind("busy", _A, "the host holds the entry: OPERAND_BUSY"),
        Kind("size-mismatch", _A, "the host backs the 2 MiB page with 4 KiB pages", levels=_ONLY_2M),
        Kind("withhold", _A, "the host never backs the page: exit after exit"),
        Kind("interrupt", _A, "an interrupt comes after ARGUMENT of 512 pieces", PIECES // 2, PIECES - 1, _ONLY_2M),
        Kind("interrupt-block", _A, "meanwhile the host blocks and unblocks it", PIECES // 2, PIECES - 1, _ONLY_2M),
        Kind("replay", _A, "the accepted page is removed and a new one is added in its place"),
        Kind("remove", _A, "the accepted page is removed"),
        Kind("block", _A, "the accepted page is blocked and never given back"),
        Kind("block-unblock", _A, "the accepted page is blocked, and given back at the next touch"),
        Kind("mapgpa-refuse", _M, "MapGPA is refused: INVALID_OPERAND"),
        Kind("mapgpa-retry", _M, "MapGPA does half of the range and answers RETRY"),
        Kind("mapgpa-stuck", _M, "MapGPA does nothing and answers RETRY at the same address"),
        Kind("mapgpa-partial", _M, "MapGPA does half of the range and answers SUCCESS"),
        Kind("registers", _V, "the call is done, but all result registers behind R10 are garbage"),
        Kind("status", _V, "the call is done, but R10 says ARGUMENT", 0xDEAD, (1 << 64) - 1),
        Kind("hob-stale", _H, "the HOB list of an earlier life: all RAM is accepted system memory"),
        Kind("hob-accepted", _H, "the HOB list calls unaccepted what the host added with contents"),
        Kind("hob-overlap", _H, "the HOB list has each unaccepted resource twice, once from its middle on"),
        Kind("hob-more", _H, "the HOB list has 1 GiB of RAM that is none behind each end of RAM"),
        Kind("hob-less", _H, "the HOB list has half of each unaccepted resource of 4 MiB and more"),
    )
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One fault, and when it happens. A condition that is None asks for nothing."""

    kind: str
    argument: int = 0
    accept: int | None = None
    mapgpa: int | None = None
    tdvmcall: int | None = None
    gpa: Range | None = None
    stage: str | None = None
    p: float | None = None
    seed: int = 0
    n: int | None = None
    text: str = field(default="", compare=False)
    """The rule as it was written."""

    @property
    def place(self) -> Place:
        return KINDS[self.kind].place

    @property
    def times(self) -> int:
        """How often it can happen."""
        default = 1 if self.p is None else 1 << 63
        return default if self.n is None else self.n

    def __str__(self) -> str:
        return self.text


def parse_rule(text: str) -> Rule:
    """The rule that ``text`` says. Anything else is a ``FormatError`` that names what there is."""
    head, at, tail = text.partition("@")
    name, colon, argument = head.partition(":")
    kind = KINDS.get(name)
    if kind is None:
        raise _refusal(text, f"kind {name!r}", ", ".join(KINDS))
    number = _argument(text, kind, argument) if colon else kind.argument or 0
    values: dict[str, Any] = {}
    for condition in tail.split(",") if at else ():
        key, _, value = condition.partition("=")
        if key not in kind.place.value or key in values:
            found = f"condition {key!r}{' again' if key in values else ''}"
            raise _refusal(text, found, f"for {name} some of {', '.join(sorted(kind.place.value))}")
        values[key] = _value(text, key, value)
    if "seed" in values and "p" not in values:
        raise _refusal(text, "seed= without p=", "p= too")
    return Rule(name, number, **values, text=text)


def _argument(text: str, kind: Kind, argument: str) -> int:
    if kind.argument is None:
        raise _refusal(text, f"argument {argument!r}", f"none for {kind.name}")
    if not _NUMBER.fullmatch(argument) or not 0 < int(argument, 0 if argument[:2] == "0x" else 10) <= kind.limit:
        raise _refusal(text, f"argument {argument!r}", f"a number from 1 to {kind.limit}")
    return int(argument, 0 if argument[:2] == "0x" else 10)


def _value(text: str, key: str, value: str) -> int | float | str | Range:
    """The value of one condition."""
    if key == "gpa":
        return _gpa_range(text, value)
    if key == "stage":
        if not _STAGE.fullmatch(value):
            raise _refusal(text, f"stage={value}", "the name of a stage")
        return value
    if key == "p":
        if not _PROBABILITY.fullmatch(value) or not 0 < float(value) <= 1:
            raise _refusal(text, f"p={value}", "a probability above 0, up to 1")
        return float(value)
    if not _NUMBER.fullmatch(value) or value[:2] == "0x" or (key != "seed" and int(value) == 0):
        raise _refusal(text, f"{key}={value}", "a decimal number, from 1 on" if key != "seed" else "a decimal number")
    return int(value)


def _gpa_range(text: str, value: str) -> Range:
    """``A-B``, each with a suffix K, M, G or T."""
    low, dash, high = value.partition("-")
    (start, rest), (end, more) = memparse(low), memparse(high)
    if not dash or rest or more or not low or not high or start >= end:
        raise _refusal(text, f"gpa={value}", "a range such as 4G-5G or 0x1000-0x2000")
    return Range(start, end)


def _refusal(text: str, found: str, expected: str) -> FormatError:
    return FormatError(f"fault {text!r}", found=found, expected=expected, source=_SOURCE)
