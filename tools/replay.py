"""``unaccepted replay DIR...``: captured boots of real kernels in our kernel stages; is it the same memory boot?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.captures.capture import Capture
from tools.captures.compare import Row
from tools.captures.replay import compare, replay
from tools.cli import script
from tools.output import add_json_option, json_text, print_table

SHOWN = 3
"""Differences of a subject that are printed, unless all are asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "captures", metavar="DIR", nargs="+", help="captured boots: boot_params.bin, dmesg.txt(.gz), ..."
    )
    parser.add_argument("--all", action="store_true", help=f"print all differences, not {SHOWN} of each subject")
    parser.add_argument("--log", action="store_true", help="print our kernel's log and compare nothing")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Replay each capture; 1 if something differs for which there is no cause."""
    failed, found = False, []
    for name in args.captures:
        capture = Capture.read(Path(name))
        ours = replay(capture)
        if args.log:
            print("\n".join(ours.log))
            continue
        rows = list(compare(capture, ours))
        failed = failed or any(row.unexplained for row in rows)
        found.append((Path(name).name, rows))
        if not args.json:
            _print_capture(Path(name).name, rows, args.all)
    if args.json and not args.log:
        print(json_text([_to_json(name, rows) for name, rows in found], args.json))
    elif len(found) > 1:
        _print_sum(found)
    return int(failed)


def _print_capture(name: str, rows: Sequence[Row], show_all: bool) -> None:
    table = [
        [row.subject, str(row.compared), str(row.compared - len(row.differences)), str(len(row.differences)),
         str(len(row.unexplained))] for row in rows
    ]  # fmt: skip
    print_table([name, "compared", "equal", "differ", "unexplained"], table)
    for row in rows:
        shown = row.differences if show_all else row.differences[:SHOWN]
        for difference in shown:
            print(f"{row.subject}: ours     {difference.ours}")
            print(f"{' ' * len(row.subject)}  captured {difference.captured}")
            print(f"{' ' * len(row.subject)}  cause    {difference.cause or 'none that is known'}")
        if len(shown) < len(row.differences):
            print(f"{row.subject}: {len(row.differences) - len(shown)} more; --all prints them")
    print()


def _print_sum(found: Sequence[tuple[str, Sequence[Row]]]) -> None:
    """A line for each subject over all captures."""
    sums: dict[str, list[int]] = {}
    for _, rows in found:
        for row in rows:
            numbers = (1, row.compared, len(row.differences), len(row.unexplained))
            sums[row.subject] = [a + b for a, b in zip(sums.get(row.subject, [0] * 4), numbers, strict=True)]
    print_table(
        ["subject", "captures", "compared", "differ", "unexplained"],
        [[subject, *map(str, numbers)] for subject, numbers in sums.items()],
    )


def _to_json(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    subjects = {
        row.subject: {
            "compared": row.compared,
            "differences": [{"ours": d.ours, "captured": d.captured, "cause": d.cause} for d in row.differences],
        }
        for row in rows
    }
    return {"capture": name, "unexplained": sum(len(row.unexplained) for row in rows), "subjects": subjects}


if __name__ == "__main__":
    script("replay")
