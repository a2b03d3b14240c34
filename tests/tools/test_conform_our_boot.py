"""``unaccepted conform --ours boot.jsonl.gz``: our kernel stages on what a recorded stub left."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tools.cli import main

BOOTS = Path(__file__).parent.parent / "vectors/boot.jsonl.gz"


def test_all_recorded_boots_agree(capsys):
    """e820, zones, node ranges, all memory, and every accept_memory() of memblock, in order, need no kernel image."""
    assert main(["conform", "--ours", str(BOOTS)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["boot", "4", "4", "0", "0"]


@pytest.mark.parametrize(
    "field", ["e820", "zones", "early_nodes", "memory_line", "accept_memory_calls", "still_pending"]
)
def test_what_differs_is_found(field, tmp_path, capsys):
    """A recorded boot with one changed fact is named by it, and the command exits 1."""
    with gzip.open(BOOTS, "rt") as file:
        case = next(case for case in map(json.loads, file) if case["name"] == "eager")
    if field == "memory_line":
        case[field] = case[field].replace("3145208K", "3145204K")
    elif field == "accept_memory_calls":
        case[field][7]["size"] += 8
    elif field == "still_pending":
        case[field] = [[0, 4096]]
    else:
        case[field][1] = case[field][1].replace("0x", "0x1")
    path = tmp_path / "boot.jsonl"
    path.write_text(json.dumps(case) + "\n")
    assert main(["conform", "--ours", str(path)]) == 1
    out = capsys.readouterr().out
    names = {"memory_line": "memory total", "accept_memory_calls": "accept_memory of memblock"}
    assert f"    {names.get(field, field.replace('still_', 'still '))}: " in out


def test_much_more_accepted_memory_is_found(tmp_path, capsys):
    """What is accepted when user space begins may differ by 5 %, and no more."""
    with gzip.open(BOOTS, "rt") as file:
        case = next(case for case in map(json.loads, file) if case["name"] == "base")
    path = tmp_path / "boot.jsonl"
    for less, status in ((16 << 10, 0), (40 << 10, 1)):
        changed = {**case, "meminfo": [[n, v - less if n == "Unaccepted" else v] for n, v in case["meminfo"]]}
        path.write_text(json.dumps(changed) + "\n")
        assert main(["conform", "--ours", str(path)]) == status
        assert ("accepted at /init" in capsys.readouterr().out) == bool(status)


def test_other_families_have_no_ours(capsys):
    """--ours is for runs of a kernel image."""
    assert main(["conform", "--ours", str(BOOTS.with_name("e820.jsonl.gz"))]) == 1
    assert "expected stub or decompressor or boot" in capsys.readouterr().err
