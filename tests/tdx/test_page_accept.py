"""TDG.MEM.PAGE.ACCEPT: its decision table, and runs of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest.errors import MemoryFault
from guest.registers import Registers
from guest.units import round_down
from tdx.backing import Backing
from tdx.events import SeamCall, TdCall, TdExit
from tdx.seamcall import SeamLeaf

ACCEPT = 6
OPERAND_INVALID_RCX = 0xC000_0100_0000_0001
ALREADY_ACCEPTED = 0x0000_0B0A_0000_0000
SIZE_MISMATCH_2M = 0xC000_0B0B_0000_0001
SZ_4K, SZ_2M, SZ_1G = 0x1000, 0x20_0000, 0x4000_0000
SIZE = (SZ_4K, SZ_2M, SZ_1G)
P = 0x40_0000
"""A 2 MiB page in the middle of RAM."""


def prepare(td, *steps):
    """Bring the Secure EPT to a state: (step, first page, page behind the last, level), 4 KiB pages from P on."""
    for step, first, last, level in steps:
        start, end = P + first * SZ_4K, P + last * SZ_4K
        if step == "add":
            td.sept.page_add(start, end)
        if step in ("aug", "accept"):
            td.sept.page_aug(start, end, level)
        if step == "accept":
            td.sept.page_accept(start, end, level)


def accept(td, rcx):
    """One TDCALL with RAX = 6; returns RAX."""
    regs = Registers(rax=ACCEPT, rcx=rcx, rdx=7, r8=8)
    td.module.tdcall(regs)
    assert regs == Registers(rax=regs.rax, rcx=rcx, rdx=7, r8=8)
    return regs.rax


# Intel TDX module 1.5, TDG.MEM.PAGE.ACCEPT: reserved bits, level, alignment, shared bit, guest physical width.
INVALID_OPERANDS = [
    *((52, P | 1 << bit) for bit in range(3, 12)),
    *((52, P | 1 << bit) for bit in range(52, 64)),
    *((52, P | level) for level in range(2, 8)),
    (52, SZ_1G | 2),
    (52, P + SZ_4K | 1),
    (52, P + SZ_2M // 2 | 1),
    (52, P | 1 << 51),
    (52, P | 1 << 51 | 1),
    (48, P | 1 << 47),
    *((48, P | 1 << bit) for bit in range(48, 52)),
]


@pytest.mark.parametrize("gpaw, rcx", INVALID_OPERANDS, ids=lambda value: f"{value:#x}")
def test_a_bad_operand_is_refused_without_an_exit(make_td, gpaw, rcx):
    """A reserved bit, a level above 2 MiB, a misaligned or a shared address gives OPERAND_INVALID | RCX."""
    td = make_td(gpaw=gpaw)
    assert accept(td, rcx) == OPERAND_INVALID_RCX
    assert td.events(TdExit) == []
    assert td.states(0, 1 << 64) == [(0, 1 << 64, "FREE", 0)]
    assert td.clock.ns == 1_000


FREE, HALF, WHOLE = (), 256, 512
TABLE = [
    # name, page_level of the host, entries before, first page of the request, level,
    # status, exits (page, level, count), entries after
    ("4K PENDING", 1, [("aug", 0, 512, 0)], 3, 0,
     0, [], [(0, 3, "PENDING", 0), (3, 4, "MAPPED", 0), (4, 512, "PENDING", 0)]),
    ("4K FREE, host with 2M", 1, FREE, 0, 0,
     0, [(0, 0, 1)], [(0, 1, "MAPPED", 0), (1, 512, "FREE", 0)]),
    ("4K FREE, host with 4K", 0, FREE, 511, 0,
     0, [(511, 0, 1)], [(0, 511, "FREE", 0), (511, 512, "MAPPED", 0)]),
    ("4K MAPPED", 1, [("add", 0, 512, 0)], 5, 0,
     ALREADY_ACCEPTED | 0, [], [(0, 512, "MAPPED", 0)]),
    ("4K in a MAPPED 2M leaf", 1, [("accept", 0, 512, 1)], 5, 0,
     ALREADY_ACCEPTED | 1, [], [(0, 512, "MAPPED", 1)]),
    ("4K in a PENDING 2M leaf", 1, [("aug", 0, 512, 1)], 5, 0,
     0, [(0, 0, 1)], [(0, 5, "PENDING", 0), (5, 6, "MAPPED", 0), (6, 512, "PENDING", 0)]),
    ("2M PENDING", 1, [("aug", 0, 512, 1)], 0, 1,
     0, [], [(0, 512, "MAPPED", 1)]),
    ("2M FREE, host with 2M", 1, FREE, 0, 1,
     0, [(0, 1, 1)], [(0, 512, "MAPPED", 1)]),
    ("2M FREE, host with 4K", 0, FREE, 0, 1,
     SIZE_MISMATCH_2M, [(0, 0, 1)], [(0, 1, "PENDING", 0), (1, 512, "FREE", 0)]),
    ("2M MAPPED", 1, [("accept", 0, 512, 1)], 0, 1,
     ALREADY_ACCEPTED | 1, [], [(0, 512, "MAPPED", 1)]),
    ("2M over PENDING 4K", 1, [("aug", 0, 512, 0)], 0, 1,
     SIZE_MISMATCH_2M, [], [(0, 512, "PENDING", 0)]),
    ("2M over MAPPED 4K", 1, [("add", 0, 512, 0)], 0, 1,
     SIZE_MISMATCH_2M, [], [(0, 512, "MAPPED", 0)]),
    ("2M, first page PENDING", 1, [("aug", 0, 1, 0)], 0, 1,
     SIZE_MISMATCH_2M, [], [(0, 1, "PENDING", 0), (1, 512, "FREE", 0)]),
    ("2M, last page PENDING", 1, [("aug", 511, 512, 0)], 0, 1,
     SIZE_MISMATCH_2M, [], [(0, 511, "FREE", 0), (511, 512, "PENDING", 0)]),
    ("2M, first page MAPPED", 1, [("add", 0, 1, 0)], 0, 1,
     SIZE_MISMATCH_2M, [], [(0, 1, "MAPPED", 0), (1, 512, "FREE", 0)]),
    ("2M, last page MAPPED", 1, [("add", 511, 512, 0)], 0, 1,
     SIZE_MISMATCH_2M, [], [(0, 511, "FREE", 0), (511, 512, "MAPPED", 0)]),
    ("2M, half MAPPED half PENDING", 1, [("add", 0, 256, 0), ("aug", 256, 512, 0)], 0, 1,
     SIZE_MISMATCH_2M, [], [(0, 256, "MAPPED", 0), (256, 512, "PENDING", 0)]),
]  # fmt: skip


@pytest.mark.parametrize(
    "page_level, before, page, level, status, exits, after",
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_accept_decides_by_what_the_walk_finds(make_td, page_level, before, page, level, status, exits, after):
    """Status, exits to the host and new state follow from the request's level and the entry found."""
    td = make_td(page_level=page_level)
    prepare(td, *before)
    rcx = P + page * SZ_4K | level
    assert accept(td, rcx) == status
    assert td.events(TdExit) == [TdExit(P + at * SZ_4K, lvl, count) for at, lvl, count in exits]
    assert td.events(TdCall) == [TdCall("TDG.MEM.PAGE.ACCEPT", rcx, status, 1)]
    expected = [(P + first * SZ_4K, P + last * SZ_4K, state, lvl) for first, last, state, lvl in after]
    assert td.states(P, P + SZ_2M) == expected
    pages = SIZE[level] // SZ_4K if status == 0 else 0
    seamcalls = td.seamcalls().total()
    assert bool(seamcalls) is bool(exits)
    assert td.clock.ns == 1_000 + 500_000 * len(exits) + 11_000_000 * seamcalls + 7 * pages


