import struct
from types import SimpleNamespace

import pytest

from cpu.devices import Devices
from cpu.postmortem import report
from cpu.symbols import Symbols, parse_system_map
from cpu.vcpu import Vcpu
from guest.clock import VirtualClock
from guest.machine import Machine
from guest.memory import PhysicalMemory
from guest.registers import Registers
from guest.trace import Print, ServiceCall, Trace

STACK = 0xFFFF_C900_0000_0000
TEXT = 0xFFFF_FFFF_8100_0000
SYMBOLS = parse_system_map(
    "ffffffff81000000 T _text\nffffffff81000100 t do_one_initcall\nffffffff81000200 T panic\n"
    "ffffffff81000300 D data\nffffffff81000400 B _end\n"
)


class FakeVcpu:
    """A processor that stopped, with ``stack`` from its stack pointer on."""

    def __init__(self, stack=(), rsp=STACK + 0x3F00, exceptions=None):
        self.words = stack
        self.exceptions = exceptions or {}
        self.regs = Registers(rax=0x1234, r8=8, r15=15, rsp=rsp, rip=TEXT + 0x212, cr3=0x1000)
        self.state = SimpleNamespace(
            cr=[0x8005_0033, 0, 0xDEAD_BEEF, 0x1000, 0x20],
            segment=lambda name: ({"cs": 0x10, "ss": 0x18}[name], 0, 0, 0),
        )

    def registers(self):
        return self.regs

    def peek(self, linear, size):
        assert linear % 8 == 0
        return struct.pack(f"<{len(self.words)}Q", *self.words)[:size]


@pytest.fixture
def trace():
    trace = Trace(VirtualClock())
    trace.stage = "kernel"
    return trace


def test_registers(trace):
    """Registers stand as the kernel prints them, RIP with its symbol."""
    lines = report(FakeVcpu(), trace, SYMBOLS)
    assert lines[:9] == [
        "RIP: 0010:panic+0x12",
        "RSP: 0018:ffffc90000003f00",
        "RAX: 0000000000001234 RBX: 0000000000000000 RCX: 0000000000000000",
        "RDX: 0000000000000000 RSI: 0000000000000000 RDI: 0000000000000000",
        "RBP: 0000000000000000 R08: 0000000000000008 R09: 0000000000000000",
        "R10: 0000000000000000 R11: 0000000000000000 R12: 0000000000000000",
        "R13: 0000000000000000 R14: 0000000000000000 R15: 000000000000000f",
        "CR0: 0000000080050033 CR2: 00000000deadbeef CR3: 0000000000001000 CR4: 0000000000000020",
        "Call Trace:",
    ]


def test_call_trace(trace):
    """Words on the stack that point into functions are guessed to be return addresses, in order."""
    words = [1, TEXT + 0x110, TEXT + 0x310, STACK, TEXT + 0x20, TEXT + 0x110]
    lines = report(FakeVcpu(words), trace, SYMBOLS)
    at = lines.index("Call Trace:")
    assert lines[at + 1 : at + 5] == [
        " ? do_one_initcall+0x10", " ? _text+0x20", " ? do_one_initcall+0x10", "Exceptions: none"
    ]  # fmt: skip


@pytest.mark.parametrize(("rsp", "words"), [(STACK + 0x3FF8, 1), (STACK + 0x3FF3, 2), (STACK + 0x4000, 24)])
def test_call_trace_ends(trace, rsp, words):
    """The search ends with the stack, or with two dozen."""
    lines = report(FakeVcpu([TEXT] * 100, rsp=rsp), trace, SYMBOLS)
    assert lines.count(" ? _text+0x0") == words


def test_no_symbols(trace):
    """Without symbols, or with a stack that is not mapped, there is no call trace, and all else."""
    for lines in (report(FakeVcpu([TEXT]), trace, Symbols((), "", ())), report(FakeVcpu(), trace, SYMBOLS)):
        assert lines[lines.index("Call Trace:") + 1] == " no return address found"
    assert "RIP: 0010:0xffffffff81000212" in report(FakeVcpu(), trace, Symbols((), "", ()))


def test_exceptions(trace):
    """Exceptions are counted by their name, ascending."""
    lines = report(FakeVcpu(exceptions={14: 523, 3: 1, 32: 7}), trace, SYMBOLS)
    assert "Exceptions: #BP 1, #PF 523, #32 7" in lines


def test_last_events(trace):
    """The last twenty events close the report, numbers in hexadecimal."""
    for number in range(30):
        trace.add(Print(f"line {number}"))
    trace.add(ServiceCall("FreePool", (0x1000, 2), 0))
    lines = report(FakeVcpu(), trace, SYMBOLS)
    assert lines[-21] == "Last events of 31:"
    assert lines[-20] == " 11 kernel: Print text='line 11'"
    assert lines[-1] == " 30 kernel: ServiceCall service='FreePool' args=(0x1000, 0x2) status=0x0"


def test_nothing_changes(trace):
    """A report leaves no mark in the trace."""
    trace.add(Print("line"))
    assert report(FakeVcpu(), trace, SYMBOLS) == report(FakeVcpu(), trace, SYMBOLS)
    assert trace.count == 1


def test_peek(trace):
    """A look at memory follows the page tables, ends where nothing is mapped, and asks no gate."""
    physical = PhysicalMemory()
    machine = Machine.build(physical, SimpleNamespace(), trace, VirtualClock())
    vcpu = Vcpu(machine, physical, Devices(machine.print))
    vcpu.state.cr[3] = 0x1000
    for table, entry in ((0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x9003), (0x4008, 0x7003)):
        physical.write(table, entry.to_bytes(8, "little"))
    physical.write(0x9FFE, b"ab")
    physical.write(0x7000, b"cd")
    assert vcpu.peek(0xFFE, 4) == b"abcd"
    assert vcpu.peek(0x1FFF, 100) == b"\0"
    assert vcpu.peek(STACK, 8) == b""
