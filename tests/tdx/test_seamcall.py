"""The host's calls: the table of the fact sheet (section 4), registers, TD epochs, and runs of calls."""

from __future__ import annotations

import pytest

from guest.errors import MemoryFault
from guest.registers import Registers
from tdx.events import SeamCall
from tdx.seamcall import SeamLeaf, TlbTracking, entry_bits
from tdx.sept import SeptEntry, SeptState

SZ_4K, SZ_2M, SZ_1G = 0x1000, 0x20_0000, 0x4000_0000
SIZE = (SZ_4K, SZ_2M, SZ_1G)
P = SZ_1G
RAM = ((0, 4 * SZ_1G),)
RCX = 1
OP_STATE, INVALID, BUSY = 0xC000_0608 << 32, 0xC000_0100 << 32 | RCX, 0x8000_0200 << 32 | RCX
WALK_FAILED, STATE, NOT_FREE = 0xC000_0B00 << 32 | RCX, 0xC000_0B0D << 32 | RCX, 0xC000_0B02 << 32 | RCX
NOT_BLOCKED, ALREADY_BLOCKED = 0xC000_0B06 << 32 | RCX, 0x0000_0B07 << 32 | RCX
NOT_TRACKED, NO_PROMOTE = 0xC000_0B08 << 32, 0xC000_0B09 << 32 | RCX
SEPT_TREE, TD_EPOCH = 146, 169
ADD, SEPT_ADD, AUG, BLOCK, DEMOTE, FINALIZE, PROMOTE, RD, REMOVE, SEPT_REMOVE, TRACK, UNBLOCK = (
    SeamLeaf(number) for number in (2, 3, 6, 7, 15, 17, 23, 25, 29, 30, 38, 39)
)


def seamcall(td, leaf: int, rcx: int = 0, **regs: int) -> Registers:
    """One SEAMCALL; returns the registers."""
    found = Registers(rax=leaf, rcx=rcx, **regs)
    td.host.seam.seamcall(found)
    return found


def track(td) -> None:
    """A new epoch while the processor is outside."""
    td.host.seam.tracking.leave(0)
    assert seamcall(td, TRACK).rax == 0
    td.host.seam.tracking.enter(0)


def reach(td, state: str, level: int) -> None:
    """Bring the entry of ``level`` at P to ``state``; a table gets one PENDING child."""
    if state.startswith("NL"):
        td.sept.page_aug(P, P + SIZE[level - 1], level - 1)
    elif state != "FREE":
        td.sept.page_aug(P, P + SIZE[level], level)
        if state in ("MAPPED", "BLOCKED"):
            td.sept.page_accept(P, P + SIZE[level], level)
    else:
        td.sept.page_aug(P + SIZE[level], P + 2 * SIZE[level], level)
    if state.endswith("BLOCKED"):
        assert seamcall(td, BLOCK, P | level).rax == 0


def state_of(td, level: int) -> str:
    return td.sept.walk(P, level)[2].state.name


