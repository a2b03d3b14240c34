"""Counting basic blocks at the speed of the engine, and stopping at a count.

A Python hook for each block would cost a hundred times what the block does. So the hook is a dozen bytes of
machine code that count, and call Python only when a limit is reached; then Python also gets to see a Ctrl-C.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable

from cpu.binding import Engine
from cpu.build import EngineError

# void block(uc in RDI, address in RSI, size in EDX, user_data in RCX):
#   add qword [rcx], 1; mov rax, [rcx]; cmp rax, [rcx+8]; jae slow; ret; slow: jmp [rcx+16]
_CODE = bytes.fromhex("48830101 488b01 483b4108 7301 c3 ff6110")
_COUNT, _LIMIT, _SLOW = range(3)
_TICK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)


def machine_code(code: bytes) -> tuple[mmap.mmap, int]:
    """A page that holds ``code`` for the host's processor, and its address, which is good while the page is kept."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise EngineError(f"running machine code needs an x86-64 machine, this is {platform.machine()}")
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    return page, ctypes.addressof(ctypes.c_char.from_buffer(page))


class BlockCounter:
    """Counts the basic blocks that ``engine`` runs, and calls ``tick`` every ``interval`` blocks.

    What ``tick`` raises stops the engine and comes out of its ``run``.
    """

    def __init__(self, engine: Engine, interval: int, tick: Callable[[], None]) -> None:
        self._interval = interval
        self._page, code = machine_code(_CODE)
        self._slow = _TICK(engine.guarded(self._on_limit(tick)))
        slow = ctypes.cast(self._slow, ctypes.c_void_p).value
        self._cells = (ctypes.c_uint64 * 3)(0, interval, slow or 0)
        engine.hook_native(engine.unicorn.UC_HOOK_BLOCK, code, ctypes.addressof(self._cells))

    @property
    def count(self) -> int:
        """Blocks so far."""
        return self._cells[_COUNT]

    def _on_limit(self, tick: Callable[[], None]) -> Callable[[], None]:
        def on_limit() -> None:
            self._cells[_LIMIT] += self._interval
            tick()

        return on_limit
