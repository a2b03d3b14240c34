"""Instructions that raise #VE, run as machine code in a small TD with an IDT, a #VE handler and a #DF handler."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from cpu.binding import self_test
from cpu.exits import VeConfig
from cpu.run import RealCode, RunOptions
from cpu.vcpu import Vcpu
from guest.registers import Registers
from guest.trace import Note, Print
from tdx.instructions import Instructions
from tdx.ve import ExitReason
from tools.pipeline import REAL_KERNEL_CMDLINE, Boot, BootConfig

TABLES, CODE, IDT, IDT_POINTER, STACK, SIZE = (0x1000 * n for n in (1, 4, 5, 6, 15, 16))
VE_HANDLER, DF_HANDLER, BP_HANDLER = 0x7000, 0x8000, 0x9000
CODE_SELECTOR = 0x10
RESUME = bytes.fromhex("58 4883c420 ffe0")  # pop rax; add rsp, 32; jmp rax
LIDT = bytes.fromhex("0f011c25") + IDT_POINTER.to_bytes(4, "little")
CPUID, RDMSR, WRMSR, HLT, STOP = (bytes.fromhex(code) for code in ("0fa2", "0f32", "0f30", "f4", "0f0b"))
TDCALL_VEINFO_GET = bytes.fromhex("b803000000 660f01cc")
HANDLER = TDCALL_VEINFO_GET + STOP
START = Registers(rax=0xAAAA, rcx=0xCCCC, rdx=0x3F8, rbx=0xBBBB, rsp=STACK, rsi=CODE, rdi=0xD000, cr3=TABLES)
ALL = VeConfig(cpuid=True, io=True, msr=True, hlt=True)


class Stopped(Exception):
    """The code came to UD2."""


class PortLog:
    """Ports that read as 0x5A and remember what was done."""

    def __init__(self) -> None:
        self.log: list[tuple[int, ...]] = []

    def read(self, port: int, size: int) -> int:
        self.log.append((port, size))
        return 0x5A

    def write(self, port: int, size: int, value: int) -> None:
        self.log.append((port, size, value))


def _gate(handler: int) -> bytes:
    return struct.pack("<HHBBHI4x", handler, CODE_SELECTOR, 0, 0x8E, 0, 0)


def _memory(code: bytes, handler: bytes) -> bytes:
    memory = bytearray(SIZE)
    for level in range(2):
        struct.pack_into("<Q", memory, TABLES + 0x1000 * level, TABLES + 0x1000 * (level + 1) | 3)
    struct.pack_into("<Q", memory, TABLES + 0x2000, 1 << 7 | 3)  # the first 2 MiB
    struct.pack_into("<HQ", memory, IDT_POINTER, 0xFFF, IDT)
    for vector, at, what in ((20, VE_HANDLER, handler), (8, DF_HANDLER, STOP), (3, BP_HANDLER, RESUME)):
        memory[IDT + 16 * vector : IDT + 16 * (vector + 1)] = _gate(at)
        memory[at : at + len(what)] = what
    memory[CODE : CODE + len(code)] = code
    return bytes(memory)


class Guest:
    """A TD that ran ``code`` from CODE until UD2."""

    def __init__(self, code: bytes, ve: VeConfig, handler: bytes = HANDLER, **regs: int) -> None:
        self.boot = Boot(BootConfig(b""))
        memory = _memory(code + STOP, handler)
        self.boot.host.page_add(0, memory, SIZE, "test")
        self.ports, self.host_ports = PortLog(), PortLog()
        self.boot.host.instructions = Instructions(self.host_ports)
        self.vcpu = Vcpu(self.boot.machine, self.boot.physical, self.ports, ve)
        self.vcpu.start(Registers(**(START.as_dict() | regs)))
        for at in [found for found in range(SIZE) if memory.startswith(STOP, found)]:
            self.vcpu.break_at(at, self._stop)
        with pytest.raises(Stopped):
            self.vcpu.run(CODE)
        self.regs = self.vcpu.registers()

    def _stop(self) -> None:
        raise Stopped

    @property
    def frame(self) -> tuple[int, int]:
        """RIP and RSP that the exception pushed."""
        rip, _, _, rsp = struct.unpack("<4Q", self.boot.physical.read(self.regs.rsp, 32))
        return rip, rsp

    @property
    def info(self) -> tuple[int, int, int, int]:
        """What TDG.VP.VEINFO.GET told the handler: status, exit reason, qualification, length."""
        return self.regs.rax, self.regs.rcx, self.regs.rdx, self.regs.r10


def test_the_engine_is_the_one_that_is_known() -> None:
    """The self test finds the CPU's state laid out as expected."""
    self_test()


