"""Clearing of large memory, answered from outside: the emulated processor takes seconds for a bounce buffer.

The kernel's memset() for processors without fast strings is found by how it begins. A few instructions of machine
code look at the size of each call, so that Python is asked for the large ones only; the memory is cleared through the
platform's gate, and a guest that has not accepted it dies as it would have died. Whatever is not plain, a value other
than zero or a page that is not mapped, is left to the real code.
Source: arch/x86/lib/memset_64.S, memset_orig.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from bootstub.kernel_layout import START_KERNEL_MAP
from cpu.binding import RDI, RDX, RSI
from cpu.counter import machine_code
from cpu.paging import walk
from cpu.vcpu import Vcpu
from guest.machine import Machine
from guest.memory import PhysicalMemory
from guest.units import SZ_64K, SZ_64M

MEMSET = bytes.fromhex("4989fa 400fb6ce 48b80101010101010101 480fafc1")
"""mov r10, rdi; movzx ecx, sil; mov rax, 0x0101010101010101; imul rax, rcx"""
LARGE = SZ_64K
_TEXT_REACH = SZ_64M

# void code(uc in RDI, address in RSI, size in EDX, user_data in RCX):
#   mov rax, [rcx]; mov rax, [rax+16]; cmp rax, [rcx+8]; jae slow; ret; slow: jmp [rcx+16]
_CODE = bytes.fromhex("488b01 488b4010 483b4108 7301 c3 ff6110")
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)


class Fills:
    """Answers the large ones of the calls of memset() in the kernel at ``pa``, which is moved by ``va`` in its map.

    ``count`` and ``total`` are the calls that were answered, and their bytes.
    """

    def __init__(self, vcpu: Vcpu, machine: Machine, physical: PhysicalMemory, pa: int, va: int) -> None:
        self._vcpu, self._machine, self._physical = vcpu, machine, physical
        self.count = self.total = 0
        at = physical.read(pa, _TEXT_REACH).find(MEMSET)
        if at < 0:
            return
        engine, state = vcpu.engine, vcpu.state
        self._slow = _CALLBACK(engine.guarded(self._on_large))
        slow = ctypes.cast(self._slow, ctypes.c_void_p).value
        self._cells = (ctypes.c_uint64 * 3)(ctypes.addressof(state.regs), LARGE, slow or 0)
        self._page, code = machine_code(_CODE)
        linear = START_KERNEL_MAP + va + at
        engine.hook_native(
            self, engine.unicorn.UC_HOOK_CODE, code, ctypes.addressof(self._cells), begin=linear, end=linear
        )

    def _on_large(self) -> None:
        regs = self._vcpu.state.regs
        start, size = regs[RDI], regs[RDX]
        if regs[RSI] & 0xFF:
            return
        pieces = list(self._pieces(start, size))
        if sum(end - gpa for gpa, end in pieces) != size:
            return
        for gpa, end in pieces:
            self._machine.memory.clear(gpa, end)
        self.count, self.total = self.count + 1, self.total + size
        self._vcpu.return_from_function(start)

    def _pieces(self, linear: int, size: int) -> Iterator[tuple[int, int]]:
        """The guest physical memory of ``size`` bytes at ``linear``, page by page, as far as it is mapped."""
        while size:
            found = walk(self._physical.read, self._vcpu.state.cr[3], linear)
            if found is None:
                return
            gpa, piece = found[0], min(found[1], size)
            yield gpa, gpa + piece
            linear, size = linear + piece, size - piece
