"""What a person sees of real code that runs for a while: a status line on a terminal, and a Ctrl-C that is heeded."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from guest.trace import Print, Record
from tools.pipeline import Boot

A = TypeVar("A")

_WIPE = "\r\x1b[K"


class StatusLine:
    """One line on standard error, rewritten while real code runs; nothing at all if that is no terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._last_line = ""
        self._shown = False

    def on_record(self, record: Record) -> None:
        """Remember the last line of the log."""
        if isinstance(record.event, Print):
            self._last_line = record.event.text

    def show(self, count: int) -> None:
        """Write the line: instructions so far, seconds on this machine, the last line of the log."""
        if not self._terminal:
            return
        text = f"{count / 1e6:.0f} M instructions, {time.monotonic() - self._start:.0f} s: {self._last_line}"
        printable = "".join(character if character.isprintable() else "?" for character in text)
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(_WIPE + printable[:width])
        sys.stderr.flush()
        self._shown = True

    def wipe(self) -> None:
        """Take the line away, for what is printed next."""
        if self._shown:
            sys.stderr.write(_WIPE)
            sys.stderr.flush()
            self._shown = False


@contextmanager
def interruptible(boot: Boot, at_prompt: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Within this, Ctrl-C leaves the boot as ``KeyboardInterrupt`` where real code can be left.

    An exception from the signal handler itself could come up in a callback from the engine's C code, where it would
    be lost. So the signal is only noted, and raised at the next event of the trace or tick of the vCPU, except
    ``at_prompt``, where somebody waits for it.
    """
    pending = False
    progress = boot.progress

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        if at_prompt() or boot.real_code is None or not boot.real_code.running:
            raise KeyboardInterrupt
        pending = True

    def on_record(record: Record) -> None:
        if pending:
            raise KeyboardInterrupt

    def on_tick(count: int) -> None:
        if pending:
            raise KeyboardInterrupt
        progress(count)

    boot.progress = on_tick
    boot.trace.watchers.append(on_record)
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        boot.trace.watchers.remove(on_record)
        boot.progress = progress


def counted(what: str, results: Iterator[A]) -> Iterator[A]:
    """``results``; on a terminal, with their number so far, which is wiped in the end."""
    shown = sys.stderr.isatty()
    for number, result in enumerate(results, start=1):
        if shown:
            print(f"\r{number} {what}", end="", file=sys.stderr, flush=True)
        yield result
    if shown:
        print(_WIPE, end="", file=sys.stderr, flush=True)
