"""The kernel's e820 table against a slow obvious model, real firmware maps, and the odd cases by hand."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstub.boot_params import BootE820Entry, e820_table_of, parse_e820_table
from bootstub.e820_types import (
    E820_TYPE_ACPI,
    E820_TYPE_NVS,
    E820_TYPE_PMEM,
    E820_TYPE_PRAM,
    E820_TYPE_RAM,
    E820_TYPE_RESERVED,
    E820_TYPE_SOFT_RESERVED,
    E820_TYPE_UNUSABLE,
)
from kernel.e820 import RAM_AND_ACPI, E820Table, memory_setup

SPACE = 24
TYPES = [E820_TYPE_RAM, E820_TYPE_RESERVED, E820_TYPE_NVS, E820_TYPE_PRAM, E820_TYPE_SOFT_RESERVED]
SAMPLES = Path(__file__).parent.parent / "samples" / "boot_params" / "captures.jsonl.gz"

entries = st.lists(
    st.builds(BootE820Entry, st.integers(0, SPACE), st.integers(0, SPACE), st.sampled_from(TYPES)), max_size=8
)
ranges = st.tuples(st.integers(0, SPACE), st.integers(0, SPACE))


def table(*rows: tuple[int, int, int], capacity: int = 320) -> E820Table:
    """A table of (addr, size, type)."""
    return E820Table([BootE820Entry(*row) for row in rows], capacity)


def rows(found: E820Table) -> list[tuple[int, int, int]]:
    """The entries as (addr, size, type)."""
    return [(e.addr, e.size, e.type) for e in found]


def cover(found: E820Table) -> dict[int, Counter[int]]:
    """How many entries of each type lie on each address: what a table means, whatever its order."""
    return {a: Counter(e.type for e in found if e.addr <= a < e.addr + e.size) for a in range(2 * SPACE)}


def sanitised_slowly(before: list[BootE820Entry]) -> list[tuple[int, int, int]]:
    """Address by address: the largest type there, joined where neither type nor a start or end says otherwise."""
    largest = [max((e.type for e in before if e.addr <= a < e.addr + e.size), default=0) for a in range(2 * SPACE + 1)]
    edges = {edge for e in before if e.size for edge in (e.addr, e.addr + e.size)}
    cuts = {0} | {
        a
        for a in range(1, 2 * SPACE + 1)
        if largest[a] != largest[a - 1] or (a in edges and largest[a] in (E820_TYPE_PRAM, E820_TYPE_SOFT_RESERVED))
    }
    return [(low, high - low, largest[low]) for low, high in pairwise(sorted(cuts)) if largest[low]]


@given(entries)
@settings(max_examples=300, deadline=None)
def test_update_table_against_the_model(before: list[BootE820Entry]) -> None:
    """The update gives what looking at every single address gives."""
    found = E820Table(before)
    if len(before) < 2:
        assert (found.update_table(), list(found)) == (-1, before)
    else:
        assert (found.update_table(), rows(found)) == (0, sanitised_slowly(before))


@given(entries, ranges, st.sampled_from(TYPES), st.sampled_from(TYPES))
@settings(max_examples=200, deadline=None)
def test_range_update_against_the_model(before: list[BootE820Entry], span: tuple[int, int], old: int, new: int) -> None:
    """Each address in the range has as many of the new type as it had of old and new, and no other changes."""
    if old == new:
        return
    found, expected = E820Table(before), cover(E820Table(before))
    changed = 0
    for address in range(span[0], min(sum(span), 2 * SPACE)):
        here = expected[address]
        changed += here[old]
        here[new] += here.pop(old, 0)
    assert found.range_update(*span, old, new) == changed
    assert cover(found) == {a: +counts for a, counts in expected.items()}


@given(entries, ranges, st.sampled_from([None, *TYPES]))
@settings(max_examples=200, deadline=None)
def test_range_remove_against_the_model(before: list[BootE820Entry], span: tuple[int, int], old: int | None) -> None:
    """Each address in the range has lost the type, or all types; no other address changes."""
    found, expected = E820Table(before), cover(E820Table(before))
    removed = 0
    for address in range(span[0], min(sum(span), 2 * SPACE)):
        here = expected[address]
        lost = set(here) if old is None else {old}
        removed += sum(here.pop(t, 0) for t in lost)
    assert found.range_remove(*span, old) == removed
    assert cover(found) == expected


@given(entries, ranges, st.sampled_from([None, *TYPES]))
@settings(max_examples=200, deadline=None)
def test_mapped_against_the_model(before: list[BootE820Entry], span: tuple[int, int], wanted: int | None) -> None:
    """On an updated table, any means one address has the type, all means every address has it."""
    found = E820Table([*before, *before])
    found.update_table()
    here = [bool(c if wanted is None else c[wanted]) for c in list(cover(found).values())[span[0] : sum(span)]]
    if not here:
        return
    assert found.mapped_any(span[0], sum(span), wanted) == any(here)
    assert found.mapped_all(span[0], sum(span), wanted) == all(here)


def test_larger_type_wins() -> None:
    """Where RAM and a reservation overlap, the reservation cuts the RAM in two."""
    found = table((0, 0x10000, E820_TYPE_RAM), (0x4000, 0x1000, E820_TYPE_RESERVED))
    assert found.update_table() == 0
    assert rows(found) == [(0, 0x4000, 1), (0x4000, 0x1000, 2), (0x5000, 0xB000, 1)]


def test_wrapping_entry_refuses_all() -> None:
    """One entry whose end is 2^64 or beyond leaves the whole table as it was."""
    before = [(0x2000, 0x1000, 1), (0x1000, 0x1000, 1), ((1 << 64) - 0x1000, 0x1000, 2)]
    found = table(*before)
    assert (found.update_table(), rows(found)) == (-1, before)


def test_update_keeps_to_the_capacity() -> None:
    """A table that would grow beyond its capacity loses its top."""
    found = table((0, 100, 1), (10, 10, 2), (30, 10, 2), capacity=3)
    assert (found.update_table(), rows(found)) == (0, [(0, 10, 1), (10, 10, 2), (20, 10, 1)])


def test_full_table_ignores_entries() -> None:
    """Entry number 321 is ignored."""
    found = table(*((i * 4096, 4096, 1 + i % 2) for i in range(320)))
    assert not found.range_add(1 << 40, 4096, 1)
    assert len(found) == 320
    assert not found.mapped_any(1 << 40, (1 << 40) + 1)


def test_update_to_the_same_type() -> None:
    """Old and new type must differ."""
    with pytest.raises(ValueError, match="expected two types"):
        table((0, 1, 1)).range_update(0, 1, 1, 1)


def test_end_of_ram() -> None:
    """6.1 counts RAM, 6.12 ACPI data as well; whole pages only; never beyond the limit."""
    found = table((0, 0x9FC00, 1), (0x100000, 0x7FF00000, 1), (0x80000000, 0x3000, 3), (1 << 32, 1 << 20, 2))
    assert found.end_of_ram_pfn(1 << 34) == found.end_of_low_ram_pfn() == 0x80000
    assert found.end_of_ram_pfn(1 << 34, RAM_AND_ACPI) == 0x80003
    assert found.end_of_ram_pfn(0x100) == 0x9F
    assert found.end_of_ram_pfn(0x101) == 0x101
    assert table((0, 0xFFF, 1)).end_of_ram_pfn(1 << 34) == 0
    high = table((1 << 32, 1 << 30, 1))
    assert (high.end_of_ram_pfn(1 << 34), high.end_of_low_ram_pfn()) == (0x140000, 0)


def test_get_entry_type() -> None:
    """The type of the entry that holds the range, None if a part of it is a hole."""
    found = table((0, 0x1000, 1), (0x2000, 0x1000, E820_TYPE_SOFT_RESERVED))
    assert found.get_entry_type(0, 0x1000) == 1
    assert found.get_entry_type(0x2800, 0x3000) == E820_TYPE_SOFT_RESERVED
    assert found.get_entry_type(0, 0x3000) is None


def test_memory_setup_sorts_firmware_entries() -> None:
    """Two entries or more are the firmware's own map."""
    who, found = memory_setup([BootE820Entry(1 << 20, 1 << 20, 1), BootE820Entry(0, 0xA0000, 1)], 5, 6)
    assert (who, rows(found)) == ("BIOS-e820", [(0, 0xA0000, 1), (1 << 20, 1 << 20, 1)])


