"""Interrupts in running code: when they enter the guest, and what HLT and the timer do to its time."""

from __future__ import annotations

import struct

import pytest

from cpu.counter import InstructionCounter
from cpu.interrupts import INSTRUCTIONS_PER_NS
from cpu.vcpu import Vcpu
from guest.errors import GuestPanic
from guest.registers import Registers
from tdx.instructions import Instructions, NoPorts
from tools.pipeline import Boot, BootConfig

TABLES, CODE, IDT, IDT_POINTER, HANDLER, GP_HANDLER, STACK, SIZE = (0x1000 * n for n in (1, 4, 5, 6, 7, 8, 15, 16))
VECTOR, SELECTOR = 0x40, 0x10
LIDT = bytes.fromhex("0f011c25") + IDT_POINTER.to_bytes(4, "little")
STI, CLI, HLT, STOP = (bytes.fromhex(code) for code in ("fb", "fa", "f4", "0f0b"))
SVR, TIMER, INITIAL, DIVIDE, SELF_IPI, TPR = 0x80F, 0x832, 0x838, 0x83E, 0x83F, 0x808
MASKED, PERIODIC = 1 << 16, 1 << 17
COUNT_NS = 40
SLACK_NS = 40
"""No more than this long does a test take besides what it waits for."""


def wrmsr(index: int, value: int) -> bytes:
    """mov ecx, index; mov eax, value; xor edx, edx; wrmsr"""
    return b"\xb9" + index.to_bytes(4, "little") + b"\xb8" + value.to_bytes(4, "little") + b"\x31\xd2\x0f\x30"


ENABLE = LIDT + wrmsr(SVR, 0x1FF) + wrmsr(DIVIDE, 0xB)


class Stopped(Exception):
    """The code came to UD2."""


class Guest:
    """A TD that runs ``code`` from CODE until UD2, which the handlers of its interrupt and of #GP are too."""

    def __init__(self, code: bytes) -> None:
        self.boot = Boot(BootConfig(b""))
        memory = self._memory(ENABLE + code + STOP)
        self.boot.host.page_add(0, memory, SIZE, "test")
        self.vcpu = Vcpu(self.boot.machine, self.boot.physical, NoPorts())
        self.boot.host.instructions = Instructions(NoPorts(), self.vcpu.interrupts)
        self.counter = InstructionCounter(self.vcpu.engine, 1 << 20, self._out_of_time)
        self.vcpu.interrupts.start(self.counter)
        self.vcpu.start(Registers(rsp=STACK, cr3=TABLES))
        for at in [found for found in range(SIZE) if memory.startswith(STOP, found)]:
            self.vcpu.break_at(at, self._stop)
        self.began = self.boot.clock.ns

    def run(self) -> Registers:
        with pytest.raises(Stopped):
            self.vcpu.run(CODE)
        self.vcpu.interrupts.pass_time()
        return self.vcpu.registers()

    @property
    def time(self) -> int:
        """Nanoseconds since the start."""
        return self.boot.clock.ns - self.began

    @staticmethod
    def _memory(code: bytes) -> bytes:
        memory = bytearray(SIZE)
        for level in range(2):
            struct.pack_into("<Q", memory, TABLES + 0x1000 * level, TABLES + 0x1000 * (level + 1) | 3)
        struct.pack_into("<Q", memory, TABLES + 0x2000, 1 << 7 | 3)  # the first 2 MiB
        struct.pack_into("<HQ", memory, IDT_POINTER, 0xFFF, IDT)
        for vector, at in ((VECTOR, HANDLER), (13, GP_HANDLER)):
            struct.pack_into("<HHBBHI4x", memory, IDT + 16 * vector, at, SELECTOR, 0, 0x8E, 0, 0)
            memory[at : at + len(STOP)] = STOP
        memory[CODE : CODE + len(code)] = code
        return bytes(memory)

    def _stop(self) -> None:
        raise Stopped

    def _out_of_time(self) -> None:
        raise AssertionError("the code did not come to its end")


