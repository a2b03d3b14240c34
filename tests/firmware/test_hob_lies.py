"""Untrue HOB lists: what each lie makes of a list, and which resources it is about."""

from __future__ import annotations

import pytest

from firmware.hob import Resource, read_hob_list
from firmware.hob_lies import tell
from firmware.launch import launch_td
from firmware.ovmf_layout import BUILT_IN
from tdx.faults import KINDS, Place, parse_rule

SYSTEM, UNACCEPTED = 0, 7
M = 1 << 20
TRUTH = [
    Resource(UNACCEPTED, 0, 8 * M),
    Resource(SYSTEM, 8 * M, 9 * M),
    Resource(UNACCEPTED, 9 * M, 16 * M),
    Resource(UNACCEPTED, 4096 * M, 6144 * M),
]
TOLD = {
    "hob-stale": [(SYSTEM, 0, 8), (SYSTEM, 8, 9), (SYSTEM, 9, 16), (SYSTEM, 4096, 6144)],
    "hob-accepted": [(UNACCEPTED, 0, 8), (UNACCEPTED, 8, 9), (UNACCEPTED, 9, 16), (UNACCEPTED, 4096, 6144)],
    "hob-overlap": [
        (UNACCEPTED, 0, 8), (UNACCEPTED, 4, 8), (SYSTEM, 8, 9), (UNACCEPTED, 9, 16), (UNACCEPTED, 12.5, 16),
        (UNACCEPTED, 4096, 6144), (UNACCEPTED, 5120, 6144),
    ],
    "hob-more": [(UNACCEPTED, 0, 8), (SYSTEM, 8, 9), (UNACCEPTED, 9, 1040), (UNACCEPTED, 4096, 7168)],
    "hob-less": [(UNACCEPTED, 0, 4), (SYSTEM, 8, 9), (UNACCEPTED, 9, 12.5), (UNACCEPTED, 4096, 5120)],
}  # fmt: skip


def rows(resources: list[Resource]) -> list[tuple[int, float, float]]:
    return [(r.type, r.start / M, r.end / M) for r in resources]


@pytest.mark.parametrize("kind", TOLD)
def test_lies(kind):
    """Each lie, row by row."""
    assert rows(tell(TRUTH, [parse_rule(kind)])) == TOLD[kind]


def test_every_kind_is_told():
    """There is no other fault of the HOB list."""
    assert {kind.name for kind in KINDS.values() if kind.place is Place.HOB} == set(TOLD)


def test_a_range_chooses_the_resources():
    """With gpa= the lie is about resources that start there; other faults say nothing about HOBs."""
    told = tell(TRUTH, [parse_rule("hob-less@gpa=4G-8G"), parse_rule("busy")])
    assert rows(told) == [*rows(TRUTH[:3]), (UNACCEPTED, 4096, 5120)]


def test_the_firmware_reads_the_lie(make_lab):
    """The untrue list is what lies in guest memory, and the pages are those of the true one."""
    lab = make_lab(4 << 30)
    told = launch_td(lab.host, BUILT_IN, [], lab.machine.regs, [parse_rule("hob-more@gpa=4G-8G")])
    assert read_hob_list(lab.machine.memory, lab.machine.regs.rcx) == told
    assert told[-1].end == 7 << 30
    assert not lab.host.ram.overlaps(6 << 30, 7 << 30)