ALL = ["FREE", "NL_MAPPED", "NL_BLOCKED", "MAPPED", "BLOCKED", "PENDING", "PENDING_BLOCKED"]
TABLE = [
    # leaf, state before, tracked, state after or status; the TD runs. Wrong states follow from what is not here
    (AUG, "FREE", False, "PENDING"),
    (SEPT_ADD, "FREE", False, "NL_MAPPED"),
    (BLOCK, "NL_MAPPED", False, "NL_BLOCKED"),
    (BLOCK, "MAPPED", False, "BLOCKED"),
    (BLOCK, "PENDING", False, "PENDING_BLOCKED"),
    (BLOCK, "NL_BLOCKED", False, ALREADY_BLOCKED),
    (BLOCK, "BLOCKED", True, ALREADY_BLOCKED),
    (BLOCK, "PENDING_BLOCKED", False, ALREADY_BLOCKED),
    (UNBLOCK, "NL_BLOCKED", True, "NL_MAPPED"),
    (UNBLOCK, "BLOCKED", True, "MAPPED"),
    (UNBLOCK, "PENDING_BLOCKED", True, "PENDING"),
    (UNBLOCK, "NL_BLOCKED", False, NOT_TRACKED | SEPT_TREE),
    (UNBLOCK, "BLOCKED", False, NOT_TRACKED | SEPT_TREE),
    (UNBLOCK, "PENDING_BLOCKED", False, NOT_TRACKED | SEPT_TREE),
    (REMOVE, "BLOCKED", True, "FREE"),
    (REMOVE, "PENDING_BLOCKED", True, "FREE"),
    (REMOVE, "BLOCKED", False, NOT_TRACKED | RCX),
    (REMOVE, "PENDING_BLOCKED", False, NOT_TRACKED | RCX),
    (REMOVE, "MAPPED", True, NOT_BLOCKED),
    (REMOVE, "PENDING", True, NOT_BLOCKED),
    (DEMOTE, "BLOCKED", True, "NL_MAPPED"),
    (DEMOTE, "PENDING_BLOCKED", True, "NL_MAPPED"),
    (DEMOTE, "BLOCKED", False, NOT_TRACKED | RCX),
    (DEMOTE, "MAPPED", True, NOT_BLOCKED),
    (DEMOTE, "PENDING", True, NOT_BLOCKED),
    (SEPT_REMOVE, "NL_BLOCKED", False, NOT_TRACKED | RCX),
    (SEPT_REMOVE, "NL_BLOCKED", True, NOT_FREE),
    (SEPT_REMOVE, "NL_MAPPED", True, NOT_BLOCKED),
    (PROMOTE, "NL_BLOCKED", False, NOT_TRACKED | RCX),
    (PROMOTE, "NL_BLOCKED", True, NO_PROMOTE),
    (PROMOTE, "NL_MAPPED", True, NOT_BLOCKED),
]
KNOWN = {(leaf, state) for leaf, state, _, _ in TABLE}
TABLE += [
    (leaf, state, False, STATE)
    for leaf in (AUG, SEPT_ADD, BLOCK, UNBLOCK, REMOVE, DEMOTE, SEPT_REMOVE, PROMOTE)
    for state in ALL
    if (leaf, state) not in KNOWN
]


@pytest.mark.parametrize("leaf, state, tracked, outcome", TABLE, ids=lambda value: getattr(value, "name", str(value)))
def test_a_call_takes_an_entry_from_state_to_state(make_td, leaf, state, tracked, outcome):
    """4, table of SEAMCALLs: the state after, or a refusal that changes nothing and returns the entry."""
    td = make_td(RAM)
    reach(td, state, 1)
    if tracked:
        track(td)
    before = td.states(0, 1 << 40)
    regs = seamcall(td, leaf, P | 1)
    if isinstance(outcome, str):
        assert (regs.rax, regs.rcx, regs.rdx) == (0, 0, 0)
        assert state_of(td, 1) == outcome
        return
    assert hex(regs.rax) == hex(outcome)
    assert td.states(0, 1 << 40) == before
    assert regs.rdx == SeptState[state].public << 8 | 1
    assert regs.rcx == entry_bits(P, td.sept.walk(P, 1)[2])


def test_while_the_td_is_built_nothing_needs_to_be_blocked(make_td):
    """4: pages are removed and split without BLOCK and TRACK until FINALIZE; from then on no page is added."""
    td = make_td(RAM, running=False)
    assert seamcall(td, AUG, P).rax == OP_STATE
    reach(td, "MAPPED", 1)
    assert seamcall(td, DEMOTE, P | 1).rax == 0
    assert seamcall(td, REMOVE, P).rax == 0
    td.host.seam.host_memory.write(0x7000, b"page of the image")
    assert seamcall(td, ADD, P, r9=0x7000).rax == 0
    assert td.machine.memory.read(P, 17) == b"page of the image"
    assert td.clock.ns == 0
    assert seamcall(td, FINALIZE).rax == 0
    assert seamcall(td, FINALIZE).rax == OP_STATE
    assert seamcall(td, ADD, P + SZ_2M).rax == OP_STATE
    assert seamcall(td, REMOVE, P + SZ_4K).rax == NOT_BLOCKED


BAD = [
    (AUG, P | 2), (AUG, P | 1 << 3), (AUG, P | 1 << 11), (AUG, P + SZ_4K | 1), (AUG, 1 << 51), (AUG, 1 << 52),
    (SEPT_ADD, P), (SEPT_ADD, P | 5), (SEPT_REMOVE, P), (DEMOTE, P), (DEMOTE, P | 3), (PROMOTE, P), (BLOCK, P | 5),
    (REMOVE, P | 3), (RD, P | 6),
]  # fmt: skip


@pytest.mark.parametrize("leaf, rcx", BAD)
def test_a_bad_operand(make_td, leaf, rcx):
    """A level that the call does not know, reserved bits, a misaligned or a shared address: OPERAND_INVALID | RCX."""
    td = make_td(RAM)
    assert seamcall(td, leaf, rcx).rax == INVALID
    assert td.states(0, 1 << 60) == [(0, 1 << 60, "FREE", 0)]


