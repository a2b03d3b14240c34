"""Memory under real code: shared memory has bytes of its own, and what the host takes away is gone."""

from __future__ import annotations

import struct

import pytest

from cpu.vcpu import Vcpu
from guest.errors import MemoryFault
from guest.registers import Registers
from tdx.instructions import NoPorts
from tdx.seamcall import SeamLeaf
from tools.pipeline import GPAW_REAL_CODE, Boot, BootConfig

TABLES, CODE, STACK, DATA, SIZE = 0x1000, 0x4000, 0x8000, 0x9000, 0xA000
SHARED = 1 << GPAW_REAL_CODE - 1
ALIAS = 0x20_0000
"""Linear address of the first 2 MiB again, with the shared bit in the page table."""
STORE = bytes.fromhex("48891e")  # mov [rsi], rbx
LOAD = bytes.fromhex("488b0f")  # mov rcx, [rdi]
STOP = bytes.fromhex("0f0b")


class Stopped(Exception):
    """The code came to UD2."""


def build(code: bytes) -> tuple[Boot, Vcpu]:
    """A TD of 40-bit addresses with ``code``; DATA is private, and shared at ALIAS + DATA."""
    memory = bytearray(SIZE)
    for level in range(2):
        struct.pack_into("<Q", memory, TABLES + 0x1000 * level, TABLES + 0x1000 * (level + 1) | 3)
    struct.pack_into("<QQ", memory, TABLES + 0x2000, 1 << 7 | 3, SHARED | 1 << 7 | 3)
    memory[CODE : CODE + len(code) + 2] = code + STOP
    memory[DATA : DATA + 7] = b"private"
    boot = Boot(BootConfig(b"", run="kernel"))
    boot.host.page_add(0, bytes(memory), SIZE, "test")
    boot.host.finalize()
    vcpu = Vcpu(boot.machine, boot.physical, NoPorts())
    boot.sept.on_revoke.append(vcpu.forget)
    vcpu.break_at(CODE + len(code), _stop)
    return boot, vcpu


def _stop() -> None:
    raise Stopped


def run(vcpu: Vcpu, rsi: int, rdi: int) -> Registers:
    """Run the code from its start."""
    vcpu.start(Registers(rbx=0x21646572616873, rsi=rsi, rdi=rdi, rsp=STACK, cr3=TABLES))
    with pytest.raises(Stopped):
        vcpu.run(CODE)
    return vcpu.registers()


def test_shared_memory_has_bytes_of_its_own() -> None:
    """A store through the shared bit reaches the host's bytes; the private page keeps what it had."""
    boot, vcpu = build(STORE + LOAD)
    call = Registers(rax=0, rcx=0xFC00, r11=0x10001, r12=SHARED | DATA, r13=0x1000)
    boot.machine.platform.tdcall(call)
    assert call.r10 == 0
    regs = run(vcpu, ALIAS + DATA, DATA)
    assert regs.rcx.to_bytes(8, "little") == b"private\0"
    assert vcpu.read(ALIAS + DATA, 7) == boot.physical.read(SHARED | DATA, 7) == b"shared!"
    assert boot.physical.read(DATA, 7) == b"private"


def test_shared_memory_that_the_guest_did_not_ask_for() -> None:
    """Without MapGPA the access dies as #VE, and touches nothing."""
    boot, vcpu = build(STORE)
    vcpu.start(Registers(rsi=ALIAS + DATA, rsp=STACK, cr3=TABLES))
    with pytest.raises(MemoryFault, match=r"shared memory that the host does not map.*#VE"):
        vcpu.run(CODE)
    assert boot.physical.read(DATA, 7) == b"private"


def test_blocked_memory_leaves_the_engine() -> None:
    """What the host blocked after it was used faults at the next access; unblocked, it is there again."""
    boot, vcpu = build(LOAD)
    assert run(vcpu, 0, DATA).rcx.to_bytes(8, "little") == b"private\0"
    seam = boot.host.seam
    assert seam.run(SeamLeaf.TDH_MEM_RANGE_BLOCK, DATA).status == 0
    boot.host.unblock = False
    vcpu.start(Registers(rdi=DATA, rsp=STACK, cr3=TABLES))
    with pytest.raises(MemoryFault, match="found BLOCKED"):
        vcpu.run(CODE)
    boot.host.unblock = True
    assert run(vcpu, 0, DATA).rcx.to_bytes(8, "little") == b"private\0"
    assert boot.sept.walk(DATA, 0)[2].state.name == "MAPPED"
