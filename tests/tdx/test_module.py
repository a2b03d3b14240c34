"""The TDX module's other leaves, CPUID, and the gate of a TD's memory."""

from __future__ import annotations

import pytest

from guest.errors import MemoryFault
from guest.registers import Registers
from tdx.events import TdCall, TdVmCall
from tdx.sept import LEVEL_2M, LEVEL_4K
from tdx.status import status_name
from tdx.vmm import Host

OPERAND_INVALID = 0xC000_0100_0000_0000
GENERAL = ["rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"]
NUMBER = {"rax": 0, "rcx": 1, "rdx": 2, "rbx": 3, "rsp": 4, "rbp": 5, "rsi": 6, "rdi": 7} | {
    f"r{n}": n for n in range(8, 16)
}
SZ_4K, SZ_2M = 0x1000, 0x20_0000


def everything(**changes: int) -> Registers:
    """Registers that all have a value of their own."""
    return Registers(**({name: 0x1000 + number for name, number in NUMBER.items()} | changes))


@pytest.mark.parametrize(
    "selector",
    [
        13,
        17,
        18,
        19,
        20,
        21,
        25,
        26,
        27,
        28,
        0xFFFF,
        *(1 << 16 | leaf for leaf in range(28) if leaf != 7),
        2 << 16 | 7,
        *(1 << bit | 7 for bit in range(17, 64)),
        1 << 63 | 6,
    ],
)
def test_an_unknown_leaf_or_version_is_refused(td, selector):
    """An unknown leaf, a version above 0 and reserved bits give OPERAND_INVALID | RAX and change nothing."""
    regs = everything(rax=selector)
    td.module.tdcall(regs)
    assert regs == everything(rax=OPERAND_INVALID)
    assert td.clock.ns == 1_000
    (event,) = td.events(TdCall)
    assert (event.leaf, event.status) == (f"leaf {selector:#x}", OPERAND_INVALID)


@pytest.mark.parametrize(
    "gpaw, sept_ve_disable, vcpus, attributes", [(52, True, 1, 1 << 28), (48, True, 4, 1 << 28), (52, False, 2, 0)]
)
def test_vp_info_describes_the_td(make_td, gpaw, sept_ve_disable, vcpus, attributes):
    """TDG.VP.INFO tells the address width, the attributes, the number of VCPUs and this VCPU's index."""
    td = make_td(gpaw=gpaw, sept_ve_disable=sept_ve_disable, vcpus=vcpus)
    regs = everything(rax=1)
    td.module.tdcall(regs)
    assert regs == everything(rax=0, rcx=gpaw, rdx=attributes, r8=vcpus << 32 | vcpus, r9=0, r10=1, r11=0)
    assert td.events(TdCall) == [TdCall("TDG.VP.INFO", 0x1001, 0, 1)]


def test_cpuid_says_that_this_is_a_td(td):
    """Leaf 0x21 has the 12 bytes of the TDX signature, and leaf 0 says that leaf 0x21 is there."""
    assert td.module.cpuid(0)[0] >= 0x21
    _, ebx, ecx, edx = td.module.cpuid(0x21)
    assert b"".join(reg.to_bytes(4, "little") for reg in (ebx, edx, ecx)) == b"IntelTDX    "
    assert td.module.cpuid(1)[2] >> 31 & 1
    assert td.module.cpuid(0x21, 1) == td.module.cpuid(0x4000_0002) == (0, 0, 0, 0)
    assert td.trace.records == []


@pytest.fixture
def seen(monkeypatch):
    """What the host saw of each TDG.VP.VMCALL; it answers with all ones in every register."""
    calls: list[Registers] = []

    def answer(self, regs: Registers) -> None:
        calls.append(Registers(**regs.as_dict()))
        for name in regs.as_dict():
            setattr(regs, name, (1 << 64) - 1)

    monkeypatch.setattr(Host, "tdvmcall", answer)
    return calls


@pytest.mark.parametrize("mask", [0, 0xFC00, 0xFFCC, 0xFFEC, *(1 << NUMBER[name] for name in GENERAL)], ids=hex)
def test_the_host_sees_and_changes_what_the_mask_exposes(td, seen, mask):
    """Registers outside the mask reach the host as zero and keep the guest's values, whatever the host does."""
    regs = everything(rax=0, rcx=mask)
    td.module.tdcall(regs)
    exposed = {name for name in GENERAL if mask >> NUMBER[name] & 1}
    assert seen == [Registers(**{name: 0x1000 + NUMBER[name] for name in exposed})]
    assert regs == everything(rax=0, rcx=mask, **dict.fromkeys(exposed, (1 << 64) - 1))


@pytest.mark.parametrize("bit", [0, 1, 4, *range(32, 64)])
def test_a_forbidden_mask_does_not_reach_the_host(td, seen, bit):
    """RAX, RCX, RSP and the bits above 31 cannot be exposed: OPERAND_INVALID | RCX, without an exit."""
    regs = everything(rax=0, rcx=0xFC00 | 1 << bit)
    td.module.tdcall(regs)
    assert regs == everything(rax=OPERAND_INVALID | 1, rcx=0xFC00 | 1 << bit)
    assert seen == []


def test_vector_registers_may_be_exposed(td, seen):
    """Bits 31:16 of the mask select XMM registers, which are valid and not modelled."""
    regs = everything(rax=0, rcx=0xFFFF_FC00)
    td.module.tdcall(regs)
    assert regs.rax == 0
    assert len(seen) == 1


