"""``unaccepted diff``: two boots, what they saved, and boot_params files; each difference with its author."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.boot_params import BootE820Entry, build_e820_table
from guest.ranges import RangeMap
from tools.diff import differences
from tools.facts import Fact, Facts, Span

SPAN = '{"schema":1,"fields":{},"ranges":{"e820":[%s]}}'
ZEROED = "efi-stub bootstub.stub.Stub.__init__ #"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(name, *words)``: the directory of a boot with these options, run once."""
    from tools.cli import main

    root = tmp_path_factory.mktemp("boots")

    def run(name: str, *words: str) -> Path:
        path = root / name
        if not path.exists():
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                main(["boot", "--save", str(path), *words])
        return path

    return run


@pytest.fixture
def found(command):
    """``found(a, b)``: the differences in JSON."""

    def run(a: object, b: object) -> list[dict]:
        answer = command("diff", a, b, "--json")
        differences = json.loads(answer.out)["differences"]
        assert answer.status == (1 if differences else 0)
        return differences

    return run


def page(*entries: BootE820Entry) -> bytes:
    data = bytearray(4096)
    data[0x1E8] = len(entries)
    table = build_e820_table(entries)
    data[0x2D0 : 0x2D0 + len(table)] = table
    return bytes(data)


def test_equal(command, saved):
    """A boot and its own saved directory are equal, whichever way they come."""
    four = saved("4G")
    assert (command("diff", four, four).status, command("diff", four, "td:4G").status) == (0, 0)
    answer = command("diff", "td:4G", four)
    assert answer.out.splitlines() == ["A td:4G", f"B {four}", "equal"]


def test_command_lines(found, saved):
    """A longer command line is told as text, and nothing else of boot_params but its effects differs."""
    (difference,) = [
        d for d in found(saved("4G"), saved("quiet", "--cmdline", "nokaslr quiet")) if "text" in d["where"]
    ]
    assert difference["section"] == "command line"
    assert (difference["a"]["value"], difference["b"]["value"]) == ("nokaslr efi=debug", "nokaslr quiet")
    assert difference["b"]["author"].startswith("efi-stub bootstub.stub.Stub.convert_command_line #")


def test_protocols(found, saved):
    """v9's bitmap is a field of boot_params with its author; mainline's zero is that of the cleared page."""
    both = found(saved("4G"), saved("mainline", "--protocol", "mainline"))
    (difference,) = [d for d in both if d["where"] == "0x078 unaccepted_memory"]
    assert difference["section"] == "boot_params"
    assert difference["a"]["author"].startswith("efi-stub bootstub.unaccepted_memory.BitmapOfStub.allocate #")
    assert difference["b"]["author"].startswith(ZEROED)
    assert difference["b"]["value"] == "0x0000000000000000  no bitmap"
    assert any(d["where"] == "decompress.virtual_ns" and d["b"]["value"] == "nothing" for d in both)


def test_memory(found, saved):
    """One GiB more is one range of e820, one of the EFI map, and ranges of the bitmap, each with its author."""
    by_section: dict[str, list[dict]] = {}
    for difference in found(saved("4G"), saved("5G", "--memory", "5G")):
        by_section.setdefault(difference["section"], []).append(difference)
    assert {"stages", "e820", "EFI memory map", "bitmap"} == set(by_section)
    (e820,), (efi,) = by_section["e820"], by_section["EFI memory map"]
    assert e820["where"] == efi["where"] == "[0x180000000, 0x1c0000000) 1 GiB"
    assert (e820["a"]["value"], e820["b"]["value"]) == ("nothing", "usable")
    assert e820["b"]["author"].startswith("efi-stub bootstub.exit_boot.ExitBoot._store #")
    assert efi["b"]["author"].startswith("efi-stub firmware.memory_services.MemoryServices.get_memory_map #")
    assert all("_accept_units #" in d["a"]["author"] or d["a"]["value"] == "nothing" for d in by_section["bitmap"])


def test_extended_table(found, file):
    """Entries beyond 128 are e820 too, and their author is the stub."""
    rows = [{"type": "Conventional", "start": "1M", "size": "2047M"}]
    rows += [
        {"type": ("Unaccepted", "Reserved")[n % 2], "start": f"{4096 + 16 * n}M", "size": "16M"} for n in range(200)
    ]
    maps = [file(f"{n}.json", json.dumps(rows[: 201 - n])) for n in (0, 1)]
    configs = [file(f"{n}.toml", f'efi-map = "{path}"\nscript = "/dev/null"\n') for n, path in enumerate(maps)]
    (difference,) = [d for d in found(*configs) if d["section"] == "e820"]
    assert difference["where"] == f"[{4096 + 16 * 199 << 20:#x}, {4096 + 16 * 200 << 20:#x}) 16 MiB"
    assert "bootstub.exit_boot.ExitBoot._add_e820ext" in difference["a"]["author"]


