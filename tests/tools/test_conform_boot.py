"""Recorded boots of a real kernel, and boots of the same image on our firmware and TDX module."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.conformance.boot import COMPARED, differences
from tools.conformance.record_boot import run_boot

VECTORS = Path(__file__).parent.parent / "vectors"
BEFORE_THE_PAGE_ALLOCATOR = "Initmem setup node"
KNOWN_BY_THEN = ("kernel_pa", "kernel_va", "map_at_exit", "accept_stub", "e820", "zones", "early_nodes")


def cases() -> dict[str, dict[str, Any]]:
    """The recorded boots by name."""
    with gzip.open(VECTORS / "boot.jsonl.gz", "rt") as file:
        return {case["name"]: case for case in map(json.loads, file)}


@pytest.mark.parametrize("name", ["base", "holes", "eager", "small"])
def test_boots_agree_up_to_the_page_allocator(exact_debian_kernel, name):
    """The kernel is given the same map, accepts the same memory in the same order, and sets up the same zones."""
    recorded = cases()[name]
    ours = run_boot(recorded | {"until": BEFORE_THE_PAGE_ALLOCATOR}, exact_debian_kernel.read_bytes())
    assert differences(ours, recorded, KNOWN_BY_THEN) == []
    calls = len(ours["accept_memory_calls"])
    assert calls >= 8
    for key in ("start", "size", "tdcalls_before"):
        assert [call[key] for call in ours["accept_memory_calls"]] == [
            call[key] for call in recorded["accept_memory_calls"][:calls]
        ]
    assert len(ours["accept_kernel"]) >= 1
    assert ours["accept_kernel"] == recorded["accept_kernel"][: len(ours["accept_kernel"])]
    assert [call[0] for call in ours["tdcalls"]] == ["TDG.VP.INFO", "TDG.VM.WR", "TDG.VM.RD", "TDG.VM.RD", "TDG.VM.WR"]
    assert ours["tdcalls"] == recorded["tdcalls"][:5]


def test_a_whole_boot_agrees(command, file, exact_debian_kernel):
    """A boot to user space, up to its end, agrees with the recorded one in all that is compared."""
    answer = command("conform", file("boot.jsonl", json.dumps(cases()["small"])), "--kernel", exact_debian_kernel)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.splitlines()[-1].split() == ["boot", "1", "1", "0", "0"]


def test_a_boot_is_recorded(command, file, tmp_path, exact_debian_kernel):
    """A boot that was written down here is a case: what came of it comes out again."""
    recorded, out = cases()["small"], tmp_path / "boot.jsonl"
    maps = file("boot.maps.jsonl", json.dumps(recorded | {"until": "Memory: "}))
    answer = command("conform", "--record", out, "--kernel", exact_debian_kernel, "--maps", maps)
    assert (answer.status, answer.out, answer.err) == (0, "", "")
    ours = json.loads(out.read_text())
    assert (ours["name"], ours["descs"], ours["until"]) == ("small", recorded["descs"], "Memory: ")
    assert differences(ours, recorded, (*KNOWN_BY_THEN, "memory_line")) == []
    assert {call["by"][0] for call in ours["accept_memory_calls"]} >= {"memblock_alloc_range_nid", "__accept_page"}
    answer = command("conform", out, "--kernel", exact_debian_kernel)
    assert (answer.status, answer.out.splitlines()[-1].split()) == (0, ["boot", "1", "1", "0", "0"])


def test_another_kernel_is_left_out(command, file, exact_debian_kernel):
    """A boot of another release says nothing about this one."""
    case = cases()["small"]
    case["dmesg"] = case["dmesg"].replace("6.12.117", "6.12.118")
    answer = command("conform", file("boot.jsonl", json.dumps(case)), "--kernel", exact_debian_kernel)
    assert answer.status == 0
    assert answer.out.splitlines()[-1].startswith("boot: 1 left out: recorded with another image: ")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "kernel_pa": lambda case: case.update(kernel_pa=0),
    "kernel_va": lambda case: case.update(kernel_va=0),
    "map_at_exit": lambda case: case["map_at_exit"].pop(),
    "table": lambda case: case["table"]["bits_at_end"].append([1, 2]),
    "accept_stub": lambda case: case["accept_stub"].pop(),
    "accept_kernel": lambda case: case["accept_kernel"].reverse(),
    "tdx_accept_memory_ranges": lambda case: case["tdx_accept_memory_ranges"].pop(3),
    "still_pending": lambda case: case["still_pending"].append([0, 4096]),
    "tdcalls": lambda case: case["tdcalls"][5].pop(),
    "mapgpa_shared": lambda case: case["mapgpa_shared"].pop(),
    "e820": lambda case: case["e820"].pop(),
    "zones": lambda case: case["zones"].pop(),
    "early_nodes": lambda case: case["early_nodes"].pop(),
    "memory_line": lambda case: case.update(memory_line="Memory: 0K/0K available"),
    "accept_memory_calls": lambda case: case["accept_memory_calls"][7].update(size=1),
    "meminfo": lambda case: case["meminfo"].pop(3),
}


def test_every_changed_field_is_found():
    """Whatever is changed in a result, that field and no other is named."""
    original = cases()["base"]
    assert differences(original, original) == []
    assert set(CHANGES) == set(COMPARED)
    for name, change in CHANGES.items():
        changed = copy.deepcopy(original)
        change(changed)
        assert [line.partition(":")[0] for line in differences(changed, original)] == [name]


def test_what_init_uses_up_is_not_compared():
    """Free memory depends on the program, and is left out; a carriage return at the end of a line too."""
    original = cases()["base"]
    changed = copy.deepcopy(original)
    changed["meminfo"][1][1] += 4
    changed["e820"] = [line.rstrip("\r") for line in changed["e820"]]
    assert differences(changed, original) == []
