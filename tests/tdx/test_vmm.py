"""The host: answers to TDG.VP.VMCALL, backing of memory, RAM of a q35 machine."""

from __future__ import annotations

import pytest

from guest.errors import MemoryFault
from guest.registers import Registers
from tdx.events import PageAdd, SeamCall, TdExit, TdVmCall
from tdx.machine_type import MachineType
from tdx.sept import SeptEntry, SeptState
from tdx.td_exit import EptViolation
from tests.tdx.conftest import vmcall

SHARED = 1 << 51
INVALID_OPERAND = 0x8000_0000_0000_0000
ALIGN_ERROR = 0x8000_0000_0000_0002
SUBFUNC_UNSUPPORTED = 0x8000_0000_0000_0003
SZ_4K, SZ_2M, SZ_4G = 0x1000, 0x20_0000, 1 << 32
ALL_ONES = (1 << 64) - 1


@pytest.mark.parametrize(
    "gpa, size, status",
    [
        (0x1000, SZ_4K, 0),
        (SHARED | 0x1000, SZ_4K, 0),
        (0, SHARED, 0),
        (SHARED, SHARED, 0),
        (SHARED - SZ_4K, SZ_4K, 0),
        (0x1001, SZ_4K, ALIGN_ERROR),
        (0x1000, SZ_4K + 1, ALIGN_ERROR),
        (SHARED | 0x1800, SZ_4K, ALIGN_ERROR),
        (0x1000, 0, INVALID_OPERAND),
        (0x1001, 0, INVALID_OPERAND),
        (SHARED - SZ_4K, 2 * SZ_4K, INVALID_OPERAND),
        (SHARED | SHARED - SZ_4K, 2 * SZ_4K, INVALID_OPERAND),
        (0x1000, ALL_ONES - 0xFFF, INVALID_OPERAND),
        (1 << 52, SZ_4K, INVALID_OPERAND),
        (ALL_ONES - 0xFFF, SZ_4K, INVALID_OPERAND),
    ],
)
def test_map_gpa_checks_its_operands(td, gpa, size, status):
    """An empty, wrapping or illegal range and parts of pages are refused, with the GPA in R11."""
    regs = vmcall(td, r11=0x10001, r12=gpa, r13=size)
    assert regs.r10 == status
    assert regs.r11 == (gpa if status else 0)
    assert (regs.r12, regs.r13) == (gpa, size)
    assert td.events(TdVmCall) == [TdVmCall("MapGPA", gpa, size, status)]
    if status:
        assert list(td.host.shared) == []


def test_map_gpa_moves_memory_between_shared_and_private(td):
    """The shared bit of the address says which way; nothing is accepted and no page is added."""
    vmcall(td, r11=0x10001, r12=SHARED | 0x1000, r13=4 * SZ_4K)
    assert list(td.host.shared) == [(0x1000, 0x5000)]
    vmcall(td, r11=0x10001, r12=0x2000, r13=SZ_4K)
    assert list(td.host.shared) == [(0x1000, 0x2000), (0x3000, 0x5000)]
    assert td.states(0, 1 << 24) == [(0, 1 << 24, "FREE", 0)]


def test_map_gpa_follows_the_width_of_addresses(make_td):
    """With 48-bit addresses bit 47 is the shared bit, and what is above it is illegal."""
    td = make_td(gpaw=48)
    assert vmcall(td, r11=0x10001, r12=1 << 47 | 0x1000, r13=SZ_4K).r10 == 0
    assert list(td.host.shared) == [(0x1000, 0x2000)]
    assert vmcall(td, r11=0x10001, r12=1 << 48, r13=SZ_4K).r10 == INVALID_OPERAND


def test_get_td_vm_call_info_answers_zero(td):
    """The base sub-functions are there: R10 and R11 to R14 are zero, R15 is left alone."""
    regs = vmcall(td, r11=0x10000, r12=0, r13=5, r14=6, r15=7)
    assert (regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15) == (0, 0, 0, 0, 0, 7)


@pytest.mark.parametrize("sub_function", [0, 11, 65, 0x10005, ALL_ONES])
def test_an_unknown_sub_function_is_unsupported(td, sub_function):
    """The host says so in R10."""
    assert vmcall(td, r11=sub_function).r10 == SUBFUNC_UNSUPPORTED
    (event,) = td.events(TdVmCall)
    assert event.sub_function == f"{sub_function:#x}"


def test_a_vendor_call_is_refused(td):
    """R10 other than 0 is a hypercall of KVM and none of the GHCI: unknown ones give -KVM_ENOSYS, no other change."""
    regs = vmcall(td, r10=2, r11=0x10001, r12=0x1000, r13=SZ_4K)
    assert regs == Registers(rcx=0xFC00, r10=ALL_ONES - 999, r11=0x10001, r12=0x1000, r13=SZ_4K)
    assert vmcall(td, r10=1, r11=5).r10 == 0
    assert list(td.host.shared) == []
    assert [event.sub_function for event in td.events(TdVmCall)] == ["vendor 0x2", "vendor 0x1"]


