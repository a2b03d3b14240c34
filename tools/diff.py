"""``unaccepted diff A B``: what two boots left, field by field and range by range, and who wrote either side.

See ``tools/facts.py`` for what A and B can be. What only one of them has a record of is not compared: a file with a
boot_params page says nothing of stages.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from guest.ranges import RangeMap
from guest.units import size_text
from tools.cli import script
from tools.dump_boot_params import rows
from tools.facts import Fact, Facts, Span, facts_of, first_of
from tools.output import add_json_option, json_text

_E820_TABLE = "e820_table"
_NOTHING = Fact("nothing", "")


@dataclass(frozen=True, slots=True)
class Difference:
    """``where`` in ``section`` the two sides have ``a`` and ``b``."""

    section: str
    where: str
    a: Fact
    b: Fact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    text = "a directory of `boot --save`, FILE.toml with options of a boot, td:4G[,OPTION=VALUE]..., or a boot_params"
    parser.add_argument("a", metavar="A", help=text)
    parser.add_argument("b", metavar="B", help="the same")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Compare; 1 if there is a difference."""
    a, b = facts_of(args.a), facts_of(args.b)
    found = list(differences(a, b))
    if args.json:
        print(json_text(_json(a, b, found), args.json))
    else:
        for line in _text(a, b, found):
            print(line)
    return 1 if found else 0


def differences(a: Facts, b: Facts) -> Iterator[Difference]:
    """All differences: boot_params, then fields, then ranges."""
    ranges = [d for section in a.ranges if section in b.ranges for d in _ranges(section, a, b)]
    e820_differs = any(d.section == "e820" for d in ranges)
    fields_a, fields_b = _boot_params(a, e820_differs), _boot_params(b, e820_differs)
    if fields_a and fields_b:
        yield from _fields("boot_params", fields_a, fields_b)
    for section in a.fields:
        if section in b.fields:
            yield from _fields(section, a.fields[section], b.fields[section])
    yield from ranges


def _boot_params(facts: Facts, e820_differs: bool) -> dict[str, Fact]:
    """The fields by name, with offset; entries of e820 only if their ranges do not tell what differs."""
    out = {}
    for row in rows(facts.boot_params) if facts.boot_params is not None else ():
        if not (e820_differs and row.name.startswith(_E820_TABLE)):
            value = row.text if isinstance(row.value, bytes) else f"{row.hex}  {row.text}".rstrip()
            author = facts.journal.author_of(row) if facts.journal is not None else ""
            out[f"{row.offset:#05x} {row.name}"] = Fact(value, author)
    return out


def _fields(section: str, a: Mapping[str, Fact], b: Mapping[str, Fact]) -> Iterator[Difference]:
    for name in dict.fromkeys([*a, *b]):
        one, other = a.get(name, _NOTHING), b.get(name, _NOTHING)
        if one.value != other.value:
            yield Difference(section, name, one, other)


def _ranges(section: str, a: Facts, b: Facts) -> Iterator[Difference]:
    map_a, map_b = _map(a.ranges[section]), _map(b.ranges[section])
    both = ((low, high, one, map_b) for low, high, one in map_a.runs())
    pieces = ((s, e, one, other) for low, high, one, against in both for s, e, other in against.runs(low, high))
    for (one, other), group in groupby(pieces, key=lambda piece: (piece[2].value, piece[3].value)):
        if one != other:
            run = list(group)
            start, end = run[0][0], run[-1][1]
            by_a, by_b = first_of(piece[2].author for piece in run), first_of(piece[3].author for piece in run)
            where = f"[{start:#x}, {end:#x}) {size_text(end - start)}"
            yield Difference(section, where, Fact(one, by_a), Fact(other, by_b))


def _map(spans: Sequence[Span]) -> RangeMap[Fact]:
    out = RangeMap(_NOTHING)
    for start, end, fact in spans:
        out.assign(start, end, fact)
    return out


def _text(a: Facts, b: Facts, found: Iterable[Difference]) -> Iterator[str]:
    yield f"A {a.name}"
    yield f"B {b.name}"
    count = 0
    for section, group in groupby(found, key=lambda difference: difference.section):
        yield section
        for d in group:
            count += 1
            yield f"  {d.where}"
            yield from (f"    {side} {fact.value}{_by(fact)}" for side, fact in (("A", d.a), ("B", d.b)))
    yield f"{count} difference{'s' * (count > 1)}" if count else "equal"


def _by(fact: Fact) -> str:
    return f"  by {fact.author}" if fact.author else ""


def _json(a: Facts, b: Facts, found: Iterable[Difference]) -> dict[str, Any]:
    return {
        "schema": 1,
        "a": a.name,
        "b": b.name,
        "differences": [
            {"section": d.section, "where": d.where, "a": d.a._asdict(), "b": d.b._asdict()} for d in found
        ],
    }


if __name__ == "__main__":
    script("diff")
