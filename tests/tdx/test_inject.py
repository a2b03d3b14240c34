"""Faults at the module's and the host's border: each meets the call that its rule names, in runs as in single calls."""

from __future__ import annotations

import random

import pytest

from guest.errors import BootError, MemoryFault
from guest.registers import Registers
from guest.units import SZ_2M, SZ_4G, SZ_4M
from tdx.events import AcceptInterrupted, FaultInjected, SeamCall, TdCall
from tdx.faults import parse_rule
from tdx.guest import accept_pages, tdx_map_gpa
from tdx.inject import Injector
from tdx.leaves import EXPOSE_R10_R15, Leaf, SubFunction, VmCallStatus
from tdx.status import status_name

RAM = ((0, 64 << 20), (SZ_4G, SZ_4G + (8 << 20)))


@pytest.fixture
def hostile(make_td):
    """``hostile(*rules)``: a TD with 64 MiB of RAM whose host plays by those rules."""

    def build(*rules: str, **how: object):
        td = make_td(RAM, **how)
        Injector([parse_rule(rule) for rule in rules], td.module.page_accept, td.host, td.trace)
        return td

    return build


def accept(td, gpa: int, level: int, count: int = 1) -> tuple[int, str, int]:
    """Run of accepts: how many succeeded, the last status, RCX."""
    regs = Registers(rax=Leaf.TDG_MEM_PAGE_ACCEPT, rcx=gpa | level)
    size = (4096, SZ_2M)[level]
    done = td.machine.platform.tdcall_run(regs, size, count)
    return done, status_name(regs.rax), regs.rcx


def map_gpa(td, gpa: int, size: int) -> Registers:
    regs = Registers(rax=0, rcx=EXPOSE_R10_R15, r11=SubFunction.MapGPA, r12=gpa, r13=size)
    td.machine.platform.tdcall(regs)
    return regs


def seamcalls(td) -> list[str]:
    return [event.leaf.removeprefix("TDH.MEM.") for event in td.events(SeamCall)]


def test_a_run_is_cut_exactly_at_the_call(hostile):
    """BUSY at the 17th accept: 16 succeed before it in one run, and the 17th page is what the guest gets it for."""
    td = hostile("busy@accept=17")
    assert accept(td, 0, 0, 100) == (16, "TDX_OPERAND_BUSY", 16 << 12)
    events = [(e.rcx, status_name(e.status), e.count) for e in td.events(TdCall)]
    assert events == [(0, "TDX_SUCCESS", 16), (16 << 12, "TDX_OPERAND_BUSY", 1)]
    assert accept(td, 16 << 12, 0, 84) == (84, "TDX_SUCCESS", 99 << 12)


def test_busy_n_times(hostile):
    """With n=3 the next three accepts from the second on are refused, and then no more."""
    td = hostile("busy@accept=2,n=3")
    assert [accept(td, gpa << 12, 0)[1] for gpa in (0, 1, 1, 1, 1)] == [
        "TDX_SUCCESS", "TDX_OPERAND_BUSY", "TDX_OPERAND_BUSY", "TDX_OPERAND_BUSY", "TDX_SUCCESS"
    ]  # fmt: skip


def test_gpa_and_level(hostile):
    """A rule with a range meets the first page that touches it; a fault of 2 MiB pages leaves 4 KiB pages alone."""
    td = hostile("size-mismatch@gpa=0x601000-0x602000")
    assert accept(td, 0x60_0000, 0, 3) == (3, "TDX_SUCCESS", 0x60_2000)
    td = hostile("size-mismatch@gpa=0x601000-0x602000")
    assert accept(td, 0, 1, 8) == (3, "TDX_PAGE_SIZE_MISMATCH", 0x60_0001)
    assert td.states(0x60_0000, 0x80_0000) == [
        (0x60_0000, 0x60_1000, "PENDING", 0), (0x60_1000, 0x80_0000, "FREE", 0)
    ]  # fmt: skip