def test_page_add_gives_contents_and_zeros(make_td):
    """While the TD is built the host adds pages that are mapped at once, with data first and zeros behind it."""
    td = make_td(running=False)
    td.host.page_add(0x4000, b"data", 2 * SZ_4K, "TD_HOB")
    assert td.machine.memory.read(0x4000, 2 * SZ_4K) == b"data".ljust(2 * SZ_4K, b"\0")
    assert td.states(0x3000, 0x7000) == [
        (0x3000, 0x4000, "FREE", 0),
        (0x4000, 0x6000, "MAPPED", 0),
        (0x6000, 0x7000, "FREE", 0),
    ]
    assert td.events(PageAdd) == [PageAdd(0x4000, 0x6000, "TD_HOB")]
    with pytest.raises(ValueError, match=r"TDH\.MEM\.PAGE\.ADD at 0x5000: TDX_EPT_ENTRY_STATE_INCORRECT"):
        td.host.page_add(0x5000, b"again", SZ_4K, "twice")
    assert td.machine.memory.read(0x5000, 5) == bytes(5)


@pytest.mark.parametrize(
    "page_level, level, count, backed",
    [
        (1, 1, 3, (3 * SZ_2M, 1, 3)),
        (1, 1, 9, (4 * SZ_2M, 1, 4)),  # up to where RAM has no whole page any more
        (1, 0, 9, (9 * SZ_4K, 0, 9)),
        (0, 0, 9, (9 * SZ_4K, 0, 9)),
        (0, 1, 3, (SZ_4K, 0, 1)),
    ],
)
def test_the_host_backs_what_it_can(make_td, page_level, level, count, backed):
    """It adds pages of the wanted size as far as RAM reaches, or one small page if it has no large ones."""
    td = make_td(ram=((SZ_2M, 5 * SZ_2M + SZ_4K),), page_level=page_level)
    td.host.ept_violation(EptViolation(SZ_2M, "accept", SeptEntry(SeptState.FREE, td.sept.top), level), count)
    size, at_level, pages = backed
    assert td.states(SZ_2M, SZ_2M + size) == [(SZ_2M, SZ_2M + size, "PENDING", at_level)]
    assert td.sept.run_at(SZ_2M + size)[2].state.name == "FREE"
    assert td.events(TdExit) == [TdExit(SZ_2M, at_level, pages)]
    assert td.seamcalls()["TDH.MEM.PAGE.AUG", 0] == pages
    assert td.clock.ns == 500_000 * pages + 11_000_000 * td.seamcalls().total()


@pytest.mark.parametrize("level", [0, 1])
def test_the_host_has_nothing_where_no_ram_is(td, level):
    """An address outside RAM ends the guest, and the host adds no page."""
    with pytest.raises(MemoryFault, match="no RAM"):
        td.host.ept_violation(EptViolation(1 << 24, "accept", SeptEntry(SeptState.FREE, td.sept.top), level))
    assert td.events(TdExit) == []


def test_demote_splits_the_page_that_was_hit(td):
    """A pending 2 MiB page becomes pending 4 KiB pages, and its neighbours stay whole."""
    td.sept.page_aug(0, 3 * SZ_2M, 1)
    td.host.ept_violation(EptViolation(SZ_2M + 7 * SZ_4K, "accept", SeptEntry(SeptState.PENDING, 1), 0))
    assert td.states(0, 3 * SZ_2M) == [
        (0, SZ_2M, "PENDING", 1),
        (SZ_2M, 2 * SZ_2M, "PENDING", 0),
        (2 * SZ_2M, 3 * SZ_2M, "PENDING", 1),
    ]
    assert [(event.leaf, event.rcx) for event in td.events(SeamCall)] == [
        ("TDH.MEM.RANGE.BLOCK", SZ_2M | 1),
        ("TDH.MEM.TRACK", 0),
        ("TDH.MEM.PAGE.DEMOTE", SZ_2M | 1),
    ]


@pytest.mark.parametrize(
    "memory, ranges",
    [
        (0, []),
        (256 << 20, [(0, 256 << 20)]),
        (2 << 30, [(0, 2 << 30)]),
        (0xB000_0000 - SZ_4K, [(0, 0xB000_0000 - SZ_4K)]),
        (0xB000_0000, [(0, 0x8000_0000), (SZ_4G, SZ_4G + 0x3000_0000)]),
        (4 << 30, [(0, 0x8000_0000), (SZ_4G, 6 << 30)]),
        (64 << 30, [(0, 0x8000_0000), (SZ_4G, 66 << 30)]),
    ],
)
def test_q35_splits_ram_at_2816_mib(memory, ranges):
    """Up to 2816 MiB all RAM is low; from there on 2 GiB are, and the rest starts at 4 GiB."""
    found = MachineType().ram(memory)
    assert list(found) == ranges
    assert found.total() == memory


@pytest.mark.parametrize(
    ("machine", "limit", "memory", "low"),
    [
        ("pc", None, 2 << 30, 2 << 30),
        ("pc", None, 0xE000_0000 - SZ_4K, 0xE000_0000 - SZ_4K),
        ("pc", None, 0xE000_0000, 3 << 30),
        ("pc", None, 40 << 30, 3 << 30),
        ("pc", 0xE000_0000, 4 << 30, 3 << 30),
        ("pc", 1 << 30, 4 << 30, 1 << 30),
        ("q35", 1 << 30, 4 << 30, 1 << 30),
        ("q35", 3 << 30, 4 << 30, 2 << 30),
        ("q35", 1 << 30, 512 << 20, 512 << 20),
    ],
)
def test_machines_split_ram(machine, limit, memory, low):
    """pc keeps 3 GiB low if not all fits in 3.5 GiB; max-ram-below-4g makes the low part smaller, never larger."""
    found = MachineType(machine, limit).ram(memory)
    assert next(iter(found)) == (0, low)
    assert found.total() == memory
    assert not found.overlaps(low, SZ_4G)
