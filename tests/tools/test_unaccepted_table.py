"""The table of unaccepted memory as bytes."""

from __future__ import annotations

import hashlib

import pytest

from guest.memory import PhysicalMemory
from tools.conformance.unaccepted_table import build_table, read_table


def test_layout():
    """Two 32-bit and two 64-bit fields, then one bit a unit, lowest bit first."""
    data = build_table(1, 0x20_0000, 0x1_0000_0000, 3, [[0, 1], [7, 9], [23, 24]])
    assert data == bytes.fromhex("01000000 00002000 0000000001000000 0300000000000000 810180")


def test_what_was_built_is_read():
    """All fields come back, bits as runs."""
    memory, bits = PhysicalMemory(), [[0, 1], [7, 9], [23, 24]]
    memory.write(0x1000, build_table(1, 0x20_0000, 0x1_0000_0000, 3, bits))
    table = read_table(memory, 0x1000)
    assert table.pop("sha256") == hashlib.sha256(memory.read(0x1000, 27)).hexdigest()
    assert table == {
        "pa": 0x1000, "version": 1, "unit_size": 0x20_0000, "phys_base": 0x1_0000_0000, "size": 3, "bits": bits,
    }  # fmt: skip


@pytest.mark.parametrize("size", [-1, 1 << 40])
def test_a_size_that_cannot_be(size):
    """A bitmap far beyond what memory needs is refused before it is made."""
    with pytest.raises(ValueError, match="bytes"):
        build_table(1, 0x20_0000, 0, size, [])
