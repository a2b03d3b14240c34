"""The decision tables of the TDX module, row by row.

Each row names its place in the fact sheet that it was typed from: the section of the sheet and the row of its table.
The sheet's source is the TDX module 1.5.01: tdg_mem_page_accept.c, td_exit.c, td_ept_violation.c.
"""

from __future__ import annotations

import pytest

from guest.errors import MemoryFault
from guest.registers import Registers
from tdx.events import AcceptInterrupted, SeamCall, TdExit
from tdx.seamcall import SeamLeaf
from tdx.sept import SeptEntry, SeptState
from tdx.td_exit import EptViolation
from tdx.vmm import Host

ACCEPT = 6
SZ_4K, SZ_2M, SZ_1G = 0x1000, 0x20_0000, 0x4000_0000
P = SZ_1G
"""Start of a 1 GiB entry, so that a page of every level can begin here."""
RAM = ((0, 4 * SZ_1G),)
INVALID, BUSY = 0xC000_0100_0000_0001, 0x8000_0200_0000_0001
ALREADY, MISMATCH = 0x0000_0B0A_0000_0000, 0xC000_0B0B_0000_0001
SIZE = (SZ_4K, SZ_2M, SZ_1G)
BLOCK, TRACK = SeamLeaf.TDH_MEM_RANGE_BLOCK, SeamLeaf.TDH_MEM_TRACK


class Exited(Exception):
    """A TD exit by EPT violation, instead of the host's answer."""


def reach(td, name: str, level: int) -> None:
    """Bring the entry of ``level`` at P to the state ``name``, by the calls that lead there."""
    run, size = td.host.seam.run, SIZE[level]
    if name in ("NL_MAPPED", "NL_BLOCKED"):
        td.sept.page_aug(P + SZ_4K, P + 2 * SZ_4K, 0)
    elif name == "removed child":
        td.sept.page_aug(P, P + SZ_4K, 0)
        run(BLOCK, P)
        track(td)
        assert run(SeamLeaf.TDH_MEM_PAGE_REMOVE, P).status == 0
    elif name != "FREE":
        td.sept.page_aug(P, P + size, level)
    if name in ("MAPPED", "BLOCKED", "BLOCKEDW"):
        td.sept.page_accept(P, P + size, level)
    if name == "BLOCKEDW":
        td.sept.page_blockw(P, P + size, level)
    if name in ("BLOCKED", "PENDING_BLOCKED", "NL_BLOCKED"):
        assert run(BLOCK, P | level).status == 0


def track(td) -> None:
    """What a host does after it blocked: the processor leaves, a new epoch, and it comes back."""
    td.host.seam.tracking.leave(0)
    assert td.host.seam.mem_track() == 0
    td.host.seam.tracking.enter(0)


@pytest.fixture
def exits(monkeypatch):
    """The host is cut off: each exit is kept and ends the call."""
    seen: list[EptViolation] = []

    def answer(self, exit, count=1):
        seen.append(exit)
        raise Exited

    monkeypatch.setattr(Host, "ept_violation", answer)
    return seen


def accept(td, rcx: int) -> int:
    """One TDCALL; returns RAX."""
    regs = Registers(rax=ACCEPT, rcx=rcx)
    td.module.tdcall(regs)
    assert regs.rcx == rcx
    return regs.rax


OPERANDS = [
    # source, gpaw, RCX
    ("5.1 no. 1", 52, P | 1 << 3),
    ("5.1 no. 1", 52, P | 1 << 11),
    ("5.1 no. 1", 52, P | 1 << 52),
    ("5.1 no. 1", 52, P | 1 << 63),
    ("5.1 no. 2", 52, P | 2),
    ("5.1 no. 2", 52, P | 7),
    ("5.1 no. 3", 52, P + SZ_4K | 1),
    ("5.1 no. 4", 52, P | 1 << 51),
    ("5.1 no. 4", 48, P | 1 << 47),
    ("5.1 no. 5", 48, P | 1 << 48),
    ("5.1 no. 5", 48, P | 1 << 51),
]


