"""Recorded results of the kernel's own e820.c, all of them."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from tools.conformance.e820 import run_case

VECTORS = Path(__file__).parent.parent / "vectors" / "e820.jsonl.gz"
SHA256 = "aad520e5941cce11976adbf4423c52b9e19555551fa2112646b5af9f309cd456"


def cases() -> list[dict[str, Any]]:
    """The cases in file order."""
    with gzip.open(VECTORS, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_file_is_the_recorded_one() -> None:
    """The vectors are others' answers: nobody has rewritten them."""
    assert hashlib.sha256(VECTORS.read_bytes()).hexdigest() == SHA256


def test_every_case() -> None:
    """All 477 cases with all their operations agree."""
    results = {case["name"] + f" #{case['id']}": run_case(case) for case in cases()}
    assert len(results) == 477
    assert {name: differences for name, differences in results.items() if differences} == {}


def test_every_operation_is_there() -> None:
    """The cases exercise each operation and each outcome of memory_setup."""
    assert {op[0] for case in cases() for op in case["ops"]} == set("SAUMELelQWG")
    assert {case["boot"]["who"] for case in cases() if "boot" in case} == {"BIOS-e820", "BIOS-88", "BIOS-e801"}


def test_difference_is_told() -> None:
    """A case whose record was changed is told with place, found and expected."""
    case = {"physbits": 46, "add": [[0, 8192, 1]], "ops": [["e", 2], ["e", 3]]}
    assert run_case(case) == ["ops[1] e: found [2], expected [3]"]
