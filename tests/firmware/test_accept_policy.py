"""OVMF's policy: what it accepts itself, and with which pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware.accept_policy import accept_range, accept_resources
from firmware.hob import Resource
from guest.errors import GuestPanic
from guest.ranges import RangeSet
from guest.trace import Print

SZ_4K, SZ_2M, SZ_4G = 0x1000, 0x20_0000, 1 << 32
RAM = RangeSet([(0, 1 << 26)])
P = 0x40_0000
UNACCEPTED, SYSTEM, MMIO, RESERVED = 7, 0, 1, 5


@pytest.mark.parametrize(
    "start, end, accepts",
    [
        (P, P + SZ_2M, [(P, 0, 512)]),
        (P, P + SZ_2M + SZ_4K, [(P, 1, 1), (P + SZ_2M, 0, 1)]),
        (P, P + 2 * SZ_2M, [(P, 1, 2)]),
        (P, P + SZ_2M - SZ_4K, [(P, 0, 511)]),
        (P + SZ_4K, P + SZ_2M, [(P + SZ_4K, 0, 511)]),
        (P + SZ_4K, P + 2 * SZ_2M, [(P + SZ_4K, 0, 511), (P + SZ_2M, 0, 512)]),
        (P - SZ_4K, P + 3 * SZ_2M + 2 * SZ_4K, [(P - SZ_4K, 0, 1), (P, 1, 3), (P + 3 * SZ_2M, 0, 2)]),
        (P + SZ_4K, P + 3 * SZ_4K, [(P + SZ_4K, 0, 2)]),
        (P - SZ_4K, P + SZ_4K, [(P - SZ_4K, 0, 1), (P, 0, 1)]),
        (P, P, []),
    ],
)
def test_pages_are_chosen_as_ovmf_does(make_lab, start, end, accepts):
    """4 KiB up to a border, 2 MiB only if strictly more than 2 MiB are left there, 4 KiB for the tail."""
    lab = make_lab(RAM, running=True)
    accept_range(lab.machine, start, end)
    assert lab.accepts() == accepts
    assert lab.prints() == [f"MpAccept : {start:#x} - {end:#x} ({end - start:#x})"]


def pages_slowly(start: int, end: int) -> dict[int, int]:
    """Level of each accepted page by its address: the rule, page by page."""
    out, gpa, border = {}, start, -(-start // SZ_2M) * SZ_2M
    large = end - border > SZ_2M
    while gpa < end:
        level = 1 if large and gpa % SZ_2M == 0 and end - gpa >= SZ_2M else 0
        out[gpa] = level
        gpa += SZ_2M if level else SZ_4K
    return out


around = st.builds(lambda block, page: block * SZ_2M + page * SZ_4K, st.integers(1, 4), st.integers(-3, 3))


@settings(deadline=None)
@given(st.tuples(around, around).map(sorted))
def test_every_page_is_accepted_once_with_its_size(make_lab, span):
    """Whatever its ends, a range is accepted completely, and by the rule."""
    lab = make_lab(RAM, running=True)
    accept_range(lab.machine, *span)
    found = {gpa + n * (SZ_2M if level else SZ_4K): level for gpa, level, count in lab.accepts() for n in range(count)}
    assert found == pages_slowly(*span)
    assert list(lab.host.sept.mapped()) == ([tuple(span)] if span[0] < span[1] else [])


def test_a_host_with_small_pages_gets_small_accepts(make_lab):
    """A 2 MiB page that the host cannot back is accepted in 4 KiB pages, and the next one is tried again."""
    lab = make_lab(RAM, page_level=0, running=True)
    accept_range(lab.machine, P, P + 3 * SZ_2M)
    assert list(lab.host.sept.mapped()) == [(P, P + 3 * SZ_2M)]
    assert lab.accepts() == [(P + n * SZ_2M, 0, 512) for n in range(3)]


def test_a_page_that_is_refused_stops_the_firmware(make_lab):
    """Memory that is accepted already is not what the HOB list says, and the firmware gives up."""
    lab = make_lab(RAM)
    lab.host.page_add(P + SZ_4K, b"", SZ_4K, "somebody else's")
    lab.host.finalize()
    with pytest.raises(GuestPanic) as died:
        accept_range(lab.machine, P, P + 4 * SZ_4K)
    assert died.value.text == f"Accept memory failed: {P:#x} - {P + 4 * SZ_4K:#x}"
    assert lab.machine.trace.records[-1].event == Print(died.value.text)


def test_only_unaccepted_memory_below_4g_is_accepted(make_lab):
    """System memory, MMIO and reserved ranges are left alone; what lies above 4 GiB stays unaccepted."""
    lab = make_lab(RangeSet([(0, P), (SZ_4G, SZ_4G + P)]), running=True)
    left = accept_resources(
        lab.machine,
        [
            Resource(UNACCEPTED, 0, SZ_2M),
            Resource(SYSTEM, SZ_2M, 2 * SZ_2M),
            Resource(MMIO, 0xE000_0000, 0xF000_0000),
            Resource(RESERVED, 0xF000_0000, 0xF100_0000),
            Resource(SYSTEM, SZ_4G, SZ_4G + SZ_2M),
            Resource(UNACCEPTED, SZ_4G + SZ_2M, SZ_4G + P),
        ],
    )
    assert left == [Resource(UNACCEPTED, SZ_4G + SZ_2M, SZ_4G + P)]
    assert list(lab.host.sept.mapped()) == [(0, SZ_2M)]
    assert lab.prints() == ["AcceptMemory under address of 4G", "MpAccept : 0x0 - 0x200000 (0x200000)"]


@pytest.mark.parametrize("below, above", [(SZ_4K, SZ_4K), (3 * SZ_2M, SZ_2M), (SZ_2M, 0), (0, SZ_2M)])
def test_a_range_over_4g_is_clamped(make_lab, below, above):
    """The part below 4 GiB is accepted, the part above stays unaccepted."""
    start, end = SZ_4G - below, SZ_4G + above
    lab = make_lab(RangeSet([(start, end)]), running=True)
    left = accept_resources(lab.machine, [Resource(UNACCEPTED, start, end)])
    assert left == ([Resource(UNACCEPTED, SZ_4G, end)] if above else [])
    assert list(lab.host.sept.mapped()) == ([(start, SZ_4G)] if below else [])
