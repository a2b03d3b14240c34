"""``unaccepted map``: look at a memory map, turn it into another form, compare it with another one."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import Any

from guest.units import size_text
from tools.cli import script
from tools.maps.bar import bar_lines
from tools.maps.compare import Comparison, compare
from tools.maps.kinds import spans, totals
from tools.maps.notes import notes
from tools.maps.platform_map import PlatformMap
from tools.maps.source import SourceOptions, read_map
from tools.maps.words import efi_attribute_text, efi_type_name
from tools.maps.write import WRITERS, kernel_table, table_lines
from tools.options import MAP_OPTIONS
from tools.output import add_json_option, json_text, print_table

_EPILOG = (
    "SOURCE: a kernel's log (efi=debug, or BIOS-e820 lines), JSON, TOML, memmap=exactmap parameters, boot_params, raw "
    "EFI descriptors, each packed with gzip or not; a directory like /sys/firmware/memmap; - for standard input; "
    "td:4G or td:4G,pc,max-ram-below-4g=3G for the map that our firmware gives a TD of that size, with any options of "
    "a boot behind it: td:64G,accept-policy=all, td:8G,numa=2,hotplug=8G, td:4G,profile=td-shim."
)
_MAX_BAR = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.epilog = _EPILOG
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("source", metavar="SOURCE", nargs="?", help="the map to show")
    what.add_argument("--compare", metavar=("A", "B"), nargs=2, help="two sources; exit 1 unless all is explained")
    form = parser.add_mutually_exclusive_group()
    add_json_option(form)
    form.add_argument("--to", choices=WRITERS, help="print the map in another form, and nothing else")
    form.add_argument("--plot", metavar="FILE", help="draw into an .svg or .png file (needs unaccepted[plot])")
    for option in MAP_OPTIONS:
        parser.add_argument(f"--{option.name}", metavar=option.metavar, help=option.help)
    parser.add_argument("--firmware", metavar="IMAGE", help="image with TDX metadata, for td:")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Show, convert or compare."""
    if args.compare and (args.to or args.plot):
        args.usage_error("--compare: not with --to or --plot")
    options = _options(args)
    if args.compare:
        maps = [read_map(source, options) for source in args.compare]
        return _compare(maps[0], maps[1], args.json)
    if args.plot:
        from tools.maps.plot import check_plot_path

        check_plot_path(args.plot)
    platform = read_map(args.source, options)
    if args.to:
        _put(WRITERS[args.to](platform))
    elif args.json:
        print(json_text(_json(platform), args.json))
    elif args.plot:
        from tools.maps.plot import plot

        plot(spans(platform), platform.name, args.plot)
    else:
        _show(platform)
    return 0


def _put(form: str | bytes) -> None:
    """A map in another form, and nothing else."""
    if isinstance(form, str):
        sys.stdout.write(form)
    else:
        sys.stdout.buffer.write(form)


def _options(args: argparse.Namespace) -> SourceOptions:
    given = {option.field: (option.read, getattr(args, option.field)) for option in MAP_OPTIONS}
    fields = {field: read(text) for field, (read, text) in given.items() if text is not None}
    return SourceOptions(**fields, td=() if args.firmware is None else (("firmware", args.firmware),))


def _show(platform: PlatformMap) -> None:
    """The table, the drawing, the sums and what is odd."""
    cut = spans(platform)
    for line in table_lines(platform):
        print(line)
    print()
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line in bar_lines(cut, min(shutil.get_terminal_size().columns, _MAX_BAR), colour):
        print(line)
    print()
    print_table(["kind", "ranges", "size"], [[kind.word, str(count), _size(size)] for kind, count, size in totals(cut)])
    for line in [*_node_lines(platform), *(f"note: {note}" for note in notes(platform))]:
        print(line)


def _node_lines(platform: PlatformMap) -> list[str]:
    """The nodes, as dmesg names ranges."""
    return [
        f"node {n.node}: [mem {n.start:#018x}-{n.end - 1:#018x}] {_size(n.end - n.start)}{', hot-plug' * n.hotplug}"
        for n in platform.nodes
    ]


def _size(size: int) -> str:
    """A size for a table: in KiB, or in bytes where that does not come out even."""
    return f"{size >> 10} KiB" if size % 1024 == 0 else f"{size} B"


def _compare(a: PlatformMap, b: PlatformMap, json_form: str | None) -> int:
    result = compare(a, b)
    if json_form:
        print(json_text(_comparison_json(a, b, result), json_form))
    else:
        _print_comparison(a, b, result)
    return 1 if result.unexplained else 0


def _print_comparison(a: PlatformMap, b: PlatformMap, result: Comparison) -> None:
    for letter, platform in (("A", a), ("B", b)):
        print(f"{letter}: {platform.name} ({platform.form})")
    print()
    rows = [
        [f"{row.start:#018x}-{row.end - 1:#018x}", size_text(row.end - row.start), row.a, row.b, _mark(row.a, row.b)]
        for row in result.rows
    ]
    print_table(["range", "size", "A", "B", ""], rows)
    print()
    for difference, reason in result.differences:
        where = f"{difference.start:#018x}-{difference.end - 1:#018x} {size_text(difference.size)}"
        print(f"{where}: {difference.a} | {difference.b}: {reason.name if reason else 'unexplained'}")
    for reason in dict.fromkeys(reason for _, reason in result.differences if reason):
        print(f"{reason.name}: {reason.text}")
    count = len(result.differences)
    print(f"{count} differences, {len(result.unexplained)} unexplained")


def _mark(a: str, b: str) -> str:
    return "" if a == b else "!"


def _json(platform: PlatformMap) -> dict[str, Any]:
    cut = spans(platform)
    entries = [{**_range(e.addr, e.addr + e.size), "type": e.type} for e in kernel_table(platform)]
    return {
        "schema": 1,
        "name": platform.name,
        "form": platform.form,
        "descriptors": [
            {**_range(d.start, d.end), "type": d.type, "text": efi_type_name(d.type), "attribute": f"{d.attribute:#x}",
             "attribute_text": efi_attribute_text(d.attribute)}
            for d in platform.descriptors
        ],
        "e820": entries,
        "nodes": [{**_range(n.start, n.end), "node": n.node, "hotplug": n.hotplug} for n in platform.nodes],
        "spans": [{**_range(span.start, span.end), "kind": span.kind.word} for span in cut],
        "totals": {kind.word: {"ranges": count, "bytes": size} for kind, count, size in totals(cut)},
        "notes": notes(platform),
    }  # fmt: skip


def _range(start: int, end: int) -> dict[str, object]:
    """Addresses as text, since JSON readers lose the low bits of 64-bit numbers; the end is exclusive."""
    return {"start": f"{start:#x}", "end": f"{end:#x}", "bytes": end - start}


def _comparison_json(a: PlatformMap, b: PlatformMap, result: Comparison) -> dict[str, Any]:
    return {
        "schema": 1,
        "a": {"name": a.name, "form": a.form},
        "b": {"name": b.name, "form": b.form},
        "ranges": [{**_range(row.start, row.end), "a": row.a, "b": row.b} for row in result.rows],
        "differences": [
            {**_range(d.start, d.end), "a": d.a, "b": d.b, "reason": reason and reason.name}
            for d, reason in result.differences
        ],
        "unexplained": len(result.unexplained),
    }


if __name__ == "__main__":
    script("map")
