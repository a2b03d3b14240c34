"""Load options as firmware hands them over."""

from __future__ import annotations

import struct

import pytest

from bootstub.load_options import command_line, optional_data

END = b"\x7f\xff\x04\0"
FILE = struct.pack("<BBH", 4, 4, 8) + "k\0".encode("utf-16-le")
HIGH, LOW = "\ud83d", "\ude42"


def utf16(text: str) -> bytes:
    return text.encode("utf-16-le", errors="surrogatepass")


def load_option(attributes: int = 1, path: bytes = FILE + END, length: int | None = None, data: bytes = b"") -> bytes:
    head = struct.pack("<IH", attributes, len(path) if length is None else length)
    return head + utf16("Linux\0") + path + data


@pytest.mark.parametrize(
    ("options", "line", "counted"),
    [
        (utf16(HIGH + LOW), "\U0001f642", 4),
        (utf16(HIGH + "x"), "\ufffdx", 4),
        (utf16(LOW + HIGH + HIGH + LOW), "\ufffd\ufffd\U0001f642", 10),
        (utf16("x" + HIGH), "x", 1),
        (utf16("x" + LOW), "x\ufffd", 4),
        (utf16("x" + HIGH + "\0"), "x", 4),
        (utf16("x" + HIGH + "\n\0"), "x", 4),
        (utf16("quiet") + b"x", "quiet", 5),
        (b"x", "", 0),
    ],
)
def test_halves_of_pairs(options, line, counted):
    """Half a pair is replaced, but for a first half at the end, which is left out; so is half a unit.

    A first half counts unless it is the last of all.
    """
    assert command_line(options) == (line.encode(), counted, False)


def test_the_limit_counts_what_was_read():
    """A line that reaches 2048 bytes is cut, whatever comes behind; NUL and line end come before the limit."""
    assert command_line(utf16("a b" + "c" * 2044)) == (b"a b" + b"c" * 2044, 2047, False)
    assert command_line(utf16("a b" + "c" * 2045)) == (b"a", 1, True)
    assert command_line(utf16("a" + HIGH + " " + "c" * 2045)) == (b"a", 4, True)
    assert command_line(utf16("a b" + "c" * 2042 + HIGH)) == (b"a b" + b"c" * 2042, 2045, False)
    assert command_line(utf16("a b" + "c" * 2042 + LOW)) == (b"a", 1, True)
    assert command_line(utf16("a b" + "c" * 2044 + "\n" + "d" * 9)) == (b"a b" + b"c" * 2044, 2047, False)


@pytest.mark.parametrize("attributes", [0, 1, 9, 0x1F01])
def test_a_whole_load_option(attributes):
    """Firmware that hands over a whole EFI_LOAD_OPTION means its optional data."""
    assert optional_data(load_option(attributes, data=utf16("quiet"))) == utf16("quiet")
    assert optional_data(load_option(attributes, path=END)) == b""


@pytest.mark.parametrize(
    "options",
    [
        load_option(2),
        load_option(0x8000_0001),
        load_option(length=4),
        load_option(path=FILE),
        load_option(path=b"\x04\x04\x03\0" + END),
        load_option(path=b"\x04\x04\xff\0" + END),
        struct.pack("<IH", 1, 4) + utf16("Linux"),
        b"\1\0\0\0\4",
        b"",
        utf16("quiet"),
    ],
)
def test_what_is_no_load_option(options):
    """Anything else is a command line as it stands."""
    assert optional_data(options) is None