@pytest.mark.parametrize(
    "code, qualification",
    [
        ("ee", 0x03F8_0000),  # out dx, al
        ("66ef", 0x03F8_0001),  # out dx, ax
        ("ef", 0x03F8_0003),  # out dx, eax
        ("e680", 0x0080_0000),  # out 0x80, al
        ("ec", 0x03F8_0008),  # in al, dx
        ("66ed", 0x03F8_0009),  # in ax, dx
        ("ed", 0x03F8_000B),  # in eax, dx
        ("e4ed", 0x00ED_0008),  # in al, 0xed
    ],
)
def test_io_raises_ve(code: str, qualification: int) -> None:
    """#VE comes with the state from before the instruction, its length, size, direction and port."""
    instruction = bytes.fromhex(code)
    guest = Guest(LIDT + instruction, VeConfig(io=True))
    assert guest.info == (0, 30, qualification, len(instruction))
    assert guest.frame == (CODE + len(LIDT), STACK)
    assert (guest.regs.rbx, guest.regs.rsi) == (START.rbx, START.rsi)
    assert guest.ports.log == []
    assert guest.vcpu.ve_reasons == {ExitReason.IO_INSTRUCTION: 1}
    assert guest.vcpu.exceptions == {20: 1}


def test_in_leaves_rax_alone() -> None:
    """IN that raises #VE has not changed RAX when the handler begins."""
    guest = Guest(LIDT + b"\xec", VeConfig(io=True), handler=STOP)
    assert guest.regs.rax == START.rax


