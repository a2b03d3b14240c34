"""OVMF's policy: what it accepts itself, and with which pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware.accept_policy import AcceptPolicy, accept_range, accept_resources
from firmware.hob import Resource
from guest.errors import GuestPanic
from guest.ranges import RangeSet
from guest.trace import Print
from tdx.events import TdCall

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


SZ_32M = 1 << 25


def test_processors_take_pieces_of_32_mib_by_turns(make_lab):
    """Up to a 2 MiB border one works alone; then each piece goes to the next one, and time is that of the slowest."""
    end = P + 4 * SZ_32M + SZ_4K
    lab = make_lab(RangeSet([(0, 1 << 28)]), running=True)
    accept_range(lab.machine, P - SZ_4K, end, cpus=3)
    pieces = [(P + n * SZ_32M, 1, 16) for n in range(4)]
    assert lab.accepts() == [(P - SZ_4K, 0, 1), *pieces, (P + 4 * SZ_32M, 0, 1)]
    begins = {r.event.rcx & ~0xFFF: r.ns for r in lab.machine.trace.records if isinstance(r.event, TdCall)}
    times = [begins[P + n * SZ_32M] for n in range(5)]
    piece = times[3] - times[0]
    assert piece > 16 * 512 * 200  # 16 pages of 2 MiB are cleared
    near = piece // 10  # the host builds tables of Secure EPT for some pieces
    assert max(times[:3]) - min(times[:3]) < near
    assert abs(times[3] - times[4]) < near
    assert abs(lab.machine.clock.ns - times[3] - piece) < near


@settings(deadline=None, max_examples=30)
@given(st.tuples(around, st.integers(0, 60)), st.integers(1, 9))
def test_many_processors_accept_the_same_and_sooner(make_lab, span, cpus):
    """Whatever their number, every page is accepted once; the time is at least that of one divided by them."""
    start, end = span[0], span[0] + span[1] * SZ_2M + SZ_4K
    alone, together = (make_lab(RangeSet([(0, 1 << 28)]), running=True) for _ in range(2))
    accept_range(alone.machine, start, end)
    accept_range(together.machine, start, end, cpus)
    assert list(together.host.sept.mapped()) == list(alone.host.sept.mapped()) == [(start, end)]
    one, many = alone.machine.clock.ns, together.machine.clock.ns
    slack = 1024 * 4000  # exactly 2 MiB are pages of 4 KiB if one works alone
    assert one / cpus - slack <= many <= one + slack


def accept_pieces(make_lab, pieces, *options):
    """Accept unaccepted resources on a machine that has them; returns the lab and what is left."""
    lab = make_lab(RangeSet(pieces), running=True)
    left = accept_resources(lab.machine, [Resource(UNACCEPTED, *piece) for piece in pieces], *options)
    return lab, [(r.type, r.start, r.end) for r in left]


@pytest.mark.parametrize(
    "policy, accepted, left",
    [
        (AcceptPolicy(), [(0, P), (SZ_4G - P, SZ_4G + P)], []),
        (AcceptPolicy(end=SZ_4G), [(0, P), (SZ_4G - P, SZ_4G)], [(SZ_4G, SZ_4G + P)]),
        (AcceptPolicy(size=SZ_4K), [(0, SZ_4K)], [(SZ_4K, P), (SZ_4G - P, SZ_4G + P)]),
        (AcceptPolicy(size=P), [(0, P)], [(SZ_4G - P, SZ_4G + P)]),
        (AcceptPolicy(size=P + SZ_4K), [(0, P), (SZ_4G - P, SZ_4G - P + SZ_4K)], [(SZ_4G - P + SZ_4K, SZ_4G + P)]),
        (AcceptPolicy(size=3 * P), [(0, P), (SZ_4G - P, SZ_4G + P)], []),
        (AcceptPolicy(size=1 << 50), [(0, P), (SZ_4G - P, SZ_4G + P)], []),
    ],
)
@pytest.mark.parametrize("cpus", [1, 3])
def test_a_policy_divides_memory(make_lab, policy, accepted, left, cpus):
    """What lies below the end and within the first bytes is accepted, and the rest is left, also with stacks first."""
    if cpus > 1 and policy.size == SZ_4K:
        return  # no room for stacks
    lab, found = accept_pieces(make_lab, [(0, P), (SZ_4G - P, SZ_4G + P)], policy, cpus)
    assert list(lab.host.sept.mapped()) == accepted
    assert found == [(UNACCEPTED, *span) for span in left]


@pytest.mark.parametrize(
    "policy, line",
    [
        (AcceptPolicy(), "AcceptMemory till 0xffffffffffffffff"),
        (AcceptPolicy(size=P), "AcceptMemory of 0x400000 bytes"),
    ],
)
def test_a_policy_says_what_it_does(make_lab, policy, line):
    """The headline names it."""
    lab, _ = accept_pieces(make_lab, [(0, SZ_2M)], policy)
    assert lab.prints() == [line, "MpAccept : 0x0 - 0x200000 (0x200000)"]


def test_stacks_come_first(make_lab):
    """Small ranges are accepted on the way to one with room for 16 KiB each; of more than 32 MiB only the stacks."""
    pieces = [(0, SZ_4K), (SZ_2M, 2 * SZ_2M + SZ_32M)]
    lab, left = accept_pieces(make_lab, pieces, AcceptPolicy(), 129)
    assert lab.prints() == [
        "AcceptMemoryForAPsStack with APsStackSize=0x400000",
        "AcceptMemory till 0xffffffffffffffff",
        "MpAccept : 0x600000 - 0x2400000 (0x1e00000)",
    ]
    assert lab.accepts()[:2] == [(0, 0, 1), (SZ_2M, 1, 2)]
    assert left == []
    lab, _ = accept_pieces(make_lab, [(0, SZ_2M), (2 * SZ_2M, 3 * SZ_2M)], AcceptPolicy(), 2)
    assert lab.accepts() == [(0, 0, 512), (2 * SZ_2M, 0, 512)]
    assert lab.prints()[-1] == "MpAccept : 0x400000 - 0x600000 (0x200000)"


def test_no_room_for_stacks_stops_the_firmware(make_lab):
    """Without a range that is large enough nobody could help."""
    with pytest.raises(GuestPanic) as died:
        accept_pieces(make_lab, [(0, SZ_2M)], AcceptPolicy(), 129)
    assert died.value.text == "no range of 0x400000 bytes for the stacks of 129 processors"
