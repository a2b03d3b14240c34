"""Free memory, walked upwards and downwards: the same ranges in the other order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guest.ranges import TOP
from kernel.memblock import Memblock
from kernel.memblock_iter import free_mem_ranges, free_mem_ranges_reverse
from kernel.memblock_type import NUMA_NO_NODE, MemblockFlags

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(0, 1)), max_size=8)
MIRROR = int(MemblockFlags.MEMBLOCK_MIRROR)
FLAGS = (MemblockFlags.MEMBLOCK_NONE, MemblockFlags.MEMBLOCK_MIRROR)


@given(RANGES, RANGES, st.sampled_from([NUMA_NO_NODE, 0, 1]), st.sampled_from(FLAGS), st.integers(0, 100))
def test_descending_is_ascending_from_behind(memory, reserved, nid, flags, below):
    """Of any arrays; with an end, what begins there or above is missing and nothing else."""
    block = Memblock(lambda start, end: None, clear_memory=lambda start, end: None)
    for base, size, node in memory:
        block.memory.add_range(base, size, MIRROR * (base % 3 == 0))
        block.memory.set_node(base, size, node)
    for base, size, _ in reserved:
        block.reserve(base, size)
    arrays = (block.memory, block.reserved, flags, False, nid)
    ascending = list(free_mem_ranges(*arrays))
    assert list(free_mem_ranges_reverse(*arrays, TOP)) == ascending[::-1]
    low = [free for free in free_mem_ranges_reverse(*arrays, below) if free[0] < below]
    assert low == [free for free in reversed(ascending) if free.start < below]