def test_a_vmcall_costs_the_call_and_the_way_to_the_host(td):
    """Time passes for the TDCALL and for the host, and both leave an event, the host first."""
    regs = Registers(rax=0, rcx=0xFC00, r11=0x10000)
    td.module.tdcall(regs)
    assert td.clock.ns == 31_000
    assert [type(record.event) for record in td.trace.records] == [TdVmCall, TdCall]
    assert td.events(TdCall) == [TdCall("TDG.VP.VMCALL", 0xFC00, 0, 1)]


def map_some(td):
    """[1M, 2M) added, [2M, 4M) accepted as one page, [4M, 4M+4K) as a small page, then one PENDING page."""
    td.sept.page_add(1 << 20, SZ_2M)
    td.sept.page_aug(SZ_2M, 2 * SZ_2M, LEVEL_2M)
    td.sept.page_accept(SZ_2M, 2 * SZ_2M, LEVEL_2M)
    td.sept.page_aug(2 * SZ_2M, 2 * SZ_2M + 2 * SZ_4K, LEVEL_4K)
    td.sept.page_accept(2 * SZ_2M, 2 * SZ_2M + SZ_4K, LEVEL_4K)


LOW, HIGH, PENDING = 1 << 20, 2 * SZ_2M + SZ_4K, 2 * SZ_2M + SZ_4K


def test_an_access_may_cross_pages_of_different_size(td):
    """Mapped neighbours are one memory, whatever the level of their leaves."""
    map_some(td)
    td.machine.memory.write(LOW, b"\x5a" * (HIGH - LOW))
    assert td.machine.memory.read(SZ_2M - 2, 4) == b"\x5a" * 4
    assert td.machine.memory.read(2 * SZ_2M - 2, 4) == b"\x5a" * 4


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize(
    "gpa, size", [(LOW, 1), (LOW, HIGH - LOW), (SZ_2M - 1, 2), (HIGH - 1, 1), (LOW, 0), (SZ_2M, SZ_2M)]
)
def test_admit_returns_a_mapped_run_around_the_access(td, gpa, size, kind):
    """The run that is admitted holds the access and nothing that is not mapped."""
    map_some(td)
    low, high = td.module.admit(gpa, size, kind)
    assert LOW <= low <= gpa
    assert gpa + size <= high <= HIGH
    assert list(td.sept.mapped(low, high)) == [(low, high)]


BAD = [
    # start, size, first page that is not mapped, its state, how the guest dies with #VE enabled
    (LOW - 4, 8, LOW - 4, "FREE (not accepted)", "EPT violation, TD exit"),
    (HIGH - 4, 8, PENDING, "PENDING (not accepted)", "#VE"),
    (LOW, 1 << 23, PENDING, "PENDING (not accepted)", "#VE"),
    (PENDING + 5, 1, PENDING + 5, "PENDING (not accepted)", "#VE"),
    (PENDING + SZ_4K - 1, 2, PENDING + SZ_4K - 1, "PENDING (not accepted)", "#VE"),
    (PENDING + SZ_4K, 8, PENDING + SZ_4K, "FREE (not accepted)", "EPT violation, TD exit"),
    (1 << 24, 8, 1 << 24, "no RAM", "EPT violation, TD exit"),
    ((1 << 51) - 8, 8, (1 << 51) - 8, "no RAM", "EPT violation, TD exit"),
    ((1 << 52) - 8, 8, (1 << 52) - 8, "shared memory that the host does not map", "#VE"),
    (1 << 51 | LOW, 8, 1 << 51 | LOW, "shared memory that the host does not map", "#VE"),
]


@pytest.mark.parametrize("sept_ve_disable", [True, False])
@pytest.mark.parametrize("start, size, gpa, state, end", BAD)
def test_an_access_to_what_is_not_accepted_kills_the_guest(make_td, sept_ve_disable, start, size, gpa, state, end):
    """The fault names the first bad address and its state; only PENDING memory can raise #VE."""
    for kind in ("read", "write"):
        td = make_td(sept_ve_disable=sept_ve_disable)
        map_some(td)
        if state != "shared memory that the host does not map":
            end = "EPT violation, TD exit" if sept_ve_disable else end
        with pytest.raises(MemoryFault) as died:
            td.machine.memory.read(start, size) if kind == "read" else td.machine.memory.write(start, bytes(size))
        fault = died.value
        assert (fault.gpa, fault.start, fault.size, fault.kind) == (gpa, start, size, kind)
        assert (fault.state, fault.end, fault.stage) == (state, end, "test")
        assert td.machine.memory.writes == []


def test_memory_can_be_used_right_after_it_is_accepted(td):
    """A page that killed the access before is there after TDG.MEM.PAGE.ACCEPT."""
    with pytest.raises(MemoryFault):
        td.machine.memory.read(0x5000, 1)
    td.module.tdcall(Registers(rax=6, rcx=0x5000))
    td.machine.memory.write(0x5000, b"x" * SZ_4K)
    with pytest.raises(MemoryFault):
        td.machine.memory.read(0x5FFF, 2)


@pytest.mark.parametrize(
    "status, name",
    [
        (0, "TDX_SUCCESS"),
        (0xC000_0100_0000_0001, "TDX_OPERAND_INVALID"),
        (0x8000_0200_0000_0001, "TDX_OPERAND_BUSY"),
        (0x0000_0B0A_0000_0001, "TDX_PAGE_ALREADY_ACCEPTED"),
        (0xC000_0B0B_0000_0001, "TDX_PAGE_SIZE_MISMATCH"),
        (0xC000_0704_0000_0000, "TDX_NO_VALID_VE_INFO"),
    ],
)
def test_a_status_is_named_without_its_details(status, name):
    """The lower half of a status word is detail; an unknown word is its number."""
    assert status_name(status) == name