@pytest.mark.parametrize("source, gpaw, rcx", OPERANDS, ids=str)
def test_accept_operands(make_td, exits, source, gpaw, rcx):
    """A bad operand is refused before the walk, whatever there is to be found."""
    td = make_td(RAM, gpaw=gpaw)
    assert accept(td, rcx) == INVALID
    assert exits == []


TD_EXIT = "TD exit"
WALKS = [
    # source, level of the request, state and level of the entry, outcome, level where the walk ended
    ("5.2 row 1", 0, "MAPPED", 1, ALREADY | 1, 1),
    ("5.2 row 1", 0, "MAPPED", 2, ALREADY | 2, 2),
    ("5.2 row 1", 1, "MAPPED", 2, ALREADY | 2, 2),
    ("5.2 row 1", 0, "BLOCKEDW", 1, ALREADY | 1, 1),
    ("5.2 row 2", 0, "PENDING", 1, TD_EXIT, 1),
    ("5.2 row 3", 0, "BLOCKED", 1, TD_EXIT, 1),
    ("5.2 row 3", 1, "BLOCKED", 2, TD_EXIT, 2),
    ("5.2 row 3", 0, "PENDING_BLOCKED", 1, TD_EXIT, 1),
    ("5.2 row 3", 0, "NL_BLOCKED", 1, TD_EXIT, 1),
    ("5.2 row 3", 1, "NL_BLOCKED", 2, TD_EXIT, 2),
    ("5.2 row 3", 0, "FREE", 1, TD_EXIT, 4),
    ("5.2 row 3", 1, "FREE", 1, TD_EXIT, 4),
    ("5.2 row 4", 0, "lock", 0, BUSY, 0),
    ("5.2 row 4", 1, "lock", 1, BUSY, 1),
    ("5.2 row 5", 1, "NL_MAPPED", 1, MISMATCH, 1),
    ("5.2 row 5", 1, "NL_BLOCKED", 1, MISMATCH, 1),
    ("5.2 row 5", 1, "removed child", 1, MISMATCH, 1),
    ("5.2 row 6", 0, "MAPPED", 0, ALREADY | 0, 0),
    ("5.2 row 6", 1, "MAPPED", 1, ALREADY | 1, 1),
    ("5.2 row 6", 0, "BLOCKEDW", 0, ALREADY | 0, 0),
    ("5.2 row 6", 1, "BLOCKEDW", 1, ALREADY | 1, 1),
    ("5.2 row 7", 0, "PENDING", 0, 0, 0),
    ("5.2 row 7", 1, "PENDING", 1, 0, 1),
    ("5.2 row 8", 0, "removed child", 1, TD_EXIT, 0),
    ("5.2 row 8", 0, "BLOCKED", 0, TD_EXIT, 0),
    ("5.2 row 8", 1, "BLOCKED", 1, TD_EXIT, 1),
    ("5.2 row 8", 0, "PENDING_BLOCKED", 0, TD_EXIT, 0),
    ("5.2 row 8", 1, "PENDING_BLOCKED", 1, TD_EXIT, 1),
]


@pytest.mark.parametrize("source, level, state, at, outcome, ended", WALKS, ids=str)
def test_accept_by_what_the_walk_finds(make_td, exits, source, level, state, at, outcome, ended):
    """Status, or what the host sees of the exit; only success changes the entry, and zeroes the page."""
    td = make_td(RAM)
    if state == "lock":
        td.sept.page_aug(P, P + SIZE[at], at)
        td.sept.lock(P, at)
    else:
        reach(td, state, at)
    td.physical.write(P, b"before")
    before = td.states(P, P + SZ_1G)
    if outcome == TD_EXIT:
        with pytest.raises(Exited):
            accept(td, P | level)
        (exit,) = exits
        assert (exit.gpa, exit.kind, exit.level, exit.entry.level) == (P, "accept", level, ended)
        assert exit.entry.state.name == ("FREE" if state == "removed child" else state)
    else:
        assert hex(accept(td, P | level)) == hex(outcome)
        assert exits == []
    assert (td.states(P, P + SZ_1G) == before) is (outcome != 0)
    assert td.physical.read(P, 6) == (bytes(6) if outcome == 0 else b"before")


