"""EFI types to e820 types and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.boot_params import BootE820Entry
from bootstub.e820_types import type_of_word, type_word
from bootstub.efi_e820 import e820_entries, e820_type_of, efi_descriptors
from firmware.memory_descriptor import MemoryDescriptor, check_map
from kernel.e820 import E820Table

SP, NV = 1 << 18, 1 << 15
RAM, RESERVED, ACPI, NVS, UNUSABLE, PMEM, PRAM, KERN, SOFT = 1, 2, 3, 4, 5, 7, 12, 128, 0xEFFFFFFF


@pytest.mark.parametrize(
    ("entry_type", "efi_type", "attribute", "back"),
    [
        (RAM, 7, 0xF, RAM),
        (KERN, 7, 0xF, RAM),
        (RESERVED, 0, 0, RESERVED),
        (ACPI, 9, 0xF, ACPI),
        (NVS, 10, 0xF, NVS),
        (UNUSABLE, 8, 0xF, UNUSABLE),
        (PMEM, 14, 0xF | NV, PMEM),
        (PRAM, 14, 0xF | NV, PMEM),
        (SOFT, 7, 0xF | SP, SOFT),
        (20, 0, 0, RESERVED),
    ],
)
def test_each_type_and_back(entry_type, efi_type, attribute, back):
    """An e820 type has one EFI type, and the stub makes the same e820 type of it, or the next best one."""
    (found,) = efi_descriptors([BootE820Entry(0x1000, 0x2000, entry_type)])
    assert found == MemoryDescriptor(efi_type, 0x1000, 2, attribute)
    assert e820_type_of(found) == back


def test_special_purpose_memory_only_where_it_is_wanted():
    """Without soft reservation EFI_MEMORY_SP is plain RAM; a type beyond the specification's is dropped."""
    special = MemoryDescriptor(7, 0, 1, SP)
    assert (e820_type_of(special), e820_type_of(special, soft_reserve=False)) == (SOFT, RAM)
    assert e820_entries([MemoryDescriptor(16, 0, 1, 0), special], soft_reserve=False) == [BootE820Entry(0, 0x1000, RAM)]


def test_pages_that_are_ram_in_part():
    """RAM shrinks to whole pages and everything else grows to them, as a BIOS data area at 0x9fc00 needs it."""
    found = efi_descriptors([BootE820Entry(0, 0x9FC00, RAM), BootE820Entry(0x9FC00, 0x400, RESERVED)])
    assert [(d.type, d.start, d.end) for d in found] == [(7, 0, 0x9F000), (0, 0x9F000, 0xA0000)]


def test_overlapping_entries():
    """The larger type wins; empty entries and type 0 are nothing."""
    entries = [(0, 0x8000, RAM), (0x2000, 0x2000, NVS), (0x3000, 0x2000, RESERVED), (0x9000, 0, RAM), (0xA000, 1, 0)]
    found = efi_descriptors([BootE820Entry(*entry) for entry in entries])
    assert [(d.type, d.start, d.end) for d in found] == [
        (7, 0, 0x2000), (10, 0x2000, 0x4000), (0, 0x4000, 0x5000), (7, 0x5000, 0x8000),
    ]  # fmt: skip


@given(
    st.lists(
        st.builds(
            lambda start, pages, kind: BootE820Entry(start << 12, pages << 12, kind),
            st.integers(0, 60), st.integers(1, 9), st.sampled_from([RAM, RESERVED, ACPI, NVS, UNUSABLE, PMEM]),
        ),
        min_size=2, max_size=8,
    )
)  # fmt: skip
def test_there_and_back_is_what_the_kernel_sees(entries):
    """The table of the descriptors is the table that the kernel's own update makes of the entries."""
    wanted = E820Table(entries)
    wanted.update_table()
    descriptors = efi_descriptors(entries)
    check_map(descriptors, "map")
    assert e820_entries(descriptors) == list(wanted)


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 7, 12, 20, 0xEFFFFFFF, 0xFFFFFFFF])
def test_words_of_dmesg_come_back(kind):
    """A type is found by the word that dmesg has for it."""
    assert type_of_word(type_word(kind)) == kind


@pytest.mark.parametrize("word", ["", "Usable", "type", "type -1", "type 4294967296", "type ٣", "reserved "])
def test_what_is_no_word(word):
    """Other words have no type."""
    assert type_of_word(word) is None
