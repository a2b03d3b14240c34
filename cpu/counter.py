"""Counting basic blocks at the speed of the engine, and stopping at a count.

A Python hook for each block would cost a hundred times what the block does. So the hook is a dozen bytes of
machine code that count, and call Python only when a limit is reached; then Python also gets to see a Ctrl-C.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable

from cpu.binding import Engine, EngineError

# void block(uc in RDI, address in RSI, size in EDX, user_data in RCX):
#   add qword [rcx], 1; mov rax, [rcx]; cmp rax, [rcx+8]; jae look; ret
#   look: cmp rax, [rcx+16]; jae slow; mov rax, [rcx+32]; test byte [rax+1], IF >> 8; jnz slow; ret; slow: jmp [rcx+24]
_CODE = bytes.fromhex("48830101 488b01 483b4108 7301 c3 483b4110 730b 488b4120 f6400102 7501 c3 ff6118")
_COUNT, _SOFT_LIMIT, _HARD_LIMIT, _SLOW, _RFLAGS = range(5)
"""From the soft limit on, Python is called if RFLAGS.IF is set; from the hard limit on in any case."""
_TICK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)
NEVER = 1 << 63


class BlockCounter:
    """Counts the basic blocks that ``engine`` runs, and calls ``tick`` every ``interval`` blocks.

    What ``tick`` raises stops the engine and comes out of its ``run``.
    """

    def __init__(self, engine: Engine, interval: int, tick: Callable[[], None]) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise EngineError(f"counting blocks needs an x86-64 machine, this is {platform.machine()}")
        self._interval, self._tick, self._next_tick = interval, tick, interval
        self._engine = engine
        self._attend: Callable[[], bool] = lambda: False
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(_CODE)
        self._slow = _TICK(engine.guarded(self._on_limit))
        slow = ctypes.cast(self._slow, ctypes.c_void_p).value or 0
        self._cells = (ctypes.c_uint64 * 5)(0, interval, interval, slow, engine.state.rflags_address)
        code = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        engine.hook_native(engine.unicorn.UC_HOOK_BLOCK, code, ctypes.addressof(self._cells))

    @property
    def count(self) -> int:
        """Blocks so far."""
        return self._cells[_COUNT]

    def attend(self, action: Callable[[], bool]) -> None:
        """Have ``action`` called when :meth:`look` says; if it returns True, it set RIP, and that goes on there."""
        self._attend = action

    def look(self, blocks: int, with_interrupts_on: bool) -> None:
        """Call the action in ``blocks`` blocks, and, ``with_interrupts_on``, as soon as the guest has set RFLAGS.IF."""
        self._cells[_HARD_LIMIT] = min(self._next_tick, self.count + blocks)
        self._cells[_SOFT_LIMIT] = 0 if with_interrupts_on else self._cells[_HARD_LIMIT]

    def _on_limit(self) -> None:
        count = self.count
        if count >= self._next_tick:
            self._next_tick = count + self._interval
            self.look(self._interval, with_interrupts_on=False)
            self._tick()
        if self._attend():
            self._engine.go_on()
