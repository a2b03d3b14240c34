"""Sub-functions of TDG.VP.VMCALL where the host has a choice: MapGPA in pieces, information, quotes, vectors."""

from __future__ import annotations

import struct

import pytest

from guest.ranges import RangeSet
from guest.registers import Registers
from tdx.leaves import VmCallStatus
from tdx.vmcall import QUOTE
from tests.tdx.conftest import vmcall

SHARED = 1 << 51
SZ_4K, SZ_2M = 0x1000, 0x20_0000
MAP_GPA, INFO, GET_QUOTE, NOTIFY, MMIO = 0x10001, 0x10000, 0x10002, 0x10004, 48
RETRY, INVALID, GPA_INUSE, ALIGN_ERROR, UNSUPPORTED = 1, 1 << 63, 1 << 63 | 1, 1 << 63 | 2, 1 << 63 | 3


PIECES = [
    # start, size, next addresses at which an event is pending, status, R11, end of what was done
    (0, 4 * SZ_2M, [], 0, 0, 4 * SZ_2M),
    (0, 4 * SZ_2M, [SZ_2M], RETRY, SZ_2M, SZ_2M),
    (0, 4 * SZ_2M, [3 * SZ_2M], RETRY, 3 * SZ_2M, 3 * SZ_2M),
    (0, 4 * SZ_2M, [4 * SZ_2M], 0, 0, 4 * SZ_2M),  # nothing is left then
    (SZ_4K, SZ_2M, [SZ_2M + SZ_4K], 0, 0, SZ_2M + SZ_4K),
    (SZ_4K, SZ_2M + SZ_4K, [SZ_2M + SZ_4K], RETRY, SZ_2M + SZ_4K, SZ_2M + SZ_4K),  # pieces start where the range does
    (SZ_4K, 2 * SZ_2M, [SZ_2M], 0, 0, 2 * SZ_2M + SZ_4K),
]


@pytest.mark.parametrize("shared", [0, SHARED])
@pytest.mark.parametrize("start, size, events, status, r11, done", PIECES)
def test_map_gpa_stops_between_pieces(td, start, size, events, status, r11, done, shared):
    """With an event pending after a piece of 2 MiB the host answers RETRY; R11 says where to go on."""
    if not shared:
        td.host.shared.add(0, 1 << 24)
    td.host.vmcalls.has_event = lambda gpa: gpa ^ shared in events
    regs = vmcall(td, r11=MAP_GPA, r12=start | shared, r13=size)
    assert (regs.r10, regs.r11) == (status, r11 | shared if status else 0)
    assert td.host.shared == (RangeSet([(start, done)]) if shared else RangeSet([(0, start), (done, 1 << 24)]))


@pytest.mark.parametrize("refusal", [INVALID, GPA_INUSE], ids=hex)
@pytest.mark.parametrize(
    "bad, stop", [(0, 0), (SZ_2M - SZ_4K, 0), (SZ_2M, SZ_2M), (3 * SZ_2M + SZ_4K, 3 * SZ_2M)], ids=hex
)
def test_map_gpa_stops_at_what_the_host_refuses(td, bad, stop, refusal):
    """What lies before the refused piece is done, and R11 is where that piece begins."""
    td.host.vmcalls.refused.add(bad, bad + SZ_4K)
    td.host.vmcalls.refusal = VmCallStatus(refusal)
    regs = vmcall(td, r11=MAP_GPA, r12=SHARED, r13=4 * SZ_2M)
    assert (regs.r10, regs.r11) == (refusal, SHARED | stop)
    assert td.host.shared == RangeSet([(0, stop)] if stop else [])


def test_an_event_before_the_refused_piece_comes_first(td):
    """RETRY ends the call before the host finds out that it will refuse."""
    td.host.vmcalls.refused.add(SZ_2M, 2 * SZ_2M)
    td.host.vmcalls.has_event = lambda gpa: True
    regs = vmcall(td, r11=MAP_GPA, r12=SHARED, r13=4 * SZ_2M)
    assert (regs.r10, regs.r11) == (RETRY, SHARED | SZ_2M)


def test_a_host_without_map_gpa(td):
    """Where user space did not opt in, the sub-function is unsupported, whatever its operands."""
    td.host.vmcalls.map_gpa = False
    for gpa, size in ((SHARED, SZ_4K), (1, 0)):
        regs = vmcall(td, r11=MAP_GPA, r12=gpa, r13=size)
        assert (regs.r10, regs.r11) == (UNSUPPORTED, gpa)