EXIT_REGISTERS = [
    # source, request, entry, RCX, RDX
    ("5.3", 0, SeptEntry(SeptState.FREE, 4), 2, 1 | (0 | 4 << 3) << 32),
    ("5.3", 1, SeptEntry(SeptState.FREE, 1), 2, 1 | (1 | 1 << 3) << 32),
    ("5.3", 0, SeptEntry(SeptState.PENDING, 1), 2, 1 | (0 | 1 << 3 | 2 << 6 | 1 << 14) << 32),
    ("5.3", 1, SeptEntry(SeptState.PENDING_BLOCKED, 1), 2, 1 | (1 | 1 << 3 | 3 << 6 | 1 << 14) << 32),
    ("5.3", 1, SeptEntry(SeptState.BLOCKED, 1), 2, 1 | (1 | 1 << 3 | 1 << 6 | 1 << 14) << 32),
    ("5.3", 0, SeptEntry(SeptState.NL_BLOCKED, 1), 2, 1 | (0 | 1 << 3 | 129 << 6) << 32),
]


@pytest.mark.parametrize("source, level, entry, rcx, rdx", EXIT_REGISTERS, ids=str)
def test_what_the_host_sees_of_an_accept(source, level, entry, rcx, rdx):
    """RAX = 48, RCX = a write, RDX = type ACCEPT with levels and public state, R8 = the page."""
    assert EptViolation(P, "accept", entry, level).registers() == Registers(rax=0x30, rcx=rcx, rdx=rdx, r8=P)


ACCESSES = [
    # source, state and level of the entry, kind, PENDING_VE_DISABLE, outcome
    ("6 row 4", "PENDING", 0, "read", False, "#VE"),
    ("6 row 4", "PENDING", 1, "write", False, "#VE"),
    ("6 row 5", "PENDING", 0, "read", True, "EPT violation, TD exit"),
    ("6 row 5", "PENDING", 1, "write", True, "EPT violation, TD exit"),
    *(
        ("6 row 6", state, level, kind, ve_disable, TD_EXIT)
        for state, level in [
            ("FREE", 0), ("removed child", 0), ("BLOCKED", 0), ("BLOCKED", 1), ("NL_BLOCKED", 1), ("NL_BLOCKED", 2),
            ("PENDING_BLOCKED", 0), ("PENDING_BLOCKED", 1),
        ]
        for kind in ("read", "write")
        for ve_disable in (False, True)
    ),
    ("6 row 7", "BLOCKEDW", 0, "write", True, TD_EXIT),
    ("6 row 7", "BLOCKEDW", 1, "write", False, TD_EXIT),
    ("6 row 7", "BLOCKEDW", 0, "read", True, None),
    ("4 row 5", "MAPPED", 0, "read", True, None),
    ("4 row 5", "MAPPED", 2, "write", False, None),
]  # fmt: skip


def access(td, gpa: int, kind: str) -> None:
    """One access of a byte."""
    td.machine.memory.read(gpa, 1) if kind == "read" else td.machine.memory.write(gpa, b"x")


@pytest.mark.parametrize("source, state, level, kind, ve_disable, outcome", ACCESSES, ids=str)
def test_access_by_what_the_walk_finds(make_td, exits, source, state, level, kind, ve_disable, outcome):
    """An access succeeds, raises #VE, or exits; which, depends on the entry and on nothing else."""
    td = make_td(RAM, sept_ve_disable=ve_disable)
    reach(td, state, level)
    if outcome is None:
        access(td, P, kind)
        return
    with pytest.raises(Exited if outcome == TD_EXIT else MemoryFault) as ended:
        access(td, P + 5, kind)
    if outcome == TD_EXIT:
        (exit,) = exits
        assert (exit.gpa, exit.kind) == (P + 5, kind)
        assert exit.registers().rcx == (1 if kind == "read" else 2) | (0b101 << 3 if state == "BLOCKEDW" else 0)
        assert exit.registers().rdx == 0
    else:
        assert (ended.value.end, ended.value.state) == (outcome, "PENDING (not accepted)")


