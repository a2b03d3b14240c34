"""``unaccepted kaslr``: the choice of a boot, over many seeds."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.events import KernelPlaced
from bootstub.protocol import PROTOCOLS
from bootstub.sample_kernel import sample_bzimage
from bootstub.slots import SlotArea
from guest.ranges import RangeSet
from tools.kaslr import slots_over, spread
from tools.pipeline import Boot, BootConfig

GIB = 1 << 30


def placed(config: BootConfig) -> tuple[int, int]:
    """Where a whole boot puts the kernel."""
    boot = Boot(config)
    boot.run("decompress" if config.protocol.name == "v9" else "efi-stub")
    event = next(r.event for r in boot.trace.records if isinstance(r.event, KernelPlaced))
    return event.physical, event.virtual


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_choice_is_that_of_a_boot(protocol):
    """For each seed, physical and virtual address are those that a boot with this seed has."""
    fields = {"kernel": sample_bzimage(), "memory": 6 * GIB, "cmdline": "", "protocol": PROTOCOLS[protocol]}
    found = spread(BootConfig(**fields), "6G", 5)
    places = [placed(BootConfig(**fields, seed=seed)) for seed in range(5)]
    assert found.places == Counter(physical for physical, _ in places)
    assert found.virtual == Counter(virtual for _, virtual in places)
    assert found.stays == 0


def test_shares_of_unaccepted_memory(command):
    """v9 takes unaccepted memory in proportion, at 64 GiB nearly always; mainline's stub never does."""
    answer = command("kaslr", "--seeds", "1000", "--json", "short")
    report = json.loads(answer.out)
    assert (answer.status, answer.err, report["schema"], report["seeds"]) == (0, "", 1, 1000)
    for each in report["spreads"]:
        share, of_slots = each["chosen_unaccepted"] / each["chosen"], each["slots_unaccepted"] / each["slots"]
        assert (each["chosen"], each["stays"]) == (1000, 0)
        assert sum(area["num"] for area in each["areas"]) == each["slots"]
        assert sum(place["count"] for place in each["physical"]) == 1000
        assert abs(share - of_slots) < 0.05
    shares = {(e["protocol"], e["memory"]): e["slots_unaccepted"] / e["slots"] for e in report["spreads"]}
    assert shares[("mainline", "4G")] == shares[("mainline", "64G")] == 0
    assert 0.5 < shares[("v9", "4G")] < 0.52
    assert 0.96 < shares[("v9", "64G")] < 0.98


def test_as_text(command):
    """A line for each protocol and size, then how the addresses spread: their sums are the seeds and the slots."""
    answer = command("kaslr", "--seeds", "20", "--memory", "5G", "--protocol", "v9")
    header, row, empty, title, *lines = answer.out.splitlines()
    assert "  of them unaccepted  " in header
    assert row.split()[:2] == ["v9", "5G"]
    assert (empty, title.startswith("v9, 5G: ")) == ("", True)
    words = [line.split() for line in lines]
    assert sum(int(each[1]) for each in words) == int(row.split()[3])
    assert sum(int(each[3]) for each in words) == 20


def test_the_choice_is_in_the_trace(command, tmp_path, file):
    """``boot --save`` writes it down, and ``step`` stops at it, for both protocols."""
    for protocol in ("v9", "mainline"):
        words = ("--cmdline", "", "--protocol", protocol, "--seed", "1")
        assert command("boot", *words, "--until", "setup-arch", "--save", tmp_path).status == 0
        lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
        (choice,) = [line for line in lines if line["event"] == "KaslrChoice"]
        assert all(int(addr, 16) % 0x200000 == 0 and int(num, 16) > 0 for addr, num in choice["areas"])
        answer = command("step", *words, "--commands", file("commands", "break KaslrChoice\ncontinue\nquit\n"))
        stops = [line for line in answer.out.splitlines() if line.startswith("stopped at ")]
        assert answer.status == 0
        assert " KASLR: " in stops[-1]
        assert stops[-1].endswith(" areas, 0x200000 apart, for 0x800000 bytes")


def test_no_place(command):
    """A kernel that finds no place is counted as one that stays."""
    words = ("kaslr", "--seeds", "3", "--memory", "4G", "--protocol", "v9", "--cmdline", "mem=20M")
    answer = command(*words, "--json=short")
    (each,) = json.loads(answer.out)["spreads"]
    assert (each["slots"], each["chosen"], each["stays"], len(each["virtual"])) == (0, 0, 3, 3)
    assert command(*words).status == 0


def test_a_thousand_seeds_are_one_boot(command):
    """The boot is made once, not for each seed."""
    start = time.process_time()
    assert command("kaslr", "--seeds", "1000", "--memory", "4G", "--protocol", "v9").status == 0
    assert time.process_time() - start < 5


def test_refusals(command, refused):
    """Without KASLR there is nothing to show; a seed is needed; what a boot refuses is refused."""
    assert refused("kaslr", "--cmdline", "nokaslr").startswith("--cmdline: found 'nokaslr'")
    assert refused("kaslr", "--memory", "x").startswith("--memory: found 'x'")
    assert refused("kaslr", "--protocol", "x").startswith("--protocol: found 'x'")
    assert command("kaslr", "--seeds", "0").status == 2


@given(
    st.integers(0, 50), st.integers(1, 30), st.integers(1, 9), st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 60)), max_size=4),
)  # fmt: skip
def test_slots_over_ranges(addr, num, align, size, ranges):
    """As many places touch a range as are found by looking at each."""
    area, touched = SlotArea(addr, num), RangeSet((start, start + length) for start, length in ranges)
    places = [addr + n * align for n in range(num)]
    assert slots_over(area, align, size, touched) == sum(touched.overlaps(at, at + size) for at in places)
