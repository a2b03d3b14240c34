"""Physical memory against plain bytes, and the gate in front of it."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

import guest.memory
from guest.errors import MemoryFault
from guest.memory import PhysicalMemory
from guest.trace import Note
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_1G, SZ_2M

BORDER = SZ_1G
"""Where one mapping of the backing ends and the next begins."""
SIZE = 6 * PAGE_SIZE
BASE = BORDER - SIZE // 2

spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)


@given(st.lists(st.tuples(spans, st.integers(0, 255)), max_size=6), spans)
def test_memory_is_bytes_across_a_border(operations, window):
    """Writes and clears across pages and across a border of the backing read back as plain bytes would."""
    physical, model = PhysicalMemory(), bytearray(SIZE)
    for (start, end), value in operations:
        model[start:end] = bytes([value]) * (end - start)
        if value:
            physical.write(BASE + start, bytes([value]) * (end - start))
        else:
            physical.clear(BASE + start, BASE + end)
    assert physical.read(BASE, SIZE) == model
    assert physical.read(BASE + window[0], window[1] - window[0]) == model[window[0] : window[1]]


@pytest.mark.parametrize("linux", [True, False])
@pytest.mark.parametrize(
    "start, end",
    [(0, PAGE_SIZE), (0, 3 * PAGE_SIZE), (1, PAGE_SIZE), (5, 3 * PAGE_SIZE - 5), (PAGE_SIZE - 1, PAGE_SIZE + 1),
     (7, 9), (PAGE_SIZE, PAGE_SIZE), (PAGE_SIZE - 1, 2 * PAGE_SIZE)],
)  # fmt: skip
def test_clear_takes_exactly_its_range(monkeypatch, linux, start, end):
    """Whole pages and parts of pages read as zero after a clear, and the bytes beside them stay."""
    if not linux:
        monkeypatch.setattr(guest.memory, "_LINUX", False)
    physical = PhysicalMemory()
    model = bytearray(b"\xaa" * 3 * PAGE_SIZE)
    physical.write(0, bytes(model))
    physical.clear(start, end)
    model[start:end] = bytes(end - start)
    assert physical.read(0, len(model)) == model


def test_memory_costs_only_what_is_written(monkeypatch):
    """Reading, clearing and an empty write map nothing; a write at each end of 4 PiB maps one GiB at each."""
    mapped = []
    real = mmap.mmap
    monkeypatch.setattr(guest.memory.mmap, "mmap", lambda *args, **kw: mapped.append(args) or real(*args, **kw))
    physical = PhysicalMemory()
    assert physical.read(PHYSICAL_ADDRESS_END - SZ_2M, SZ_2M) == bytes(SZ_2M)
    physical.clear(0, PHYSICAL_ADDRESS_END >> 10)
    physical.write(SZ_1G, b"")
    assert mapped == []
    physical.write(PHYSICAL_ADDRESS_END - 2, b"ab")
    physical.write(0, b"cd")
    assert mapped == [(-1, SZ_1G)] * 2
    assert physical.read(PHYSICAL_ADDRESS_END - 3, 3) == b"\0ab"
    assert physical.read(0, 3) == b"cd\0"


def test_pieces_are_cut_at_every_gib():
    """A range is cut where one mapping ends and the next begins, and nowhere else."""
    physical = PhysicalMemory()
    assert list(physical.pieces(BORDER - 1, 2 * BORDER + 1)) == [
        (BORDER - 1, BORDER), (BORDER, 2 * BORDER), (2 * BORDER, 2 * BORDER + 1)
    ]  # fmt: skip
    assert list(physical.pieces(BORDER, 2 * BORDER)) == [(BORDER, 2 * BORDER)]
    assert list(physical.pieces(5, 5)) == []


@pytest.mark.parametrize("gpa, size", [(PHYSICAL_ADDRESS_END - 4, 8), (PHYSICAL_ADDRESS_END, 1), (-8, 8), (-8, 16)])
def test_nothing_lies_outside_52_bits(gpa, size):
    """An address below 0 or from 2^52 on is a ValueError for every operation."""
    physical = PhysicalMemory()
    for operation in (
        lambda: physical.read(gpa, size),
        lambda: physical.write(gpa, bytes(size)),
        lambda: physical.clear(gpa, gpa + size),
        lambda: physical.view(gpa, size),
    ):
        with pytest.raises(ValueError, match="expected a range"):
            operation()


def test_a_view_is_the_memory_itself():
    """What is stored through a view is read from memory and the other way round."""
    physical = PhysicalMemory()
    view = physical.view(BORDER - 8, 8)
    view[:2] = b"ab"
    physical.write(BORDER - 6, b"cd")
    assert physical.read(BORDER - 8, 8) == bytes(view) == b"abcd\0\0\0\0"
    with pytest.raises(ValueError, match="inside one window"):
        physical.view(BORDER - 8, 9)


def test_a_refused_access_stores_nothing(make_bench):
    """If the gate refuses a part of a write, nothing is stored and nothing is in the journal."""
    bench = make_bench(run=(0, PAGE_SIZE))
    memory = bench.memory
    for operation in (
        lambda: memory.write(PAGE_SIZE - 4, b"x" * 8),
        lambda: memory.write_uint(PAGE_SIZE - 4, 1, 8),
        lambda: memory.clear(PAGE_SIZE - 4, PAGE_SIZE + 4),
        lambda: next(memory.views(PAGE_SIZE - 4, PAGE_SIZE + 4, "write")),
        lambda: memory.read(PAGE_SIZE - 4, 8),
        lambda: memory.read_uint(PAGE_SIZE, 1),
    ):
        with pytest.raises(MemoryFault):
            operation()
    assert bench.physical.read(0, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
    assert memory.writes == []


def test_the_gate_is_asked_before_the_first_access_to_a_run(make_bench):
    """An admitted run is remembered until flush(); an access beyond it asks again."""
    bench = make_bench(run=(0x1000, 0x3000))
    memory, gate = bench.memory, bench.gate
    memory.write(0x1000, b"abc")
    memory.read(0x2FFF, 1)
    memory.clear(0x2000, 0x3000)
    memory.read(0x3000, 0)
    assert gate.asked == [(0x1000, 3, "write")]
    with pytest.raises(MemoryFault):
        memory.read(0x2FFF, 2)
    with pytest.raises(MemoryFault):
        memory.read(0xFFF, 2)
    memory.flush()
    memory.read_uint(0x1000, 2)
    assert gate.asked[1:] == [(0x2FFF, 2, "read"), (0xFFF, 2, "read"), (0x1000, 2, "read")]


def test_the_journal_has_every_write_in_order(bench):
    """Each write is noted with the number of the event that comes next; a read is not."""
    memory = bench.memory
    memory.write(0x10, b"abcd")
    bench.trace.add(Note("one"))
    memory.write_uint(0x20, 7, 8)
    memory.read(0x10, 4)
    list(memory.views(0x30, 0x40, "read"))
    bench.trace.add(Note("two"))
    memory.clear(0x1000, 0x2000)
    list(memory.views(0x50, 0x60, "write"))
    assert memory.writes == [(0, 0x10, 0x14), (1, 0x20, 0x28), (2, 0x1000, 0x2000), (2, 0x50, 0x60)]


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))
def test_integers_are_little_endian(make_bench, size, value):
    """An unsigned integer is stored with its lowest byte first, and one that does not fit is refused."""
    memory = make_bench().memory
    if value >> 8 * size:
        with pytest.raises(OverflowError):
            memory.write_uint(BORDER - 3, value, size)
        assert memory.writes == []
    else:
        memory.write_uint(BORDER - 3, value, size)
        assert memory.read(BORDER - 3, size) == bytes(value >> 8 * n & 0xFF for n in range(size))
        assert memory.read_uint(BORDER - 3, size) == value


def test_a_clear_of_the_guest_stores_zeros(bench):
    """What the guest clears reads as zero, to the byte."""
    bench.memory.write(0x1000, b"x" * 0x3000)
    bench.memory.clear(0x1800, 0x3001)
    assert bench.physical.read(0x1000, 0x3000) == b"x" * 0x800 + bytes(0x1801) + b"x" * 0xFFF


def test_views_cover_a_range_piece_by_piece(bench):
    """The pieces of a range are writable views of the memory, in ascending order."""
    for address, view in bench.memory.views(BORDER - 2, BORDER + 3, "write"):
        view[:] = bytes([address - BORDER + 0x80]) * len(view)
    assert bench.physical.read(BORDER - 3, 7) == b"\0\x7e\x7e\x80\x80\x80\0"
