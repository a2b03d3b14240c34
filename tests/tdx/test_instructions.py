"""Instructions that the host does for a guest: TDG.VP.VMCALL with the number of an exit reason."""

from __future__ import annotations

import pytest

from guest.errors import GuestPanic
from guest.registers import Registers
from tdx.events import TdVmCall
from tdx.instructions import Instructions
from tools.pipeline import Boot, BootConfig

CPUID, HLT, IO, RDMSR, WRMSR, MMIO, FATAL_ERROR = 10, 12, 30, 31, 32, 48, 0x10003
INVALID_OPERAND = 0x8000_0000_0000_0000
EXPOSE_ALL = 0xFFCC
SHARED = 1 << 51


class PortLog:
    """Ports that remember what was written, and read as the number of the port, in more bits than asked for."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def read(self, port: int, size: int) -> int:
        return 0xABCD_0000_0000 | port * 0x1_0001

    def write(self, port: int, size: int, value: int) -> None:
        self.writes.append((port, size, value))


@pytest.fixture
def boot() -> Boot:
    """A TD that has not run yet."""
    return Boot(BootConfig(b""))


def vmcall(boot: Boot, **regs: int) -> Registers:
    """One TDG.VP.VMCALL with all registers exposed."""
    call = Registers(rax=0, rcx=EXPOSE_ALL, **regs)
    boot.machine.platform.tdcall(call)
    assert call.rax == 0
    return call


def test_cpuid_leaf_of_the_host(boot: Boot) -> None:
    """Instruction.CPUID answers KVM's signature in R12 to R15, and zeros for a leaf the host has nothing for."""
    regs = vmcall(boot, r11=CPUID, r12=0x4000_0000)
    signature = b"".join(reg.to_bytes(4, "little") for reg in (regs.r13, regs.r14, regs.r15))
    assert (regs.r10, regs.r12, signature) == (0, 0x4000_0001, b"KVMKVMKVM\0\0\0")
    regs = vmcall(boot, r11=CPUID, r12=2, r13=5)
    assert (regs.r10, regs.r12, regs.r13, regs.r14, regs.r15) == (0, 0, 0, 0, 0)


def test_io_reaches_the_hosts_devices(boot: Boot) -> None:
    """Instruction.IO reads and writes the ports of the host, in the size that R12 says."""
    ports = PortLog()
    boot.host.instructions = Instructions(ports)
    assert vmcall(boot, r11=IO, r12=1, r13=0, r14=0x3FD).r11 == 0xFD
    assert vmcall(boot, r11=IO, r12=2, r13=0, r14=0x3FD).r11 == 0x3FD
    assert vmcall(boot, r11=IO, r12=4, r13=0, r14=0x3FD).r11 == 0x03FD_03FD
    for size in (1, 2, 4):
        assert vmcall(boot, r11=IO, r12=size, r13=1, r14=0xFFFF, r15=0x1122_3344_5566_7788).r10 == 0
    assert ports.writes == [(0xFFFF, 1, 0x88), (0xFFFF, 2, 0x7788), (0xFFFF, 4, 0x5566_7788)]


@pytest.mark.parametrize("size, value", [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)])
def test_a_host_without_devices_reads_all_ones(boot: Boot, size: int, value: int) -> None:
    """Without devices a write is lost and a read gives all ones."""
    assert vmcall(boot, r11=IO, r12=size, r13=1, r14=0x80, r15=1).r10 == 0
    assert vmcall(boot, r11=IO, r12=size, r13=0, r14=0x80).r11 == value


@pytest.mark.parametrize(
    "operands",
    [{"r12": 0}, {"r12": 3}, {"r12": 8}, {"r12": 1, "r13": 2}, {"r12": 1, "r14": 0x1_0000}, {"r12": (1 << 64) - 1}],
)
def test_io_checks_its_operands(boot: Boot, operands: dict[str, int]) -> None:
    """A size, direction or port that no instruction has gives INVALID_OPERAND, and no device hears of it."""
    ports = PortLog()
    boot.host.instructions = Instructions(ports)
    assert vmcall(boot, r11=IO, **({"r13": 1} | operands)).r10 == INVALID_OPERAND
    assert ports.writes == []


