"""``unaccepted replay``: captured boots of real kernels in our kernel stages."""

from __future__ import annotations

import base64
import gzip
import json
import lzma
from functools import cache
from pathlib import Path

import pytest

from tools.cli import main

SAMPLES = Path(__file__).parent.parent / "samples"
SIMPLE = "bios-q35-2G-k6.12"


@cache
def captures() -> dict[str, dict[str, str]]:
    """The files of each capture by its name."""
    with lzma.open(SAMPLES / "captures/captures.jsonl.xz", "rt") as file:
        return {case["name"]: case["files"] for case in map(json.loads, file)}


@cache
def boot_params() -> dict[str, bytes]:
    """boot_params of each capture."""
    with gzip.open(SAMPLES / "boot_params/captures.jsonl.gz", "rt") as file:
        return {case["name"]: bytes.fromhex(case["boot_params"]) for case in map(json.loads, file)}


def unpack(name: str, root: Path) -> Path:
    """Write a capture as a directory."""
    directory = root / name
    for path, text in captures()[name].items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        is_base64 = text.startswith("base64:")
        file.write_bytes(base64.b64decode(text[7:]) if is_base64 else text.encode())
    (directory / "boot_params.bin").write_bytes(boot_params()[name])
    return directory


def table(out: str) -> dict[str, list[int]]:
    """Numbers of each subject: compared, equal, differ, unexplained."""
    rows = [line.rsplit(None, 4) for line in out.splitlines()[1:] if len(line.rsplit(None, 4)) == 5]
    return {row[0]: [int(n) for n in row[1:]] for row in rows if all(n.isdecimal() for n in row[1:])}


@pytest.mark.parametrize("name", sorted(boot_params()))
def test_a_captured_boot(name, tmp_path, capsys):
    """The kernel's own log and zoneinfo: nothing differs without a cause, and no line of the log differs at all."""
    assert main(["replay", str(unpack(name, tmp_path))]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["e820"][0] >= 9
    assert all(unexplained == 0 for *_, unexplained in rows.values())
    assert {subject for subject, row in rows.items() if row[2]} <= {
        "zones: managed", "zones: spanned and present", "min_free_kbytes", "zonelists"
    }  # fmt: skip
    if "unaccepted" not in name:  # that kernel panics in memblock
        subjects = {"zone ranges", "early node ranges", "zones: spanned and present", "watermarks from managed"}
        assert all(rows[subject][0] for subject in subjects | {"lowmem protection", "Memory: total"})
    if "nomb" not in name:
        assert rows["memblock arrays"][0] > 50


def test_memory_that_came_later_has_a_cause(tmp_path, capsys):
    """A DIMM that was plugged in is not in the boot's map: its zone differs, and the row says why."""
    assert main(["replay", str(unpack("efirom-q35-2G-attrs-k6.12", tmp_path))]) == 0
    out = capsys.readouterr().out
    assert "cause    memory that was plugged in, or taken over by a driver, after the boot" in out


def test_a_panic_is_compared(tmp_path, capsys):
    """A guest with a table of unaccepted memory and no platform to accept it dies with the kernel's words."""
    assert main(["replay", str(unpack("efirom-q35-2G-unaccepted-k6.12", tmp_path))]) == 0
    assert table(capsys.readouterr().out)["panic"] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("file", "old", "new", "subject"),
    [
        ("dmesg.txt", "BIOS-e820: [mem 0x0000000000100000", "BIOS-e820: [mem 0x0000000000101000", "e820"),
        ("dmesg.txt", "  DMA      [mem 0x0000000000001000", "  DMA      [mem 0x0000000000002000", "zone ranges"),
        ("dmesg.txt", "/2096628K available", "/2096624K available", "Memory: total"),
        ("dmesg.txt", "memblock_alloc_try_nid: 16384 bytes", "memblock_alloc_try_nid: 16385 bytes", "memblock calls"),
        ("zoneinfo.txt", "present  520159", "present  520158", "zones: spanned and present"),
        ("zoneinfo.txt", "managed  3840", "managed  3841", "zones: managed"),
        ("zoneinfo.txt", "protection: (0, 1933", "protection: (0, 1934", "lowmem protection"),
        ("vm.json", "45056", "45057", "min_free_kbytes"),
    ],
)
def test_what_differs_is_found(file, old, new, subject, tmp_path, capsys):
    """A capture in which one number was changed has one difference without a cause, and the command exits 1."""
    directory = unpack(SIMPLE, tmp_path)
    path = directory / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert main(["replay", str(directory)]) == 1
    out = capsys.readouterr().out
    assert table(out)[subject][3] >= 1
    assert f"{subject}: ours " in out


def test_several_captures_are_summed(tmp_path, capsys):
    """A table for each capture, and one over all of them."""
    names = ("bios-pc-512M-k6.12", SIMPLE)
    assert main(["replay", *(str(unpack(name, tmp_path)) for name in names)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "compared" in line] == [*names, "subject"]
    assert next(line.split() for line in reversed(lines) if line.startswith("e820")) == ["e820", "2", "22", "0", "0"]


def test_json_and_log(tmp_path, capsys):
    """--json has every difference with its cause; --log prints our kernel's log and compares nothing."""
    directory = str(unpack(SIMPLE, tmp_path))
    assert main(["replay", "--json=short", directory]) == 0
    (capture,) = json.loads(capsys.readouterr().out)
    assert (capture["capture"], capture["unexplained"]) == (SIMPLE, 0)
    assert "SMP alternatives" in capture["subjects"]["zones: managed"]["differences"][0]["cause"]
    assert main(["replay", "--log", directory]) == 0
    assert "BIOS-provided physical RAM map:" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("file", "data", "text"),
    [
        ("boot_params.bin", b"x" * 4095, "found 4095 bytes"),
        ("dmesg.txt", None, "found no such file"),
        ("dmesg.txt", b"nothing of a kernel\n", "found no line 'Linux version'"),
        ("dmesg.txt", b"Linux version 5.4.0 (gcc)\n", "found 5.4.0"),
        ("vm.json", b"[1, 2]", "expected a JSON object"),
        ("vm.json", b"{", "expected a JSON object"),
        ("zoneinfo.txt.gz", b"\x1f\x8b\x08\x00garbage", "expected a whole gzip file"),
        ("dmesg.txt.gz", b"not gzip at all", "expected a whole gzip file"),
    ],
)
def test_a_capture_that_is_none(file, data, text, tmp_path, capsys):
    """One line on standard error, exit status 1."""
    directory = unpack(SIMPLE, tmp_path)
    (directory / file.removesuffix(".gz")).unlink()
    if file == "dmesg.txt" and data is not None:
        (directory / "vm.json").write_text("{}")
    if data is not None:
        (directory / file).write_bytes(data)
    assert main(["replay", str(directory)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("unaccepted: error: ")
    assert text in err
    assert err.count("\n") == 1
