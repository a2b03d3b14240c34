"""Tables, JSON and bytes on standard output: what every verb prints with, and no more than that."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

_HEX_LINE = 16


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, all others to the right; with rich on a terminal."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*headers, box=None, header_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in [headers, *rows]) for column in range(len(headers))]
    for row in [headers, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())


def hex_dump(data: bytes, base: int = 0) -> list[str]:
    """The bytes as xxd(1) shows them; the first one is at address ``base``."""
    return [_hex_line(base + at, data[at : at + _HEX_LINE]) for at in range(0, len(data), _HEX_LINE)]


def _hex_line(at: int, piece: bytes) -> str:
    text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in piece)
    return f"{at:08x}: {piece.hex(' ', -2):<39}  {text}"


def add_json_option(parser: argparse._ActionsContainer) -> None:
    """Give ``parser`` the option that every verb with facts has: ``--json``, pretty unless told otherwise."""
    parser.add_argument("--json", nargs="?", const="pretty", choices=("pretty", "short"), help="print JSON")


def json_text(data: object, form: str) -> str:
    """``data`` as JSON: ``pretty`` with an indent, ``short`` in one line."""
    return json.dumps(data, indent=2) if form == "pretty" else json.dumps(data, separators=(",", ":"))
