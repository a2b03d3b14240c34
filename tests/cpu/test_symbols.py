import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstub.bzimage import parse_bzimage
from bootstub.payload import decompress
from cpu.symbols import Symbols, parse_system_map, read_kallsyms
from guest.errors import FormatError

SAMPLE = Path(__file__).parent.parent / "samples" / "kallsyms" / "linux-6.12.117+deb12-cloud-amd64.txt"
TEXT = 0xFFFF_FFFF_8100_0000

MAP = """\
0000000000000000 D __per_cpu_start
0000000000031000 D __per_cpu_end
ffffffff81000000 T _text
ffffffff81000000 T _stext
ffffffff81000040 t local_function
ffffffff81000080 D data
ffffffff81000090 B _end
"""


def test_names():
    """An address is named by the first symbol at or below it, with the distance."""
    symbols = parse_system_map(MAP)
    assert symbols.name(TEXT) == "_text+0x0"
    assert symbols.name(TEXT + 0x12) == "_text+0x12"
    assert symbols.name(TEXT + 0x40) == "local_function+0x0"
    assert symbols.name(TEXT + 0x90) == "_end+0x0"


@pytest.mark.parametrize("address", [0, 0x40, 0x31000, 0x40_0000, TEXT - 1, TEXT + 0x91, (1 << 64) - 1])
def test_no_name(address):
    """Addresses of user space, per-CPU offsets, and what lies outside the kernel have no name."""
    symbols = parse_system_map(MAP)
    assert symbols.name(address) == f"{address:#x}"
    assert not symbols.is_text(address)


def test_text():
    """Only functions are text."""
    symbols = parse_system_map(MAP)
    assert [symbols.is_text(TEXT + offset) for offset in (0, 0x41, 0x7F, 0x80, 0x90)] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_placed():
    """Where KASLR moved the kernel, its symbols move by as much, and per-CPU offsets stay."""
    symbols = parse_system_map(MAP)
    moved = symbols.placed(TEXT + 0x20_0000)
    assert moved.addresses == (0, 0x31000, *(address + 0x20_0000 for address in symbols.addresses[2:]))
    assert (moved.name(TEXT + 0x20_0041), moved.name(TEXT + 0x41)) == ("local_function+0x1", f"{TEXT + 0x41:#x}")
    assert moved.placed(TEXT) == symbols.placed(TEXT) == symbols


def test_placed_without_a_start():
    """Symbols without _text stay where they are."""
    symbols = parse_system_map("ffffffff81000040 t local_function\n")
    assert symbols.placed(TEXT + 0x20_0000) == symbols


def test_address():
    """A name is looked up, unknown ones are None."""
    symbols = parse_system_map(MAP)
    assert symbols.address("local_function") == TEXT + 0x40
    assert symbols.address("nothing") is None


def test_proc_kallsyms():
    """Modules come unsorted, with their name in brackets."""
    symbols = parse_system_map(MAP + "ffffffffc0000100 t later\t[m]\nffffffffc0000000 t sooner\t[m]\n")
    assert symbols.addresses == tuple(sorted(symbols.addresses))
    assert symbols.name(0xFFFF_FFFF_C000_0010) == "sooner+0x10"


def test_nothing_is_known():
    """Without symbols every address is a number."""
    assert Symbols((), "", ()).name(TEXT) == f"{TEXT:#x}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ffffffffffffffff B The real System.map is elsewhere\n",
        MAP + "\n",
        "81000000T _text",
        "x" * 17 + " T a",
        "-1 T a",
    ],
)
def test_hostile_map(text):
    """A text that is no System.map is a FormatError."""
    with pytest.raises(FormatError):
        parse_system_map(text)


@given(st.text(alphabet="0123456789abcdef Tt_\n[]\tz", max_size=80))
def test_any_text(text):
    """Any text gives symbols or a FormatError."""
    try:
        symbols = parse_system_map(text)
    except FormatError:
        return
    assert len(symbols.addresses) == len(symbols.types) == len(symbols.names) > 0


def aligned(data):
    return data + bytes(-len(data) % 8)


