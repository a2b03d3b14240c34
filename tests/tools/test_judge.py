"""``unaccepted judge``: our stub and the real one on random set-ups."""

from __future__ import annotations

import json

from tools.judge_maps import PROFILES, set_up


def test_one_map_of_each_profile(command, exact_debian_kernel):
    """On a set-up of each profile our stub does what the real one does."""
    answer = command("judge", "--kernel", exact_debian_kernel, "--maps", len(PROFILES).__str__(), "--json", "short")
    report = json.loads(answer.out)
    assert (len(PROFILES), report["maps"], report["differing"], answer.status) == (13, 13, [], 0)
    assert report["agree"] >= 12


def test_set_ups_follow_from_the_seed():
    """The same seed and number, the same set-up; another seed, another one."""
    assert [set_up(n, 1) for n in range(26)] == [set_up(n, 1) for n in range(26)]
    assert all(set_up(n, 1) != set_up(n, 2) for n in range(26))
