"""The guest's side: detection, MapGPA, the accept loop of v9, and the platform accept of a stage."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest.errors import GuestPanic
from guest.machine import Machine
from guest.registers import Registers
from guest.trace import Print
from tdx.events import TdCall, TdVmCall
from tdx.guest import (
    PlatformAccept,
    accept_pages,
    tdx_accept_memory_v9,
    tdx_cc_mask,
    tdx_guest_detected,
    tdx_map_gpa,
    tdx_map_gpa_v9,
)

SZ_4K, SZ_2M, SZ_1G = 0x1000, 0x20_0000, 0x4000_0000
ACCEPT = "TDG.MEM.PAGE.ACCEPT"
OPERAND_INVALID_RCX = 0xC000_0100_0000_0001
SIZE_MISMATCH_2M = 0xC000_0B0B_0000_0001
ALREADY_ACCEPTED = 0x0000_0B0A_0000_0000
RAM_8G = ((0, 8 * SZ_1G),)


@dataclass
class OtherPlatform:
    """A platform whose CPUID answers what it is given."""

    leaves: dict[int, tuple[int, int, int, int]]

    def admit(self, gpa, size, kind):
        return 0, 1 << 52

    def cpuid(self, leaf, subleaf=0):
        return self.leaves.get(leaf, (0, 0, 0, 0))

    def tdcall(self, regs):
        raise AssertionError("TDCALL outside a TD")

    def tdcall_run(self, regs, step, count):
        raise AssertionError("TDCALL outside a TD")


def machine_on(td, leaves) -> Machine:
    """A machine on another platform."""
    return Machine.build(td.physical, OtherPlatform(leaves), td.trace, td.clock)


IDENT = (0, 0x65746E49, 0x20202020, 0x5844546C)
NO_TD = [
    {},
    {0: (0x20, 0, 0, 0), 0x21: IDENT},
    {0: (0x21, 0, 0, 0)},
    {0: (0x21, 0, 0, 0), 0x21: (0, 0x65746E49, 0x5844546C, 0x20202020)},
    {0: (0x21, 0, 0, 0), 0x21: (0, 0x65746E49, 0x20202021, 0x5844546C)},
]


def test_a_td_is_detected_by_cpuid(td):
    """Leaf 0 reaches to 0x21 and leaf 0x21 has the signature in EBX, EDX, ECX."""
    assert tdx_guest_detected(td.machine)
    assert tdx_guest_detected(machine_on(td, {0: (0x21, 0, 0, 0), 0x21: IDENT}))


@pytest.mark.parametrize("leaves", NO_TD)
def test_anything_else_is_no_td(td, leaves):
    """A lower leaf 0, no signature, or one in other registers is another platform."""
    assert not tdx_guest_detected(machine_on(td, leaves))


@pytest.mark.parametrize("gpaw", [48, 52])
def test_the_shared_bit_is_the_highest_of_the_width(make_td, gpaw):
    """TDG.VP.INFO is asked once and gives the mask."""
    td = make_td(gpaw=gpaw)
    assert tdx_cc_mask(td.machine) == 1 << gpaw - 1
    assert td.calls() == {("TDG.VP.INFO", 0): 1}


@pytest.mark.parametrize("start, end, done", [(0x1000, 0x3000, True), (0x1000, 0x1800, False), (0, 1 << 52, False)])
def test_map_gpa_succeeds_if_the_host_says_so(td, start, end, done):
    """One call for the whole range; any status of the host other than success is a failure."""
    for map_gpa in (tdx_map_gpa, tdx_map_gpa_v9):
        td.trace.records.clear()
        assert map_gpa(td.machine, start, end) is done
        (event,) = td.events(TdVmCall)
        assert (event.r12, event.r13) == (start, end - start)


RETRIES = [
    # R11 of each RETRY, whether mainline succeeds, the addresses it calls with
    ([], True, [0]),
    ([SZ_2M], True, [0, SZ_2M]),
    ([SZ_2M, SZ_2M, SZ_2M], True, [0, SZ_2M, SZ_2M, SZ_2M]),
    ([SZ_2M, SZ_2M, SZ_2M, SZ_2M], False, [0, SZ_2M, SZ_2M, SZ_2M]),
    ([0, 0, SZ_2M, SZ_2M, SZ_2M], True, [0, 0, 0, SZ_2M, SZ_2M, SZ_2M]),
    ([0, 0, 0], False, [0, 0, 0]),
    ([8 * SZ_2M], False, [0]),
    ([2 * SZ_2M, SZ_2M], False, [0, 2 * SZ_2M]),
    ([(1 << 64) - 1], False, [0]),
]


@pytest.mark.parametrize("answers, done, calls", RETRIES)
def test_mainline_goes_on_where_the_host_stopped(td, monkeypatch, answers, done, calls):
    """RETRY restarts at R11, which must lie in what is left; three answers in a row without progress are a failure."""
    left = list(answers)

    def answer(host, regs: Registers) -> int:
        if not left:
            return 0
        regs.r11 = left.pop(0)
        return 1

    monkeypatch.setattr("tdx.vmm.answer", answer)
    assert tdx_map_gpa(td.machine, 0, 8 * SZ_2M) is done
    assert [(event.r12, event.r12 + event.r13) for event in td.events(TdVmCall)] == [(at, 8 * SZ_2M) for at in calls]


def test_v9_takes_retry_for_a_failure(td):
    """v9 knows no RETRY: a host that was interrupted after 2 MiB lets it fail, with those 2 MiB done."""
    td.host.shared.add(0, 8 * SZ_2M)
    td.host.vmcalls.has_event = lambda gpa: gpa == SZ_2M
    assert not tdx_map_gpa_v9(td.machine, 0, 8 * SZ_2M)
    assert list(td.host.shared) == [(SZ_2M, 8 * SZ_2M)]
    assert tdx_map_gpa(td.machine, 0, 8 * SZ_2M)
    assert not td.host.shared


def test_v9_asks_the_host_once_and_tries_1g_first(make_td):
    """MapGPA for the range, then at each 1 GiB border a try that must fail, and 2 MiB pages."""
    td = make_td(RAM_8G)
    start, end = SZ_1G - SZ_2M, 3 * SZ_1G + SZ_4K
    assert tdx_accept_memory_v9(td.machine, start, end)
    assert td.events(TdVmCall) == [TdVmCall("MapGPA", start, end - start, 0)]
    assert [event for event in td.events(TdCall) if event.leaf == ACCEPT] == [
        TdCall(ACCEPT, SZ_1G - SZ_2M | 1, 0, 1),
        TdCall(ACCEPT, SZ_1G | 2, OPERAND_INVALID_RCX, 1),
        TdCall(ACCEPT, SZ_1G | 1, 0, 512),
        TdCall(ACCEPT, 2 * SZ_1G | 2, OPERAND_INVALID_RCX, 1),
        TdCall(ACCEPT, 2 * SZ_1G | 1, 0, 512),
        TdCall(ACCEPT, 3 * SZ_1G, 0, 1),
    ]
    assert list(td.sept.mapped()) == [(start, end)]


def test_v9_accepts_nothing_that_the_host_refused(td):
    """If MapGPA fails, no page is accepted."""
    assert not tdx_accept_memory_v9(td.machine, 0, 1 << 52)
    assert not td.sept.mapped()
    assert td.calls() == {("TDG.VP.VMCALL", 0): 1}


def test_a_host_with_small_pages_costs_a_mismatch_for_each_2m(make_td):
    """With 4 KiB pages below, each 2 MiB try fails with a size mismatch and 512 small accepts follow."""
    td = make_td(page_level=0)
    assert accept_pages(td.machine, 0, 4 * SZ_2M, (2, 1, 0))
    assert td.calls() == {(ACCEPT, SIZE_MISMATCH_2M): 4, (ACCEPT, 0): 4 * 512}
    assert td.exits() == {0: 4 * 512}


def test_accept_stops_at_the_first_page_that_is_refused(td):
    """What came before the refused page stays accepted, what comes behind it is not tried."""
    td.sept.page_add(0x5000, 0x6000)
    assert not accept_pages(td.machine, 0x1000, 0x9000, (1, 0))
    assert list(td.sept.mapped()) == [(0x1000, 0x6000)]
    assert td.calls() == {(ACCEPT, 0): 4, (ACCEPT, ALREADY_ACCEPTED): 1}


def test_an_empty_range_is_accepted_without_a_call(td):
    """Nothing to accept is success."""
    assert accept_pages(td.machine, 0x1000, 0x1000, (2, 1, 0))
    assert td.trace.records == []


def accept_slowly(machine, start, end, levels):
    """v9's loop as the series has it: one page a turn, largest first, any refusal tries the next size."""
    while start < end:
        for level in levels:
            size = (SZ_4K, SZ_2M, SZ_1G)[level]
            if start % size or end - start < size:
                continue
            regs = Registers(rax=6, rcx=start | level)
            machine.platform.tdcall(regs)
            if regs.rax == 0:
                start += size
                break
        else:
            return False
    return True


