"""Clearing of large memory, answered from outside, in a small TD and in a real kernel."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from bootstub.kernel_layout import START_KERNEL_MAP
from cpu.fill import LARGE, MEMSET, Fills
from cpu.vcpu import Vcpu
from guest.errors import MemoryFault
from guest.registers import Registers
from guest.trace import Event, Print
from guest.units import SZ_1G, SZ_1M, SZ_2M, SZ_4M
from tdx.instructions import NoPorts
from tools.pipeline import REAL_KERNEL_CMDLINE, Boot, BootConfig

TABLES, CODE, FUNCTION, STACK, BUFFER = 0x1000, 0x4000, 0x5000, 0xF000, SZ_1M
TOUCH_AND_RETURN = bytes.fromhex("c6075a 4c89d0 c3")  # mov byte [rdi], 0x5a; mov rax, r10; ret
UNACCEPTED = SZ_2M


class Stopped(Exception):
    """The code came to its end."""


def run(start: int, value: int, size: int) -> tuple[Vcpu, Fills, bytes]:
    """Call a memset() that only touches, in a TD with 2 MiB of memory and page tables for 4 MiB."""
    memory = bytearray(b"\xa5" * SZ_2M)
    for level in range(2):
        struct.pack_into("<Q", memory, TABLES + 0x1000 * level, TABLES + 0x1000 * (level + 1) | 3)
    struct.pack_into("<512Q", memory, TABLES + 0x2000, 1 << 7 | 3, SZ_2M | 1 << 7 | 3, *[0] * 510)
    code = b"\xe8" + struct.pack("<i", FUNCTION - CODE - 5)  # call FUNCTION
    memory[CODE : CODE + len(code)] = code
    memory[FUNCTION : FUNCTION + len(MEMSET + TOUCH_AND_RETURN)] = MEMSET + TOUCH_AND_RETURN
    boot = Boot(BootConfig(b""))
    boot.host.page_add(0, bytes(memory), SZ_2M, "test")
    vcpu = Vcpu(boot.machine, boot.physical, NoPorts())
    fills = Fills(vcpu, boot.machine, boot.physical, 0, -START_KERNEL_MAP)
    vcpu.start(Registers(rdi=start, rsi=value, rdx=size, rsp=STACK, cr3=TABLES))

    def stop() -> None:
        raise Stopped

    vcpu.break_at(CODE + len(code), stop)
    with pytest.raises(Stopped):
        vcpu.run(CODE)
    return vcpu, fills, boot.physical.read(start, max(size, 1))


@pytest.mark.parametrize("size", [LARGE, LARGE + 1, SZ_1M])
def test_large_memory_is_cleared(size):
    """All bytes are zero, the function returned its first argument, and none of its own code ran."""
    vcpu, fills, data = run(BUFFER, 0, size)
    assert data == bytes(size)
    assert vcpu.registers().rax == BUFFER
    assert vcpu.registers().rsp == STACK
    assert (fills.count, fills.total) == (1, size)


@pytest.mark.parametrize(
    ("start", "value", "size"), [(BUFFER, 0, LARGE - 1), (BUFFER, 1, LARGE), (BUFFER, 0, 0), (BUFFER, 0, SZ_4M)]
)
def test_the_rest_is_left_to_the_code(start, value, size):
    """A small size, a value other than zero, and memory that ends in no page run the function itself."""
    vcpu, fills, data = run(start, value, size)
    assert data[:1] == b"\x5a"
    assert data[1:2] in (b"\xa5", b"")
    assert vcpu.registers().rax == start
    assert fills.count == 0


def test_unaccepted_memory_is_not_cleared():
    """Who clears memory that it has not accepted dies of it, as by its own stores."""
    with pytest.raises(MemoryFault) as death:
        run(UNACCEPTED - LARGE, 0, 2 * LARGE)
    assert (death.value.gpa, death.value.kind) == (UNACCEPTED, "write")


def test_a_real_kernel_comes_to_the_same(exact_debian_kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose large clears are answered does and prints the same, earlier, as one that clears for itself."""
    image, boots = exact_debian_kernel.read_bytes(), []
    for memset in (MEMSET, b"no such function"):
        monkeypatch.setattr("cpu.fill.MEMSET", memset)
        config = BootConfig(image, memory=3 * SZ_1G, cmdline=REAL_KERNEL_CMDLINE, run="kernel", until="Zone ranges:")
        boots.append(Boot(config))
        boots[-1].run()
    answered, cleared = boots
    assert [_timeless(r.event) for r in answered.trace.records] == [_timeless(r.event) for r in cleared.trace.records]
    assert answered.clock.ns < cleared.clock.ns
    assert answered.real_code.fills.count >= 1
    assert cleared.real_code.fills.count == 0
    assert answered.real_code.counter.count < cleared.real_code.counter.count


def _timeless(event: Event) -> Event:
    """The event; of a line of the log, without its time stamp."""
    return Print(re.sub(r"^\[ *[0-9.]+\] ", "", event.text)) if isinstance(event, Print) else event
