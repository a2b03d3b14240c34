"""``unaccepted boot``: run all stages, print the guest's log, then a table of what each stage cost."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guest.errors import BootError
from guest.trace import Record
from kernel.runtime import script_help
from tools.cli import script
from tools.config import add_options, boot_config
from tools.cpu_report import cpu_rows, cpus_json
from tools.milestones import milestone_rows, milestones, milestones_json
from tools.pipeline import Boot
from tools.postmortem import add_symbols_option, postmortem
from tools.progress import StatusLine, interruptible
from tools.render import (
    LogText,
    add_json_option,
    json_text,
    log_lines,
    print_table,
    record_json,
    summary_json,
    summary_rows,
)
from tools.report import summarize
from tools.until import add_until_option, resolve_until
from tools.verdict import bitmap, verdict_lines

_SAVED = "write boot_params.bin, bitmap.bin, e820.txt, trace.jsonl, facts.json, journal.jsonl (who wrote what)"
_End = BootError | KeyboardInterrupt | None
"""What ended a boot before its end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_options(parser)
    add_until_option(parser)
    parser.add_argument("--save", metavar="DIR", help=_SAVED)
    add_json_option(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw accepted memory over virtual time: .svg or .png")
    add_symbols_option(parser)
    parser.add_argument("--measure", action="store_true", help="print the TD's measurements: MRTD and RTMR0 to RTMR3")
    parser.add_argument("--timing", action="store_true", help="print how long the boot took on this machine")


def run(args: argparse.Namespace) -> int:
    """Boot. A guest that dies, or a Ctrl-C, leaves its log and table, then its error."""
    if args.script == "help":
        print(script_help(), end="")
        return 0
    config, stage = resolve_until(args, boot_config(args))
    if args.plot is not None:
        from tools.plot import check_plot

        check_plot(args.plot)
    boot = Boot(config)
    save = _directory(args.save) if args.save else None
    if save is not None:
        boot.keep_journal()
    end, seconds = _run(boot, stage, print_log=not args.json)
    _print_outcome(boot, end, args)
    if isinstance(end, BootError):
        for line in postmortem(boot, end, args.system_map):
            print(line, file=sys.stderr)
    if args.timing:
        print(f"boot: {seconds * 1000:.1f} ms on this machine", file=sys.stderr if args.json else sys.stdout)
    if save is not None:
        _save(boot, save, _end_text(end))
    if args.plot is not None:
        from tools.plot import plot

        plot(boot, args.plot)
    if end is not None:
        raise end
    return 0


def _run(boot: Boot, stage: str | None, *, print_log: bool) -> tuple[_End, float]:
    """Run up to ``stage``; returns what ended the boot before, and how many seconds it took on this machine."""
    start = time.perf_counter()
    end: _End = None
    try:
        with _watched(boot, print_log=print_log), interruptible(boot):
            boot.run(stage)
    except (BootError, KeyboardInterrupt) as error:
        end = error
    return end, time.perf_counter() - start


def _print_outcome(boot: Boot, end: _End, args: argparse.Namespace) -> None:
    """What the boot came to, as tables or as JSON."""
    measured = _measurements(boot, args.measure)
    if args.json:
        print(json_text(_json(boot, end) | measured, args.json))
        return
    _print_tables(boot)
    for name, value in measured.items():
        print(name, value)


@contextmanager
def _watched(boot: Boot, print_log: bool) -> Iterator[None]:
    """Print the log while the boot runs; with real code, also say on a terminal how far it is."""
    log, status = LogText(), StatusLine()

    def on_record(record: Record) -> None:
        status.on_record(record)
        for line in log.lines(record) if print_log else ():
            status.wipe()
            print(line, flush=boot.config.run is not None)

    boot.trace.watchers.append(on_record)
    boot.progress = status.show
    try:
        yield
    finally:
        status.wipe()


def _print_tables(boot: Boot) -> None:
    print()
    print_table(*summary_rows(summarize(boot.trace.records)))
    found = milestones(boot.trace.records, boot.host.ram)
    if boot.config.run is not None and found:
        print()
        print_table(*milestone_rows(found))
        print()
    if boot.shell is not None and len(boot.shell.cpus.all) > 1:
        print()
        print_table(*cpu_rows(boot.shell.cpus.all))
        print()
    for line in verdict_lines(boot):
        print(line)


def _measurements(boot: Boot, wanted: bool) -> dict[str, str]:
    """The TD's measurement registers by name, in hexadecimal, if they are wanted."""
    if not wanted:
        return {}
    measurement = boot.host.seam.measurement
    rtmrs = {f"RTMR{index}": digest.hex() for index, digest in enumerate(measurement.rtmr)}
    return {"MRTD": measurement.mrtd.hex()} | rtmrs


def _json(boot: Boot, end: _End) -> dict[str, Any]:
    return {
        "schema": 1,
        "stages": summary_json(summarize(boot.trace.records)),
        "milestones": milestones_json(milestones(boot.trace.records, boot.host.ram)),
        "log": log_lines(boot.trace.records),
        "cpus": cpus_json(boot.shell.cpus.all) if boot.shell is not None else [],
        "verdict": verdict_lines(boot),
        "error": _end_text(end),
    }


def _end_text(end: _End) -> str | None:
    """What ended the boot before its end."""
    return "interrupted" if isinstance(end, KeyboardInterrupt) else str(end) if end is not None else None


def _directory(path: str) -> Path:
    """The directory to save into, made now so that a boot is not run in vain."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _save(boot: Boot, directory: Path, end: str | None) -> None:
    """Write what the boot left behind; what it did not reach is left out."""
    from tools.facts import take
    from tools.saved import write_saved

    if boot.boot_params is not None:
        from tools.dump_boot_params import dmesg_lines

        (directory / "boot_params.bin").write_bytes(boot.boot_params)
        (directory / "bitmap.bin").write_bytes(bitmap(boot))
        (directory / "e820.txt").write_text("\n".join(dmesg_lines(boot.boot_params)) + "\n")
    with (directory / "trace.jsonl").open("w") as file:
        for record in boot.trace.records:
            file.write(json_text(record_json(record), "short") + "\n")
    write_saved(take(str(directory), boot, end), directory)


if __name__ == "__main__":
    script("boot")