def test_no_interrupt_while_if_is_clear_nor_in_the_shadow_of_sti() -> None:
    """It comes behind the instruction that follows STI: CLI there keeps it out, and another one does not."""
    guest = Guest(wrmsr(SELF_IPI, VECTOR) + b"\xeb\x00" + STI + CLI + b"\xeb\x00" * 3 + STI + b"\x90\xeb\x00")
    regs = guest.run()
    assert regs.rip == HANDLER
    rip, _, rflags, rsp = struct.unpack("<4Q", guest.boot.physical.read(regs.rsp, 32))
    assert rip == CODE + len(ENABLE) + 14 + 2 + 2 + 6 + 2
    assert (rflags >> 9 & 1, rsp) == (1, STACK)
    assert guest.vcpu.state.rflags >> 9 & 1 == 0
    assert guest.vcpu.interrupts.delivered == {VECTOR: 1}


def test_hlt_takes_time_up_to_the_timer() -> None:
    """HLT lets the clock go on to the timer's interrupt, which returns behind the HLT."""
    guest = Guest(wrmsr(TIMER, VECTOR) + wrmsr(INITIAL, 25_000_000) + STI + HLT)
    regs = guest.run()
    assert regs.rip == HANDLER
    assert 25_000_000 * COUNT_NS <= guest.time <= 25_000_000 * COUNT_NS + SLACK_NS
    assert struct.unpack("<Q", guest.boot.physical.read(regs.rsp, 8)) == (CODE + len(ENABLE) + 28 + 2,)


def test_executed_code_takes_time() -> None:
    """A loop that reads no clock is interrupted by the timer after as many instructions as its time is worth."""
    guest = Guest(wrmsr(TIMER, VECTOR) + wrmsr(INITIAL, 1000) + STI + b"\x90\xeb\xfd")
    assert guest.run().rip == HANDLER
    assert 1000 * COUNT_NS <= guest.time <= 1000 * COUNT_NS + SLACK_NS
    assert guest.counter.count / INSTRUCTIONS_PER_NS == pytest.approx(1000 * COUNT_NS, abs=SLACK_NS)


@pytest.mark.parametrize(
    "code, words",
    [
        (CLI + HLT, "with interrupts blocked"),
        (STI + HLT, "with no timer set: nothing can wake it"),
        (wrmsr(TIMER, MASKED | VECTOR) + wrmsr(INITIAL, 10) + STI + HLT, "with no timer set: nothing can wake it"),
        (wrmsr(TPR, 0xF0) + wrmsr(TIMER, PERIODIC | VECTOR) + wrmsr(INITIAL, 10) + STI + HLT, "nothing can wake it"),
    ],
    ids=["IF clear", "no timer", "masked", "TPR"],
)
def test_a_halt_that_nothing_can_end_ends_the_guest(code: bytes, words: str) -> None:
    """HLT with interrupts off, or with none to come, is the guest's end, in words."""
    with pytest.raises(GuestPanic, match=f"halted at 0x[0-9a-f]+ .*{words}"):
        Guest(code).vcpu.run(CODE)


def test_the_host_waits_too() -> None:
    """TDG.VP.VMCALL<HLT> comes back when the timer has interrupted, also while the guest has interrupts off."""
    tdvmcall_hlt = bytes.fromhex("b900fc0000 4531d2 41bb0c000000 4531e4 31c0 660f01cc")
    guest = Guest(wrmsr(TIMER, VECTOR) + wrmsr(INITIAL, 1_000_000) + tdvmcall_hlt)
    assert guest.run().rip == CODE + len(ENABLE) + 28 + len(tdvmcall_hlt)
    assert guest.time >= 1_000_000 * COUNT_NS
    assert guest.vcpu.interrupts.apic.pending() == VECTOR


def test_what_the_apic_refuses_is_a_general_protection_fault() -> None:
    """WRMSR of a register that is read-only raises #GP at the instruction."""
    guest = Guest(wrmsr(0x802, 0))
    regs = guest.run()
    assert regs.rip == GP_HANDLER
    assert struct.unpack("<2Q", guest.boot.physical.read(regs.rsp, 16)) == (0, CODE + len(ENABLE) + 12)


def test_rdmsr_reads_the_apic() -> None:
    """APIC_BASE is read into EDX:EAX without the guest's help."""
    regs = Guest(b"\xb9\x1b\x00\x00\x00\x0f\x32").run()
    assert (regs.rax, regs.rdx) == (0xFEE0_0D00, 0)
