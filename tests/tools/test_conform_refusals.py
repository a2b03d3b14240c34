"""``unaccepted conform`` with files that are none."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

VECTORS = Path(__file__).parent.parent / "vectors"
CASE = json.dumps({"id": 1, "name": "x"})


def first_case(family: str) -> dict[str, object]:
    with gzip.open(VECTORS / f"{family}.jsonl.gz", "rt") as lines:
        return json.loads(next(lines))


@pytest.mark.parametrize(
    ("name", "contents", "text"),
    [
        ("v9.jsonl", b"", "v9.jsonl: found no case"),
        # No time in the bytes: they are in the names of the cases, on which all test processes must agree.
        ("v9.jsonl.gz", gzip.compress(b"", mtime=0), "v9.jsonl.gz: found no case"),
        ("v9.jsonl.gz", b"", "v9.jsonl.gz: found no case"),
        ("v9.jsonl.gz", b"{}", "v9.jsonl.gz, line 0: found BadGzipFile"),
        ("v9.jsonl.gz", gzip.compress(CASE.encode() * 100, mtime=0)[:-20], "v9.jsonl.gz, line 0: found EOFError"),
        ("v9.jsonl.gz", b"\x1f\x8b\x08\x00" + b"\xff" * 50, "v9.jsonl.gz, line 0: found error: Error -3"),
        (
            "other.jsonl",
            CASE.encode(),
            "other.jsonl: found family 'other', expected a name that starts with v9 or mainline or e820",
        ),
        (".jsonl", CASE.encode(), ".jsonl: found family ''"),
        ("v9.jsonl", b"no json\n", "v9.jsonl, line 1: found JSONDecodeError"),
        ("v9.jsonl", b"\xff\xfe\n", "v9.jsonl, line 1: found UnicodeDecodeError"),
        ("v9.jsonl", b"[]\n", "v9.jsonl, line 1: found ValueError: not an object"),
        ("v9.jsonl", b"[" * 100_000, "v9.jsonl, line 1: found RecursionError"),
        ("v9.jsonl", b"9" * 5000, "v9.jsonl, line 1: found ValueError"),
        ("v9.jsonl", CASE.encode(), "v9.jsonl, line 1: found KeyError: 'lvl', expected a case of this family"),
        ("e820.jsonl", b"{}", "e820.jsonl, line 1: found KeyError: 'boot'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_file_without_cases(refused, file, name, contents, text):
    """It is refused with file and line."""
    assert text in refused("conform", file(name, contents))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("v9", {"desc": [[7, 0, 1.5, 0]]}),
        ("v9", {"desc": [[7, 0, 1 << 70, 0]]}),
        ("v9", {"desc": [[7, 0]]}),
        ("v9", {"desc": None}),
        ("v9", {"lvl": "one"}),
        ("v9", {"ops": [["R"]]}),
        ("v9", {"ops": [["K", -1 << 21, 5, [], [], 0]]}),
        ("e820", {"physbits": 1 << 40}),
        ("e820", {"physbits": -1}),
        ("e820", {"physbits": "52"}),
        ("e820", {"ops": [["?"]]}),
        ("e820", {"ops": [["A", 1]]}),
        ("e820", {"add": [[1, 2]]}),
    ],
)
def test_case_with_a_wrong_field(refused, file, family, change):
    """A real case with a field that no recorder writes is refused with file and line, not compared."""
    path = file(f"{family}.jsonl", json.dumps(first_case(family)) + "\n" + json.dumps(first_case(family) | change))
    assert f"{family}.jsonl, line 2: found " in refused("conform", path)


def test_missing_file_and_directory(refused, tmp_path):
    """They are refused with the system's words, the good file before them notwithstanding."""
    good = VECTORS / "e820.jsonl.gz"
    assert refused("conform", tmp_path / "v9.jsonl").endswith("v9.jsonl: No such file or directory")
    (tmp_path / "e820.dir").mkdir()
    assert refused("conform", good, tmp_path / "e820.dir").endswith("e820.dir: Is a directory")


def test_case_that_differs(command, file):
    """A difference is no error: it is shown, counted, and the exit status is 1."""
    case = first_case("v9")
    case["n"] += 1
    answer = command("conform", file("v9.jsonl", json.dumps(case)))
    assert (answer.status, answer.err) == (1, "")
    assert answer.out.splitlines()[0] == f"case {case['id']} {case['name']}"
    assert answer.out.splitlines()[1].startswith("    n: found ")
    assert answer.out.splitlines()[-1].split() == ["v9", "1", "0", "1", "0"]


def test_progress_on_a_terminal(command, file, monkeypatch):
    """On a terminal, the number of cases so far is written over itself on standard error, and wiped in the end."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = json.dumps(first_case("v9"))
    answer = command("conform", file("v9.jsonl", f"{line}\n{line}\n"), "--jobs", "1")
    assert (answer.status, answer.err) == (0, "\r1 cases\r2 cases\r\x1b[K")
