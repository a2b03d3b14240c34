"""Recorded runs of a real EFI stub and a real decompressor against the same image on our firmware and TDX module."""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VECTORS = Path(__file__).parent.parent / "vectors"
NO_RAM = "the stub accepts what is no RAM; a real host has nothing to map there"


def cases(family: str) -> list[dict[str, Any]]:
    """All recorded cases of a family."""
    with gzip.open(VECTORS / f"{family}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def case(family: str, wanted: int) -> dict[str, Any]:
    """The case with this number."""
    return next(each for each in cases(family) if each["id"] == wanted)


@pytest.fixture
def conform(command, file, exact_debian_kernel):
    """``conform(family, cases, *options)``: the report of the command on those cases."""

    def run(family, chosen, *options):
        path = file(f"{family}.jsonl", "\n".join(map(json.dumps, chosen)))
        answer = command("conform", path, "--kernel", exact_debian_kernel, "--json", "short", *options)
        assert answer.err == ""
        (report,) = json.loads(answer.out)["files"]
        assert answer.status == (1 if report["differ"] else 0)
        return report

    return run


@pytest.mark.parametrize("options", [(), ("--ours",)], ids=["the image's code", "our stage"])
def test_stubs_of_every_profile_agree(conform, options):
    """Three runs of each of the 13 kinds of set-up agree in all that is compared, or are left out with the reason."""
    profiles: dict[str, list[dict[str, Any]]] = {}
    for each in cases("stub"):
        profiles.setdefault(each["profile"], []).append(each)
    chosen = [each for group in profiles.values() for each in random.Random(2304).sample(group, 3)]
    report = conform("stub", chosen, *options)
    assert (len(profiles), report["cases"], report["differing"]) == (13, 39, [])
    assert set(report["reasons"]) <= {NO_RAM}
    assert report["agree"] >= 38


def test_decompressors_agree(conform):
    """A dozen recorded decompressors take the same place, accept the same pages and leave the same bitmap."""
    accepting = [each for each in cases("decompressor") if each["accept"]]
    talking = [each for each in cases("decompressor") if each["serial"]]
    report = conform("decompressor", [*random.Random(2304).sample(accepting, 11), *talking])
    assert (report["cases"], report["agree"], report["differing"]) == (12, 12, [])


def test_our_decompressor_agrees(conform):
    """So does ours on a set-up of every kind of command line, and in all that was recorded with it."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for each in cases("decompressor"):
        lines.setdefault(each["cmdline"], []).append(each)
    chosen = [each for group in lines.values() for each in group[:4]]
    chosen += [each for each in cases("decompressor") if each["serial"] and each not in chosen]
    report = conform("decompressor", chosen, "--ours")
    assert (len(lines), report["agree"], report["differing"]) == (5, len(chosen), [])


def test_a_changed_answer_is_found_by_our_decompressor(conform):
    """Whatever is changed in a recorded run of a decompressor is named; what ours does not have is no difference."""
    each = case("decompressor", 14)
    each["accept"].pop()
    each["loadflags_after"] ^= 2
    each["exceptions"] = {}
    report = conform("decompressor", [each], "--ours")
    (differing,) = report["differing"]
    assert [line.split(":")[0] for line in differing["differences"]] == ["loadflags_after", "accept"]


def test_accepting_what_is_no_ram_is_left_out(conform):
    """Where the recorded TDX module answered for memory that is not there, ours ends the guest: nothing is compared."""
    report = conform("stub", [case("stub", 892)])
    assert (report["agree"], report["differ"], report["left_out"]) == (0, 0, 1)
    assert report["reasons"] == {NO_RAM: 1}


def test_another_image_is_left_out(conform):
    """Runs of an image of another size say nothing about this one."""
    stub, decompressor = case("stub", 2), case("decompressor", 8)
    stub["firmware"]["image_size"] += 4096
    decompressor["init_size"] += 4096
    for family, each in (("stub", stub), ("decompressor", decompressor)):
        report = conform(family, [each])
        assert (report["left_out"], report["differ"]) == (1, 0)
        assert next(iter(report["reasons"])).startswith("recorded with another image: ")


def test_another_set_up_is_left_out(conform):
    """A run whose image met another memory map than the recorded one is not compared."""
    each = case("stub", 2)
    each["input_map"][0][2] += 1
    report = conform("stub", [each])
    assert report["reasons"] == {"the memory map at the image's entry is not the recorded one": 1}


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "stop": lambda out: out.update(stop="halted at image+0x1"),
    "kernel_pa": lambda out: out.update(kernel_pa=out["kernel_pa"] + 4096),
    "boot_params": lambda out: out["boot_params"].append([0x1EF, "01"]),
    "e820": lambda out: out["e820"][3].pop(),
    "setup_data": lambda out: out["setup_data"].append({}),
    "table": lambda out: out["table"]["bits"].pop(),
    "accept": lambda out: out["accept"].pop(),
    "still_pending": lambda out: out["still_pending"].pop(0),
    "config_tables": lambda out: out["config_tables"].reverse(),
    "map_at_bitmap": lambda out: out["map_at_bitmap"].pop(),
    "map_at_exit": lambda out: out["map_at_exit"][0].pop(),
    "calls": lambda out: out["calls"].pop(5),
    "console": lambda out: out.update(console="x"),
}


def test_a_changed_answer_of_a_stub_is_found(conform):
    """Whatever field of a recorded run is changed, that field and no other is named."""
    original, changed = case("stub", 30), []
    for change in CHANGES.values():
        changed.append(copy.deepcopy(original))
        change(changed[-1]["out"])
    report = conform("stub", changed)
    named = [[line.split(":")[0] for line in each["differences"]] for each in report["differing"]]
    assert named == [[name] for name in CHANGES]


def test_a_changed_answer_of_a_decompressor_is_found(conform):
    """A recorded accept or bit that ours does not have is named."""
    each = case("decompressor", 14)
    each["accept"][0][3] -= 1
    each["table"]["bits_after"].pop()
    report = conform("decompressor", [each])
    (differing,) = report["differing"]
    assert [line.split(":")[0] for line in differing["differences"]] == ["bits_after", "accept"]


def test_what_is_recorded_agrees_with_itself(command, conform, tmp_path, exact_debian_kernel):
    """Runs that were recorded here are cases: the same set-ups, answers that come out again."""
    maps, out = VECTORS / "stub.jsonl.gz", tmp_path / "out.jsonl"
    answer = command("conform", "--record", out, "--kernel", exact_debian_kernel, "--maps", maps, "--limit", "6")
    assert (answer.status, answer.out, answer.err) == (0, "", "")
    recorded = [json.loads(line) for line in out.read_text().splitlines()]
    theirs = cases("stub")[:6]
    for ours, their in zip(recorded, theirs, strict=True):
        assert ours["input_map"] == their["input_map"]
        assert {name: their[name] for name in ours if name not in ("out", "firmware")}.items() <= ours.items()
        assert ours["out"]["table"] == their["out"]["table"]
    assert conform("stub", recorded)["agree"] == 6


def test_what_a_decompressor_does_is_recorded(command, conform, file, tmp_path, exact_debian_kernel):
    """Runs of a decompressor that were recorded here are cases, with the places that KASLR chose here."""
    theirs = [case("decompressor", number) for number in (8, 14, 37)]  # nokaslr; accepts; prints
    maps, out = file("decompressor.jsonl", "\n".join(map(json.dumps, theirs))), tmp_path / "out.jsonl"
    answer = command("conform", "--record", out, "--kernel", exact_debian_kernel, "--maps", maps)
    assert (answer.status, answer.out, answer.err) == (0, "", "")
    recorded = [json.loads(line) for line in out.read_text().splitlines()]
    for ours, their in zip(recorded, theirs, strict=True):
        assert {name: ours[name] for name in ("id", "memmap", "load", "init_size", "rdtsc", "serial")} == {
            name: their[name] for name in ("id", "memmap", "load", "init_size", "rdtsc", "serial")
        }
        assert ours["table"].keys() == their["table"].keys()
    assert recorded[0]["output"] == theirs[0]["output"]
    assert sum(each["accept_calls"] for each in recorded) > 0
    report = conform("decompressor", recorded)
    assert (report["agree"], report["differing"]) == (3, [])


def test_what_cannot_be_recorded_is_named(command, file, tmp_path, exact_debian_kernel):
    """A set-up on which the guest dies, or that is none, leaves a line on the screen and none in the file."""
    maps, out = file("stub.jsonl", "\n".join(map(json.dumps, [case("stub", 892), {"id": 7}]))), tmp_path / "out.jsonl"
    answer = command("conform", "--record", out, "--kernel", exact_debian_kernel, "--maps", maps)
    assert (answer.status, answer.err, out.read_text()) == (0, "", "")
    dead, none = answer.out.splitlines()
    assert dead.startswith("case 892 was not recorded: efi-stub: accept of ")
    assert none == "case 7 is no case: KeyError: 'descs'"


@pytest.mark.parametrize("family", ["stub", "decompressor", "boot"])
def test_without_a_kernel(refused, family):
    """Runs of an image cannot be compared without one: one line."""
    path = VECTORS / f"{family}.jsonl.gz"
    assert refused("conform", path).startswith(f"{path}: found no --kernel, expected --kernel FILE")


@pytest.mark.parametrize("words", [["--record", "o", "x"], ["--record", "o"], ["--maps", "m"], ["x", "--jobs", "0"]])
def test_wrong_usage(command, words):
    """--record and --maps go together and without FILE; a job is needed."""
    assert command("conform", *words).status == 2


def test_a_case_that_is_none(refused, file, exact_debian_kernel):
    """A line without the fields of a case is refused with its number, also where other processes run the cases."""
    path = file("stub.jsonl", json.dumps(case("stub", 2)) + '\n{"id": 1}')
    for jobs in ("1", "2"):
        text = refused("conform", path, "--kernel", exact_debian_kernel, "--jobs", jobs)
        assert text.startswith(f"{path}, line 2: found KeyError: ")
