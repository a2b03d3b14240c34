"""Machine code that calls firmware services: arguments on registers and stack, lists, virtual addresses."""

from __future__ import annotations

import struct

import pytest

from bootstub.sample_kernel import sample_bzimage
from cpu.devices import Devices
from cpu.vcpu import Vcpu
from guest.gates import CallGate
from tools.pipeline import Boot, BootConfig

CODE, STACK, GATE, TABLES = 0x20_0000, 0x20_8000, 0x20_9000, 0x20_A000
CALL_R11 = bytes.fromhex("41ffd3")
STOP = bytes.fromhex("0f0b")
VIRTUAL = 0x7F00_0000_0000


class Stopped(Exception):
    """The code came to its end."""


def calls(nargs: int, variadic: bool, stack: list[int], rcx: int = 1, virtual: bool = False):
    """What a service with ``nargs`` arguments is called with, the vCPU's machine, and RAX afterwards."""
    boot = Boot(BootConfig(sample_bzimage()))
    boot.run("firmware")
    machine, memory, seen = boot.machine, boot.machine.memory, []

    def answer(*args: int) -> int:
        seen.append((args, machine.caller.read(VIRTUAL, 5) if virtual else b""))
        return 77

    machine.gates.install(GATE, CallGate("service", nargs, answer, variadic))
    memory.write(GATE, STOP)
    memory.write(CODE, CALL_R11 + STOP)
    shadow_space = bytes(32)
    memory.write(STACK, shadow_space + b"".join(word.to_bytes(8, "little") for word in stack))
    memory.write(TABLES + 0x3000, b"there")
    if virtual:
        pml4 = machine.regs.cr3
        for entry, table in (
            (pml4 + 8 * (VIRTUAL >> 39), TABLES),
            (TABLES, TABLES + 0x1000),
            (TABLES + 0x1000, TABLES + 0x2000),
        ):
            memory.write(entry, struct.pack("<Q", table | 3))
        memory.write(TABLES + 0x2000, struct.pack("<Q", TABLES + 0x3000 | 3))
    regs = machine.regs
    regs.rsp, regs.rcx, regs.rdx, regs.r8, regs.r9, regs.r11 = STACK, rcx, 2, 3, 4, GATE
    vcpu = Vcpu(machine, boot.physical, Devices(print))
    vcpu.start(regs)

    def stop() -> None:
        raise Stopped

    vcpu.break_at(CODE + len(CALL_R11), stop)
    with pytest.raises(Stopped):
        vcpu.run(CODE)
    assert vcpu.registers().rsp == STACK
    return seen, machine, vcpu.registers().rax


@pytest.mark.parametrize("nargs, expected", [(0, ()), (2, (1, 2)), (4, (1, 2, 3, 4)), (6, (1, 2, 3, 4, 5, 6))])
def test_arguments(nargs, expected):
    """Four in registers, the others behind the shadow space; the status is in RAX."""
    assert calls(nargs, False, [5, 6, 7])[::2] == ([(expected, b"")], 77)


@pytest.mark.parametrize(
    "stack, expected", [([5, 0, 8], (1, 2, 3, 4, 5, 0)), ([0, 6, 7, 0, 8], (1, 2, 3, 4, 0, 6, 7, 0))]
)
def test_a_list_of_pairs_ends_with_a_null(stack, expected):
    """Pairs begin behind the first argument; a null ends them only where a pair begins."""
    assert calls(1, True, stack)[0] == [(expected, b"")]


def test_a_list_that_does_not_end_is_cut():
    """After 128 arguments the service gets what there is, without a null at its end."""
    ((args, _),) = calls(1, True, [5] * 200)[0]
    assert len(args) in (128, 129)
    assert args[-1] == 5


def test_memory_as_the_caller_sees_it():
    """A service can read at the caller's own virtual address while it is called, and no longer."""
    seen, machine, _ = calls(1, False, [], rcx=VIRTUAL, virtual=True)
    assert seen == [((VIRTUAL,), b"there")]
    assert machine.caller is machine.memory
