"""Counting instructions at the speed of the engine, and stopping at a count.

A Python hook for each block would cost a hundred times what the block does, and a native hook for each instruction
makes a boot of Debian's kernel to its /init take 58 s instead of 16 s. So the hook is a few dozen bytes of machine
code that run once for each translated block, add up, and call Python only when a limit is reached; then Python also
gets to see a Ctrl-C. Beside no hook at all this is within what two runs differ by, a twentieth.

How many instructions a block has stands in Unicorn's own record of it (struct TranslationBlock), which lies in front
of the block's code; the hook is called from that code, so its return address tells where. A block counts as a whole
when it is entered: what an exception or a hook cuts off is counted too, 62 of 2,289,841,768 instructions in that boot.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable
from functools import lru_cache

from cpu.binding import Engine
from cpu.build import KNOWN_VERSION, EngineError

# void block(uc in RDI, address in RSI, size in EDX, user_data in RCX), called from the code of a block. Its record
# begins at a multiple of 64 bytes with the address, and has the size at 20, the number of instructions at 22, of 16
# bits each:
#   mov rax, [rsp]; and rax, -64; mov r8d, 4
#   next:  sub rax, 64; cmp [rax], rsi; jne other; cmp [rax+20], dx; je found
#   other: dec r8d; jnz next; or qword [rcx], -1; jmp [rcx+24]
#   found: movzx eax, word [rax+22]; add rax, [rcx]; mov [rcx], rax; cmp rax, [rcx+8]; jae look; ret
#   look:  cmp rax, [rcx+16]; jae slow; mov rax, [rcx+32]; test byte [rax+1], IF >> 8; jnz slow; ret
#   slow:  jmp [rcx+24]
_CODE = bytes.fromhex(
    "488b0424 4883e0c0 41b804000000 4883e840 483930 7506 66395014 740c 41ffc8 75ec 488309ff ff6118"
    "0fb74016 480301 488901 483b4108 7301 c3 483b4110 730b 488b4120 f6400102 7501 c3 ff6118"
)
_COUNT, _SOFT_LIMIT, _HARD_LIMIT, _SLOW, _RFLAGS = range(5)
"""From the soft limit on, Python is called if RFLAGS.IF is set; from the hard limit on in any case."""
NEVER = 1 << 63
_NOT_FOUND = (1 << 64) - 1
_TICK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)

_TEST_CODE = b"\xb9\x03\x00\x00\x00\xff\xc9\x75\xfc\xcc"  # mov ecx, 3; again: dec ecx; jnz again; int3
_TEST_COUNT = 1 + 3 * 2 + 1


def machine_code(code: bytes) -> tuple[mmap.mmap, int]:
    """A page that holds ``code`` for the host's processor, and its address, which is good while the page is kept."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise EngineError(f"running machine code needs an x86-64 machine, this is {platform.machine()}")
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    return page, ctypes.addressof(ctypes.c_char.from_buffer(page))


class InstructionCounter:
    """Counts the instructions that ``engine`` runs, and calls ``tick`` every ``interval`` of them.

    What ``tick`` raises stops the engine and comes out of its ``run``.
    """

    def __init__(self, engine: Engine, interval: int, tick: Callable[[], None]) -> None:
        self._interval, self._tick, self._next_tick = interval, tick, interval
        self._engine = engine
        self._attend: Callable[[], bool] = lambda: False
        self._page, code = machine_code(_CODE)
        self._slow = _TICK(engine.guarded(self._on_limit))
        slow = ctypes.cast(self._slow, ctypes.c_void_p).value or 0
        self._cells = (ctypes.c_uint64 * 5)(0, interval, interval, slow, engine.state.rflags_address)
        engine.hook_native(self, engine.unicorn.UC_HOOK_BLOCK, code, ctypes.addressof(self._cells))

    @property
    def count(self) -> int:
        """Instructions so far."""
        return self._cells[_COUNT]

    def attend(self, action: Callable[[], bool]) -> None:
        """Have ``action`` called when :meth:`look` says; if it returns True, it set RIP, and that is where to go on."""
        self._attend = action

    def look(self, instructions: int, with_interrupts_on: bool) -> None:
        """Call the action in so many instructions, and, ``with_interrupts_on``, as soon as the guest has set RFLAGS.IF.

        It is called between two blocks.
        """
        self._cells[_HARD_LIMIT] = min(self._next_tick, self.count + instructions)
        self._cells[_SOFT_LIMIT] = 0 if with_interrupts_on else self._cells[_HARD_LIMIT]

    def _on_limit(self) -> None:
        count = self.count
        if count == _NOT_FOUND:
            raise EngineError(f"unicorn: blocks have no record in front of them as in {KNOWN_VERSION}")
        if count >= self._next_tick:
            self._next_tick = count + self._interval
            self.look(self._interval, with_interrupts_on=False)
            self._tick()
        if self._attend():
            self._engine.go_on()


@lru_cache(maxsize=1)
def self_test() -> None:
    """Count a loop of known length: are blocks recorded as this file says? Raises ``EngineError``."""
    engine = Engine()
    engine.uc.mem_map(0, mmap.PAGESIZE)
    engine.uc.mem_write(0, _TEST_CODE)
    engine.uc.hook_add(engine.unicorn.UC_HOOK_INTR, lambda *_: engine.stop())
    counter = InstructionCounter(engine, _NOT_FOUND, lambda: None)
    engine.run(0)
    if counter.count != _TEST_COUNT:
        raise EngineError(f"unicorn: {counter.count} instructions counted, not {_TEST_COUNT} as in {KNOWN_VERSION}")
