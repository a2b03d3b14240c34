"""``unaccepted dump STRUCTURE FILE``: show a structure of the boot, field by field."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
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
    form = _add_forms(boot_params)
    form.add_argument("--dmesg", action="store_true", help="print the BIOS-e820 lines as the kernel will print them")
    tdvf = structures.add_parser("tdvf", help="TDX and SEV metadata of a firmware image, and its MRTD")
    tdvf.add_argument("file", metavar="IMAGE", help="OVMF, td-shim or another image whose end is at 4 GiB")
    _add_forms(tdvf)
    hob = structures.add_parser("hob", help="a HOB list: the memory that a host tells the firmware of")
    hob.add_argument("file", metavar="SOURCE", help="a file, or td:MEMORY[,MACHINE]: what the host gives such a TD")
    _add_forms(hob)
    acpi = structures.add_parser("acpi", help="the ACPI tables that the firmware makes")
    acpi.add_argument("file", metavar="SOURCE", help="td:MEMORY[,MACHINE], or a file of tables")
    acpi.add_argument("--numa", metavar="NODES", help="NUMA nodes, as boot --numa has them")
    acpi.add_argument("--save", metavar="DIR", help="write each table into a file, such as DSDT.dat")
    _add_forms(acpi)
    kernel = structures.add_parser("kernel", help="a bzImage or vmlinux: headers, payload, segments, configuration")
    kernel.add_argument("file", metavar="FILE", help="a bzImage of boot protocol 2.02 or later, or a bare vmlinux")
    kernel.add_argument("--config", metavar="FILE", help="the kernel's configuration, if it is not inside")
    _add_forms(kernel)


def _add_forms(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """The forms of output that every structure has."""
    form = parser.add_mutually_exclusive_group()
    add_json_option(form)
    form.add_argument("--hex", action="store_true", help="print the bytes")
    return form


def run(args: argparse.Namespace) -> int:
    """Dump a structure; one that cannot be read to its end prints nothing."""
    for line in list(_STRUCTURES[args.structure](args)):
        print(line)
    return 0


def _boot_params(args: argparse.Namespace) -> Iterable[str]:
    data = _read(LIVE_BOOT_PARAMS if args.live else args.file)
    check_size(data)
    if args.json:
        return [json_text(to_json(data), args.json)]
    return hex_dump(data) if args.hex else dmesg_lines(data) if args.dmesg else text_lines(rows(data))


def _tdvf(args: argparse.Namespace) -> Iterable[str]:
    from tools import dump_tdvf

    found = dump_tdvf.read(read_file(args.file))
    if args.json:
        return [json_text(dump_tdvf.to_json(found), args.json)]
    return dump_tdvf.hex_lines(found) if args.hex else dump_tdvf.text(found)


def _hob(args: argparse.Namespace) -> Iterable[str]:
    from tools import dump_hob

    found = dump_hob.read(args.file)
    if args.json:
        return [json_text(dump_hob.to_json(found), args.json)]
    return hex_dump(found.data, found.gpa) if args.hex else dump_hob.text(found)


def _acpi(args: argparse.Namespace) -> Iterable[str]:
    from tools import dump_acpi

    tables = dump_acpi.read(args.file, args.numa)
    if args.save:
        dump_acpi.save(tables, Path(args.save))
    if args.json:
        return [json_text(dump_acpi.to_json(tables), args.json)]
    return [line for t in tables for line in hex_dump(t.data, t.at)] if args.hex else dump_acpi.text(tables)


def _kernel(args: argparse.Namespace) -> Iterable[str]:
    from tools import dump_kernel
    from tools.kernel_image import KernelImage, read_config_text

    config = read_config_text(args.config) if args.config is not None else None
    found = dump_kernel.Dump(KernelImage(read_file(args.file), config))
    if args.json:
        return [json_text(dump_kernel.to_json(found), args.json)]
    return dump_kernel.hex_lines(found) if args.hex else dump_kernel.text(found)


_STRUCTURES: dict[str, Callable[[argparse.Namespace], Iterable[str]]] = {
    "boot-params": _boot_params, "tdvf": _tdvf, "hob": _hob, "acpi": _acpi, "kernel": _kernel
}  # fmt: skip


def _read(path: str) -> bytes:
    """The file's bytes, or what of them is enough to see that there are too many."""
    if path == "-":
        return sys.stdin.buffer.read(BOOT_PARAMS_SIZE + 1)
    if path == LIVE_BOOT_PARAMS:
        return Path(path).read_bytes()
    return read_file(path)


if __name__ == "__main__":
    script("dump")