def left_behind(td, done):
    """What an accept loop leaves."""
    return done, td.states(0, 1 << 64), td.calls(), td.exits(), td.clock.ns


around_2m = st.builds(
    lambda base, pages: base + pages * SZ_4K, st.integers(1, 4).map(lambda n: n * SZ_2M), st.integers(-2, 2)
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(around_2m, min_size=2, max_size=2).map(sorted),
    st.lists(st.lists(around_2m, min_size=2, max_size=2).map(sorted), max_size=2),
    st.integers(0, 1),
    st.sampled_from([(2, 1, 0), (1, 0), (0,)]),
)
def test_accept_in_runs_is_the_loop_page_by_page(make_td, span, added, page_level, levels):
    """Around 2 MiB borders, with pages that are mapped already, runs make the very calls of the slow loop."""
    results = []
    for accept in (accept_pages, accept_slowly):
        td = make_td(page_level=page_level)
        for start, end in added:
            for low, high, state, _ in td.states(start, end):
                if state == "FREE":
                    td.sept.page_add(low, high)
        results.append(left_behind(td, accept(td.machine, *span, levels)))
    assert results[0] == results[1]


@settings(deadline=None, max_examples=15)
@given(st.integers(-2, 2), st.integers(-2, 2), st.sampled_from([SZ_4K, SZ_2M]), st.integers(0, 1))
def test_accept_in_runs_is_the_loop_around_1g(make_td, first, last, step, gib):
    """Around 1 GiB borders, where the largest size is tried and refused, runs make the calls of the slow loop."""
    start, end = SZ_1G + first * step, (gib + 1) * SZ_1G + 8 * SZ_2M + last * step
    results = []
    for accept in (accept_pages, accept_slowly):
        td = make_td(RAM_8G)
        results.append(left_behind(td, accept(td.machine, start, end, (2, 1, 0))))
    assert results[0] == results[1]
    assert results[0][0]


