"""``unaccepted dump boot-params``: files of a wrong size, forms of output, and pages that were tampered with."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tools.dump
from tests.refusals import value_or_refusal
from tools.dump_boot_params import dmesg_lines, rows, text_lines, to_json

SAMPLES = Path(__file__).parent.parent / "samples" / "boot_params" / "captures.jsonl.gz"
with gzip.open(SAMPLES, "rt") as _lines:
    PAGES = [bytes.fromhex(json.loads(line)["boot_params"]) for line in _lines]


@pytest.mark.parametrize("size", [0, 1, 100, 4095, 4097, 8192])
@pytest.mark.parametrize("form", [[], ["--json"], ["--hex"], ["--dmesg"]])
def test_page_of_a_wrong_size(refused, file, size, form):
    """It is refused by its size, in every form of output."""
    path = file("page", PAGES[0][:size].ljust(size, b"\0"))
    text = refused("dump", "boot-params", path, *form)
    assert text.startswith(f"boot_params at 0x0: found {size} bytes, expected 4096 bytes")


def test_too_many_entries(refused, file):
    """e820_entries above 128 is refused, by field and offset."""
    page = bytearray(PAGES[0])
    page[0x1E8] = 129
    text = refused("dump", "boot-params", file("page", bytes(page)))
    assert text.startswith("boot_params.e820_entries at 0x1e8: found 129, expected at most 128")


def test_missing_file_and_directory(refused, tmp_path):
    """They are refused with the system's words."""
    assert refused("dump", "boot-params", tmp_path / "none").endswith("/none: No such file or directory")
    assert refused("dump", "boot-params", tmp_path).endswith(": Is a directory")


def test_live_on_a_machine_without_it(refused, tmp_path, monkeypatch):
    """--live reads the kernel's own file; where there is none it says so."""
    monkeypatch.setattr(tools.dump, "LIVE_BOOT_PARAMS", str(tmp_path / "data"))
    assert refused("dump", "boot-params", "--live") == f"{tmp_path}/data: No such file or directory"


def test_live(command, tmp_path, monkeypatch):
    """--live shows what a file with the same bytes shows."""
    (tmp_path / "data").write_bytes(PAGES[0])
    monkeypatch.setattr(tools.dump, "LIVE_BOOT_PARAMS", str(tmp_path / "data"))
    assert command("dump", "boot-params", "--live") == command("dump", "boot-params", tmp_path / "data")


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_standard_input(command, monkeypatch, extra):
    """``-`` is standard input; a page and a byte more is too much, however much follows."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(PAGES[0] + extra)))
    answer = command("dump", "boot-params", "-", "--json=short")
    assert answer.status == bool(extra)
    assert json.loads(answer.out) == to_json(PAGES[0]) if not extra else "found 4097 bytes" in answer.err


def test_forms_of_output(command, file):
    """Text, JSON, hexadecimal and the kernel's lines, each complete."""
    path = file("page", PAGES[0])

    def out(*form: str) -> str:
        answer = command("dump", "boot-params", path, *form)
        assert (answer.status, answer.err) == (0, "")
        return answer.out

    assert out().splitlines() == text_lines(rows(PAGES[0]))
    assert json.loads(out("--json")) == to_json(PAGES[0])
    assert out("--dmesg").splitlines() == dmesg_lines(PAGES[0])
    hexadecimal = out("--hex").splitlines()
    assert len(hexadecimal) == 256
    assert bytes.fromhex("".join(line[10:49] for line in hexadecimal)) == PAGES[0]


def dump(page: bytes) -> None:
    """Every form of the dump: a value, or a BootError."""
    for form in (lambda: text_lines(rows(page)), lambda: json.dumps(to_json(page)), lambda: dmesg_lines(page)):
        with value_or_refusal():
            assert form()


@given(
    st.sampled_from(PAGES), st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=20)), max_size=8)
)
def test_pages_that_were_tampered_with(page, changes):
    """A real page with other bytes anywhere is a dump, or a BootError."""
    changed = bytearray(page)
    for at, data in changes:
        changed[at : at + len(data)] = data
    dump(bytes(changed[:4096]))


def test_random_pages():
    """Random bytes are a dump, or a BootError; so are all bytes alike."""
    rng = random.Random(3)
    for page in [bytes([byte]) * 4096 for byte in (0, 1, 0x7F, 0x80, 0xFF)] + [rng.randbytes(4096) for _ in range(40)]:
        dump(page)