@pytest.mark.parametrize(
    ("given_entries", "alt_mem_k", "ext_mem_k", "who", "high"),
    [
        ([], 32768, 0, "BIOS-e801", 32 << 20),
        ([BootE820Entry(0, 1 << 30, 1)], 0, 15360, "BIOS-88", 15 << 20),
        ([BootE820Entry(0, 4096, 1), BootE820Entry((1 << 64) - 1, 4096, 2)], 1024, 1024, "BIOS-e801", 1 << 20),
    ],
    ids=["no-entries", "one-entry", "wrap"],
)
def test_memory_setup_makes_a_map_up(
    given_entries: list[BootE820Entry], alt_mem_k: int, ext_mem_k: int, who: str, high: int
) -> None:
    """Without a usable firmware map there is RAM below 0x9f000 and from 1 MiB on, by the larger size."""
    found = memory_setup(given_entries, alt_mem_k, ext_mem_k)
    assert (found[0], rows(found[1])) == (who, [(0, 0x9F000, 1), (1 << 20, high, 1)])


def test_print_lines() -> None:
    """Lines are the kernel's: inclusive ends, 16 digits, and an empty entry ends one below its start."""
    found = table((0, 0xA0000, 1), (0x100000000, 0x1000, E820_TYPE_PMEM), (0, 0, 0), (0x1000, 0, 20))
    assert found.print_lines("BIOS-e820") == [
        "BIOS-e820: [mem 0x0000000000000000-0x000000000009ffff] usable",
        "BIOS-e820: [mem 0x0000000100000000-0x0000000100000fff] persistent (type 7)",
        "BIOS-e820: [mem 0x0000000000000000-0xffffffffffffffff] type 0",
        "BIOS-e820: [mem 0x0000000000001000-0x0000000000000fff] type 20",
    ]


