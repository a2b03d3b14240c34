"""The relocation lists behind the kernel's ELF file, and what they change."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.kernel_layout import START_KERNEL_MAP
from bootstub.relocations import Relocations, read_relocations, relocate
from bootstub.sample_kernel import (
    POINTERS,
    POINTERS_32_OFFSET,
    POINTERS_64_OFFSET,
    POINTERS_INVERSE_OFFSET,
    build_vmlinux,
)
from bootstub.vmlinux import Vmlinux, load_segments
from guest.errors import FormatError

BASE = 0x100_0000
DATA = 0x20_0000
SLOT = 0x20_0000
TEXT = 0xFFFF_FFFF_8100_0000
EMPTY = Vmlinux(entry=BASE, segments=(), elf_end=0)


def table(*lists: list[int]) -> bytes:
    """The lists as they lie in the file, a zero before each."""
    words = [word for entries in lists for word in (0, *entries)]
    return struct.pack(f"<{len(words)}I", *words)


def read(data: bytes) -> Relocations:
    """The lists of a file that has nothing else in it."""
    return read_relocations(data, EMPTY)


def sample_image() -> tuple[bytearray, Relocations]:
    """The sample kernel's segments as they lie in memory, and its lists."""
    vmlinux = build_vmlinux()
    kernel = load_segments(vmlinux)
    image = bytearray(max(s.p_paddr + s.p_filesz for s in kernel.segments) - BASE)
    for s in kernel.segments:
        image[s.p_paddr - BASE : s.p_paddr - BASE + s.p_filesz] = vmlinux[s.p_offset : s.p_offset + s.p_filesz]
    return image, read_relocations(vmlinux, kernel)


def test_the_sample_kernel_moves() -> None:
    """Each kind of pointer of the sample kernel points to the same page of a kernel that lies 2 MiB further up."""
    image, relocations = sample_image()
    relocate(image, BASE, relocations, SLOT)
    pages = [0x1000 * number for number in range(POINTERS)]
    assert list(struct.unpack_from(f"<{POINTERS}Q", image, DATA + POINTERS_64_OFFSET)) == [
        TEXT + SLOT + page for page in pages
    ]
    assert list(struct.unpack_from(f"<{POINTERS}I", image, POINTERS_32_OFFSET)) == [
        (TEXT + SLOT + DATA + page) & 0xFFFF_FFFF for page in pages
    ]
    assert list(struct.unpack_from(f"<{POINTERS}I", image, POINTERS_INVERSE_OFFSET)) == [
        (page - TEXT - SLOT) & 0xFFFF_FFFF for page in pages
    ]


def test_what_is_no_pointer_stays() -> None:
    """Only the listed words change, and moving back undoes it all."""
    image, relocations = sample_image()
    before = bytes(image)
    relocate(image, BASE, relocations, SLOT)
    changed = sum(a != b for a, b in zip(before, image, strict=True))
    assert 0 < changed <= POINTERS * (8 + 4 + 4)
    relocate(image, BASE, relocations, -SLOT)
    assert image == before


def test_two_lists() -> None:
    """A kernel without the inverse list has two lists; either may be empty."""
    words = [0x8100_0000, 0x8100_0010], [0x8100_0020]
    assert read(table(*words)) == Relocations([BASE, BASE + 0x10], (), [BASE + 0x20])
    assert read(table(words[0], [], words[1])) == Relocations([BASE, BASE + 0x10], [], [BASE + 0x20])
    assert read(table([], [])) == Relocations([], (), [])


@pytest.mark.parametrize(
    ("data", "at"),
    [
        (b"", 0),
        (b"\0" * 7, 0),
        (table([0x8100_0000]), 0),
        (table([], [], [], []), 0),
        (table([0x8100_0000], [])[4:], 0),
        (b"\1\0\0\0" * ((1 << 22) + 1), 0),
        (table([0x8100_0000], [0x7FFF_FFFF]), 12),
        (table([0x8100_0000, 1], []), 8),
    ],
    ids=["none", "odd", "one list", "four lists", "no zero first", "too long", "user space", "small"],
)
def test_no_table(data: bytes, at: int) -> None:
    """What is no table is refused, by the offset of the first word that cannot be."""
    with pytest.raises(FormatError) as refusal:
        read(data)
    assert refusal.value.what.startswith("relocation ")
    assert refusal.value.at == at


@pytest.mark.parametrize(
    ("lists", "place"),
    [
        (([], [], [0x8100_0FFD]), BASE + 0xFFD),
        (([], [0x80FF_FFFF], []), BASE - 1),
        (([0x8100_0FF9], [], []), BASE + 0xFF9),
        (([], [0x8100_0000], [0xFFFF_FFFF]), 0x7FFF_FFFF),
    ],
)
def test_places_outside_the_kernel(lists: tuple[list[int], ...], place: int) -> None:
    """A place that is not all inside the kernel is refused with the kernel's words, and nothing has changed."""
    image = bytearray(range(256)) * 16
    before = bytes(image)
    with pytest.raises(FormatError, match="relocation outside of kernel!") as refusal:
        relocate(image, BASE, read(table(*lists)), SLOT)
    assert refusal.value.at == place
    assert image == before


def test_the_last_bytes_of_the_kernel() -> None:
    """A word that ends where the kernel ends is inside, and it wraps as the processor's own addition does."""
    image = bytearray(b"\xff" * 16)
    relocate(image, BASE, read(table([0x8100_0008], [], [0x8100_0004])), 1)
    assert image == b"\xff" * 4 + bytes(12)


@given(st.binary(max_size=200) | st.lists(st.integers(0x80FF_FFF0, 0x8100_0040), max_size=9).map(lambda w: table(w, w)))
def test_any_bytes(data: bytes) -> None:
    """Any bytes behind the ELF file move the kernel or are refused."""
    image = bytearray(64)
    try:
        relocate(image, BASE, read(data), SLOT)
    except FormatError:
        assert not any(image)
    assert len(image) == 64


def test_the_kernels_mapping() -> None:
    """Where the kernel is linked, physical address 0 has this virtual address."""
    assert TEXT - BASE == START_KERNEL_MAP
