"""Numbers that KASLR is made to draw."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware.memory_descriptor import MemoryDescriptor
from tools.conformance.kaslr_seed import physical_slot, tsc_for, virtual_slot

SZ_2M = 2 << 20
U64 = st.integers(0, (1 << 64) - 1)


def kaslr_get_random_long(seed: int, tsc: int) -> int:
    """The kernel's mixing, as mul and add do it: 64-bit factors, both halves of the product added."""
    product = (seed ^ tsc) * 0x5D6008CBF3848DD3
    return ((product & (1 << 64) - 1) + (product >> 64)) & (1 << 64) - 1


@given(U64, st.integers(0, 1 << 32))
def test_the_wanted_number_comes_out(seed, wanted):
    """Whatever the hash is, there is a TSC for each number, and it has 64 bits."""
    tsc = tsc_for(seed, wanted)
    assert 0 <= tsc < 1 << 64
    assert kaslr_get_random_long(seed, tsc) == wanted


@pytest.mark.parametrize(
    "output, slot",
    [(0x100_0000, 0), (0x120_0000, 1), (0x180_0000, 4), (0x1000_0000, 5), (0x1020_0000, 6), (0x3000_0000, 9)],
)
def test_slots_are_counted_in_the_order_of_the_map(output, slot):
    """Free and unaccepted ranges have slots where the whole kernel fits, from 16 MiB on; others have none."""
    descriptors = [
        MemoryDescriptor(7, 0x10_0000, 0x1F00, 15),  # to 32 MiB: 5 slots of 8 MiB from 16 MiB on
        MemoryDescriptor(2, 0x200_0000, 0x400, 15),
        MemoryDescriptor(7, 0x400_0000, 0x7FF, 0x4000F),  # special purpose
        MemoryDescriptor(7, 0x800_1000, 0x800, 15),  # 8 MiB, but not from a border on
        MemoryDescriptor(15, 0xFFF_F000, 0xE01, 15),  # 14 MiB behind the border: 4 slots
        MemoryDescriptor(15, 0x3000_0000, 0x800, 15),
    ]
    assert physical_slot(descriptors, 4 * SZ_2M, SZ_2M, output) == slot


def test_reliable_memory_counts_alone():
    """Where some memory is more reliable, no other has slots."""
    descriptors = [MemoryDescriptor(7, 0x200_0000, 0x800, 15), MemoryDescriptor(7, 0x400_0000, 0x800, 0x1000F)]
    assert physical_slot(descriptors, SZ_2M, SZ_2M, 0x440_0000) == 2


def test_virtual_slots_begin_at_16_mib():
    """Slot 0 is where a kernel without KASLR is."""
    assert [virtual_slot(SZ_2M, 0x100_0000 + n * SZ_2M) for n in (0, 1, 476)] == [0, 1, 476]
