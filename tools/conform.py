"""``unaccepted conform FILE...``: run recorded answers of the real code through our stages and compare.

A file has one case a line, as JSON; it may be compressed with gzip. Its family is the first part of its name:
``v9.jsonl.gz``, ``e820.jsonl``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from guest.errors import BootError, FormatError
from tools.cli import script
from tools.render import add_json_option, json_text, print_table

FAMILIES = ("v9", "e820")
"""Families with a module ``tools.conform_FAMILY`` that has ``run_case(case)``."""

_NO_CASE = (
    KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, MemoryError, struct.error,
)  # fmt: skip
"""What comes of fields that are missing, of another type, or far too large."""

_MAX_LINE = 1 << 26
_SOURCE = "unaccepted conform --help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("files", metavar="FILE", nargs="+", help=f"FAMILY.jsonl or .jsonl.gz: {', '.join(FAMILIES)}")
    parser.add_argument("--differences", metavar="N", type=int, default=5, help="cases to show in full (default 5)")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Run all files; 1 if any case differs."""
    results = [_run_file(Path(name)) for name in args.files]
    if args.json:
        print(json_text({"schema": 1, "files": results}, args.json))
    else:
        for result in results:
            _print_differences(result["differing"][: args.differences])
        rows = [[r["family"], *(str(r[key]) for key in ("cases", "agree", "differ"))] for r in results]
        print_table(["family", "cases", "agree", "differ"], rows)
    return 1 if any(result["differ"] for result in results) else 0


def _run_file(path: Path) -> dict[str, Any]:
    family = path.name.split(".")[0]
    if family not in FAMILIES:
        expected = f"a name that starts with {' or '.join(FAMILIES)}"
        raise FormatError(str(path), found=f"family {family!r}", expected=expected, source=_SOURCE)
    run_case = import_module(f"tools.conform_{family}").run_case
    cases, differing = 0, []
    for number, case in enumerate(_cases(path), 1):
        cases += 1
        if differences := _compare(run_case, case, f"{path}, line {number}"):
            differing.append({"id": case.get("id"), "name": case.get("name"), "differences": differences})
    if cases == 0:
        raise FormatError(str(path), found="no case", expected="one JSON object a line", source=_SOURCE)
    agree = cases - len(differing)
    return {"family": family, "cases": cases, "agree": agree, "differ": len(differing), "differing": differing}


def _compare(run_case: Callable[[dict[str, Any]], list[str]], case: dict[str, Any], where: str) -> list[str]:
    """The differences of one case. A guest that dies is one; a case that is no case is refused."""
    try:
        return run_case(case)
    except BootError as error:
        return [f"our stages stopped: {error}"]
    except _NO_CASE as error:
        found = f"{type(error).__name__}: {error}"[:80]
        raise FormatError(where, found=found, expected="a case of this family", source=_SOURCE) from error


def _cases(path: Path) -> Iterator[dict[str, Any]]:
    """The cases of a file, one after the other."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            while line := file.readline(_MAX_LINE):
                number += 1
                case = json.loads(line)
                if not isinstance(case, dict):
                    raise ValueError("not an object")
                yield case
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        found = f"{type(error).__name__}: {error}"[:80]
        raise FormatError(f"{path}, line {number}", found=found, expected="a JSON object", source=_SOURCE) from error


def _print_differences(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        print(f"case {case['id']} {case['name']}")
        for line in case["differences"]:
            print(f"    {line[:300]}")


if __name__ == "__main__":
    script("conform")
