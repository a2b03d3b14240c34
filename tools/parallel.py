"""One function over many inputs, on several processors."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

_BATCH = 64
"""Inputs that are read ahead for each process."""


def in_parallel(function: Callable[[A], B], inputs: Iterator[A], jobs: int, chunk: int = 4) -> Iterator[B]:
    """``map(function, inputs)`` in ``jobs`` processes, results in order. Everything must be fit for pickling.

    A process takes ``chunk`` inputs at once: 1 is best for what takes long.
    """
    if jobs == 1:
        yield from map(function, inputs)
        return
    with ProcessPoolExecutor(jobs, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        while batch := list(islice(inputs, _BATCH * jobs)):
            yield from pool.map(function, batch, chunksize=chunk)
