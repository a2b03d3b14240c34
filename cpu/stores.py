"""Stores of real code one by one, for a journal of writes: slow, so only where one is kept, and before the kernel runs.

Stub and decompressor run on page tables that map memory to itself, so a linear address is a physical one. Code that
stores all the time is unpacking something: after ``LIMIT`` stores nobody listens any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cpu.vcpu import Vcpu

OnStore = Callable[[str, int, int], None]
"""Called with who stores, and start and end of what is stored."""
LIMIT = 20_000


@contextmanager
def watched_stores(vcpu: Vcpu, on_store: OnStore | None) -> Iterator[None]:
    """Tell ``on_store``, if there is one, of the stores of the code that ``vcpu`` runs meanwhile."""
    if on_store is None:
        yield
        return
    uc, rip, left = vcpu.engine.uc, vcpu.engine.const.UC_X86_REG_RIP, LIMIT

    def on_write(_: Any, access: int, address: int, size: int, value: int, data: Any) -> None:
        nonlocal left
        left -= 1
        on_store(f"real code at {uc.reg_read(rip):#x}", address, address + size)
        if left == 0:
            uc.hook_del(hook)

    hook = uc.hook_add(vcpu.engine.unicorn.UC_HOOK_MEM_WRITE, on_write)
    try:
        yield
    finally:
        if left > 0:
            uc.hook_del(hook)