def test_a_td_with_48_bits_has_no_fifth_level(make_td):
    """The table of level 4 exists only where addresses have 52 bits."""
    assert seamcall(make_td(RAM, gpaw=48), SEPT_ADD, 4).rax == INVALID
    assert seamcall(make_td(RAM, gpaw=52), SEPT_ADD, 4).rax == 0


def test_an_unknown_leaf(td):
    """OPERAND_INVALID | RAX."""
    assert seamcall(td, 99).rax == 0xC000_0100_0000_0000


def test_tables_are_added_from_the_root_down(make_td):
    """A walk that meets no table fails, and says where it ended."""
    td = make_td(RAM)
    for level in (4, 3, 2, 1):
        regs = seamcall(td, AUG, P)
        assert (regs.rax, regs.rdx) == (WALK_FAILED, level)
        assert seamcall(td, SEPT_ADD, (0 if level > 2 else P) | level).rax == 0
    assert seamcall(td, AUG, P).rax == 0
    assert seamcall(td, AUG, P).rax == STATE


def test_an_empty_table_can_be_removed(make_td):
    """SEPT.REMOVE: NL_BLOCKED to FREE once the last child is gone; until then the 2 MiB entry has a table."""
    td = make_td(RAM)
    reach(td, "NL_MAPPED", 1)
    for rcx in (P, P | 1):
        assert seamcall(td, BLOCK, rcx).rax == 0
        track(td)
        if rcx == P:
            assert seamcall(td, REMOVE, P).rax == 0
            assert state_of(td, 1) == "NL_MAPPED"
    assert seamcall(td, SEPT_REMOVE, P | 1).rax == 0
    assert state_of(td, 1) == "FREE"
    assert seamcall(td, AUG, P | 1).rax == 0


@pytest.mark.parametrize("state", ["MAPPED", "PENDING"])
@pytest.mark.parametrize("level", [1, 2])
def test_promote_undoes_demote(make_td, state, level):
    """512 equal children become one leaf, which splits into the same children again."""
    td = make_td(RAM)
    td.sept.page_aug(P, P + SIZE[level], level - 1)
    if state == "MAPPED":
        td.sept.page_accept(P, P + SIZE[level], level - 1)
    for leaf, at in ((PROMOTE, level), (DEMOTE, level - 1)):
        assert seamcall(td, BLOCK, P | level).rax == 0
        track(td)
        assert seamcall(td, leaf, P | level).rax == 0
        assert td.states(P, P + SIZE[level]) == [(P, P + SIZE[level], state, at)]


@pytest.mark.parametrize("spoil", ["other state", "gap", "blocked child", "half accepted"])
def test_promote_wants_equal_children(make_td, spoil):
    """One child that is different is enough to be refused."""
    td, level = make_td(RAM), 2 if spoil == "half accepted" else 1
    child, size = level - 1, SIZE[level - 1]
    td.sept.page_aug(P, P + SIZE[level] - (size if spoil == "gap" else 0), child)
    if spoil == "other state":
        td.sept.page_accept(P + size, P + 2 * size, child)
    elif spoil == "blocked child":
        assert seamcall(td, BLOCK, P + size | child).rax == 0
    elif spoil == "half accepted":
        td.sept.put_leaves(P + size, P + 2 * size, SeptEntry(SeptState.PENDING, 1, progress=7))
    assert seamcall(td, BLOCK, P | level).rax == 0
    track(td)
    assert seamcall(td, PROMOTE, P | level).rax == NO_PROMOTE


READ = [
    # state, level, bits 63, 56:54, 7:0 of the entry, public code
    ("FREE", 0, 0b000, 0x00, 0),
    ("NL_MAPPED", 1, 0b000, 0x07, 132),
    ("NL_BLOCKED", 1, 0b010, 0x00, 129),
    ("MAPPED", 1, 0b000, 0xB7, 4),
    ("BLOCKED", 1, 0b010, 0xB0, 1),
    ("PENDING", 0, 0b100, 0xB0, 2),
    ("PENDING_BLOCKED", 1, 0b110, 0xB0, 3),
]


@pytest.mark.parametrize("state, level, upper, lower, public", READ)
def test_sept_rd_shows_entry_and_public_state(make_td, state, level, upper, lower, public):
    """4: the entry's bits in RCX, level and public code in RDX; nothing changes."""
    td = make_td(RAM)
    reach(td, state, level)
    regs = seamcall(td, RD, P | level)
    assert (regs.rax, regs.rdx) == (0, public << 8 | level)
    assert (regs.rcx >> 63, regs.rcx >> 54 & 7, regs.rcx & 0xFF) == (1, upper, lower)
    assert regs.rcx & ((1 << 52) - SZ_4K) == (P if lower & 0x80 else 0)
    assert state_of(td, level) == state


