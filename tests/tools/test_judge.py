"""``unaccepted judge``: our stub and the real one on random set-ups."""

from __future__ import annotations

import json

import pytest

from tools import judge_decompressor_maps
from tools.judge_maps import PROFILES, set_up


def test_one_map_of_each_profile(command, exact_debian_kernel):
    """On a set-up of each profile our stub does what the real one does."""
    answer = command("judge", "--kernel", exact_debian_kernel, "--maps", str(len(PROFILES)), "--json", "short")
    report = json.loads(answer.out)
    assert [each["id"] for each in report["dead"]] == [8]
    assert (len(PROFILES), report["maps"], report["differing"], answer.status) == (22, 22, [], 0)
    assert report["agree"] == 22


def test_a_stub_that_is_wrong_is_found(command, exact_debian_kernel, monkeypatch, tmp_path):
    """A stub with a smaller slack is shown field by field with its set-up, which conform finds different too."""
    monkeypatch.setattr("bootstub.exit_boot.ALT_MEM_K", 0x1234)
    answer = command(
        "judge", "--kernel", exact_debian_kernel, "--maps", "1", "--jobs", "1", "--save", tmp_path / "cases"
    )
    assert answer.status == 1
    first, difference, *_, last = answer.out.splitlines()
    assert first.startswith("map 0 ovmf: {")
    assert difference.strip().startswith("boot_params: [480] found 52, expected 0")
    assert last == "1 maps, seed 1: 0 agree, 1 differ, 0 end both guests"
    (case,) = (tmp_path / "cases").iterdir()
    options = ("--kernel", exact_debian_kernel, "--jobs", "1")
    assert command("conform", case, "--ours", *options).status == 1
    monkeypatch.undo()
    assert command("conform", case, "--ours", *options).status == 0
    assert command("conform", case, *options).status == 0


def test_both_guests_die_alike(command, exact_debian_kernel):
    """Where a table that is installed already makes the real stub accept what is no RAM, ours does too, and all that
    they did before is compared."""
    options = ("--maps", "1", "--first", "8", "--jobs", "1")
    answer = command("judge", "--kernel", exact_debian_kernel, *options)
    assert (answer.status, answer.out.splitlines()) == (
        0,
        [
            "map 8 pretable: both guests die alike: accept of page 0x103000000, which is no RAM",
            "1 maps, seed 1: 1 agree, 0 differ, 1 end both guests",
        ],
    )


def test_a_death_of_another_kind_is_found(command, exact_debian_kernel, monkeypatch):
    """A stub that does not accept what the real one dies of is shown with what it did instead."""
    monkeypatch.setattr("bootstub.unaccepted_table.UnacceptedTable.process", lambda *_: None)
    answer = command("judge", "--kernel", exact_debian_kernel, "--maps", "1", "--first", "8", "--jobs", "1")
    named = [line.split(":")[0].strip() for line in answer.out.splitlines()[1:-1]]
    assert answer.status == 1
    assert {"stop", "died", "accept"} <= set(named)


def test_decompressors_of_each_profile(command, exact_debian_kernel):
    """On a set-up of each profile our decompressor puts the kernel where the real one does, and accepts the same."""
    count = len(judge_decompressor_maps.PROFILES)
    answer = command(
        "judge", "--decompressor", "--kernel", exact_debian_kernel, "--maps", str(count), "--json", "short"
    )
    report = json.loads(answer.out)
    assert (count, report["agree"], report["differing"], report["dead"], answer.status) == (13, 13, [], [], 0)


def test_decompressors_without_unaccepted_memory(command, debian_kernel_6_1):
    """A decompressor that was built without it leaves such memory alone, and so does ours for that image."""
    answer = command("judge", "--decompressor", "--kernel", debian_kernel_6_1, "--maps", "3")
    assert answer.out == "3 maps, seed 1: 3 agree, 0 differ, 0 end both guests\n"


def test_a_stub_of_another_generation_is_no_judge(refused, debian_kernel_6_1):
    """The stub of a kernel without unaccepted memory would differ everywhere: it is refused in one line."""
    text = refused("judge", "--kernel", debian_kernel_6_1, "--maps", "3")
    assert "found nothing about unaccepted memory, expected that of 6.12; --decompressor" in text


def test_a_decompressor_that_is_wrong_is_found(command, exact_debian_kernel, monkeypatch, tmp_path):
    """One that counts a virtual place too many is shown with its set-up; the saved case differs until it is mended."""
    cases = tmp_path / "cases"
    monkeypatch.setattr("bootstub.random_location.KERNEL_IMAGE_SIZE", (1 << 30) + (2 << 20))
    answer = command(
        "judge", "--decompressor", "--kernel", exact_debian_kernel, "--maps", "1", "--jobs", "1", "--save", cases
    )
    assert answer.status == 1
    assert answer.out.splitlines()[1].strip().startswith("virt: found ")
    (case,) = cases.iterdir()
    options = ("--kernel", exact_debian_kernel, "--jobs", "1")
    assert (case.name, command("conform", case, "--ours", *options).status) == ("decompressor.0.jsonl", 1)
    monkeypatch.undo()
    assert command("conform", case, "--ours", *options).status == 0
    assert command("conform", case, *options).status == 0


def test_full_is_for_decompressors(command, debian_kernel):
    """A stub is never made to unpack the kernel."""
    assert command("judge", "--kernel", debian_kernel, "--full").status == 2


@pytest.mark.parametrize("option", ["--maps", "--jobs"])
def test_numbers_from_one_on(command, debian_kernel, option):
    """No map, and no process, is wrong usage."""
    assert command("judge", "--kernel", debian_kernel, option, "0").status == 2


def test_set_ups_follow_from_the_seed():
    """The same seed and number, the same set-up; another seed, another one."""
    assert [set_up(n, 1) for n in range(26)] == [set_up(n, 1) for n in range(26)]
    assert all(set_up(n, 1) != set_up(n, 2) for n in range(26))
    for_decompressors = [[judge_decompressor_maps.set_up(n, seed, 56 << 20) for n in range(24)] for seed in (1, 1, 2)]
    assert for_decompressors[0] == for_decompressors[1]
    assert all(one != other for one, other in zip(*for_decompressors[1:], strict=True))
