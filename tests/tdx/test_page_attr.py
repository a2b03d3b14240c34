"""TDG.MEM.PAGE.ATTR.RD and WR: the walk, since a TD without L2 VMs has no attributes to set."""

from __future__ import annotations

import pytest

from guest.errors import MemoryFault
from guest.registers import Registers
from tdx.events import TdExit
from tdx.seamcall import SeamLeaf
from tdx.sept import LEVEL_2M, LEVEL_4K

RD, WR = 23, 24
SZ_4K, SZ_2M = 0x1000, 0x20_0000
SHARED, PENDING = 1 << 51, 1 << 62
INVALID, BUSY_RCX, SIZE_MISMATCH = 0xC000_0100_0000_0000, 0x8000_0200_0000_0001, 0xC000_0B0B_0000_0000
SMALL, LARGE, PENDING_SMALL, PENDING_LARGE, ABSENT, NO_RAM = SZ_4K, 2 * SZ_2M, 2 * SZ_4K, 3 * SZ_2M, 5 * SZ_2M, 1 << 30


@pytest.fixture
def td(make_td):
    """A TD with accepted and PENDING pages of both sizes."""
    td = make_td()
    td.host.add_tables(0, SZ_2M, LEVEL_4K)
    td.host.seam.run(SeamLeaf.TDH_MEM_PAGE_AUG, SMALL, 2)
    td.host.add_tables(LARGE, PENDING_LARGE + SZ_2M, LEVEL_2M)
    td.host.seam.run(SeamLeaf.TDH_MEM_PAGE_AUG, LARGE | 1, 2)
    for rcx in (SMALL, LARGE | 1):
        regs = Registers(rax=6, rcx=rcx)
        td.module.tdcall(regs)
        assert regs.rax == 0
    return td


def call(td, leaf: int, rcx: int, rdx: int = 0, r8: int = 0) -> tuple[int, int, int]:
    """RAX, RCX, RDX."""
    regs = Registers(rax=leaf, rcx=rcx, rdx=rdx, r8=r8)
    td.module.tdcall(regs)
    assert regs == Registers(rax=regs.rax, rcx=regs.rcx, rdx=regs.rdx, r8=r8)
    return regs.rax, regs.rcx, regs.rdx


@pytest.mark.parametrize(
    "gpa, rcx",
    [
        (SMALL, SMALL),
        (SMALL + 0x123, SMALL),
        (PENDING_SMALL, PENDING_SMALL | PENDING),
        (LARGE, LARGE | 1),
        (LARGE + 7 * SZ_4K + 5, LARGE | 1),
        (PENDING_LARGE + SZ_4K, PENDING_LARGE | 1 | PENDING),
    ],
)
def test_rd_tells_size_and_pending(td, gpa, rcx):
    """RCX is the page that holds the address, with level and PENDING; all attributes are 0."""
    assert call(td, RD, gpa, rdx=5) == (0, rcx, 0)


def test_rd_of_an_absent_page_exits_to_the_host(td):
    """The host backs the page, and the leaf finds it PENDING; without RAM the guest dies."""
    assert call(td, RD, ABSENT) == (0, ABSENT | PENDING, 0)
    assert td.events(TdExit)[-1] == TdExit(ABSENT, 0, 1)
    with pytest.raises(MemoryFault, match="no RAM"):
        call(td, RD, NO_RAM)


@pytest.mark.parametrize(
    "leaf, rcx, rdx, r8, status",
    [
        (RD, SHARED | SMALL, 0, 0, INVALID | 1),
        (RD, 1 << 52 | SMALL, 0, 0, INVALID | 1),
        (WR, SMALL, 1, 0, INVALID | 2),
        (WR, SMALL, 1 << 63, 0, INVALID | 2),
        (WR, SMALL, 0, 1 << 15, INVALID | 8),
        (WR, SMALL, 1 << 16, 1, INVALID | 8),  # set by set: the first set's mask before the second set
        (WR, SMALL, 1 << 16, 1 << 16, INVALID | 2),
        (WR, SMALL | 0x800, 1, 0, INVALID | 2),
        (WR, SMALL | 0x800, 0, 0, INVALID | 1),
        (WR, SMALL | 1, 0, 0, INVALID | 1),
        (WR, 3, 0, 0, INVALID | 1),
        (WR, SHARED | SMALL, 0, 0, INVALID | 1),
        (WR, 1, 0, 0, SIZE_MISMATCH | 1),
    ],
)
def test_operands_are_checked_in_order(td, leaf, rcx, rdx, r8, status):
    """Attributes of the TD itself and of L2 VMs that are not there must be 0; then the address; RCX and RDX are 0."""
    assert call(td, leaf, rcx, rdx, r8) == (status, 0, 0)


@pytest.mark.parametrize("rcx", [SMALL, PENDING_SMALL, LARGE | 1, PENDING_LARGE | 1], ids=hex)
def test_wr_of_nothing_succeeds(td, rcx):
    """Empty sets can be written to a page of the level that is named."""
    gpa = rcx & ~7
    assert call(td, WR, rcx) == (0, rcx | (PENDING if gpa in (PENDING_SMALL, PENDING_LARGE) else 0), 0)


def test_a_locked_entry_is_busy(td):
    """Both leaves take the entry's lock."""
    td.sept.lock(SMALL, LEVEL_4K)
    assert call(td, RD, SMALL) == (BUSY_RCX, 0, 0)
    assert call(td, WR, SMALL) == (BUSY_RCX, 0, 0)


def test_a_blocked_page_comes_back_through_the_host(td):
    """A blocked page exits; the host unblocks it, and the leaf runs again."""
    assert td.host.seam.run(SeamLeaf.TDH_MEM_RANGE_BLOCK, SMALL).status == 0
    assert call(td, RD, SMALL) == (0, SMALL, 0)
    assert len(td.events(TdExit)) == 1