# arch/x86/kernel/e820.c, e820_type_to_string(): the words of /sys/firmware/memmap
MEMMAP_WORDS = {
    E820_TYPE_RAM: "System RAM",
    E820_TYPE_RESERVED: "Reserved",
    E820_TYPE_ACPI: "ACPI Tables",
    E820_TYPE_NVS: "ACPI Non-volatile Storage",
    E820_TYPE_UNUSABLE: "Unusable memory",
    E820_TYPE_PMEM: "Persistent Memory",
    E820_TYPE_SOFT_RESERVED: "Soft Reserved",
    128: "System RAM",
}


# In these boots the real kernel has put a range to use as RAM after it read the table, and listed it, too.
BOOTS_WITH_ADDED_MEMORY = {"efirom-q35-2G-attrs-k6.12", "efirom-q35-2G-softres-k6.1"}
ADDED_LATER = [0x100000000, 0x13FFFFFFF, "System RAM"]


def real_maps() -> list[dict[str, str | list[list[object]] | None]]:
    """The captured boots whose /sys/firmware/memmap was read."""
    with gzip.open(SAMPLES, "rt") as lines:
        boots = [json.loads(line) for line in lines]
    return [boot for boot in boots if boot["firmware_memmap"]]


@pytest.mark.parametrize("boot", real_maps(), ids=lambda boot: boot["name"])
def test_real_firmware_memmap(boot: dict[str, str]) -> None:
    """Table and SETUP_E820_EXT together, updated, are what the real kernel shows in /sys/firmware/memmap."""
    _, found = memory_setup(e820_table_of(bytes.fromhex(boot["boot_params"])), 0, 0)
    if boot["e820_ext"]:
        assert found.append_table(parse_e820_table(bytes.fromhex(boot["e820_ext"]))) == 0
        assert found.update_table() == 0
    ours = [[e.addr, e.addr + e.size - 1, MEMMAP_WORDS.get(e.type, "Unknown E820 type")] for e in found]
    added_later = [ADDED_LATER] if boot["name"] in BOOTS_WITH_ADDED_MEMORY else []
    assert [entry for entry in boot["firmware_memmap"] if entry not in added_later] == ours
