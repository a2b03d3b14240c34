"""memblock with nodes, against a model that knows the node of every page."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.memblock import Memblock
from kernel.memblock_type import NUMA_NO_NODE

PAGE, PAGES = 4096, 64


def new() -> Memblock:
    return Memblock(lambda start, end: None, clear_memory=lambda start, end: None)


span = st.tuples(st.integers(1, PAGES - 1), st.integers(1, 12))
step = st.one_of(
    st.tuples(st.just("add"), span, st.just(0)),
    st.tuples(st.just("reserve"), span, st.just(0)),
    st.tuples(st.just("free"), span, st.just(0)),
    st.tuples(st.just("node"), span, st.integers(0, 2)),
    st.tuples(st.just("alloc"), st.tuples(st.integers(1, 4), st.integers(0, 1)), st.integers(-1, 2)),
)


class Model:
    """Memory, reservations and nodes, page by page."""

    def __init__(self) -> None:
        self.memory: dict[int, int] = {}
        self.reserved: set[int] = set()

    def alloc(self, count: int, exact: bool, nid: int) -> int:
        """First page of the highest free place in one region on the node, or on any; 0 if there is none."""
        for node in (nid,) if exact or nid == NUMA_NO_NODE else (nid, NUMA_NO_NODE):
            for first in range(PAGES * 2 - count, 0, -1):
                pages = range(first, first + count)
                if any(page in self.reserved or page not in self.memory for page in pages):
                    continue
                nodes = {self.memory[page] for page in pages}
                if len(nodes) == 1 and node in (NUMA_NO_NODE, *nodes):
                    self.reserved.update(pages)
                    return first
        return 0


@settings(max_examples=300)
@given(st.lists(step, max_size=40))
def test_against_pages_with_nodes(steps):
    """Regions, nodes and where allocations land are those of the model; neighbours of one node are one region."""
    memblock, model = new(), Model()
    for name, (first, count), nid in steps:
        pages = range(first, first + count)
        base, size = first * PAGE, count * PAGE
        if name == "add":
            memblock.add(base, size)
            for page in pages:
                model.memory.setdefault(page, NUMA_NO_NODE)
        elif name == "reserve":
            memblock.reserve(base, size)
            model.reserved.update(pages)
        elif name == "free":
            memblock.phys_free(base, size)
            model.reserved.difference_update(pages)
        elif name == "node":
            memblock.set_node(base, size, nid)
            model.memory.update(dict.fromkeys(model.memory.keys() & set(pages), nid))
        else:
            found = memblock.alloc_range_nid(first * PAGE, PAGE, 0, 2 * PAGES * PAGE, nid, bool(count))
            assert found == model.alloc(first, bool(count), nid) * PAGE
    regions = memblock.memory.regions
    assert {page: r.nid for r in regions for page in range(r.base // PAGE, r.end // PAGE)} == model.memory
    taken = {page for r in memblock.reserved.regions for page in range(r.base // PAGE, r.end // PAGE)}
    assert taken == model.reserved
    assert not any(a.end == b.base and a.nid == b.nid for a, b in itertools.pairwise(regions))


def test_a_full_node_gives_way_unless_it_must_not():
    """An allocation goes to another node if its own is full, but not an exact one."""
    memblock = new()
    memblock.add(PAGE, 8 * PAGE)
    memblock.set_node(PAGE, 4 * PAGE, 0)
    memblock.set_node(5 * PAGE, 4 * PAGE, 1)
    assert memblock.alloc_range_nid(4 * PAGE, PAGE, 0, 1 << 30, 1) == 5 * PAGE
    assert memblock.alloc_range_nid(PAGE, PAGE, 0, 1 << 30, 1, exact_nid=True) == 0
    assert memblock.alloc_range_nid(PAGE, PAGE, 0, 1 << 30, 1) == 4 * PAGE


def test_below_the_minimum_if_there_is_no_room_above():
    """memblock_alloc_try_nid() prefers addresses from its minimum on, and takes lower ones, cleared or raw."""
    cleared = []
    memblock = Memblock(lambda start, end: None, clear_memory=lambda start, end: cleared.append((start, end)))
    memblock.add(PAGE, 4 * PAGE)
    memblock.current_limit = 1 << 30
    assert memblock.alloc_try_nid(2 * PAGE, PAGE, 3 * PAGE) == 3 * PAGE
    assert memblock.alloc_try_nid(PAGE, PAGE, 3 * PAGE, form="alloc_try_nid_raw") == 2 * PAGE
    assert cleared == [(3 * PAGE, 5 * PAGE)]
    assert memblock.alloc_try_nid(2 * PAGE, PAGE) == 0


def test_debug_lines():
    """memblock=debug in the kernel's words; nothing without it."""
    memblock, lines = new(), []
    memblock.add(PAGE, PAGE, who="a")
    memblock.debug = lines.append
    memblock.add(2 * PAGE, 2 * PAGE, who="b")
    memblock.set_node(PAGE, PAGE, 0)
    memblock.current_limit = 1 << 30
    memblock.alloc_try_nid(100, 64, nid=0, who="c")
    memblock.phys_free(PAGE, PAGE, who="d")
    memblock.dump_all()
    assert lines == [
        "memblock_add: [0x0000000000002000-0x0000000000003fff] b",
        "memblock_alloc_try_nid: 100 bytes align=0x40 nid=0 from=0x0000000000000000 max_addr=0x0000000000000000 c",
        "memblock_reserve: [0x0000000000001f80-0x0000000000001fe3] memblock_alloc_range_nid",
        "memblock_phys_free: [0x0000000000001000-0x0000000000001fff] d",
        "MEMBLOCK configuration:",
        " memory size = 0x0000000000003000 reserved size = 0x0000000000000000",
        " memory.cnt  = 0x2",
        " memory[0x0]\t[0x0000000000001000-0x0000000000001fff], 0x0000000000001000 bytes on node 0 flags: 0x0",
        " memory[0x1]\t[0x0000000000002000-0x0000000000003fff], 0x0000000000002000 bytes flags: 0x0",
        " reserved.cnt  = 0x0",
    ]
