"""Finding the CPU's state in host memory."""

from __future__ import annotations

import ctypes

import pytest

from cpu import binding


def test_copies_of_the_marker_are_not_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that once held what was written to R15 is not taken for R15, and the real place is still found."""
    stale = ctypes.create_string_buffer(8)
    find = binding._pointed_to

    def with_a_copy(engine: int, pattern: bytes):
        stale.raw = pattern
        yield from find(engine, pattern)
        yield ctypes.addressof(stale)

    monkeypatch.setattr(binding, "_pointed_to", with_a_copy)
    engine = binding.Engine()
    engine.uc.reg_write(engine.const.UC_X86_REG_R15, 0x1234)
    engine.uc.reg_write(engine.const.UC_X86_REG_RAX, 0x5678)
    assert (engine.state.regs[15], engine.state.regs[14], engine.state.regs[0]) == (0x1234, 0, 0x5678)
