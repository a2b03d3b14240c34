"""``unaccepted dump STRUCTURE FILE``: show a structure of the boot, field by field."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bootstub.boot_params import BOOT_PARAMS_SIZE, check_size
from tools.cli import script
from tools.config import read_file
from tools.dump_boot_params import dmesg_lines, rows, text_lines, to_json
from tools.render import add_json_option, hex_dump, json_text

LIVE_BOOT_PARAMS = "/sys/kernel/boot_params/data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    structures = parser.add_subparsers(dest="structure", metavar="STRUCTURE", required=True)
    boot_params = structures.add_parser("boot-params", help="the zero page, 4096 bytes")
    source = boot_params.add_mutually_exclusive_group(required=True)
    source.add_argument("file", metavar="FILE", nargs="?", help="a file, or - for standard input")
    source.add_argument("--live", action="store_true", help=f"the running machine's own, {LIVE_BOOT_PARAMS}")
    form = boot_params.add_mutually_exclusive_group()
    add_json_option(form)
    form.add_argument("--hex", action="store_true", help="print the bytes")
    form.add_argument("--dmesg", action="store_true", help="print the BIOS-e820 lines as the kernel will print them")


def run(args: argparse.Namespace) -> int:
    """Dump boot_params."""
    data = _read(LIVE_BOOT_PARAMS if args.live else args.file)
    check_size(data)
    if args.json:
        print(json_text(to_json(data), args.json))
        return 0
    lines = hex_dump(data) if args.hex else dmesg_lines(data) if args.dmesg else text_lines(rows(data))
    for line in lines:
        print(line)
    return 0


def _read(path: str) -> bytes:
    """The file's bytes, or what of them is enough to see that there are too many."""
    if path == "-":
        return sys.stdin.buffer.read(BOOT_PARAMS_SIZE + 1)
    if path == LIVE_BOOT_PARAMS:
        return Path(path).read_bytes()
    return read_file(path)


if __name__ == "__main__":
    script("dump")