def test_msrs_that_the_host_keeps(boot: Boot) -> None:
    """WRMSR changes what RDMSR returns in R11; an MSR that the host does not keep gives INVALID_OPERAND."""
    boot.host.instructions = Instructions(msrs={0x1B: 0xFEE0_0900})
    assert vmcall(boot, r11=RDMSR, r12=0x1B).r11 == 0xFEE0_0900
    assert vmcall(boot, r11=WRMSR, r12=0x1B, r13=0xFEE0_0D00).r10 == 0
    assert vmcall(boot, r11=RDMSR, r12=0x1B).r11 == 0xFEE0_0D00
    assert vmcall(boot, r11=RDMSR, r12=0xFE).r10 == INVALID_OPERAND
    assert vmcall(boot, r11=WRMSR, r12=0xFE).r10 == INVALID_OPERAND
    assert boot.host.instructions.msrs == {0x1B: 0xFEE0_0D00}


def test_mmio_finds_no_device(boot: Boot) -> None:
    """RequestMMIO reads all ones; a size or direction that does not exist gives INVALID_OPERAND."""
    for size in (1, 2, 4, 8):
        regs = vmcall(boot, r11=MMIO, r12=size, r13=0, r14=SHARED | 0xFEC0_0000)
        assert (regs.r10, regs.r11) == (0, (1 << 8 * size) - 1)
    assert vmcall(boot, r11=MMIO, r12=4, r13=1, r14=SHARED | 0xFEC0_0000, r15=7).r10 == 0
    assert vmcall(boot, r11=MMIO, r12=3, r13=0).r10 == INVALID_OPERAND
    assert vmcall(boot, r11=MMIO, r12=4, r13=2).r10 == INVALID_OPERAND


def test_hlt_wakes_up_unless_interrupts_are_blocked(boot: Boot) -> None:
    """HLT returns; with interrupts blocked nothing could end it, and the guest is over."""
    assert vmcall(boot, r11=HLT, r12=0).r10 == 0
    boot.trace.stage = "kernel"
    with pytest.raises(GuestPanic, match="kernel: halted with interrupts blocked"):
        vmcall(boot, r11=HLT, r12=1)


def test_report_fatal_error_ends_the_guest_with_its_text(boot: Boot) -> None:
    """The 64 bytes of text come in the order R14, R15, RBX, RDI, RSI, R8, R9, RDX, up to the first NUL."""
    text = "TD misconfiguration: SEPT #VE has to be disabled"
    order = ("r14", "r15", "rbx", "rdi", "rsi", "r8", "r9", "rdx")
    data = text.encode().ljust(64, b"\0")
    regs = {name: int.from_bytes(data[8 * at : 8 * at + 8], "little") for at, name in enumerate(order)}
    boot.trace.stage = "kernel"
    with pytest.raises(GuestPanic) as panic:
        vmcall(boot, r11=FATAL_ERROR, r12=1, **regs)
    assert panic.value.text == f"ReportFatalError 0x1: {text}"
    assert boot.trace.records[-1].event == TdVmCall("ReportFatalError", 1, 0, 0)


def test_a_fatal_error_may_say_anything(boot: Boot) -> None:
    """64 bytes without a NUL, and bytes that are no text, end the guest all the same."""
    ones = dict.fromkeys(("r14", "r15", "rbx", "rdi", "rsi", "r8", "r9", "rdx"), (1 << 64) - 1)
    with pytest.raises(GuestPanic) as panic:
        vmcall(boot, r11=FATAL_ERROR, **ones)
    assert panic.value.text == "ReportFatalError 0x0: " + 64 * "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("number", [CPUID, HLT, IO, FATAL_ERROR])
def test_a_vendor_call_is_no_instruction(boot: Boot, number: int) -> None:
    """With R10 other than 0 the number in R11 means something else, which this host does not know."""
    regs = vmcall(boot, r10=2, r11=number, r12=1)
    assert (regs.r10, regs.r11) == ((1 << 64) - 1000, number)


def test_instructions_have_their_names_in_the_trace(boot: Boot) -> None:
    """The trace calls a sub-function as the specification does."""
    vmcall(boot, r11=CPUID, r12=0x4000_0000)
    vmcall(boot, r11=MMIO, r12=4)
    names = [record.event.sub_function for record in boot.trace.records if isinstance(record.event, TdVmCall)]
    assert names == ["Instruction.CPUID", "RequestMMIO"]
