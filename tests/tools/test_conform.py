"""``unaccepted conform`` on the recorded answers of the real code."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tools.cli import main

VECTORS = Path(__file__).parent.parent / "vectors"


def first_case(family: str) -> dict[str, object]:
    """The first recorded case of a family that has operations."""
    with gzip.open(VECTORS / f"{family}.jsonl.gz", "rt") as file:
        return next(case for line in file if (case := json.loads(line)).get("ops"))


@pytest.mark.parametrize(("family", "count"), [("v9", 998), ("mainline", 582), ("e820", 477), ("memblock", 387)])
def test_every_case_agrees(family: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """All cases of the developer set agree in every recorded field and in each operation."""
    assert main(["conform", str(VECTORS / f"{family}.jsonl.gz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [[family, str(count), str(count), "0", "0"]]


@pytest.mark.parametrize("field", ["bits", "e820", "acc", "log", "ram_pfn", "rsv", "status", "n", "bm", "ext_pool"])
def test_a_changed_answer_is_found(field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever field of a case is changed, the command names it and exits 1."""
    case = first_case("v9")
    value = case[field]
    if isinstance(value, int):
        case[field] = value + 1
    elif isinstance(value, str):
        case[field] = "ff" + value[2:]
    elif isinstance(value, dict):
        value["n"] += 1
    else:
        assert isinstance(value, list)
        case[field] = [*value, 0]
    path = tmp_path / "v9.jsonl"
    path.write_text(json.dumps(case) + "\n")
    assert main(["conform", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"    {field}" in out
    assert out.splitlines()[-1].split() == ["v9", "1", "0", "1", "0"]


def test_a_changed_operation_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A different answer of one follow-up operation is named by its number and kind."""
    case = first_case("v9")
    ops = case["ops"]
    assert isinstance(ops, list)
    number, op = next((n, op) for n, op in enumerate(ops) if op[0] == "R")
    op[3] = 1 - op[3]
    path = tmp_path / "v9.jsonl"
    path.write_text(json.dumps(case) + "\n")
    assert main(["conform", "--json", "short", str(path)]) == 1
    report = json.loads(capsys.readouterr().out)
    (differing,) = report["files"][0]["differing"]
    assert [line.split(":")[0] for line in differing["differences"]] == [f"ops[{number}] R"]


def _flip(record: dict[str, object], key: str) -> None:
    value = record[key]
    record[key] = value + 1 if isinstance(value, int) else f"{value}!" if isinstance(value, str) else [*value, 0]  # type: ignore[misc]


@pytest.mark.parametrize("key", ["r", "m", "v", "ms", "vs", "mmax", "vmax", "mt", "acc", "list", "panic"])
def test_a_changed_answer_of_memblock_is_found(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever key of a record is changed, the command names the operation and the key and exits 1."""
    with gzip.open(VECTORS / "memblock.jsonl.gz", "rt") as file:
        cases = map(json.loads, file)
        case = next(case for case in cases if any(key in op[-1] for op in case["ops"]))
    number = next(number for number, op in enumerate(case["ops"]) if key in op[-1])
    _flip(case["ops"][number][-1], key)
    path = tmp_path / "memblock.jsonl"
    path.write_text(json.dumps(case) + "\n")
    assert main(["conform", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"    ops[{number}] {case['ops'][number][0]} {key.removesuffix('s')}: found" in out


def test_a_changed_answer_of_the_older_memblock_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a v9 kernel does otherwise is compared too: said to accept its array as mainline does, it differs."""
    with gzip.open(VECTORS / "memblock.jsonl.gz", "rt") as file:
        case = next(case for line in file if "acc" in (case := json.loads(line))["v61"])
    case["v61"] = "same"
    path = tmp_path / "memblock.jsonl"
    path.write_text(json.dumps(case) + "\n")
    assert main(["conform", str(path)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert line.startswith("    v61 ops[") and "acc: found [], expected [" in line
