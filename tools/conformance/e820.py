"""Compare kernel.e820 with one recorded case of the kernel's own code.

A case is a dict: ``id``, ``name``, ``physbits`` (MAX_ARCH_PFN is 2^physbits bytes), either ``add``, entries to
put in with e820__range_add, or ``boot``, arguments and result of e820__memory_setup_default with the table after
it in ``tbl``; then ``ops``, operations one after the other, each ``[letter, arguments..., results...]``. Entries
are ``[addr, size, type]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bootstub.boot_params import BootE820Entry
from guest.units import PAGE_SHIFT
from kernel.e820 import RAM_AND_ACPI, RAM_ONLY, E820Table, memory_setup

_EINVAL = 22


def run_case(case: dict[str, Any]) -> list[str]:
    """The differences between our results and the recorded ones; empty if they agree."""
    table, differences = _begin(case)
    for number, (letter, *values) in enumerate(case["ops"]):
        count, operation = _OPERATIONS[letter]
        found = operation(table, 1 << (case["physbits"] - PAGE_SHIFT), *values[:count])
        differences += _compare(f"ops[{number}] {letter}", found, values[count:])
    return differences


def _begin(case: dict[str, Any]) -> tuple[E820Table, list[str]]:
    if "add" in case:
        return E820Table(_entries(case["add"])), []
    boot = case["boot"]
    who, table = memory_setup(_entries(boot["entries"]), boot["alt_mem_k"], boot["ext_mem_k"])
    return table, _compare("boot.who", [who], [boot["who"]]) + _compare("tbl", [_rows(table)], [case["tbl"]])


def _update_table(table: E820Table, _: int) -> list[Any]:
    return [table.update_table(), _rows(table)]


def _range_add(table: E820Table, _: int, start: int, size: int, e820_type: int) -> list[Any]:
    table.range_add(start, size, e820_type)
    return [_rows(table)]


def _range_update(table: E820Table, _: int, start: int, size: int, old: int, new: int) -> list[Any]:
    return [table.range_update(start, size, old, new), _rows(table)]


def _range_remove(table: E820Table, _: int, start: int, size: int, old: int, check: int) -> list[Any]:
    return [table.range_remove(start, size, old if check else None), _rows(table)]


def _mapped_any(table: E820Table, _: int, start: int, end: int, e820_type: int) -> list[Any]:
    return [int(table.mapped_any(start, end, e820_type or None))]


def _mapped_all(table: E820Table, _: int, start: int, end: int, e820_type: int) -> list[Any]:
    return [int(table.mapped_all(start, end, e820_type or None))]


def _get_entry_type(table: E820Table, _: int, start: int, end: int) -> list[Any]:
    found = table.get_entry_type(start, end)
    return [-_EINVAL if found is None else found - (found >> 31 << 32)]


_OPERATIONS: dict[str, tuple[int, Callable[..., list[Any]]]] = {
    # letter: number of arguments, what runs it with the table, MAX_ARCH_PFN and the arguments
    "S": (0, _update_table),
    "A": (3, _range_add),
    "U": (4, _range_update),
    "M": (4, _range_remove),
    "E": (0, lambda table, max_arch_pfn: [table.end_of_ram_pfn(max_arch_pfn, RAM_AND_ACPI)]),
    "L": (0, lambda table, _: [table.end_of_low_ram_pfn(RAM_AND_ACPI)]),
    "e": (0, lambda table, max_arch_pfn: [table.end_of_ram_pfn(max_arch_pfn, RAM_ONLY)]),
    "l": (0, lambda table, _: [table.end_of_low_ram_pfn(RAM_ONLY)]),
    "Q": (3, _mapped_any),
    "W": (3, _mapped_all),
    "G": (2, _get_entry_type),
}


def _entries(rows: Sequence[Sequence[int]]) -> list[BootE820Entry]:
    return [BootE820Entry(*row) for row in rows]


def _rows(table: E820Table) -> list[list[int]]:
    return [[entry.addr, entry.size, entry.type] for entry in table]


def _compare(what: str, found: list[Any], expected: list[Any]) -> list[str]:
    return [] if found == expected else [f"{what}: found {found}, expected {expected}"]
