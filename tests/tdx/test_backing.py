"""How the host backs memory: page sizes, on demand or ahead of time."""

from __future__ import annotations

import pytest

from guest.registers import Registers
from tdx.backing import MIXED, Backing
from tdx.guest import tdx_accept_memory

SZ_4K, SZ_2M = 0x1000, 0x20_0000
ADD, AUG, SEPT_ADD = ("TDH.MEM.PAGE.ADD", 0), ("TDH.MEM.PAGE.AUG", 0), ("TDH.MEM.SEPT.ADD", 0)
ACCEPT = "TDG.MEM.PAGE.ACCEPT"
BLOCKS = 8
RAM = ((0, BLOCKS * SZ_2M),)
POLICIES = [
    # backing, 2 MiB pages, 4 KiB pages, tables of level 1
    (Backing(1), 8, 0, 0),
    (Backing(0), 0, 8 * 512, 8),
    (MIXED, 6, 2 * 512, 2),
    (Backing(1, small_every=2), 4, 4 * 512, 4),
]


@pytest.mark.parametrize("backing, large, small, tables", POLICIES)
def test_on_demand(make_td, backing, large, small, tables):
    """Every page is one exit and one AUG; where pages are small, one 2 MiB accept fails and 512 small ones succeed."""
    td = make_td(RAM, page_level=backing)
    assert tdx_accept_memory(td.machine, 0, BLOCKS * SZ_2M)
    assert td.exits() == {level: n for level, n in ((1, large), (0, small)) if n}
    assert td.seamcalls() == {AUG: large + small, SEPT_ADD: 3 + tables}
    mismatches = {(ACCEPT, 0xC000_0B0B_0000_0001): tables} if tables else {}
    assert td.calls() == {(ACCEPT, 0): large + small} | mismatches
    calls = td.calls().total()
    assert td.clock.ns == (
        calls * 1_000 + BLOCKS * 512 * 7 + (large + small) * 500_000 + td.seamcalls().total() * 11_000_000
    )


@pytest.mark.parametrize("backing, large, small, tables", POLICIES)
def test_ahead(make_td, backing, large, small, tables):
    """All pages are there before the TD runs: the same AUGs, no exit, and the accept meets the same sizes."""
    td = make_td(RAM, page_level=Backing(backing.level, backing.small_every, ahead=True), running=False)
    td.host.finalize()
    assert td.seamcalls() == {AUG: large + small, SEPT_ADD: 3 + tables, ("TDH.MR.FINALIZE", 0): 1}
    assert td.clock.ns == 11_000_000 * (td.seamcalls().total() - 1)
    assert {state for _, _, state, _ in td.states(0, BLOCKS * SZ_2M)} == {"PENDING"}
    assert tdx_accept_memory(td.machine, 0, BLOCKS * SZ_2M)
    assert td.exits() == {}
    assert td.calls()[ACCEPT, 0] == large + small
    assert td.calls()[ACCEPT, 0xC000_0B0B_0000_0001] == tables


def test_ahead_fills_around_what_was_added(make_td):
    """Added pages stay; the rest of their 2 MiB block gets small pages, and RAM that is no whole block too."""
    ram = ((SZ_4K, 3 * SZ_2M + 5 * SZ_4K),)
    td = make_td(ram, page_level=Backing(1, ahead=True), running=False)
    td.host.page_add(SZ_2M + SZ_4K, b"image", 2 * SZ_4K, "image")
    td.host.finalize()
    assert td.states(0, 4 * SZ_2M) == [
        (0, SZ_4K, "FREE", 0),
        (SZ_4K, SZ_2M + SZ_4K, "PENDING", 0),
        (SZ_2M + SZ_4K, SZ_2M + 3 * SZ_4K, "MAPPED", 0),
        (SZ_2M + 3 * SZ_4K, 2 * SZ_2M, "PENDING", 0),
        (2 * SZ_2M, 3 * SZ_2M, "PENDING", 1),
        (3 * SZ_2M, 3 * SZ_2M + 5 * SZ_4K, "PENDING", 0),
        (3 * SZ_2M + 5 * SZ_4K, 4 * SZ_2M, "FREE", 0),
    ]
    assert td.seamcalls()[ADD] == 2
    assert {status for _, status in td.seamcalls()} == {0}


def test_a_small_accept_in_a_large_page_that_was_backed_ahead(make_td):
    """The host splits the page: one exit, BLOCK, TRACK and DEMOTE, and the other 511 accepts need no more."""
    td = make_td(RAM, page_level=Backing(1, ahead=True))
    for page in range(512):
        regs = Registers(rax=6, rcx=page * SZ_4K)
        td.module.tdcall(regs)
        assert regs.rax == 0
    assert td.exits() == {0: 1}
    assert td.seamcalls() == {("TDH.MEM.RANGE.BLOCK", 0): 1, ("TDH.MEM.TRACK", 0): 1, ("TDH.MEM.PAGE.DEMOTE", 0): 1}
    assert td.states(0, 2 * SZ_2M) == [(0, SZ_2M, "MAPPED", 0), (SZ_2M, 2 * SZ_2M, "PENDING", 1)]


@pytest.mark.parametrize("gpa, level, end", [(0, 1, 3), (2, 1, 3), (3, 0, 4), (4, 1, 7), (7, 0, 8)])
def test_a_mixed_host_gives_every_fourth_block_small_pages(gpa, level, end):
    """The pattern hangs on the address alone, so that two boots are equal."""
    assert MIXED.level_at(gpa * SZ_2M) == MIXED.level_at((gpa + 1) * SZ_2M - 1) == (level, end * SZ_2M)
