"""``unaccepted dump STRUCTURE FILE``: show a structure of the boot, field by field."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from bootstub.boot_params import BOOT_PARAMS_SIZE, check_size
from guest.errors import FormatError
from tools.cli import script
from tools.dump_boot_params import Row, dmesg_lines, rows, text_lines, to_json
from tools.files import file_path, read_file
from tools.output import add_json_option, hex_dump, json_text

_SOURCE = "unaccepted dump boot-params --help"
_TD = "td:MEMORY[,MACHINE][,OPTION=VALUE]..."
LIVE_BOOT_PARAMS = "/sys/kernel/boot_params/data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    structures = parser.add_subparsers(dest="structure", metavar="STRUCTURE", required=True)
    for name, structure in _STRUCTURES.items():
        structure.add_arguments(structures.add_parser(name, help=structure.text, description=f"Show {structure.text}."))


def _add_boot_params(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    text = f"a file, - for standard input, a directory of `boot --save`, {_TD}, or a boot's FILE.toml"
    source.add_argument("file", metavar="SOURCE", nargs="?", help=text)
    source.add_argument("--live", action="store_true", help=f"the running machine's own, {LIVE_BOOT_PARAMS}")
    form = _add_forms(parser)
    form.add_argument("--dmesg", action="store_true", help="print the BIOS-e820 lines as the kernel will print them")
    parser.add_argument("--blame", action="store_true", help="say of each field who wrote it, of a boot")
    parser.set_defaults(usage_error=parser.error)


def _add_tdvf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="IMAGE", help="OVMF, td-shim or another image whose end is at 4 GiB")
    _add_forms(parser)


def _add_hob(parser: argparse.ArgumentParser) -> None:
    text = f"a file, or {_TD}: what the host gives such a TD"
    parser.add_argument("file", metavar="SOURCE", help=text)
    _add_forms(parser)


def _add_acpi(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="SOURCE", help=f"{_TD}, or a file of tables")
    parser.add_argument("--numa", metavar="NODES", help="NUMA nodes, as boot --numa has them")
    parser.add_argument("--save", metavar="DIR", help="write each table into a file, such as DSDT.dat")
    _add_forms(parser)


def _add_smbios(parser: argparse.ArgumentParser) -> None:
    text = f"{_TD}, a dump of dmidecode's, or /sys/firmware/dmi/tables/DMI"
    parser.add_argument("file", metavar="SOURCE", help=text)
    parser.add_argument("--save", metavar="FILE", help="write a file for dmidecode --from-dump")
    _add_forms(parser)


def _add_kernel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a bzImage of boot protocol 2.02 or later, or a bare vmlinux")
    parser.add_argument("--config", metavar="FILE", help="the kernel's configuration, if it is not inside")
    _add_forms(parser)


def _add_forms(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """The forms of output that every structure has."""
    form = parser.add_mutually_exclusive_group()
    add_json_option(form)
    form.add_argument("--hex", action="store_true", help="print the bytes")
    return form


def run(args: argparse.Namespace) -> int:
    """Dump a structure; one that cannot be read to its end prints nothing."""
    for line in list(_STRUCTURES[args.structure].lines(args)):
        print(line)
    return 0


def _boot_params(args: argparse.Namespace) -> Iterable[str]:
    if args.blame and (args.hex or args.dmesg):
        args.usage_error("--blame: not with --hex and --dmesg")
    data, author_of = _read_boot_params(LIVE_BOOT_PARAMS if args.live else args.file)
    if not args.blame:
        author_of = None
    elif author_of is None:
        raise FormatError("--blame", found="no journal", expected="a boot, or what it saved", source=_SOURCE)
    check_size(data)
    if args.json:
        return [json_text(to_json(data, author_of=author_of), args.json)]
    return hex_dump(data) if args.hex else dmesg_lines(data) if args.dmesg else text_lines(rows(data), author_of)


def _read_boot_params(source: str) -> tuple[bytes, Callable[[Row], str] | None]:
    """The page, and who wrote a field of it if somebody kept a journal."""
    if source in ("-", LIVE_BOOT_PARAMS) or not (
        source.endswith(".toml") or source.startswith("td:") or file_path(source).is_dir()
    ):
        return _read(source), None
    from tools.facts import facts_of

    found = facts_of(source, until="efi-stub")
    if found.boot_params is None:
        end = found.fields.get("boot", {}).get("end")
        text = end.value if end is not None else "no boot_params"
        raise FormatError(source, found=text, expected="a boot that came through stage efi-stub", source=_SOURCE)
    return found.boot_params, found.journal.author_of if found.journal is not None else None


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


def _smbios(args: argparse.Namespace) -> Iterable[str]:
    from tools import dump_smbios

    found = dump_smbios.read(args.file)
    if args.save:
        dump_smbios.save(found, Path(args.save))
    if args.json:
        return [json_text(dump_smbios.to_json(found), args.json)]
    return hex_dump(found.table, found.at) if args.hex else dump_smbios.text(found)


def _kernel(args: argparse.Namespace) -> Iterable[str]:
    from tools import dump_kernel
    from tools.kernel_image import KernelImage, read_config_text

    config = read_config_text(args.config) if args.config is not None else None
    found = dump_kernel.Dump(KernelImage(read_file(args.file), config))
    if args.json:
        return [json_text(dump_kernel.to_json(found), args.json)]
    return dump_kernel.hex_lines(found) if args.hex else dump_kernel.text(found)


class _Structure(NamedTuple):
    """What can be shown: its text in the help, the arguments that it takes, the lines that it prints."""

    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    lines: Callable[[argparse.Namespace], Iterable[str]]


_STRUCTURES = {
    "boot-params": _Structure("the zero page, 4096 bytes", _add_boot_params, _boot_params),
    "tdvf": _Structure("TDX and SEV metadata of a firmware image, and its MRTD", _add_tdvf, _tdvf),
    "hob": _Structure("a HOB list: the memory that a host tells the firmware of", _add_hob, _hob),
    "acpi": _Structure("the ACPI tables that the firmware makes", _add_acpi, _acpi),
    "smbios": _Structure("the SMBIOS structures that the firmware makes", _add_smbios, _smbios),
    "kernel": _Structure("a bzImage or vmlinux: headers, payload, segments, configuration", _add_kernel, _kernel),
}


def _read(path: str) -> bytes:
    """The file's bytes, or what of them is enough to see that there are too many."""
    if path == "-":
        return sys.stdin.buffer.read(BOOT_PARAMS_SIZE + 1)
    if path == LIVE_BOOT_PARAMS:
        return Path(path).read_bytes()
    return read_file(path)


if __name__ == "__main__":
    script("dump")
