"""The kernel command line: splitting (lib/cmdline.c, next_arg) and the early parameters of interest.

Names compare as in the kernel: a dash is an underscore. Of a parameter that is given twice the last one counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from guest.units import memparse

_SPACES = frozenset(" \t\n\v\f\r\xa0")


@dataclass(frozen=True, slots=True)
class EarlyParams:
    """What the command line says.

    ``values`` has every parameter by name, None where it has no value. ``notes`` are the kernel's words about
    what it refused.
    """

    values: dict[str, str | None]
    lazy_accept: bool = True
    """``accept_memory=lazy`` (default) or ``eager`` (v9 02/14)."""
    nokaslr: bool = False
    fake_unaccepted_start: int | None = None
    """``fake_unaccepted_start=``: an address (v9 03/14)."""
    notes: tuple[str, ...] = ()


def parse_early_param(command_line: str) -> EarlyParams:
    """Read ``command_line``. A refused value changes nothing; text behind ``--`` is for init."""
    values: dict[str, str | None] = {}
    notes: list[str] = []
    lazy_accept, nokaslr = True, False
    fake_start: int | None = None
    for name, value in parse_args(command_line):
        values[name] = value
        nokaslr = nokaslr or (name == "nokaslr" and value is None)
        if name == "accept_memory" and value in ("lazy", "eager"):
            lazy_accept = value == "lazy"
        elif name == "accept_memory":
            notes.append(f"Malformed early option '{name}'")
        elif name == "fake_unaccepted_start":
            fake_start, refused = _address(value, fake_start)
            notes += [f"Malformed early option '{name}'"] * refused
    return EarlyParams(values, lazy_accept, nokaslr, fake_start, tuple(notes))


def _address(value: str | None, before: int | None) -> tuple[int | None, bool]:
    """The address of ``fake_unaccepted_start=``, and whether it was refused: text behind it turns the feature off."""
    if value is None:
        return before, True
    address, rest = memparse(value)
    return (None, True) if rest else (address, False)


def parse_args(command_line: str) -> Iterator[tuple[str, str | None]]:
    """Name and value of each parameter up to ``--``, in order."""
    for word in _words(command_line):
        name, value = _next_arg(word)
        if value is None and name == "--":
            return
        yield name.replace("-", "_"), value


def _words(text: str) -> Iterator[str]:
    """The text cut at white space outside double quotes."""
    word, quoted = "", False
    for character in text:
        if character in _SPACES and not quoted:
            if word:
                yield word
            word = ""
            continue
        quoted ^= character == '"'
        word += character
    if word:
        yield word


def _next_arg(word: str) -> tuple[str, str | None]:
    """Name and value of one word; quotes around the word or around the value are dropped."""
    if word.startswith('"'):
        word = word[1:].removesuffix('"')
    name, equals, value = word.partition("=")
    if not equals or not name:
        return word, None
    if value.startswith('"'):
        value = value[1:].removesuffix('"')
    return name, value
