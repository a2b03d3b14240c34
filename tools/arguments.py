"""Numbers on the command line: what ``type=`` of an argument needs to refuse all others as wrong usage."""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable

MAX_JOBS = 1024
"""All processes are started at once."""
_MAX = 1 << 32


def number_from(low: int, high: int = _MAX) -> Callable[[str], int]:
    """A reader of decimal numbers from ``low`` to ``high``."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) <= len(str(high)) and low <= int(text) <= high):
            expected = f"a number from {low} {'on' if high == _MAX else f'to {high}'}"
            raise ArgumentTypeError(f"found {text[:80]!r}, expected {expected}")
        return int(text)

    return read


def add_jobs_option(parser: ArgumentParser) -> None:
    """``--jobs``, by default one process for each CPU."""
    text = "processes (default: one for each CPU)"
    parser.add_argument("--jobs", metavar="N", type=number_from(1, MAX_JOBS), default=os.cpu_count() or 1, help=text)