def test_a_touch_of_pending_memory_is_told_apart_from_others():
    """6 row 5: extended exit qualification type 6."""
    assert EptViolation(P, "read", SeptEntry(SeptState.PENDING, 0)).registers().rdx == 6


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("gpaw, gpa", [(48, 1 << 48), (48, 1 << 51 | P), (52, 1 << 52)])
def test_an_address_above_the_width_is_a_page_fault(make_td, exits, gpaw, gpa, kind):
    """6 row 1: #PF with the RSVD bit, and the host hears nothing of it."""
    td = make_td(RAM, gpaw=gpaw)
    with pytest.raises(MemoryFault, match=f"an address of more than {gpaw} bits"):
        access(td, gpa, kind)
    assert exits == []


@pytest.mark.parametrize("gpaw", [48, 52])
@pytest.mark.parametrize(
    "suppress_ve, end", [(False, "#VE"), (True, "EPT violation, TD exit; the host has nothing to map")]
)
def test_shared_memory_that_the_host_does_not_map(make_td, gpaw, suppress_ve, end):
    """6 rows 2 and 3: #VE for MMIO emulation, or a TD exit; RAM that was not made shared is no shared memory."""
    td = make_td(RAM, gpaw=gpaw)
    td.host.suppress_ve = suppress_ve
    for gpa in (P, 1 << 40):
        with pytest.raises(MemoryFault) as died:
            access(td, 1 << gpaw - 1 | gpa, "read")
        assert (died.value.gpa, died.value.end) == (1 << gpaw - 1 | gpa, end)


@pytest.mark.parametrize("gpaw", [48, 52])
def test_shared_memory_has_bytes_of_its_own(make_td, gpaw):
    """6 row 3: after MapGPA the first touch exits and the host maps its own memory, not the private page."""
    td, shared = make_td(RAM, gpaw=gpaw), 1 << gpaw - 1
    assert accept(td, P | 1) == 0
    td.machine.memory.write(P, b"private")
    regs = Registers(rax=0, rcx=0xFC00, r11=0x10001, r12=shared | P, r13=SZ_2M + SZ_4K)
    td.module.tdcall(regs)
    assert regs.r10 == 0
    before = td.exits().total()
    td.machine.memory.write(shared | P, b"shared!")
    assert td.machine.memory.read(P, 7) == b"private"
    assert td.machine.memory.read(shared | P, 7) == b"shared!"
    assert td.machine.memory.read(shared | P + SZ_2M, 1) == b"\0"
    assert td.exits().total() == before + 2
    with pytest.raises(MemoryFault):
        td.machine.memory.read(shared | P + SZ_2M + SZ_4K - 1, 2)
    regs = Registers(rax=0, rcx=0xFC00, r11=0x10001, r12=P, r13=SZ_4K)
    td.module.tdcall(regs)
    with pytest.raises(MemoryFault):
        td.machine.memory.read(shared | P, 1)
    assert td.machine.memory.read(P, 7) == b"private"


def test_a_host_that_backs_a_touched_page_finds_it_pending(make_td):
    """6, KVM: the exit of a FREE page is answered with PAGE.AUG, and the access that is made again kills the guest."""
    td = make_td(RAM)
    for state in ("FREE", "PENDING"):
        with pytest.raises(MemoryFault, match=f"{state} .not accepted.*EPT violation, TD exit"):
            access(td, P, "read")
    assert td.exits() == {0: 1}
    assert td.seamcalls()["TDH.MEM.PAGE.AUG", 0] == 1


POLICIES = [
    # state, level of the entry, level of the request, what the host calls
    ("BLOCKED", 1, None, ["TRACK", "RANGE.UNBLOCK"]),
    ("BLOCKED", 1, 1, ["TRACK", "RANGE.UNBLOCK"]),
    ("BLOCKEDW", 1, None, ["RANGE.BLOCK", "TRACK", "RANGE.UNBLOCK"]),
    ("PENDING_BLOCKED", 1, 1, ["TRACK", "RANGE.UNBLOCK"]),
    ("NL_BLOCKED", 2, 0, ["TRACK", "RANGE.UNBLOCK", "PAGE.AUG"]),
    ("PENDING", 1, 0, ["RANGE.BLOCK", "TRACK", "PAGE.DEMOTE"]),
]


