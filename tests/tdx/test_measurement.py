"""MRTD by calls and by ranges, RTMRs against hashlib. MRTD of an image: tests/firmware/test_mrtd.py."""

from __future__ import annotations

import hashlib

import pytest

from guest.errors import MemoryFault
from guest.registers import Registers
from tdx.events import SeamCall
from tdx.measurement import Measurement

SZ_4K = 0x1000
PAGE = 0x5000
RTMR_EXTEND = 2
INVALID = 0xC000_0100_0000_0000
PAGE_ADD, MR_EXTEND, MR_FINALIZE = 2, 16, 17


def test_a_range_is_its_pages_one_by_one() -> None:
    """A record of many pages hashes as the records of each: PAGE.ADD, then its 16 chunks."""
    data = bytes(range(256)) * 24
    whole, single = Measurement(), Measurement()
    whole.page_add(0x1000, 0x3000, data)
    for gpa in (0x1000, 0x2000):
        single.page_add(gpa, gpa + SZ_4K)
        page = data[gpa - 0x1000 : gpa].ljust(SZ_4K, b"\0")
        for chunk in range(0, SZ_4K, 256):
            single.mr_extend(gpa + chunk, page[chunk : chunk + 256])
    assert whole.mrtd == single.mrtd
    assert whole.mrtd != Measurement().mrtd == hashlib.sha384().digest()


def test_mrtd_by_seamcalls_is_mrtd_of_the_host(make_td) -> None:
    """TDH.MEM.PAGE.ADD and TDH.MR.EXTEND in register form give what the host's own building gives."""
    by_host, by_calls = make_td(running=False), make_td(running=False)
    by_host.host.page_add(PAGE, b"firmware", SZ_4K, "BFV", extend=True)
    host, seam = by_calls.host, by_calls.host.seam
    host.add_tables(PAGE, PAGE + SZ_4K, 0)
    seam.host_memory.write(0x8000, b"firmware")
    for leaf, rcx in [(PAGE_ADD, PAGE), *((MR_EXTEND, PAGE + at) for at in range(0, SZ_4K, 256))]:
        regs = Registers(rax=leaf, rcx=rcx, r9=0x8000)
        seam.seamcall(regs)
        assert regs.rax == 0
    assert seam.measurement.mrtd == by_host.host.seam.measurement.mrtd
    assert by_host.events(SeamCall)[-1] == SeamCall("TDH.MR.EXTEND", PAGE, 0, 16)


@pytest.mark.parametrize(
    "gpa, running, status",
    [
        (PAGE + 1, False, INVALID | 1),
        (1 << 51, False, INVALID | 1),
        (PAGE + SZ_4K, False, 0xC000_0B00_0000_0001),
        (PAGE, True, 0xC000_0608_0000_0000),
    ],
)
def test_mr_extend_is_refused(make_td, gpa, running, status) -> None:
    """TDH.MR.EXTEND wants a chunk of 256 bytes in a page that was added, before TDH.MR.FINALIZE; else MRTD stays."""
    td = make_td(running=False)
    td.host.page_add(PAGE, b"", SZ_4K, "RAM")
    if running:
        td.host.finalize()
    before = td.host.seam.measurement.mrtd
    regs = Registers(rax=MR_EXTEND, rcx=gpa)
    td.host.seam.seamcall(regs)
    assert regs.rax == status
    assert td.host.seam.measurement.mrtd == before


def test_nothing_is_added_after_finalize(make_td) -> None:
    """TDH.MEM.PAGE.ADD of a TD that can run is refused, and MRTD is final."""
    td = make_td()
    before = td.host.seam.measurement.mrtd
    with pytest.raises(ValueError, match=r"TDH\.MEM\.PAGE\.ADD"):
        td.host.page_add(PAGE, b"late", SZ_4K, "late", extend=True)
    assert td.host.seam.measurement.mrtd == before


def extend(td, gpa: int, index: int) -> int:
    """TDG.MR.RTMR.EXTEND; returns RAX. No other register changes."""
    regs = Registers(rax=RTMR_EXTEND, rcx=gpa, rdx=index)
    td.module.tdcall(regs)
    assert regs == Registers(rax=regs.rax, rcx=gpa, rdx=index)
    return regs.rax


@pytest.fixture
def td(make_td):
    """A TD with one accepted page at PAGE."""
    td = make_td()
    td.module.tdcall(Registers(rax=6, rcx=PAGE))
    return td


def test_rtmr_extend_hashes_old_and_new(td) -> None:
    """RTMR = SHA384(RTMR || data), each register for itself, from zeros on."""
    td.machine.memory.write(PAGE + 64, bytes(range(48)))
    assert extend(td, PAGE + 64, 2) == 0
    once = hashlib.sha384(bytes(48) + bytes(range(48))).digest()
    assert td.module.measurement.rtmr == [bytes(48), bytes(48), once, bytes(48)]
    assert extend(td, PAGE + 64, 2) == 0
    assert td.module.measurement.rtmr[2] == hashlib.sha384(once + bytes(range(48))).digest()


@pytest.mark.parametrize(
    "gpa, index, status",
    [
        (PAGE, 4, INVALID | 2),
        (PAGE, 1 << 63, INVALID | 2),
        (PAGE + 32, 0, INVALID | 1),
        (PAGE + 32, 9, INVALID | 1),  # the operand in memory comes first
        (1 << 51 | PAGE, 0, INVALID | 1),
        (1 << 52 | PAGE, 0, INVALID | 1),
        ((1 << 64) - 64, 0, INVALID | 1),
    ],
)
def test_rtmr_extend_refuses(td, gpa, index, status) -> None:
    """A bad address is OPERAND_INVALID | RCX, a bad index OPERAND_INVALID | RDX; nothing is extended."""
    assert extend(td, gpa, index) == status
    assert td.module.measurement.rtmr == [bytes(48)] * 4


def test_an_operand_that_is_not_accepted_kills(td) -> None:
    """A good address that is not mapped is an access like any other: the guest dies in it, whatever the index."""
    with pytest.raises(MemoryFault) as died:
        extend(td, PAGE + SZ_4K, 9)
    assert (died.value.gpa, died.value.kind) == (PAGE + SZ_4K, "read")
