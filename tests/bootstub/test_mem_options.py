"""The command line as the decompressor reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.cmdline import arguments, find_option, find_option_bool, read_command_line, simple_strtoull
from bootstub.mem_options import MemOptions
from bootstub.slots import MemVector

LIMIT = 1 << 46
GIB, MIB = 1 << 30, 1 << 20


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"", []),
        (b"  quiet\tmem=1G ", [("quiet", None), ("mem", "1G")]),
        (b'a="b c" d', [("a", "b c"), ("d", None)]),
        (b'"a=b c" d', [("a", "b c"), ("d", None)]),
        (b'"a b" c', [("a b", None), ("c", None)]),
        (b"=x =y=z", [("=x", None), ("=y", "z")]),
        (b'a="b', [("a", "b")]),
        (b'a=b"c d"e', [("a", 'b"c d"e')]),
        (b"mem=1G -- mem=2G", [("mem", "1G")]),
        (b"--=1 b", [("--", "1"), ("b", None)]),
        (b"a\xa0b=1", [("a", None), ("b", "1")]),
    ],
)
def test_arguments(line, expected):
    """Arguments end at blanks outside quotes, and the reading at two dashes."""
    assert list(arguments(line)) == expected


@given(st.binary(max_size=60).filter(lambda line: b"\0" not in line))
def test_any_line(line):
    """Whatever the line is, it is read to its end."""
    for name, value in arguments(line):
        assert isinstance(name, str)
        assert value is None or isinstance(value, str)
    MemOptions.parse(line, LIMIT)


def test_words():
    """A word is what stands between blanks and control characters; the last of several values counts."""
    line = b"nokaslrx\x01nokaslr acpi=off acpi=rsdt x=nokaslr"
    assert find_option_bool(line, b"nokaslr") == 10
    assert find_option_bool(line, b"acpi") == 0
    assert find_option(line, b"acpi") == b"rsdt"
    assert find_option(line, b"mem") is None


def test_the_line_ends_at_a_nul_or_at_2047_bytes(new_boot):
    """Nothing behind the NUL's page is read; a longer line is cut."""
    memory = new_boot("firmware").machine.memory
    memory.write(0x1FF_FF00, b"a" * 0x100 + b"b\0c")
    assert read_command_line(memory, 0x1FF_FF00) == b"a" * 0x100 + b"b"
    memory.write(0x1FF_F000, b"x" * 4096)
    assert read_command_line(memory, 0x1FF_F001) == b"x" * 2047
    assert read_command_line(memory, 0) == b""


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("", LIMIT),
        ("mem=1G", GIB),
        ("mem=2G mem=1G mem=3G", GIB),
        ("mem=nopentium mem=1G", GIB),
        ("mem=0 mem=1G", LIMIT),
        ("mem mem=1G", LIMIT),
        ("memmap=3G", 3 * GIB),
        ("memmap=64M$0 memmap=1G@0", 64 * MIB),
        ("memmap=1G@2G", LIMIT),
        ("memmap=exactmap,1G", LIMIT),
        ("memmap=x,1G memmap=2G", 2 * GIB),
    ],
)
def test_limits(text, limit):
    """mem= and a memmap= without a place limit what counts as memory; mem=0 ends the reading."""
    options = MemOptions.parse(text.encode(), LIMIT)
    assert (options.mem_limit, options.avoid) == (limit, [])


def test_regions_of_memmap():
    """Up to four regions are avoided, whatever they are marked as; a fifth in the same option is too much."""
    regions = [MemVector(GIB, MIB), MemVector(2 * GIB, MIB), MemVector(3 * GIB, 0)]
    text = "memmap=1M$1G,1M#2G memmap=0!3G"
    options = MemOptions.parse(text.encode(), LIMIT)
    assert (options.avoid, options.memmap_too_large) == (regions, False)
    four = MemOptions.parse(f"{text} memmap=1M$4G".encode(), LIMIT)
    assert (len(four.avoid), four.memmap_too_large) == (4, False)
    assert MemOptions.parse(f"{text} memmap=1M$4G,1M$5G".encode(), LIMIT).memmap_too_large
    unseen = MemOptions.parse(f"{text} memmap=1M$4G memmap=1M$5G".encode(), LIMIT)
    assert (len(unseen.avoid), unseen.memmap_too_large) == (4, False)


@pytest.mark.parametrize(
    ("text", "pages", "warnings"),
    [
        ("hugepages=3", 0, 0),
        ("hugepagesz=1G hugepages=3", 3, 0),
        ("hugepagesz=1024M hugepages=0x10", 16, 0),
        ("hugepagesz=2M hugepages=3", 0, 0),
        ("hugepagesz=1G hugepagesz=2M hugepages=3", 0, 0),
        ("hugepagesz=1G hugepages=3 hugepagesz=2M hugepages=9", 3, 0),
        ("hugepagesz=1G hugepagesz=1G hugepages=3K", 3, 1),
        ("hugepagesz=1G hugepages", 0, 0),
        ("default_hugepagesz=1G hugepages=5", 0, 0),
    ],
)
def test_huge_pages(text, pages, warnings):
    """hugepages= counts behind hugepagesz=1G."""
    options = MemOptions.parse(text.encode(), LIMIT)
    assert (options.gb_huge_pages, len(options.warnings)) == (pages, warnings)


def test_numbers():
    """Decimal, octal and hexadecimal, without a suffix."""
    assert [simple_strtoull(text) for text in ("12K", "010", "0x1fg", "0x", "x")] == [12, 8, 31, 0, 0]
