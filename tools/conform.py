"""``unaccepted conform FILE...``: run recorded answers of the real code through our stages and compare.

A file has one case a line, as JSON; it may be compressed with gzip. Its family is the first part of its name:
``v9.jsonl.gz``, ``stub.jsonl``. Some families are recorded runs of a kernel image, which is run again here:
``--kernel``. With ``--record``, such runs are not compared but written down, as cases for others.
"""

from __future__ import annotations

import argparse
import gzip
import json
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from guest.errors import BootError, FormatError
from tools.arguments import add_jobs_option, number_from
from tools.cli import script
from tools.conformance.left_out import LeftOut
from tools.files import read_file
from tools.parallel import in_parallel
from tools.progress import counted
from tools.render import add_json_option, json_text, print_table

FAMILIES = {
    "v9": False,
    "mainline": False,
    "e820": False,
    "memblock": False,
    "stub": True,
    "decompressor": True,
    "boot": True,
}
"""Families with a module ``tools.conformance.FAMILY`` that has ``run_case(case)``, or, where the value says that the
cases are runs of a kernel image, ``run_case(case, image)``."""
OURS = ("stub", "decompressor", "boot")
"""Families of a kernel image where a stage of ours can take the place of the image's own code."""
RECORDABLE = tuple(family for family, image in FAMILIES.items() if image)
"""Their modules ``tools.conformance.record_FAMILY`` have ``record(case, image)``."""

_NO_CASE = (
    KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, MemoryError, struct.error,
)  # fmt: skip
"""What comes of fields that are missing, of another type, or far too large."""