@pytest.mark.parametrize("code, direction", [("6e", 0), ("6c", 8), ("f36e", 0)], ids=["outsb", "insb", "rep outsb"])
def test_string_io_is_marked_as_such(code: str, direction: int) -> None:
    """String I/O has bit 4 of the qualification, and its pointers and count are as before."""
    guest = Guest(LIDT + bytes.fromhex(code), VeConfig(io=True))
    assert guest.info == (0, 30, 0x03F8_0010 | direction, len(code) // 2)
    assert (guest.regs.rsi, guest.regs.rdi) == (START.rsi, START.rdi)
    assert guest.frame == (CODE + len(LIDT), STACK)


def test_mov_to_dr7_does_not_end_it() -> None:
    """A guest that clears its breakpoints still raises #VE on I/O, and reads DR7 as it wrote it."""
    clear = bytes.fromhex("31c0 0f23f8 410f23f9 0f21fb")  # xor eax, eax; mov dr7, rax; mov dr7, r9; mov rbx, dr7
    guest = Guest(LIDT + clear + b"\xee", VeConfig(io=True), r9=0x300)
    assert guest.regs.rbx == 0x700
    assert guest.regs.rcx == ExitReason.IO_INSTRUCTION
    assert guest.frame[0] == CODE + len(LIDT + clear)


@pytest.mark.parametrize("leaf", [2, 0x4000_0000, 0x8000_0002], ids=hex)
def test_cpuid_of_the_host_raises_ve(leaf: int) -> None:
    """A leaf that the module has no answer for raises #VE."""
    guest = Guest(LIDT + CPUID, VeConfig(cpuid=True), rax=leaf, rcx=0)
    assert guest.info == (0, 10, 0, 2)
    assert guest.frame == (CODE + len(LIDT), STACK)


def test_native_cpuid_raises_nothing() -> None:
    """A leaf of the module's is answered at once."""
    guest = Guest(LIDT + CPUID, VeConfig(cpuid=True), rax=0x21, rcx=0)
    assert (guest.regs.rax, guest.regs.rbx) == (0, int.from_bytes(b"Inte", "little"))
    assert guest.regs.rip == CODE + len(LIDT + CPUID)
    assert (guest.vcpu.exceptions, guest.vcpu.ve_reasons) == ({}, {})


@pytest.mark.parametrize("msr", [0x1B, 0x8B, 0xFE, 0x800, 0xC000_0083, 0xC001_0015, 0x4B56_4D00], ids=hex)
@pytest.mark.parametrize("instruction, reason", [(RDMSR, 31), (WRMSR, 32)], ids=["rdmsr", "wrmsr"])
def test_msrs_of_the_host_raise_ve(instruction: bytes, reason: int, msr: int) -> None:
    """RDMSR and WRMSR of an MSR that the module does not let the guest have raise #VE."""
    guest = Guest(LIDT + instruction, VeConfig(msr=True), rcx=msr)
    assert guest.info == (0, reason, 0, 2)
    assert guest.frame == (CODE + len(LIDT), STACK)


@pytest.mark.parametrize("msr", [0x174, 0x277, 0xC000_0081, 0xC000_0082, 0xC000_0102, 0xC000_0103], ids=hex)
def test_native_msrs_raise_nothing(msr: int) -> None:
    """What is written to an MSR of the guest's own is read back, without #VE."""
    guest = Guest(LIDT + WRMSR + bytes.fromhex("31c031d2") + RDMSR, VeConfig(msr=True), rcx=msr, rax=5, rdx=0)
    assert (guest.regs.rax, guest.regs.rdx) == (5, 0)
    assert guest.vcpu.exceptions == {}


def test_an_msr_may_be_native_to_read_only() -> None:
    """TIME_STAMP_COUNTER is read without #VE and not written without it."""
    guest = Guest(LIDT + RDMSR + WRMSR, VeConfig(msr=True), rcx=0x10)
    assert guest.info == (0, 32, 0, 2)
    assert guest.vcpu.ve_reasons == {ExitReason.WRMSR: 1}


@pytest.mark.parametrize(
    "code", ["b900100000 0fa2", "b910000000 0f30", "f4", "ee"], ids=["cpuid", "wrmsr", "hlt", "out"]
)
def test_an_exit_after_int3_is_where_its_instruction_is(code: str) -> None:
    """A breakpoint that was hit and left behind does not move the next instruction that exits."""
    int3 = b"\xcc" + bytes.fromhex("b800000040")  # int3; mov eax, 0x40000000
    guest = Guest(LIDT + int3 + bytes.fromhex(code), ALL)
    length = guest.info[3]
    assert guest.vcpu.exceptions == {3: 1, 20: 1}
    assert guest.frame == (CODE + len(LIDT + int3 + bytes.fromhex(code)) - length, STACK)


def test_hlt_raises_ve() -> None:
    """HLT raises #VE, one byte long."""
    guest = Guest(LIDT + HLT, VeConfig(hlt=True))
    assert guest.info == (0, 12, 0, 1)


@pytest.mark.parametrize(
    "instruction, code",
    [("io", b"\xee\xec"), ("cpuid", b"\xb8\x00\x00\x00\x40" + CPUID), ("msr", b"\xb9\x8b\x00\x00\x00" + RDMSR)],
)
@pytest.mark.parametrize("lidt", [b"", LIDT], ids=["no IDT", "not configured"])
def test_without_an_idt_or_the_wish_nothing_raises_ve(instruction: str, code: bytes, lidt: bytes) -> None:
    """Before LIDT, and for what is not configured, instructions are done natively, I/O by the vCPU's devices."""
    others = VeConfig(**{name: name != instruction for name in ("cpuid", "io", "msr", "hlt")})
    guest = Guest(lidt + code, others if lidt else ALL)
    assert (guest.vcpu.exceptions, guest.vcpu.ve_reasons) == ({}, {})
    assert guest.regs.rip == CODE + len(lidt + code)
    assert guest.ports.log == ([(0x3F8, 1, 0xAA), (0x3F8, 1)] if instruction == "io" else [])


def test_ve_in_the_handler_before_it_asked_is_a_double_fault() -> None:
    """#VE while the information of another is unread becomes #DF, with an error code of 0."""
    guest = Guest(LIDT + CPUID, ALL, handler=b"\xee", rax=0x4000_0000)
    assert guest.regs.rip == DF_HANDLER
    error_code, rip = struct.unpack("<2Q", guest.boot.physical.read(guest.regs.rsp, 16))
    assert (error_code, rip) == (0, VE_HANDLER)
    assert guest.vcpu.exceptions == {20: 1, 8: 1}
    assert guest.vcpu.ve_reasons == {ExitReason.CPUID: 1, ExitReason.IO_INSTRUCTION: 1}


def test_a_handler_that_has_the_host_do_it() -> None:
    """A handler passes OUT to the host, whose device gets the byte; then the guest goes on behind the instruction."""
    save = bytes.fromhex("4989c7")  # mov r15, rax
    vmcall = bytes.fromhex(
        "4989cb 4989d6 49c1ee10 4d89d1 4d31d2"  # mov r11, rcx; mov r14, rdx; shr r14, 16; mov r9, r10; xor r10, r10
        "49c7c401000000 49c7c501000000"  # mov r12, 1; mov r13, 1
        "31c0 b900fc0000 660f01cc"  # xor eax, eax; mov ecx, 0xfc00; tdcall
        "58 4c01c8 4883c420 ffe0"  # pop rax; add rax, r9; add rsp, 32; jmp rax
    )
    guest = Guest(LIDT + b"\xee", VeConfig(io=True), handler=save + TDCALL_VEINFO_GET + vmcall)
    assert guest.regs.rip == CODE + len(LIDT) + 1
    assert guest.regs.rsp == STACK
    assert guest.host_ports.log == [(0x3F8, 1, 0xAA)]
    assert guest.ports.log == []


def test_ve_needs_a_tdx_module() -> None:
    """A machine on another platform cannot raise #VE."""
    boot = Boot(BootConfig(b""))
    boot.machine.platform = object()
    with pytest.raises(ValueError, match="TDX module"):
        Vcpu(boot.machine, boot.physical, PortLog(), VeConfig(hlt=True))


def test_debian_kernel_with_ve(debian_kernel: Path) -> None:
    """Debian's kernel handles #VE of I/O, CPUID, MSRs and HLT from its first lines on, up to its zones."""
    bzimage = debian_kernel.read_bytes()
    boot = Boot(BootConfig(bzimage, cmdline=REAL_KERNEL_CMDLINE, run="kernel"))
    boot.run("firmware")
    boot.real_code = RealCode(boot.machine, boot.physical, bzimage, RunOptions(until="Zone ranges:", ve=ALL))
    boot.host.instructions = Instructions(boot.real_code.devices, boot.real_code.vcpu.interrupts)
    boot.run()
    events = [record.event for record in boot.trace.records]
    lines = [event.text for event in events if isinstance(event, Print)]
    assert any(line.endswith("tdx: Guest detected") for line in lines)
    assert not any("unchecked MSR access" in line for line in lines)
    assert Note("stopped at 'Zone ranges:'") in events
    counts = boot.real_code.vcpu.ve_reasons
    characters = sum(len(line) + 2 for line in lines if line.startswith("["))
    assert counts[ExitReason.IO_INSTRUCTION] >= 2 * characters
    assert counts[ExitReason.CPUID] >= 256
    assert counts[ExitReason.RDMSR] >= 1
    assert boot.real_code.vcpu.exceptions[20] == sum(counts.values())
    assert 8 not in boot.real_code.vcpu.exceptions