@pytest.mark.parametrize("leaf, status, r11", [(0, 0, 0), (1, 0, 2), (2, INVALID, INFO), (1 << 63, INVALID, INFO)])
def test_get_td_vm_call_info(td, leaf, status, r11):
    """Leaf 0: the base API is there. Leaf 1: R11 bit 1 is SetupEventNotifyInterrupt. Others are refused."""
    regs = vmcall(td, r11=INFO, r12=leaf, r13=5, r14=6, r15=7)
    assert (regs.r10, regs.r11, regs.r15) == (status, r11, 7)
    assert (regs.r12, regs.r13, regs.r14) == ((leaf, 5, 6) if status else (0, 0, 0))


@pytest.mark.parametrize(
    "vector, status",
    [(0, INVALID), (31, INVALID), (32, 0), (0xF0, 0), (255, 0), (256, INVALID), (1 << 32 | 32, INVALID)],
)
def test_setup_event_notify_interrupt(td, vector, status):
    """Vectors 32 to 255 are kept."""
    assert vmcall(td, r11=NOTIFY, r12=vector).r10 == status
    assert td.host.vmcalls.notify_vector == (None if status else vector)


def share(td, start: int, end: int) -> None:
    assert vmcall(td, r11=MAP_GPA, r12=SHARED | start, r13=end - start).r10 == 0


def test_get_quote_answers_what_is_clearly_no_quote(td):
    """The reply comes in the buffer behind its header: version, status 0, lengths."""
    td.host.vmcalls.quotes = True
    share(td, 0x4000, 0x6000)
    td.machine.memory.write(SHARED | 0x4000, struct.pack("<QQII", 1, 77, 1024, 0))
    assert vmcall(td, r11=GET_QUOTE, r12=SHARED | 0x4000, r13=0x2000).r10 == 0
    assert b"not genuine" in QUOTE
    header = struct.pack("<QQII", 1, 0, 1024, len(QUOTE))
    assert td.machine.memory.read(SHARED | 0x4000, 24 + len(QUOTE)) == header + QUOTE


@pytest.mark.parametrize(
    "quotes, gpa, size, version, in_len, status",
    [
        (True, 0x4000, 0x1000, 1, 0, INVALID),  # private
        (False, 0x4000, 0x1000, 1, 0, INVALID),
        (False, SHARED | 0x4000, 0x1000, 1, 0, UNSUPPORTED),
        (True, SHARED | 0x4000, 0x800, 1, 0, ALIGN_ERROR),
        (True, SHARED | 0x4800, 0x1000, 1, 0, ALIGN_ERROR),
        (True, SHARED | 0x4000, 0, 1, 0, INVALID),
        (True, SHARED | 0x5000, 0x2000, 1, 0, INVALID),  # not all of it is shared
        (True, SHARED | 0x4000, (1 << 64) - 0x1000, 1, 0, INVALID),
        (True, SHARED | 0x4000, 0x1000, 2, 0, INVALID),
        (True, SHARED | 0x4000, 0x1000, 1, 0x1000, INVALID),
    ],
)
def test_get_quote_refuses(td, quotes, gpa, size, version, in_len, status):
    """The buffer must be whole pages of shared memory with a header that is known; then somebody must answer."""
    td.host.vmcalls.quotes = quotes
    share(td, 0x4000, 0x6000)
    header = struct.pack("<QQII", version, 77, in_len, 0)
    td.machine.memory.write(SHARED | 0x4000, header)
    assert vmcall(td, r11=GET_QUOTE, r12=gpa, r13=size).r10 == status
    assert td.machine.memory.read(SHARED | 0x4000, 24) == header


@pytest.mark.parametrize("gpa, status", [(SHARED | 0xFEC0_0000, 0), (0xFEC0_0000, INVALID), (SHARED - 4, INVALID)])
def test_mmio_is_for_shared_addresses(td, gpa, status):
    """The host does no MMIO at a private address."""
    assert vmcall(td, r11=MMIO, r12=4, r13=0, r14=gpa).r10 == status


def test_rbp_can_be_withheld(make_td):
    """With NO_RBP_MOD a mask with RBP is OPERAND_INVALID | RCX, and the host hears nothing."""
    td = make_td(no_rbp_mod=True)
    regs = Registers(rax=0, rcx=1 << 5 | 0xFC00, rbp=7, r11=INFO)
    td.module.tdcall(regs)
    assert regs == Registers(rax=0xC000_0100_0000_0001, rcx=1 << 5 | 0xFC00, rbp=7, r11=INFO)
