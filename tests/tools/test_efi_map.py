"""Memory maps that users bring along: real logs, JSON, and what is neither."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.sample_kernel import sample_bzimage
from firmware.memory_descriptor import MemoryDescriptor, pack_map
from guest.errors import FormatError
from kernel.efi_memmap import memmap_lines
from tests.refusals import value_or_refusal
from tools.maps.source import boot_descriptors, parse_text
from tools.pipeline import Boot, BootConfig

SAMPLES = Path(__file__).parent.parent / "samples" / "efi_maps"
CAPTURES = {"efirom-q35-2G-attrs-k6.12": 133, "efirom-q35-2G-types-k6.1": 152, "efirom-q35-2G-unaccepted-k6.12": 127}
"""Descriptors of the first map that each log prints."""

LINE = "efi: mem{:02}: [{:<12}|   |  |  |  |  |  |  |  |  |  |   |WB|WT|WC|UC] range=[0x{:016x}-0x{:016x}] ({}MB)"
ROW = {"type": "Unaccepted", "start": "0x100000000", "pages": 524288}


def parse_efi_map(text: str, name: str) -> tuple[MemoryDescriptor, ...]:
    return boot_descriptors(parse_text(text, name))


def log(name: str) -> str:
    return gzip.decompress((SAMPLES / f"{name}.txt.gz").read_bytes()).decode()


def line(number: int, start: int, last: int, name: str = "Conventional") -> str:
    return LINE.format(number, name, start, last, (last + 1 - start) >> 20)


def test_corpus():
    """The samples are the files that their note names."""
    note = (SAMPLES / "ORIGIN.md").read_text()
    files = sorted(SAMPLES.glob("*.gz"))
    assert [path.name for path in files] == [f"{name}.txt.gz" for name in sorted(CAPTURES)]
    for path in files:
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" in note


@pytest.mark.parametrize("name", sorted(CAPTURES))
def test_real_logs_come_back_line_by_line(name):
    """The map that is read prints as the very lines of the log: the first map of two."""
    descriptors = parse_efi_map(log(name), name)
    lines = [re.sub(r"^\[ *\d+\.\d+\] ", "", text) for text in log(name).splitlines()]
    assert len(descriptors) == CAPTURES[name]
    assert list(memmap_lines(list(descriptors))) == lines[: len(descriptors)]


@pytest.mark.parametrize("name", sorted(CAPTURES))
@pytest.mark.parametrize("host_level", [0, 1])
def test_boot_with_a_real_map(name, host_level):
    """A guest with that map boots to the end, and its kernel knows the same RAM."""
    descriptors = parse_efi_map(log(name), name)
    boot = Boot(BootConfig(sample_bzimage(), efi_map=descriptors, host_level=host_level))
    boot.run()
    ram = (1, 2, 3, 4, 7, 15)
    end = max(d.end for d in descriptors if d.type in ram)
    assert boot.kernel.max_pfn == end >> 12
    if "unaccepted" in name:
        assert boot.bitmap()[256:] != bytes(64)
        assert max(zone.nr_unaccepted for zone in boot.kernel.allocator.zones) > 0
    else:
        assert boot.bitmap() == b""


def test_log_with_other_lines():
    """Time stamps, other lines and line ends of any kind do not matter; a second map is not read."""
    text = "\r\n".join([
        "[    0.000000] efi: EFI v2.7 by EDK II",
        "[    0.000000] efi: memattr: Entry attributes invalid: RO and XP bits both cleared",
        "[    0.000000][    T0] " + line(0, 0, 0x9FFFF),
        "[    0.000000] efi: Remove mem01: MMIO range=[0xffc00000-0xffffffff] (4MB) from e820 map",
        "<6>" + line(1, 1 << 32, (1 << 32) + 0x7FFFFFFF, "Unaccepted"),
        line(0, 0x1000, 0x1FFF),
        "efi: mem01: cut",
    ])  # fmt: skip
    assert parse_efi_map(text, "log") == (
        MemoryDescriptor(7, 0, 0xA0, 0xF), MemoryDescriptor(15, 1 << 32, 1 << 19, 0xF),
    )  # fmt: skip


@pytest.mark.parametrize("outer", [lambda rows: rows, lambda rows: {"descriptors": rows, "note": "mine"}])
def test_json(outer):
    """A list, or an object with one; types by number or by the kernel's name, numbers as text too."""
    rows = [ROW, {"type": 7, "start": 0, "pages": "0xa0", "attribute": "0x800000000000000f"}]
    assert parse_efi_map(json.dumps(outer(rows)), "map") == (
        MemoryDescriptor(15, 1 << 32, 1 << 19, 0), MemoryDescriptor(7, 0, 0xA0, 1 << 63 | 15),
    )  # fmt: skip


