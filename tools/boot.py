"""``unaccepted boot``: run all stages, print the guest's log, then a table of what each stage cost."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from guest.errors import BootError
from tools.cli import script
from tools.config import add_options, boot_config
from tools.pipeline import STAGE_NAMES, Boot
from tools.render import add_json_option, json_text, log_lines, print_table, record_json, summary_json, summary_rows
from tools.report import summarize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_options(parser)
    parser.add_argument("--until", metavar="STAGE", choices=STAGE_NAMES, help=f"stop after: {', '.join(STAGE_NAMES)}")
    parser.add_argument("--save", metavar="DIR", help="write boot_params.bin, bitmap.bin, e820.txt, trace.jsonl")
    add_json_option(parser)
    parser.add_argument("--timing", action="store_true", help="print how long the boot took on this machine")


def run(args: argparse.Namespace) -> int:
    """Boot. A guest that dies leaves its log and table, then its error."""
    boot = Boot(boot_config(args))
    save = _directory(args.save) if args.save else None
    start = time.perf_counter()
    death: BootError | None = None
    try:
        boot.run(args.until)
    except BootError as error:
        death = error
    elapsed = time.perf_counter() - start
    if args.json:
        print(json_text(_json(boot, death), args.json))
    else:
        for line in log_lines(boot.trace.records):
            print(line)
        print()
        print_table(*summary_rows(summarize(boot.trace.records)))
    if args.timing:
        print(f"boot: {elapsed * 1000:.1f} ms on this machine")
    if save is not None:
        _save(boot, save)
    if death is not None:
        raise death
    return 0


def _json(boot: Boot, death: BootError | None) -> dict[str, Any]:
    return {
        "schema": 1,
        "stages": summary_json(summarize(boot.trace.records)),
        "log": log_lines(boot.trace.records),
        "error": str(death) if death is not None else None,
    }


def _directory(path: str) -> Path:
    """The directory to save into, made now so that a boot is not run in vain."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _save(boot: Boot, directory: Path) -> None:
    """Write what the boot left behind; what it did not reach is left out."""
    if boot.boot_params is not None:
        from tools.dump_boot_params import dmesg_lines

        (directory / "boot_params.bin").write_bytes(boot.boot_params)
        (directory / "bitmap.bin").write_bytes(boot.bitmap())
        (directory / "e820.txt").write_text("\n".join(dmesg_lines(boot.boot_params)) + "\n")
    with (directory / "trace.jsonl").open("w") as file:
        for record in boot.trace.records:
            file.write(json_text(record_json(record), "short") + "\n")


if __name__ == "__main__":
    script("boot")
