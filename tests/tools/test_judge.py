"""``unaccepted judge``: our stub and the real one on random set-ups."""

from __future__ import annotations

import json

import pytest

from tools.judge_maps import PROFILES, set_up


def test_one_map_of_each_profile(command, exact_debian_kernel):
    """On a set-up of each profile our stub does what the real one does."""
    answer = command("judge", "--kernel", exact_debian_kernel, "--maps", str(len(PROFILES)), "--json", "short")
    report = json.loads(answer.out)
    assert (len(PROFILES), report["maps"], report["differing"], answer.status) == (13, 13, [], 0)
    assert report["agree"] == 13


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


@pytest.mark.parametrize("option", ["--maps", "--jobs"])
def test_numbers_from_one_on(command, debian_kernel, option):
    """No map, and no process, is wrong usage."""
    assert command("judge", "--kernel", debian_kernel, option, "0").status == 2


def test_set_ups_follow_from_the_seed():
    """The same seed and number, the same set-up; another seed, another one."""
    assert [set_up(n, 1) for n in range(26)] == [set_up(n, 1) for n in range(26)]
    assert all(set_up(n, 1) != set_up(n, 2) for n in range(26))
