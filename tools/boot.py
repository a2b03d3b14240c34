"""``unaccepted boot``: run all stages, print the guest's log, then a table of what each stage cost."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from guest.errors import BootError, FormatError
from guest.trace import Record
from tools.cli import script
from tools.config import add_options, boot_config, read_text
from tools.pipeline import STAGE_NAMES, Boot, stages_of
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
from tools.verdict import verdict_lines

_UNTIL = (
    f"stop after a stage ({', '.join(STAGE_NAMES)}), or, with --run, when the kernel prints TEXT; "
    "`accept` stops at its first accept"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_options(parser)
    parser.add_argument("--until", metavar="STAGE|TEXT", help=_UNTIL)
    parser.add_argument("--save", metavar="DIR", help="write boot_params.bin, bitmap.bin, e820.txt, trace.jsonl")
    add_json_option(parser)
    parser.add_argument("--system-map", metavar="FILE", help="symbols for the report on real code that died")
    parser.add_argument("--measure", action="store_true", help="print the TD's measurements: MRTD and RTMR0 to RTMR3")
    parser.add_argument("--timing", action="store_true", help="print how long the boot took on this machine")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Boot. A guest that dies leaves its log and table, then its error."""
    config = boot_config(args)
    stage = args.until if args.until in stages_of(config) else None
    if args.until is not None and stage is None:
        if config.run is None:
            args.usage_error(f"--until: {args.until!r} is no stage: {', '.join(stages_of(config))}")
        config = replace(config, until=args.until)
    boot = Boot(config)
    save = _directory(args.save) if args.save else None
    if not args.json:
        _print_as_it_comes(boot)
    start = time.perf_counter()
    death: BootError | None = None
    try:
        boot.run(stage)
    except BootError as error:
        death = error
    elapsed = time.perf_counter() - start
    if args.json:
        print(json_text(_json(boot, death) | (measurements(boot) if args.measure else {}), args.json))
    else:
        print()
        print_table(*summary_rows(summarize(boot.trace.records)))
        for line in verdict_lines(boot):
            print(line)
        for name, digest in (measurements(boot) if args.measure else {}).items():
            print(f"{name} {digest}")
    if death is not None and boot.real_code is not None:
        for line in _postmortem(boot, args.system_map):
            print(line, file=sys.stderr)
    if args.timing:
        print(f"boot: {elapsed * 1000:.1f} ms on this machine", file=sys.stderr if args.json else sys.stdout)
    if save is not None:
        _save(boot, save)
    if death is not None:
        raise death
    return 0


def _print_as_it_comes(boot: Boot) -> None:
    """Print the log while the boot runs; with real code, also say on a terminal how far it is."""
    log = LogText()

    def on_record(record: Record) -> None:
        for line in log.lines(record):
            print(line, flush=boot.config.run is not None)

    boot.trace.watchers.append(on_record)
    if sys.stderr.isatty():
        boot.progress = lambda blocks: print(f"\r{blocks >> 20} Mi basic blocks\r", end="", file=sys.stderr)


def _postmortem(boot: Boot, system_map: str | None) -> list[str]:
    """How the processor stands where the guest died, with symbols of System.map or of the kernel itself."""
    from bootstub.bzimage import parse_bzimage
    from bootstub.payload import decompress
    from cpu.postmortem import report
    from cpu.symbols import Symbols, parse_system_map, read_kallsyms

    assert boot.real_code is not None
    symbols = Symbols((), "", ())
    if system_map is not None:
        symbols = parse_system_map(read_text(system_map))
    else:
        with suppress(FormatError):  # a payload that only the kernel's own code can unpack
            symbols = (
                read_kallsyms(decompress(parse_bzimage(boot.config.kernel).payload(boot.config.kernel))) or symbols
            )
    return report(boot.real_code.vcpu, boot.trace, symbols)


def measurements(boot: Boot) -> dict[str, str]:
    """The TD's measurement registers by name, in hexadecimal."""
    measurement = boot.host.seam.measurement
    rtmrs = {f"RTMR{index}": digest.hex() for index, digest in enumerate(measurement.rtmr)}
    return {"MRTD": measurement.mrtd.hex()} | rtmrs


def _json(boot: Boot, death: BootError | None) -> dict[str, Any]:
    return {
        "schema": 1,
        "stages": summary_json(summarize(boot.trace.records)),
        "log": log_lines(boot.trace.records),
        "verdict": verdict_lines(boot),
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