def test_stage(hostile):
    """A rule with a stage waits for it."""
    td = hostile("busy@stage=later")
    assert accept(td, 0, 0)[1] == "TDX_SUCCESS"
    td.trace.stage = "later"
    assert accept(td, 4096, 0)[1] == "TDX_OPERAND_BUSY"


def test_probability_is_of_the_seed_alone(hostile):
    """Calls are met with the probability, the same ones for the same seed, others for another seed."""

    def met(seed: int) -> list[int]:
        td = hostile(f"block-unblock@p=0.05,seed={seed}")
        assert accept(td, 0, 0, 4000)[0] == 4000
        return [event.gpa for event in td.events(FaultInjected)]

    assert met(7) == met(7) != met(8)
    assert 140 < len(met(7)) < 260


@pytest.mark.parametrize("seed", range(12))
def test_runs_are_the_loop_of_single_calls(make_td, seed):
    """Whatever the rules, runs of accepts end as the guest's own loop would: states, statuses, time."""
    choice = random.Random(seed)
    kinds = ("busy", "size-mismatch", "withhold", "interrupt", "interrupt-block", "replay", "remove", "block")
    rules = []
    for kind in choice.sample(kinds, 3):
        when = choice.choice((f"accept={choice.randint(1, 30)}", "gpa=3M-9M", f"p=0.1,seed={seed}"))
        rules.append(parse_rule(f"{kind}@{when},n={choice.randint(1, 4)}"))
    seen = []
    for single_step in (False, True):
        td = make_td(RAM, single_step=single_step)
        Injector(rules, td.module.page_accept, td.host, td.trace)
        try:
            end = accept_pages(td.machine, 1 << 20, 21 << 20, (1, 0))
        except BootError as error:
            end = str(error)
        seen.append((end, td.calls(), td.exits(), td.clock.ns, td.states(0, 64 << 20), td.events(FaultInjected)))
    assert seen[0] == seen[1]
    assert seen[0][-1]


def test_withheld_page(hostile):
    """A host that never backs a page lets the guest exit for ever: the guest is dead, and its page is still FREE."""
    td = hostile("withhold@accept=2")
    with pytest.raises(MemoryFault, match="the host does not resolve it"):
        accept(td, 0, 0, 3)
    assert [state for *_, state, _ in td.states(0, 0x2000)] == ["MAPPED", "FREE"]


def test_interrupted_accept_goes_on(hostile):
    """An interrupt in the accept of a 2 MiB page is seen in the trace alone."""
    td = hostile("interrupt:5@accept=2")
    assert accept(td, 0, 1, 4) == (4, "TDX_SUCCESS", (3 * SZ_2M) | 1)
    assert td.events(AcceptInterrupted) == [AcceptInterrupted(SZ_2M, 5)]
    assert td.states(0, 8 << 20) == [(0, 8 << 20, "MAPPED", 1)]


def test_interrupted_accept_of_a_page_that_was_blocked_starts_over(hostile):
    """If the host blocks and unblocks the page meanwhile, the accept begins anew, and succeeds."""
    td = hostile("interrupt-block:500@accept=1")
    before = td.clock.ns
    assert accept(td, 0, 1) == (1, "TDX_SUCCESS", 1)
    assert seamcalls(td)[-3:] == ["RANGE.BLOCK", "TRACK", "RANGE.UNBLOCK"]
    plain = hostile()
    plain_before = plain.clock.ns
    accept(plain, 0, 1)
    assert td.clock.ns - before > plain.clock.ns - plain_before + 500 * 7


def test_replay(hostile):
    """BLOCK, TRACK, REMOVE, AUG: the accepted page is PENDING again; a touch kills, an accept succeeds and zeroes."""
    td = hostile("replay@accept=1")
    assert accept(td, 0, 0) == (1, "TDX_SUCCESS", 0)
    assert seamcalls(td)[-4:] == ["RANGE.BLOCK", "TRACK", "PAGE.REMOVE", "PAGE.AUG"]
    td.physical.write(0, b"data of the guest")
    with pytest.raises(MemoryFault, match="PENDING"):
        td.machine.memory.read(0, 8)
    assert accept(td, 0, 0) == (1, "TDX_SUCCESS", 0)
    assert td.machine.memory.read(0, 17) == bytes(17)


