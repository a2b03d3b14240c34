"""Finding what Unicorn keeps in this process's memory."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu import binding, build

LIBC = ctypes.CDLL(None, use_errno=True)


def madvise(address: int, advice: int) -> None:
    """Give ``advice`` on the page at ``address``; it then is a mapping of its own, or no longer is."""
    page = ctypes.c_void_p(address & -mmap.PAGESIZE)
    assert LIBC.madvise(page, ctypes.c_size_t(mmap.PAGESIZE), advice) == 0, ctypes.get_errno()


@pytest.fixture
def split_mapping() -> Iterator[tuple[binding.Engine, int]]:
    """An engine, and the address of its R15 in a page that is a mapping of its own."""
    engine = binding.Engine()
    register = ctypes.addressof(engine.state.regs) + 15 * 8
    madvise(register, mmap.MADV_DONTFORK)
    yield engine, register
    madvise(register, mmap.MADV_DOFORK)


def test_copies_of_the_marker_are_not_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that once held what was written to R15 is not taken for R15, and the real place is still found."""
    stale = ctypes.create_string_buffer(8)
    find = build._pointed_to

    def with_a_copy(engine: int, pattern: bytes):
        stale.raw = pattern
        yield from find(engine, pattern)
        yield ctypes.addressof(stale)

    monkeypatch.setattr(build, "_pointed_to", with_a_copy)
    engine = binding.Engine()
    engine.uc.reg_write(engine.const.UC_X86_REG_R15, 0x1234)
    engine.uc.reg_write(engine.const.UC_X86_REG_RAX, 0x5678)
    assert (engine.state.regs[15], engine.state.regs[14], engine.state.regs[0]) == (0x1234, 0, 0x5678)


def test_a_border_between_mappings_does_not_hide_the_state(split_mapping: tuple[binding.Engine, int]) -> None:
    """The CPU's state is found where the memory map has a border between it and what points to it."""
    engine, register = split_mapping
    page = f"{register & -mmap.PAGESIZE:x}-"
    assert any(line.startswith(page) for line in Path("/proc/self/maps").read_text().splitlines())
    assert build.find_register(engine.uc, engine.const.UC_X86_REG_R15) == register
