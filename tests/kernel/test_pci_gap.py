"""e820__setup_pci_gap(): the largest gap below 4 GiB, against a model that looks at every page."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.e820 import E820Table

PAGE, GIB = 4 << 20, 1 << 30
PAGES = 4 * GIB // PAGE


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, PAGES + 100), st.integers(1, 300)), min_size=1, max_size=8))
def test_largest_gap(rows):
    """Of gaps of equal size the lowest counts; below the first entry there is none that counts."""
    table = E820Table()
    table.range_add(0, PAGE, 2)
    for first, count in rows:
        table.range_add(first * PAGE, count * PAGE, 1)
    table.update_table()
    taken = [any(e.addr <= n * PAGE < e.addr + e.size for e in table) for n in range(PAGES)]
    best, start = 0, None
    run = 0
    for number, is_taken in enumerate([*taken, True]):
        run = 0 if is_taken else run + 1
        end_of_run = run and (number + 1 == PAGES or taken[number + 1])
        if end_of_run and run > best:
            best, start = run, number + 1 - run
    found = table.search_gap(1 << 20)
    if start is None:
        assert found == ((1 << 32) + (1 << 20), 4 << 20)
    else:
        assert found == (start * PAGE, best * PAGE)


def test_a_gap_of_less_than_4_mib_is_none():
    """Then PCI gets what lies behind RAM."""
    table = E820Table()
    table.range_add(0, 4 * GIB - (3 << 20), 1)
    assert table.search_gap(123) == ((123 << 12) + (1 << 20), 4 << 20)
