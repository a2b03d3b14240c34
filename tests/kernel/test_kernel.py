"""Entering the kernel: what it copies out of guest memory, and its boot-time allocator."""

from __future__ import annotations

import struct

import pytest

from guest.errors import GuestPanic, MemoryFault
from kernel.kernel import Kernel

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def entered(new_boot):
    """``entered(offset, format, *values)``: the kernel of a guest whose boot_params were changed there."""

    def enter(*patch: object) -> Kernel:
        boot = new_boot("decompress", cmdline="quiet nokaslr")
        if patch:
            offset, fmt, *values = patch
            boot.physical.write(boot.machine.regs.rsi + offset, struct.pack("<" + fmt, *values))
        return Kernel.enter(boot.machine)

    return enter


def test_what_the_kernel_finds(entered):
    """Command line, image and bitmap come from boot_params, RSI and RIP alone."""
    kernel = entered()
    assert kernel.command_line == "quiet nokaslr"
    assert kernel.early.nokaslr
    assert kernel.image == (16 * MIB, 16 * MIB + 0x68B000)
    assert kernel.ramdisk.size == 0
    assert kernel.unaccepted.range_contains_unaccepted_memory(4 * GIB, 6 * GIB)
    assert kernel.allocator is None


def test_the_page_is_copied(entered):
    """What happens to boot_params later does not change the kernel's copy (copy_bootdata())."""
    kernel = entered()
    kernel.machine.memory.clear(kernel.machine.regs.rsi, kernel.machine.regs.rsi + 4096)
    assert kernel.params["hdr.header"] == 0x53726448


def test_no_command_line(entered):
    """A null pointer is an empty command line."""
    assert entered(0x228, "I", 0).command_line == ""


def test_command_line_above_4g(entered):
    """ext_cmd_line_ptr counts: a command line in unaccepted memory kills the guest."""
    with pytest.raises(MemoryFault) as caught:
        entered(0x0C8, "I", 1)
    assert caught.value.gpa >= 4 * GIB


def test_command_line_without_an_end(entered):
    """2048 bytes are read at most, and bytes that are no UTF-8 do not matter."""
    boot_code = 16 * MIB
    assert len(entered(0x228, "I", boot_code + 0x1010).command_line) == 2048
    assert "�" in entered(0x228, "I", boot_code).command_line


def test_no_bitmap(entered):
    """A null pointer means that all memory is accepted."""
    assert not entered(0x078, "Q", 0).unaccepted.range_contains_unaccepted_memory(4 * GIB, 6 * GIB)


def test_ramdisk(entered):
    """Address and size have their high halves elsewhere."""
    kernel = entered(0x0C0, "II", 1, 0)
    assert kernel.ramdisk == (4 * GIB, 4 * GIB)
    assert entered(0x218, "II", 0x1000, 0x2345).ramdisk == (0x1000, 0x3345)


def test_boot_params_in_unaccepted_memory(new_boot):
    """A boot loader that leaves RSI there leaves a dead guest."""
    boot = new_boot("decompress")
    boot.machine.regs.rsi = 5 * GIB
    with pytest.raises(MemoryFault):
        Kernel.enter(boot.machine)


def test_boot_memory_is_accepted_and_cleared(entered):
    """An allocation from unaccepted memory is accepted, with the guard, before it is written."""
    kernel = entered()
    kernel.memblock.add(4 * GIB, 2 * GIB)
    at = kernel.memblock_alloc(4 * MIB, 2 * MIB, "test", end=5 * GIB)
    assert at == 5 * GIB - 4 * MIB
    assert kernel.machine.memory.read(at, 4 * MIB) == bytes(4 * MIB)
    assert kernel.machine.memory.read(5 * GIB, 2 * MIB) == bytes(2 * MIB)  # the guard
    with pytest.raises(MemoryFault):
        kernel.machine.memory.read(5 * GIB + 2 * MIB, 1)


def test_no_boot_memory(entered):
    """Without room the kernel panics in memblock's words."""
    text = "memblock_alloc_try_nid: Failed to allocate 4096 bytes align=0x1000 nid=-1 from=0x0 max_addr=0x100000"
    kernel = entered()
    with pytest.raises(GuestPanic, match=text):
        kernel.memblock_alloc(4096, 4096, "test", end=MIB)
    assert kernel.machine.trace.records[-1].event.text == text