_MAX_LINE = 1 << 26
_SOURCE = "unaccepted conform --help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("files", metavar="FILE", nargs="*", help=f"FAMILY.jsonl or .jsonl.gz: {', '.join(FAMILIES)}")
    runs = ", ".join(name for name, image in FAMILIES.items() if image)
    parser.add_argument("--kernel", metavar="FILE", help=f"the kernel image that was recorded, for {runs}")
    parser.add_argument("--ours", action="store_true", help="run our stages on the image, not its own code")
    parser.add_argument("--limit", metavar="N", type=number_from(1), help="only the first N cases of a file")
    add_jobs_option(parser)
    parser.add_argument(
        "--differences", metavar="N", type=number_from(0), default=5, help="cases to show in full (default 5)"
    )
    parser.add_argument(
        "--record", metavar="OUT", help="write down runs of --kernel on the set-ups of --maps, as JSON lines"
    )
    parser.add_argument(
        "--maps", metavar="FILE", help=f"cases that say what to run for --record: {', '.join(RECORDABLE)}"
    )
    add_json_option(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Run all files; 1 if any case differs."""
    if (args.record is None) != (args.maps is None) or (args.record is None) != bool(args.files):
        args.usage_error("give either FILE..., or --record and --maps")
    if args.record is not None:
        return _record(args)
    results = [_run_file(Path(name), args) for name in args.files]
    if args.json:
        print(json_text({"schema": 1, "files": results}, args.json))
    else:
        for result in results:
            _print_differences(result["differing"][: args.differences])
        columns = ("cases", "agree", "differ", "left_out")
        rows = [[r["family"], *(str(r[key]) for key in columns)] for r in results]
        print_table(["family", "cases", "agree", "differ", "left out"], rows)
        for result in results:
            for reason, count in result["reasons"].items():
                print(f"{result['family']}: {count} left out: {reason}")
    return 1 if any(result["differ"] for result in results) else 0


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one case came to; ``malformed`` says why it is no case."""

    id: Any = None
    name: Any = None
    differences: list[str] = field(default_factory=list)
    left_out: str | None = None
    malformed: str | None = None


@dataclass(frozen=True, slots=True)
class _RunCase:
    """Runs a case of ``family``. It goes to other processes; each reads the image at ``kernel`` once."""

    family: str
    kernel: str | None
    ours: bool = False

    def __call__(self, case: dict[str, Any]) -> _Outcome:
        what = case.get("id"), case.get("name") or case.get("profile")
        run_case = import_module(f"tools.conformance.{self.family}").run_case
        options = {"ours": True} if self.ours else {}
        try:
            return _Outcome(*what, run_case(case, *_image(self.kernel), **options))
        except LeftOut as reason:
            return _Outcome(*what, left_out=str(reason))
        except BootError as error:
            return _Outcome(*what, [f"our stages stopped: {error}"])
        except _NO_CASE as error:
            return _Outcome(malformed=f"{type(error).__name__}: {error}"[:80])


@dataclass(frozen=True, slots=True)
class _RecordCase:
    """Runs the set-up of a case of ``family``: the new case as a line of text, or why there is none."""

    family: str
    kernel: str

    def __call__(self, case: dict[str, Any]) -> tuple[str, str]:
        record = import_module(f"tools.conformance.record_{self.family}").record
        try:
            return json.dumps(record(case, *_image(self.kernel))) + "\n", ""
        except BootError as error:
            return "", f"case {_name(case)} was not recorded: {error}"
        except _NO_CASE as error:
            return "", f"case {_name(case)} is no case: {type(error).__name__}: {error}"


def _name(case: dict[str, Any]) -> Any:
    return case.get("id", case.get("name"))


@lru_cache(maxsize=1)
def _image(kernel: str | None) -> tuple[bytes, ...]:
    return () if kernel is None else (read_file(kernel),)


def _run_file(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    family = _family(path, tuple(FAMILIES))
    ours = _ours(family, args)
    needs_image = FAMILIES[family] and not (ours and family == "boot")
    run_case = _RunCase(family, _kernel(path, args) if needs_image else None, ours)
    cases, differing, reasons = 0, [], Counter[str]()
    for outcome in counted("cases", in_parallel(run_case, islice(_cases(path), args.limit), args.jobs, _chunk(family))):
        cases += 1
        if outcome.malformed:
            where, found = f"{path}, line {cases}", outcome.malformed
            raise FormatError(where, found=found, expected="a case of this family", source=_SOURCE)
        if outcome.left_out:
            reasons[outcome.left_out] += 1
        elif outcome.differences:
            differing.append({"id": outcome.id, "name": outcome.name, "differences": outcome.differences})
    if cases == 0:
        raise FormatError(str(path), found="no case", expected="one JSON object a line", source=_SOURCE)
    left_out, differ = sum(reasons.values()), len(differing)
    return {
        "family": family, "cases": cases, "agree": cases - differ - left_out, "differ": differ, "left_out": left_out,
        "reasons": dict(reasons), "differing": differing,
    }  # fmt: skip


def _record(args: argparse.Namespace) -> int:
    """Write a case for each case of ``--maps``."""
    maps = Path(args.maps)
    family = _family(maps, RECORDABLE)
    record_case = _RecordCase(family, _kernel(maps, args))
    lines = in_parallel(record_case, islice(_cases(maps), args.limit), args.jobs, _chunk(family))
    with Path(args.record).open("w", encoding="utf-8") as file:
        for line, reason in counted("cases", lines):
            file.write(line)
            if reason:
                print(reason)
    return 0


def _chunk(family: str) -> int:
    """Cases that a process takes at once."""
    return 1 if FAMILIES[family] else 4


def _family(path: Path, known: tuple[str, ...]) -> str:
    family = path.name.split(".")[0]
    if family not in known:
        expected = f"a name that starts with {' or '.join(known)}"
        raise FormatError(str(path), found=f"family {family!r}", expected=expected, source=_SOURCE)
    return family


def _ours(family: str, args: argparse.Namespace) -> bool:
    if args.ours and family not in OURS:
        raise FormatError("--ours", found=f"family {family!r}", expected=" or ".join(OURS), source=_SOURCE)
    return bool(args.ours)


def _kernel(path: Path, args: argparse.Namespace) -> str:
    """The kernel image, once it is clear that it can be run."""
    if args.kernel is None:
        raise FormatError(str(path), found="no --kernel", expected="--kernel FILE, the image to run", source=_SOURCE)
    from bootstub.bzimage import parse_bzimage
    from cpu.binding import self_test

    parse_bzimage(*_image(args.kernel))
    self_test()
    return str(args.kernel)


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