@pytest.mark.parametrize("state, at, level, calls", POLICIES)
def test_a_host_that_helps(make_td, state, at, level, calls):
    """It answers the exit with the calls that resolve it, and the instruction that runs again succeeds."""
    td = make_td(RAM)
    reach(td, state, at)
    td.trace.records.clear()
    if level is None:
        access(td, P, "write")
    else:
        assert accept(td, P | level) == (ALREADY | 1 if state == "BLOCKED" else 0)
    assert [e.leaf.removeprefix("TDH.MEM.") for e in td.events(SeamCall)] == calls
    assert {event.status for event in td.events(SeamCall)} == {0}
    assert td.exits().total() == (2 if state == "NL_BLOCKED" else 1)


@pytest.mark.parametrize("state, at, level, calls", POLICIES)
def test_a_host_that_does_not_help(make_td, state, at, level, calls):
    """The instruction exits again and again, at the cost of time, until we say that the host is the cause."""
    td = make_td(RAM)
    reach(td, state, at)
    td.host.unblock = td.host.demote = False
    td.trace.records.clear()
    before = td.clock.ns
    with pytest.raises(MemoryFault) as died:
        access(td, P, "write") if level is None else accept(td, P | level)
    assert died.value.state == state
    assert died.value.end == "EPT violation, 16 TD exits; the host does not resolve it"
    assert td.exits().total() == 16
    assert td.clock.ns - before == 16 * 500_000
    assert td.seamcalls() == {}


def test_a_track_that_is_busy_leaves_the_page_blocked(make_td):
    """While another processor is inside, what was blocked cannot be given back: the guest dies waiting."""
    td = make_td(RAM)
    reach(td, "MAPPED", 1)
    td.host.seam.tracking.enter(1)
    track(td)
    reach_blocked = td.host.seam.run(BLOCK, P | 1)
    assert reach_blocked.status == 0
    with pytest.raises(MemoryFault, match="16 TD exits"):
        access(td, P, "read")
    assert td.seamcalls()["TDH.MEM.TRACK", 0x8000_0201_0000_00A9] == 16
    assert td.seamcalls()["TDH.MEM.RANGE.UNBLOCK", 0xC000_0B08_0000_0092] == 16
    td.host.seam.tracking.leave(1)
    access(td, P, "read")


class Pauses:
    """Interrupts after given numbers of pieces; ``during`` is done while the guest handles each."""

    def __init__(self, *pieces: int, during=None) -> None:
        self.pieces, self.during, self.seen = list(pieces), during, []

    def pieces_until(self, gpa: int, progress: int) -> int:
        self.seen.append(progress)
        return self.pieces.pop(0) if self.pieces else 512

    def taken(self) -> None:
        if self.during is not None:
            self.during()


def test_an_interrupted_accept_goes_on_where_it_was(make_td):
    """5.4: progress is kept in the entry, which stays PENDING; the guest sees one success, and time."""
    times = []
    for pieces in ((), (100, 1, 300)):
        td = make_td(RAM)
        td.sept.page_aug(P, P + 2 * SZ_2M, 1)
        td.physical.write(P, b"\xee" * SZ_2M)
        td.module.page_accept.interrupts = pauses = Pauses(*pieces)
        assert accept(td, P | 1) == 0
        assert td.physical.read(P, SZ_2M) == bytes(SZ_2M)
        assert td.states(P, P + 2 * SZ_2M) == [(P, P + SZ_2M, "MAPPED", 1), (P + SZ_2M, P + 2 * SZ_2M, "PENDING", 1)]
        times.append(td.clock.ns)
    assert pauses.seen == [0, 100, 101, 401]
    assert [event.progress for event in td.events(AcceptInterrupted)] == [100, 101, 401]
    assert times[1] - times[0] == 3 * 1_000


def test_a_half_accepted_page_is_pending(make_td):
    """5.4: partial acceptance is never visible: the page is PENDING until all 512 pieces are zero."""
    td = make_td(RAM)
    td.sept.page_aug(P, P + SZ_2M, 1)
    td.physical.write(P + 510 * SZ_4K, b"x" * 2 * SZ_4K)
    seen = []

    def during() -> None:
        seen.append((td.sept.walk(P, 1)[2], td.physical.read(P + 511 * SZ_4K - 1, 2)))

    td.module.page_accept.interrupts = Pauses(511, during=during)
    assert accept(td, P | 1) == 0
    assert seen == [(SeptEntry(SeptState.PENDING, 1, progress=511), b"\0x")]


