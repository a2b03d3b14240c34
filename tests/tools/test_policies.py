"""What the firmware accepts itself, seen in the memory map, the table of stages, the kernel's tables and the end."""

from __future__ import annotations

import json
import re

import pytest

from bootstub.boot_params import e820_table_of
from bootstub.protocol import PROTOCOLS
from bootstub.sample_kernel import sample_bzimage
from firmware.accept_policy import ALL, BELOW_4G, AcceptPolicy
from firmware.efi_types import EfiMemoryType
from guest.ranges import RangeSet
from tools.pipeline import Boot, BootConfig
from tools.verdict import verdict_lines

GIB, MIB = 1 << 30, 1 << 20
ADDED = 0x1_A000
"""What the host adds of RAM: OVMF's own sections."""
MARGIN = 2 * MIB
SIZE = 512 * MIB
CASES = {
    "below-4g": (BELOW_4G, [(4 * GIB, 6 * GIB)]),
    "all": (ALL, []),
    "size=512M": (AcceptPolicy(size=SIZE), [(SIZE + ADDED, 2 * GIB), (4 * GIB, 6 * GIB)]),
    "size=2560M": (AcceptPolicy(size=5 * SIZE), [(4 * GIB + SIZE + ADDED, 6 * GIB)]),
}
"""Policies, and what they leave unaccepted of 4 GiB."""


def booted(policy: AcceptPolicy, protocol: str, cpus: int = 1) -> Boot:
    boot = Boot(BootConfig(sample_bzimage(), protocol=PROTOCOLS[protocol], accept=policy, accept_cpus=cpus))
    boot.run("firmware")
    return boot


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", CASES)
def test_what_a_policy_leaves_is_on_record_to_the_end(name, protocol):
    """Type 15 of the map, the record of the stub, RAM of e820 and Secure EPT agree, at the start and in the end."""
    policy, unaccepted = CASES[name]
    boot = booted(policy, protocol)
    assert boot.firmware_map is not None
    fixed = [d for d in boot.firmware_map.descriptors() if d.start >= 0xE000_0000 or d.type in (0, 11, 15)]
    listed = [(d.start, d.end) for d in fixed if d.type == EfiMemoryType.EfiUnacceptedMemoryType]
    assert listed == unaccepted
    gone = boot.host.ram.copy()
    for start, end in boot.sept.mapped():
        gone.remove(start, end)
    assert list(gone) == unaccepted
    boot.run("efi-stub")
    assert boot.boot_params is not None
    entries = e820_table_of(boot.boot_params)
    ram = RangeSet((e.addr, e.addr + e.size) for e in entries if e.type == 1)
    for start, end in unaccepted:
        assert ram.covers(start, end)
    boot.run()
    *holes, line = verdict_lines(boot)
    assert all(hole.startswith("known hole guard-bit: ") for hole in holes)
    if not unaccepted:
        assert line == "no bitmap of unaccepted memory; 0 KiB are unaccepted"
    else:
        left = int(re.fullmatch(r"bitmap and Secure EPT agree: (\d+) KiB are unaccepted", line)[1])
        assert 0 < left << 10 < RangeSet(unaccepted).total()


@pytest.mark.parametrize("name", CASES)
def test_gcd_ranges_stand_behind_the_allocators_by_address(name):
    """Unaccepted memory below 4 GiB stands before MMIO, and that before unaccepted memory above: the GCD map's walk."""
    boot = booted(CASES[name][0], "v9")
    assert boot.firmware_map is not None
    descriptors = boot.firmware_map.descriptors()
    gcd = [d for d in descriptors if d.type == 15 or (d.start >= 0xE000_0000 and d.type in (0, 11))]
    assert descriptors[-len(gcd) :] == gcd
    assert [d.start for d in gcd] == sorted(d.start for d in gcd)
    assert len(gcd) == 2 + len(CASES[name][1])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_eager_firmware_allocates_below_4_gib_too(protocol):
    """With all memory accepted, everything lies below OVMF's bins, as captured maps of real guests have it."""
    boot = booted(ALL, protocol)
    boot.run("efi-stub")
    assert boot.firmware_map is not None
    used = [d for d in boot.firmware_map.descriptors() if d.type not in (0, 7, 11)]
    assert max(d.end for d in used) == 2 * GIB
    assert boot.machine.regs.rsi < 2 * GIB


@pytest.mark.parametrize("words", [["--accept-policy", "all"], ["--accept-cpus", "2"]])
def test_only_a_td_has_a_policy(refused, words):
    """Without a TD there is nothing to accept."""
    said = refused("boot", "--platform", "none", *words)
    assert said.startswith(f"--platform none: found {words[0]}, expected none of that without a TD")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_more_processors_make_the_same_boot_in_less_time(protocol):
    """With four of them the firmware's time is about a quarter, and what they accept is the same."""
    one, four = booted(ALL, protocol), booted(ALL, protocol, 4)
    assert list(one.sept.mapped()) == list(four.sept.mapped())
    assert one.clock.ns / 4 <= four.clock.ns < one.clock.ns / 3.8
    four.run()
    assert four.done[-1] == "runtime"


def test_the_command_line_knows_policies(command):
    """--accept-policy and --accept-cpus reach the firmware: what a stage accepted stands in the table of stages."""
    words = ["boot", "--memory", "4G", "--accept-policy", "size=1G", "--accept-cpus", "8", "--json"]
    data = json.loads(command(*words).out)
    accepted = {stage["stage"]: stage["accepted_bytes"] for stage in data["stages"]}
    assert accepted["firmware"] == GIB
    assert "AcceptMemory of 0x40000000 bytes" in data["log"]
    assert data["verdict"][-1].startswith("bitmap and Secure EPT agree: ")


@pytest.mark.parametrize(
    "words, error",
    [
        (["--accept-policy", "none"], "--accept-policy: found 'none', expected below-4g, all, or size=N in whole "),
        (["--accept-policy", "size=0"], "--accept-policy: found 'size=0', expected below-4g, all, or size=N in whole "),
        (["--accept-policy", "size=1"], "--accept-policy: found 'size=1', expected below-4g, all, or size=N in whole "),
        (["--accept-policy", "512M"], "--accept-policy: found '512M', expected below-4g, all, or size=N in whole "),
        (["--accept-cpus", "0"], "--accept-cpus: found '0', expected a number from 1 to 4096"),
        (
            ["--accept-policy", "all", "--efi-map", "x"],
            "--accept-policy: found with --efi-map, expected one of the two",
        ),
        (["--accept-cpus", "2", "--efi-map", "x"], "--accept-cpus: found with --efi-map, expected one of the two"),
    ],
)
def test_what_is_no_policy_is_refused(refused, words, error):
    """One line that says what was found."""
    assert refused("boot", *words).startswith(error)


def test_a_policy_that_starves_the_firmware_says_so(command):
    """The firmware needs its own ranges: with less it refuses, in one line."""
    answer = command("boot", "--accept-policy", "size=16M")
    assert answer.status == 1
    assert answer.err.splitlines()[-1] == (
        "unaccepted: error: RAM below 4 GiB at 0x101a000: found an end at 0x101a000, expected at least 0x2ef0000 for "
        "the firmware [TD HOB list]"
    )