def kallsyms(symbols, order):
    """The tables, written in the order of 6.12 or of 6.1, as scripts/kallsyms.c does. "st" has a token of its own."""
    tokens = [bytes([code]) if chr(code).isalnum() or code == ord("_") else b"" for code in range(256)]
    tokens[0xF0] = b"st"
    names, starts = b"", []
    for _, kind, name in symbols:
        starts.append(len(names))
        text = (kind + name).encode().replace(b"st", b"\xf0")
        length = len(text)
        names += (bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])) + text
    base = min(address for address, _, _ in symbols if address >> 63)
    offsets = [base - 1 - address if address >> 63 else address for address, _, _ in symbols]
    index, at = [], 0
    for token in tokens:
        index.append(at)
        at += len(token) + 1
    tables = {
        "num_syms": struct.pack("<I", len(symbols)),
        "names": names,
        "markers": struct.pack(f"<{len(starts[::256])}I", *starts[::256]),
        "seqs": b"".join(number.to_bytes(3, "big") for number in reversed(range(len(symbols)))),
        "token_table": b"".join(token + b"\0" for token in tokens),
        "token_index": struct.pack("<256H", *index),
        "offsets": struct.pack(f"<{len(offsets)}i", *offsets),
        "relative_base": struct.pack("<Q", base),
    }
    return b"\xcc" * 64 + b"".join(aligned(tables[name]) for name in order.split()) + b"\xcc" * 64


LAYOUTS = {
    "6.1": "offsets relative_base num_syms names markers token_table token_index",
    "6.1.y": "offsets relative_base num_syms names markers seqs token_table token_index",
    "6.12": "num_syms names markers token_table token_index offsets relative_base seqs",
}
MANY = (
    [(0, "A", "fixed_percpu_data"), (0x1000, "A", "percpu_stack")]
    + [(TEXT + 16 * n, "t" if n % 2 else "T", f"function_{n}_state") for n in range(700)]
    + [(TEXT + 0x10000, "D", "long_" + "x" * 300), (TEXT + 0x10001, "B", "_end")]
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [300, 512, 513, 702, 704])
def test_kallsyms(layout, count):
    """All symbols come out of the tables, of every layout and with every kind of padding."""
    symbols = read_kallsyms(kallsyms(MANY[:count], LAYOUTS[layout]))
    assert list(zip(symbols.addresses, symbols.types, symbols.names, strict=True)) == MANY[:count]


def test_utf_16_is_no_token_table():
    """Digits in UTF-16 look like the tokens, and are passed over."""
    decoy = bytes(range(48, 58)).decode().encode("utf-16-le") * 3 + b"\0" * 0x2000
    symbols = read_kallsyms(aligned(decoy) + kallsyms(MANY, LAYOUTS["6.12"]))
    assert len(symbols.names) == len(MANY)


@pytest.mark.parametrize("data", [b"", b"\0" * 4096, bytes(range(256)) * 64, b"0\x001\x002\x00"])
def test_no_kallsyms(data):
    """An image without the tables has no symbols."""
    assert read_kallsyms(data) is None


@pytest.mark.parametrize("table", ["num_syms", "names", "markers", "offsets", "relative_base"])
def test_missing_table(table):
    """Tokens without the other tables are a FormatError."""
    order = " ".join(name for name in LAYOUTS["6.12"].split() if name != table)
    with pytest.raises(FormatError):
        read_kallsyms(kallsyms(MANY, order))


GOOD = kallsyms(MANY, LAYOUTS["6.12"])


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, len(GOOD)),
)
def test_any_damage(changes, cut):
    """Damaged tables give symbols, none, or a FormatError, and never more of them than there are bytes."""
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    for image in (bytes(data), bytes(data[:cut]), bytes(data[cut:])):
        try:
            symbols = read_kallsyms(image)
        except FormatError:
            continue
        assert symbols is None or len(symbols.names) <= len(image)


def test_debian_kernel(exact_debian_kernel):
    """Debian's kernel, which has no System.map, gives the addresses that /proc/kallsyms showed."""
    image = exact_debian_kernel.read_bytes()
    symbols = read_kallsyms(decompress(parse_bzimage(image).payload(image)))
    expected = parse_system_map(SAMPLE.read_text())
    assert {name: symbols.address(name) for name in expected.names} == dict(
        zip(expected.names, expected.addresses, strict=True)
    )
    assert symbols.name(symbols.address("accept_memory") + 0x12) == "accept_memory+0x12"
    assert len(symbols.names) > 150_000