@pytest.mark.parametrize("page_level", [0, 1])
def test_accept_reaches_neither_neighbour(make_td, page_level):
    """The pages before and behind the accepted one stay as they are."""
    td = make_td(page_level=page_level)
    assert accept(td, P + SZ_4K) == 0
    assert td.states(P - SZ_2M, P + SZ_2M) == [
        (P - SZ_2M, P + SZ_4K, "FREE", 0),
        (P + SZ_4K, P + 2 * SZ_4K, "MAPPED", 0),
        (P + 2 * SZ_4K, P + SZ_2M, "FREE", 0),
    ]


def test_accept_where_ram_ends_falls_to_small_pages(make_td):
    """A 2 MiB page that is only partly RAM is backed by one 4 KiB page, so the sizes do not match."""
    td = make_td(ram=((0, P + 3 * SZ_4K),))
    assert accept(td, P | 1) == SIZE_MISMATCH_2M
    assert td.events(TdExit) == [TdExit(P, 0, 1)]
    assert [accept(td, P + page * SZ_4K) for page in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("gpa", [P + SZ_2M, (1 << 51) - SZ_2M])
def test_accept_of_no_ram_ends_the_guest(make_td, gpa, level):
    """There is no check against the size of RAM: an address that is none exits to a host with nothing to map."""
    td = make_td(ram=((0, P + SZ_2M),))
    with pytest.raises(MemoryFault) as died:
        accept(td, gpa | level)
    fault = died.value
    assert (fault.gpa, fault.size, fault.kind, fault.state) == (gpa, SIZE[level], "accept", "no RAM")
    assert fault.end == "EPT violation, TD exit; the host has nothing to map"
    assert td.states(0, 1 << 64) == [(0, 1 << 64, "FREE", 0)]


@pytest.mark.parametrize("level", [0, 1])
def test_accepted_pages_are_zero(td, level):
    """What the host wrote before is gone from an accepted page, and stays everywhere else."""
    size = SIZE[level]
    td.physical.write(P - 8, b"\xee" * (size + 16))
    assert accept(td, P | level) == 0
    assert td.machine.memory.read(P, size) == bytes(size)
    assert td.physical.read(P - 8, 8) == td.physical.read(P + size, 8) == b"\xee" * 8


def test_a_refused_accept_keeps_the_bytes(td):
    """A page that is accepted already keeps its contents when it is accepted once more."""
    assert accept(td, P | 1) == 0
    td.machine.memory.write(P, b"data")
    assert accept(td, P | 1) == ALREADY_ACCEPTED | 1
    assert accept(td, P) == ALREADY_ACCEPTED | 1
    assert td.machine.memory.read(P, 4) == b"data"


@pytest.mark.parametrize("leaf, step, count", [(1, SZ_4K, 2), (6 | 1 << 16, SZ_4K, 1), (6, SZ_2M, 2), (6, 0, 2)])
def test_only_neighbouring_accepts_can_run(td, leaf, step, count):
    """A run of another leaf, or by a step that is not the page's size, is a wrong use of the function."""
    with pytest.raises(ValueError, match="neighbouring pages"):
        td.module.tdcall_run(Registers(rax=leaf, rcx=P), step, count)
    assert td.trace.records == []


def test_a_run_costs_one_event(td):
    """A run of equal calls is one event in the trace, with the number of calls that the guest makes."""
    regs = Registers(rax=ACCEPT, rcx=P | 1)
    assert td.module.tdcall_run(regs, SZ_2M, 6) == 6
    assert td.events(TdExit) == [TdExit(P, 1, 6)]
    assert td.events(SeamCall) == [
        *(SeamCall("TDH.MEM.SEPT.ADD", level, 0, 1) for level in (4, 3, 2)), SeamCall("TDH.MEM.PAGE.AUG", P | 1, 0, 6)
    ]  # fmt: skip
    assert td.events(TdCall) == [TdCall("TDG.MEM.PAGE.ACCEPT", P | 1, 0, 6)]
    assert (regs.rax, regs.rcx) == (0, P + 5 * SZ_2M | 1)


def test_a_run_that_ends_at_the_shared_bit_is_refused_there(make_td):
    """The page at the shared bit is an invalid operand, and the pages before it were accepted."""
    top = 1 << 47
    td = make_td(ram=((top - 2 * SZ_4K, top),), gpaw=48)
    regs = Registers(rax=ACCEPT, rcx=top - 2 * SZ_4K)
    assert td.module.tdcall_run(regs, SZ_4K, 4) == 2
    assert (regs.rax, regs.rcx) == (OPERAND_INVALID_RCX, top)


BLOCKS = 4
HOSTS = [(0, 0), (1, 0), (1, 2), (1, 3)]
COUNTS = [255, 511, 512, 513, 700, 1024]
pages_in_block = st.sampled_from([0, 1, 2, 200, 256, 510, 511, 512])
spans_in_block = st.tuples(pages_in_block, pages_in_block).map(sorted)
steps = st.tuples(
    st.integers(0, BLOCKS - 1), st.sampled_from(["aug", "add", "accept", "aug 2M", "accept 2M"]), spans_in_block
)
scenes = st.fixed_dictionaries(
    {
        "ram": st.lists(st.tuples(st.integers(0, BLOCKS - 1), spans_in_block), max_size=2),
        "whole": st.sets(st.integers(0, BLOCKS - 1), min_size=2),
        "steps": st.lists(steps, max_size=5),
        "backing": st.sampled_from([Backing(level, every, ahead) for level, every in HOSTS for ahead in (False, True)]),
        "locks": st.lists(st.tuples(st.integers(0, BLOCKS - 1), pages_in_block, st.integers(0, 1)), max_size=2),
        "blocks": st.lists(st.tuples(st.integers(0, BLOCKS - 1), pages_in_block, st.integers(0, 2)), max_size=3),
        "policy": st.tuples(st.booleans(), st.booleans()),
    }
)


def build_scene(make_td, scene, *, single_step):
    """A TD with holes in RAM and any entries in its Secure EPT; steps that do not fit are left out."""
    ram = [(block * 512 + first, block * 512 + last) for block, (first, last) in scene["ram"]]
    ram += [(block * 512, (block + 1) * 512) for block in scene["whole"]]
    ram = tuple((P + first * SZ_4K, P + last * SZ_4K) for first, last in ram)
    td = make_td(ram, page_level=scene["backing"], single_step=single_step)
    td.host.demote, td.host.unblock = scene["policy"]
    for block, what, pages in scene["steps"]:
        name, _, large = what.partition(" ")
        first, last = (0, 512) if large else pages
        start, end = P + (block * 512 + first) * SZ_4K, P + (block * 512 + last) * SZ_4K
        if {state for _, _, state, _ in td.states(start, end)} == {"FREE"} and td.host.ram.covers(start, end):
            prepare(td, (name, block * 512 + first, block * 512 + last, 1 if large else 0))
    for block, page, level in scene["blocks"]:
        td.host.seam.run(
            SeamLeaf.TDH_MEM_RANGE_BLOCK, round_down(P + block * SZ_2M + page * SZ_4K, SIZE[level]) | level
        )
    for block, page, level in scene["locks"]:
        td.sept.lock(P + block * SZ_2M + page * SZ_4K, level)
    for block in range(BLOCKS):
        td.physical.write(P + block * SZ_2M, b"from the host")
    return td


def outcome(td, regs, step, count):
    """All that a run leaves behind."""
    try:
        done = td.machine.platform.tdcall_run(regs, step, count)
    except MemoryFault as fault:
        done = str(fault)
    marks = [td.physical.read(P + block * SZ_2M, 13) for block in range(BLOCKS)]
    return done, regs.rax, td.states(0, 1 << 64), td.clock.ns, td.calls(), td.exits(), td.seamcalls(), marks


@settings(deadline=None)
@given(
    scenes,
    st.integers(0, 1),
    st.integers(0, BLOCKS - 1),
    pages_in_block,
    st.integers(1, 3) | st.sampled_from(COUNTS),
)
def test_a_run_is_the_loop_of_single_calls(make_td, scene, level, block, page, count):
    """Whatever RAM and Secure EPT look like, a run leaves the state, time and calls of the loop in the guest."""
    rcx = P + block * SZ_2M + (page * SZ_4K if level == 0 else 0) | level
    results = []
    for single_step in (False, True):
        td = build_scene(make_td, scene, single_step=single_step)
        regs = Registers(rax=ACCEPT, rcx=rcx)
        results.append(outcome(td, regs, SIZE[level], count if level == 0 else min(count, BLOCKS)))
        if isinstance(results[-1][0], int):
            results[-1] += (regs.rcx,)
    assert results[0] == results[1]