@pytest.mark.parametrize("what", ["unblock", "remove", "demote"])
def test_what_the_host_does_in_the_pause_starts_the_accept_over(make_td, what):
    """5.4: RANGE.BLOCK, PAGE.REMOVE and DEMOTE reset the counter; the accept starts over or meets another entry."""
    td = make_td(RAM)
    td.sept.page_aug(P, P + SZ_2M, 1)

    def during() -> None:
        td.host.seam.run(BLOCK, P | 1)
        assert td.sept.walk(P, 1)[2].progress == 0
        track(td)
        if what == "remove":
            assert td.host.seam.run(SeamLeaf.TDH_MEM_PAGE_REMOVE, P | 1).status == 0
        elif what == "demote":
            assert td.host.seam.run(SeamLeaf.TDH_MEM_PAGE_DEMOTE, P | 1).status == 0

    td.module.page_accept.interrupts = pauses = Pauses(200, during=during)
    assert accept(td, P | 1) == (MISMATCH if what == "demote" else 0)
    assert pauses.seen == ([0] if what == "demote" else [0, 0])
    assert td.exits().total() == (what != "demote")
    assert td.events(TdExit) == ([] if what == "demote" else [TdExit(P, 1, 1)])


def test_a_run_is_interrupted_page_by_page(make_td):
    """5.4: a run of accepts with interrupts leaves what the loop of single calls leaves."""
    outcomes = []
    for single_step in (False, True):
        td = make_td(RAM, single_step=single_step)
        td.module.page_accept.interrupts = Pauses(7, 512, 3, 3)
        regs = Registers(rax=ACCEPT, rcx=P | 1)
        done = td.machine.platform.tdcall_run(regs, SZ_2M, 5)
        outcomes.append((done, regs.rax, td.states(0, 1 << 40), td.calls(), td.exits(), td.seamcalls(), td.clock.ns))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("obstacle", ["lock", "blocked table"])
def test_the_next_page_is_not_taken_for_granted(make_td, exits, obstacle):
    """A page behind accepted ones, before PENDING ones, is still busy if locked, and exits below a blocked table."""
    td = make_td(RAM)
    td.sept.page_aug(P, P + 4 * SZ_2M, 1)
    assert accept(td, P | 1) == accept(td, P + SZ_2M | 1) == 0
    if obstacle == "lock":
        td.sept.lock(P + 2 * SZ_2M, 1)
        assert accept(td, P + 2 * SZ_2M | 1) == BUSY
    else:
        assert td.host.seam.run(BLOCK, P | 2).status == 0
        with pytest.raises(Exited):
            accept(td, P + 2 * SZ_2M | 1)
    assert td.states(P, P + 4 * SZ_2M) == [
        (P, P + 2 * SZ_2M, "MAPPED", 1),
        (P + 2 * SZ_2M, P + 4 * SZ_2M, "PENDING", 1),
    ]


def test_a_read_of_write_blocked_memory_lets_no_write_through(make_td, exits):
    """6 row 7: what was admitted for a read is asked for again when it is written."""
    td = make_td(RAM)
    reach(td, "BLOCKEDW", 1)
    access(td, P, "read")
    with pytest.raises(Exited):
        access(td, P, "write")


def test_shared_memory_that_was_private_in_between_is_mapped_anew(make_td):
    """The host drops its mapping with MapGPA to private; made shared again, the first touch exits again."""
    td, shared = make_td(RAM), 1 << 51
    for number in (1, 2):
        td.module.tdcall(Registers(rax=0, rcx=0xFC00, r11=0x10001, r12=shared | P, r13=SZ_2M))
        access(td, shared | P, "write")
        assert td.exits().total() == number
        td.module.tdcall(Registers(rax=0, rcx=0xFC00, r11=0x10001, r12=P, r13=SZ_2M))