def test_removed_and_blocked_pages(hostile):
    """A touch of a removed page finds a new, PENDING one; of a blocked page nothing, unless the host gives it back."""
    td = hostile("remove@accept=1", "block@accept=2", "block-unblock@accept=3")
    assert accept(td, 0, 0, 3)[0] == 3
    with pytest.raises(MemoryFault, match="FREE"):
        td.machine.memory.read(0, 8)
    with pytest.raises(MemoryFault, match="BLOCKED"):
        td.machine.memory.read(0x1000, 8)
    assert td.machine.memory.read(0x2000, 8) == bytes(8)


def test_accepted_memory_that_the_guest_just_used_is_taken_too(hostile):
    """The guest's last translation does not outlive the page."""
    td = hostile("block@gpa=4G-5G")
    accept(td, 0, 0, 4)
    td.machine.memory.write(0x1000, b"x")
    accept(td, SZ_4G, 0)
    td.machine.memory.write(0x1000, b"y")
    with pytest.raises(MemoryFault):
        td.machine.memory.write(SZ_4G, b"z")


@pytest.mark.parametrize(
    ("rule", "status", "r11", "shared"),
    [
        ("mapgpa-refuse", VmCallStatus.INVALID_OPERAND, 0, 0),
        ("mapgpa-retry", VmCallStatus.RETRY, SZ_2M, SZ_2M),
        ("mapgpa-stuck", VmCallStatus.RETRY, 0, 0),
        ("mapgpa-partial", VmCallStatus.SUCCESS, None, SZ_2M),
        ("status", 0xDEAD, None, SZ_4M),
        ("status:1", VmCallStatus.RETRY, None, SZ_4M),
    ],
)
def test_map_gpa(hostile, rule, status, r11, shared):
    """Each fault of MapGPA: what the guest is told in R10 and R11, and what the host really made shared."""
    td = hostile(rule)
    bit = td.host.shared_mask
    regs = map_gpa(td, bit, SZ_4M)
    assert regs.r10 == status
    assert r11 is None or regs.r11 == bit | r11
    assert td.host.shared.total() == shared
    assert (regs.r12, regs.r13) == (bit, SZ_4M)
    assert map_gpa(td, bit, SZ_4M).r10 == VmCallStatus.SUCCESS


def test_garbage_in_registers(hostile):
    """The call is done and R10 says so; every other exposed register is garbage, and no other register changes."""
    td = hostile("registers@tdvmcall=2")
    assert tdx_map_gpa(td.machine, 0, SZ_2M)
    regs = map_gpa(td, 0, SZ_2M)
    assert regs.r10 == VmCallStatus.SUCCESS
    assert all(getattr(regs, name) for name in ("r11", "r12", "r13", "r14", "r15"))
    assert (regs.rbx, regs.rdx, regs.rsi, regs.r8) == (0, 0, 0, 0)


def test_which_map_gpa(hostile):
    """mapgpa=N counts calls of that sub-function, tdvmcall=N all; a range is looked for in the call's own."""
    td = hostile("mapgpa-refuse@mapgpa=2", "mapgpa-refuse@tdvmcall=4", "mapgpa-refuse@gpa=4M-5M")
    info = Registers(rax=0, rcx=EXPOSE_R10_R15, r11=SubFunction.GetTdVmCallInfo)
    td.machine.platform.tdcall(info)
    answers = [map_gpa(td, gpa, SZ_2M).r10 == 0 for gpa in (0, 0, 0, 0, SZ_2M, SZ_4M, SZ_4M)]
    assert answers == [True, False, False, True, True, False, True]