def test_states_have_the_encodings_of_the_module():
    """4, first table: internal encoding and public code."""
    assert {state.name: (state.encoding, state.public) for state in SeptState} == {
        "FREE": (0x0E, 0), "NL_MAPPED": (0x00, 132), "NL_BLOCKED": (0x08, 129), "MAPPED": (0x60, 4),
        "BLOCKED": (0x68, 1), "BLOCKEDW": (0x64, 8), "PENDING": (0x70, 2), "PENDING_BLOCKED": (0x78, 3),
    }  # fmt: skip


def test_the_accept_counter_stands_in_the_entry():
    """5.4: bits 20:12 of a 2 MiB entry count the pieces that are zero."""
    assert entry_bits(P, SeptEntry(SeptState.PENDING, 1, progress=511)) >> 12 & 0x1FF == 511


def test_a_locked_entry_is_busy_for_everybody(make_td):
    """OPERAND_BUSY | RCX for the host's own calls too, on this entry and no other."""
    td = make_td(RAM)
    td.sept.page_aug(P, P + 4 * SZ_2M, 1)
    td.sept.lock(P + 2 * SZ_2M, 1)
    assert td.host.seam.run(BLOCK, P | 1, 4)[:2] == (2, BUSY)
    td.sept.unlock(P + 2 * SZ_2M, 1)
    assert td.host.seam.run(BLOCK, P + 2 * SZ_2M | 1, 2)[:2] == (2, 0)


def test_epochs():
    """A page is tracked once its epoch is over and everybody who entered in it has left."""
    tracking = TlbTracking()
    tracking.enter(0)
    assert not tracking.is_tracked(tracking.epoch)
    assert tracking.track()
    assert not tracking.is_tracked(1)
    assert not tracking.track()
    tracking.leave(0)
    tracking.enter(0)
    assert tracking.is_tracked(1)
    assert tracking.track()
    assert not tracking.is_tracked(2)
    assert tracking.is_tracked(1)


def test_track_waits_for_processors_of_the_epoch_before(make_td):
    """4: PREVIOUS_TLB_EPOCH_BUSY | TD_EPOCH while a processor is inside that entered before the last TRACK."""
    td = make_td(RAM)
    assert seamcall(td, TRACK).rax == 0
    assert seamcall(td, TRACK).rax == 0x8000_0201 << 32 | TD_EPOCH
    td.host.seam.tracking.leave(0)
    assert seamcall(td, TRACK).rax == 0


def test_the_full_order_of_removing_a_page(make_td):
    """4: BLOCK, TRACK, everybody out, PAGE.REMOVE; then the page that the guest had is gone, and a new one is zero."""
    td = make_td(RAM)
    td.module.tdcall(Registers(rax=6, rcx=P | 1))
    td.machine.memory.write(P, b"secret")
    assert seamcall(td, BLOCK, P | 1).rax == 0
    assert seamcall(td, TRACK).rax == 0
    assert seamcall(td, REMOVE, P | 1).rax == NOT_TRACKED | RCX
    td.host.seam.tracking.leave(0)
    assert seamcall(td, REMOVE, P | 1).rax == 0
    with pytest.raises(MemoryFault, match="found FREE"):
        td.machine.memory.read(P, 6)
    td.module.tdcall(Registers(rax=6, rcx=P))
    assert td.machine.memory.read(P, 6) == bytes(6)


def test_a_call_costs_time_and_counts(make_td):
    """Each SEAMCALL of a TD that can run is in the trace and takes its time; a run is one event."""
    td = make_td(RAM)
    td.sept.page_aug(P, P + SZ_2M, 0)
    assert td.host.seam.run(BLOCK, P + SZ_4K, 511)[:2] == (511, 0)
    assert td.host.seam.run(BLOCK, P, 2)[:2] == (1, ALREADY_BLOCKED)
    name = "TDH.MEM.RANGE.BLOCK"
    assert td.events(SeamCall) == [
        SeamCall(name, P + SZ_4K, 0, 511), SeamCall(name, P, 0, 1), SeamCall(name, P + SZ_4K, ALREADY_BLOCKED, 1)
    ]  # fmt: skip
    assert td.clock.ns == 513 * 11_000_000
