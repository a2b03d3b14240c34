"""The command line as the decompressor reads it: three readers, each with rules of its own.

Sources: arch/x86/boot/cmdline.c, __cmdline_find_option() and __cmdline_find_option_bool(); lib/cmdline.c, next_arg().
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from guest.memory import GuestMemory
from guest.units import PAGE_SIZE, memparse

COMMAND_LINE_SIZE = 2048
"""Bytes that the kernel keeps of a command line, with its NUL (arch/x86/include/asm/setup.h)."""

_WORDS = re.compile(rb"[^\x00-\x20]+")
_SPACE = b" \t\n\v\f\r\xa0"
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*")


def read_command_line(memory: GuestMemory, at: int) -> bytes:
    """The bytes at ``at`` up to a NUL, 2047 of them at most; nothing behind the NUL's page is touched."""
    line = b""
    while at and len(line) < COMMAND_LINE_SIZE - 1:
        end = at + len(line)
        part = memory.read(end, min(PAGE_SIZE - end % PAGE_SIZE, COMMAND_LINE_SIZE - 1 - len(line)))
        text, nul, _ = part.partition(b"\0")
        line += text
        if nul:
            break
    return line


def find_option_bool(line: bytes, option: bytes) -> int:
    """Where ``option`` first is a word of the line, counted from 1; 0 if it is none."""
    return next((match.start() + 1 for match in _WORDS.finditer(line) if match[0] == option), 0)


def find_option(line: bytes, option: bytes) -> bytes | None:
    """What follows ``option=`` in the last word that begins so; None without such a word."""
    words = [word for word in _WORDS.findall(line) if word.startswith(option + b"=")]
    return words[-1].partition(b"=")[2] if words else None


def arguments(line: bytes) -> Iterator[tuple[str, str | None]]:
    """Name and value of each argument up to ``--``. Quotes keep blanks together; those around either are dropped."""
    at = _skip_spaces(line, 0)
    while at < len(line):
        end = _argument_end(line, at)
        name, value = _split(line[at:end])
        if (name, value) == (b"--", None):
            return
        yield name.decode("latin-1"), None if value is None else value.decode("latin-1")
        at = _skip_spaces(line, end + 1)


def simple_strtoull(text: str) -> int:
    """The number that ``text`` begins with, decimal, hexadecimal or octal; 0 if it begins with none."""
    match = _NUMBER.match(text)
    return memparse(match[0])[0] if match else 0


def _skip_spaces(line: bytes, at: int) -> int:
    while at < len(line) and line[at] in _SPACE:
        at += 1
    return at


def _argument_end(line: bytes, at: int) -> int:
    quoted = False
    for end in range(at, len(line)):
        quoted ^= line[end] == ord('"')
        if not quoted and line[end] in _SPACE:
            return end
    return len(line)


def _split(argument: bytes) -> tuple[bytes, bytes | None]:
    """Name and value; an equals sign that comes first is part of the name."""
    quoted, argument = argument[:1] == b'"', argument.removeprefix(b'"')
    equals = argument.find(b"=", 1)
    name, value = (argument, None) if equals < 0 else (argument[:equals], argument[equals + 1 :])
    if value is not None and (quoted or value[:1] == b'"'):
        value = value.removeprefix(b'"')
        return name, value.removesuffix(b'"')
    return (name.removesuffix(b'"') if quoted and value is None else name), value