def test_platform_accept_finds_its_platform_once(td):
    """The first use asks CPUID and TDG.VP.INFO, later ones do not."""
    accept = PlatformAccept(td.machine)
    assert td.trace.records == []
    accept(0, SZ_2M)
    accept(SZ_2M, 2 * SZ_2M)
    assert td.calls() == {("TDG.VP.INFO", 0): 1, ("TDG.VP.VMCALL", 0): 2, (ACCEPT, 0): 2}
    assert list(td.sept.mapped()) == [(0, 2 * SZ_2M)]


def test_platform_accept_panics_on_an_unknown_platform(td):
    """Where no TD is detected, the stage stops with the kernel's words."""
    machine = machine_on(td, {})
    accept = PlatformAccept(machine)
    for _ in range(2):
        with pytest.raises(GuestPanic) as died:
            accept(0, SZ_2M)
        assert (died.value.stage, died.value.text) == ("test", "Cannot accept memory: unknown platform")
    assert td.events(Print) == [Print("Cannot accept memory: unknown platform")] * 2


@pytest.mark.parametrize("start, end", [(0x1000, 0x3000), (1 << 50, 1 << 53)])
def test_platform_accept_panics_if_accepting_fails(td, start, end):
    """If a page or the host refuses, the stage stops and names the range."""
    td.sept.page_add(0x2000, 0x3000)
    with pytest.raises(GuestPanic) as died:
        PlatformAccept(td.machine)(start, end)
    assert died.value.text == f"Accepting memory failed: {start:#x}-{end:#x}"
    assert td.trace.records[-1].event == Print(died.value.text)