def test_largest_values_fit_the_descriptor():
    """Type and attribute may have all their bits set; the last page of the address space may be used."""
    row = {"type": 0xFFFFFFFF, "start": (1 << 52) - 4096, "pages": 1, "attribute": (1 << 64) - 1}
    (found,) = parse_efi_map(json.dumps([row]), "map")
    assert pack_map([found])[:4] == b"\xff\xff\xff\xff"
    assert found.end == 1 << 52


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("", "m", "no memory descriptor"),
        ("no map here\n" * 50, "m", "no memory descriptor"),
        ("[]", "m", "no memory descriptor"),
        ("{}", "m, line 1", "no list of descriptors"),
        ('{"descriptors": 5}', "m, line 1", "no list of descriptors"),
        ('[\n{"type": 7,\n', "m, line 3", "text that is no JSON"),
        ("[" * 100_000, "m, line 1", "text that is no JSON"),
        ("[" + "9" * 5000 + "]", "m, line 1", "text that is no JSON"),
        ("[1]", "m: descriptor 0", "int"),
        (json.dumps([ROW | {"type": "Ram"}]), "m: descriptor 0, type", "'Ram'"),
        (json.dumps([ROW | {"type": 1 << 32}]), "m: descriptor 0, type", "4294967296"),
        (json.dumps([ROW | {"type": True}]), "m: descriptor 0, type", "True"),
        (json.dumps([ROW | {"type": [[1]]}]), "m: descriptor 0, type", "[[1]]"),
        (json.dumps([ROW | {"start": 1 << 64}]), "m: descriptor 0, start", str(1 << 64)),
        (json.dumps([ROW | {"start": "4X"}]), "m: descriptor 0, start", "'4X'"),
        (json.dumps([ROW | {"pages": -1}]), "m: descriptor 0, pages", "-1"),
        (json.dumps([ROW | {"pages": 1.5}]), "m: descriptor 0, pages", "1.5"),
        (json.dumps([ROW, {"type": 7}]), "m: descriptor 1, start", "None"),
        (json.dumps([ROW | {"attribute": 1 << 64}]), "m: descriptor 0, attribute", str(1 << 64)),
        (json.dumps([ROW | {"start": 1}]), "m: descriptor 0", "a start inside a page"),
        (json.dumps([ROW | {"pages": 0}]), "m: descriptor 0", "0 pages"),
        (
            json.dumps([ROW | {"pages": 1 << 63}]), "m: descriptor 0",
            "0x8000000000000000 pages, which end at 0x8000000000100000000",
        ),
        (
            json.dumps([ROW | {"start": (1 << 64) - 4096}]), "m: descriptor 0",
            "0x80000 pages, which end at 0x1000000007ffff000",
        ),
        (
            json.dumps([ROW, ROW | {"start": "0x17ffff000", "pages": 1, "type": "Reserved"}]), "m: descriptor 1",
            "[0x17ffff000, 0x180000000) over [0x100000000, 0x180000000) of descriptor 0",
        ),
        (
            json.dumps([ROW, ROW | {"type": "Reserved"}]), "m: descriptor 1",
            "[0x100000000, 0x180000000) over [0x100000000, 0x180000000) of descriptor 0",
        ),
        (json.dumps([ROW | {"start": n << 13, "pages": 1} for n in range(65537)]), "m", 65537),
        (line(0, 0, 0xFFF) + "\n" + line(2, 0x1000, 0x1FFF), "m, line 2", "mem02"),
        (line(1, 0, 0xFFF), "m, line 1", "mem01"),
        (line(0, 0, 0xFFF) + "\n" + line(1, 0x1000, 0x1FFF)[:-30], "m, line 2", line(1, 0x1000, 0x1FFF)[:80]),
        ("efi: mem" + "0" * 5000 + ":", "m, line 1", "efi: mem" + "0" * 72),
        (line(0, 0, 0x7FF), "m, line 1", line(0, 0, 0x7FF)[:80]),
        (line(0, 0x2000, 0xFFF), "m, line 1", line(0, 0x2000, 0xFFF)[:80]),
        (line(0, 0x800, 0x17FF), "m: descriptor 0", "a start inside a page"),
        (line(0, 0, 0xFFF, "Ordinary"), "m, line 1", line(0, 0, 0xFFF, "Ordinary")[:80]),
        (line(0, 0, 0xFFF, "type=99999999999"), "m, line 1", line(0, 0, 0xFFF, "type=99999999999")[:80]),
        (line(0, 0, 0xFFF).replace("UC", "XX"), "m, line 1", line(0, 0, 0xFFF).replace("UC", "XX")[:80]),
        (line(0, 0, 0xFFF).replace("   |  |", "attr=0xzz|", 1), "m, line 1", None),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_no_map(text, where, found):
    """It is refused; the error names line or descriptor, and both descriptors that overlap."""
    with pytest.raises(FormatError) as caught:
        parse_efi_map(text, "m")
    assert caught.value.what == where
    assert found is None or caught.value.found == found


@given(st.text(max_size=200) | st.text('[]{}",:0123456789.eE-tfn \n', max_size=200))
def test_random_text(text):
    """Any text is a map that can be packed, or refused."""
    for prefix in ("", "[", "efi: mem00: ["):
        with value_or_refusal():
            pack_map(parse_efi_map(prefix + text, "random"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["type", "start", "pages", "attribute", "descriptors"]), inner)
        ),
    )
)
def test_random_json(value):
    """Any JSON value is a map that can be packed, or refused."""
    for data in (value, [value], [{"type": 7, "start": 0, "pages": 1, "attribute": value}]):
        with value_or_refusal():
            pack_map(parse_efi_map(json.dumps(data), "random"))


def test_damaged_logs():
    """A real log with characters changed, lost or doubled is a map that can be packed, or refused."""
    rng = random.Random(1)
    lines = log("efirom-q35-2G-types-k6.1").splitlines()[25:40]
    good = [re.sub(r"mem\d+", f"mem{number:02}", text) for number, text in enumerate(lines)]
    for _ in range(1500):
        text = list("\n".join(good))
        for _ in range(rng.choice([1, 2, 8])):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(3)] = rng.choice(
                ["", "0", "f", "|", "]", "=", "\0", "\n", "9" * 5000, "attr=0x"]
            )
        with value_or_refusal():
            pack_map(parse_efi_map("".join(text), "damaged"))
