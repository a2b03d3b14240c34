"""bootstub.unaccepted_memory: the size of the bitmap, what goes into it, and what comes out of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.unaccepted_memory import accept_memory, bitmap_size, process_unaccepted_memory
from firmware.memory_descriptor import MemoryDescriptor
from guest.bitmap import GuestBitmap
from guest.clock import VirtualClock
from guest.memory import GuestMemory, PhysicalMemory
from guest.trace import Trace

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE, UNIT = 4 * KIB, 2 * MIB
CONVENTIONAL, MMIO, UNACCEPTED = 7, 11, 15
BITMAP = 0x1000
UNITS = 64


class AdmitEverything:
    def admit(self, gpa, size, kind):
        return 0, 1 << 52


def new_bitmap() -> GuestBitmap:
    return GuestBitmap(GuestMemory(PhysicalMemory(), AdmitEverything(), Trace(VirtualClock())), BITMAP)


def process(start: int, end: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Ranges accepted at once, and runs of bits set, for one unaccepted range."""
    bitmap, accepted = new_bitmap(), []
    process_unaccepted_memory(bitmap, lambda low, high: accepted.append((low, high)), start, end)
    return accepted, list(bitmap.runs(0, 1 << 20))


def descriptor(kind: int, start: int, end: int) -> MemoryDescriptor:
    return MemoryDescriptor.of_range(kind, start, end, 0)


@pytest.mark.parametrize(
    ("start", "end", "accepted", "bits"),
    [
        (16 * MIB, 16 * MIB + PAGE, [(16 * MIB, 16 * MIB + PAGE)], []),
        (16 * MIB, 20 * MIB - PAGE, [(16 * MIB, 20 * MIB - PAGE)], []),  # with a whole unit in it
        (16 * MIB, 20 * MIB, [], [(8, 10)]),
        (16 * MIB + PAGE, 20 * MIB + PAGE, [(0x1001000, 0x1200000), (0x1400000, 0x1401000)], [(9, 10)]),
        (16 * MIB - PAGE, 20 * MIB, [(0xFFF000, 0x1000000)], [(8, 10)]),
        (16 * MIB, 20 * MIB + PAGE, [(0x1400000, 0x1401000)], [(8, 10)]),
        (4 * GIB, 6 * GIB, [], [(2048, 3072)]),
        (4 * GIB, 5 * GIB + 12 * KIB, [(5 * GIB, 5 * GIB + 12 * KIB)], [(2048, 2560)]),
    ],
)
def test_what_is_accepted_at_once_and_what_is_put_on_record(start, end, accepted, bits):
    """Below 4 MiB all is accepted; else the parts outside whole 2 MiB units are, and the units get their bits."""
    assert process(start, end) == (accepted, bits)


@given(st.integers(0, UNITS * 512 - 1), st.integers(1, 6 * 512))
def test_every_page_is_accepted_once_or_on_record(start_pfn, pages):
    """Each page of the range is accepted once or covered by a bit, never both, never neither; no other page is."""
    accepted, bits = process(start_pfn * PAGE, (start_pfn + pages) * PAGE)
    covered = [pfn for low, high in accepted for pfn in range(low // PAGE, high // PAGE)]
    covered += [pfn for first, last in bits for pfn in range(first * 512, last * 512)]
    assert sorted(covered) == list(range(start_pfn, start_pfn + pages))
    assert all(bound % PAGE == 0 for piece in accepted for bound in piece)
    assert bool(bits) == (pages >= 1024)


@given(st.sets(st.integers(0, UNITS - 1)), st.integers(0, UNITS * UNIT - 1), st.integers(0, 8 * UNIT))
def test_accept_takes_the_units_that_the_range_touches(unaccepted, start, size):
    """The set bits of touched units are accepted as maximal runs, ascending, then cleared; no guard, no other bit."""
    bitmap, accepted = new_bitmap(), []
    for unit in unaccepted:
        bitmap.set(unit, unit + 1)

    def accept(low: int, high: int) -> None:
        assert bitmap.count(low // UNIT, high // UNIT) == (high - low) // UNIT, "cleared before it was accepted"
        accepted.append((low, high))

    accept_memory(bitmap, accept, start, start + size)
    end = start + size
    touched = {u for u in unaccepted if u * UNIT < end and start < (u + 1) * UNIT} if size else set()
    if size == 0 and start % UNIT:
        touched = unaccepted & {start // UNIT}  # an empty range inside a unit: floor and ceiling are a unit apart
    assert [u for low, high in accepted for u in range(low // UNIT, high // UNIT)] == sorted(touched)
    assert all(before[1] < after[0] for before, after in pairwise(accepted))
    assert {u for u in range(2 * UNITS) if bitmap.test(u)} == unaccepted - touched


@pytest.mark.parametrize(
    ("ram_end", "size"),
    [
        (4 * GIB + 2 * MIB, 257),  # 4 GiB, 2 MiB and the guard are 256.25 bytes
        (4 * GIB + 14 * MIB, 257),
        (4 * GIB + 16 * MIB, 258),  # the guard's bit begins a byte
        (4 * GIB + 16 * MIB - PAGE, 258),
        (6 * GIB, 385),
        (64 * GIB - 2 * MIB, 4096),
        (64 * GIB, 4097),  # and here a page
        (5 * GIB + 12 * KIB, 321),
    ],
)
def test_size_counts_a_guard_behind_the_highest_address(ram_end, size):
    """One bit for each 2 MiB up to the highest end of all descriptors and for 2 MiB more, in whole bytes."""
    assert bitmap_size([descriptor(CONVENTIONAL, 0, MIB), descriptor(UNACCEPTED, 4 * GIB, ram_end)]) == size


def test_size_counts_descriptors_of_every_type():
    """An MMIO range at 56 TiB makes the bitmap 3,674,113 bytes, whatever RAM there is."""
    mmio = 57411 * GIB - 4 * KIB
    descriptors = [descriptor(UNACCEPTED, 4 * GIB, 64 * GIB), descriptor(MMIO, mmio, mmio + 4 * KIB)]
    assert bitmap_size(descriptors) == bitmap_size(descriptors[::-1]) == 57411 * 64 + 1


def test_no_unaccepted_memory_no_bitmap():
    """Without a descriptor of type 15 there is no bitmap, even for an empty map."""
    assert bitmap_size([]) is None
    assert bitmap_size([descriptor(CONVENTIONAL, 0, 64 * GIB)]) is None