def test_a_guest_that_died(found, saved):
    """How a boot ended is a fact too; what it did not reach is not compared."""
    died = found(saved("4G"), saved("16M", "--memory", "16M"))
    assert {d["section"] for d in died} == {"boot", "stages"}
    assert died[0]["a"]["value"] == "stage runtime done"


def test_boot_params_files(found, file, saved):
    """Pages without a boot are compared by field and by range; authors are not known."""
    one = file("one", page(BootE820Entry(0, 0x1000, 1), BootE820Entry(0x1000, 0x1000, 2)))
    other = file("other", page(BootE820Entry(0, 0x2000, 1)))
    assert [(d["section"], d["where"]) for d in found(one, other)] == [
        ("boot_params", "0x1e8 e820_entries"),
        ("e820", "[0x1000, 0x2000) 4 KiB"),
    ]
    turned = file("turned", page(BootE820Entry(0x1000, 0x1000, 2), BootE820Entry(0, 0x1000, 1)))
    assert [d["where"] for d in found(one, turned)] == ["0x2d0 e820_table[0]", "0x2e4 e820_table[1]"]
    assert {d["a"]["author"] for d in found(one, saved("4G"))} == {""}


def test_text(command, file):
    """Section, place, both sides."""
    names = file("one", page()), file("other", page(BootE820Entry(0, 0x2000, 1)))
    answer = command("diff", *names)
    assert answer.status == 1
    assert answer.out.splitlines()[2:] == [
        "boot_params", "  0x1e8 e820_entries", "    A 0x00  0", "    B 0x01  1",
        "e820", "  [0x0, 0x2000) 8 KiB", "    A nothing", "    B usable", "2 differences",
    ]  # fmt: skip


spans = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.sampled_from("abc"), st.sampled_from("xy")), max_size=5
)


@given(spans, spans)
def test_ranges_against_a_model(one, other):
    """A byte is in a difference exactly if its last value differs; neighbouring differences are one."""
    sides, models = [], []
    for rows in (one, other):
        ordered = [(min(a, b), max(a, b), value, author) for a, b, value, author in rows]
        model = ["nothing"] * 21
        for start, end, value, _ in ordered:
            model[start:end] = [value] * (end - start)
        models.append(model)
        sides.append(Facts("", None, ranges={"r": [Span(s, e, Fact(v, a)) for s, e, v, a in ordered]}))
    told: RangeMap[tuple[str, str] | None] = RangeMap(None)
    for difference in differences(*sides):
        start, end = (int(text.strip("[,)"), 16) for text in difference.where.split()[:2])
        told.assign(start, end, (difference.a.value, difference.b.value))
    for byte, (a, b) in enumerate(zip(*models, strict=True)):
        assert told[byte] == ((a, b) if a != b else None)


BAD = {
    "facts.json": [
        ("", "Expecting value"), ("[]", "schema 1"), ("{}", "schema 1"), ('{"schema": 1}', "an object"),
        ('{"schema":1,"fields":{"a":3},"ranges":{}}', "an object"),
        ('{"schema":1,"fields":{"a":{"b":{"value":1,"author":""}}},"ranges":{}}', "text"),
        ('{"schema":1,"fields":{},"ranges":{"e820":3}}', "a list"),
        (SPAN % '{"start":"0x2","end":"0x1","value":"","author":""}', "start <= end"),
        (SPAN % '{"start":"2","end":"0x1","value":"","author":""}', "hexadecimal"),
        ("[" * 100_000, "JSON"),
    ],
    "journal.jsonl": [
        ("", "JSON"), ('{"schema":2}', "schema 1"), ('{"schema":1,"boot_params":5,"event":0}', "an address"),
        ('{"schema":1,"boot_params":"0x0","event":-1}', "the number of an event"),
        ('{"schema":1,"boot_params":"0x0","event":0}\n[]', "an object"),
        ('{"schema":1,"boot_params":"0x0","event":0}\n{"stage":1}', "text"),
        ('{"schema":1,"boot_params":"0x0","event":0}\n{"stage":"","author":"","start":"0x1fffffffffffffffff"}', "2^64"),
    ],
    "boot_params.bin": [("", "4096 bytes"), ("x" * 4097, "4096 bytes")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), [(n, *case) for n, cases in BAD.items() for case in cases])
def test_a_saved_boot_that_was_changed(refused, saved, tmp_path, name, text, expected):
    """It is refused in one line that names the file."""
    for path in saved("4G").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text(text)
    error = refused("diff", tmp_path, tmp_path)
    assert expected in error
    assert name in error or "boot_params" in error


def test_wrong_sources(refused, tmp_path):
    """What is neither a boot nor a page is refused."""
    assert refused("diff", tmp_path / "none", "td:4G").endswith("/none: No such file or directory")
    assert refused("diff", tmp_path, "td:4G").endswith("Is a directory")
