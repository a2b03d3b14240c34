"""What hostile input may come to: a value, or an error of ours that is short enough to be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from guest.errors import BootError

_LONGEST = 2000
"""Characters of an error: it may quote what was found, but no input without end."""


@contextmanager
def value_or_refusal() -> Iterator[None]:
    """Let a ``BootError`` with words pass; anything else that is raised fails the test."""
    try:
        yield
    except BootError as error:
        check_refusal(error)


def check_refusal(error: BootError) -> None:
    """Fail unless the error has words, and not too many; the command line makes one printable line of them."""
    text = str(error)
    assert 0 < len(text.strip()) < _LONGEST, f"{len(text)} characters: {text[:300]!r}"
