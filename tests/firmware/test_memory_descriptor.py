"""EFI_MEMORY_DESCRIPTOR: packed, unpacked, and maps that no firmware can have."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware.memory_descriptor import MemoryDescriptor, check_map, pack_map, unpack_map
from guest.errors import FormatError

U64 = st.integers(0, (1 << 64) - 1)
descriptors = st.builds(MemoryDescriptor, st.integers(0, (1 << 32) - 1), U64, U64, U64)


@given(st.lists(descriptors, max_size=10), st.sampled_from([40, 48, 56, 100]))
def test_a_map_is_read_back_as_it_was_written(wanted, stride):
    """Descriptors keep their fields and their order at any stride, and each stands where it should."""
    data = pack_map(wanted, stride)
    assert len(data) == stride * len(wanted)
    for n, d in enumerate(wanted):
        row = struct.unpack_from("<I4xQQQQ", data, n * stride)
        assert row == (d.type, d.start, 0, d.pages, d.attribute)
        assert data[n * stride + 40 : (n + 1) * stride] == bytes(stride - 40)
    assert unpack_map(data, stride, at=0x1000) == wanted


def test_the_firmware_spaces_descriptors_by_48():
    """Without a stride the map is packed as OVMF does it."""
    assert len(pack_map([MemoryDescriptor(7, 0, 1, 15)] * 3)) == 144


@pytest.mark.parametrize(
    "size, stride, what, found, expected",
    [
        (80, 39, "EFI memory map DescriptorSize", 39, "at least 40"),
        (80, 0, "EFI memory map DescriptorSize", 0, "at least 40"),
        (100, 48, "EFI memory map", "100 bytes", "a multiple of 48"),
        (41, 40, "EFI memory map", "41 bytes", "a multiple of 40"),
    ],
)
def test_a_stride_that_does_not_fit_is_refused(size, stride, what, found, expected):
    """A stride below the structure's size, or one that does not divide the map, is a FormatError."""
    with pytest.raises(FormatError) as refused:
        unpack_map(bytes(size), stride, at=0x1234)
    error = refused.value
    assert (error.what, error.at, error.found, error.expected) == (what, 0x1234, found, expected)


@given(st.binary(max_size=200), st.integers(0, 100))
def test_any_bytes_give_a_map_or_a_format_error(data, stride):
    """Any bytes at any stride are descriptors or a FormatError, and so are the descriptors for check_map()."""
    try:
        check_map(unpack_map(data, stride, at=0), "the map")
    except FormatError as error:
        assert error.source == "UEFI 2.10, 7.2.3 GetMemoryMap"


def test_of_range_counts_pages():
    """A descriptor made of a range has the range's pages and end."""
    d = MemoryDescriptor.of_range(7, 0x1000, 0x5000, 15)
    assert (d.start, d.pages, d.end) == (0x1000, 4, 0x5000)


GOOD = [
    MemoryDescriptor(7, 0x10_0000, 16, 15),
    MemoryDescriptor(4, 0, 16, 15),
    MemoryDescriptor(15, (1 << 52) - 0x1000, 1, 0),
]


def test_a_good_map_passes():
    """Gaps, touching ranges, any order, and the last page below 2^52 are all right."""
    check_map([*GOOD, MemoryDescriptor(1, 0x11_0000, 1, 0)], "the map")
    check_map([], "the map")


@pytest.mark.parametrize(
    "bad, at, found, expected",
    [
        (MemoryDescriptor(7, 0x1800, 1, 0), 0x1800, "a start inside a page", "4 KiB pages"),
        (MemoryDescriptor(7, 0x2_0000, 0, 0), 0x2_0000, "0 pages", "at least one"),
        (MemoryDescriptor(7, 1 << 52, 1, 0), 1 << 52,
         "0x1 pages, which end at 0x10000000001000", "an end up to 2^52"),
        (MemoryDescriptor(7, 0x2_0000, (1 << 64) - 1, 0), 0x2_0000,
         "0xffffffffffffffff pages, which end at 0x1000000000000001f000", "an end up to 2^52"),
        (MemoryDescriptor(7, 0xF000, 2, 0), 0xF000,
         "[0xf000, 0x11000) over [0x0, 0x10000) of descriptor 1", "no overlap"),
        (MemoryDescriptor(7, 0x10_0000, 16, 15), 0x10_0000,
         "[0x100000, 0x110000) over [0x100000, 0x110000) of descriptor 0", "no overlap"),
        (MemoryDescriptor(7, 0x10_5000, 1, 15), 0x10_5000,
         "[0x105000, 0x106000) over [0x100000, 0x110000) of descriptor 0", "no overlap"),
    ],
)  # fmt: skip
def test_a_bad_descriptor_is_named(bad, at, found, expected):
    """A misaligned, empty or wrapping descriptor is named by its number; of an overlap both are."""
    with pytest.raises(FormatError) as refused:
        check_map([*GOOD, bad], "map.json")
    error = refused.value
    assert (error.what, error.at, error.found, error.expected) == ("map.json: descriptor 3", at, found, expected)


UNACCEPTED = MemoryDescriptor(15, 0x20_0000, 0x200, 0)


def test_unaccepted_memory_that_is_listed_twice_passes():
    """It goes unnoticed until it is accepted; with any other type it is refused as ever, next to it or not."""
    inside = [MemoryDescriptor(15, 0x21_0000, 1, 0), MemoryDescriptor(15, 0x22_0000, 0x400, 0)]
    check_map([*GOOD, UNACCEPTED, *inside, UNACCEPTED], "map")
    for start in (0x23_0000, 0x40_0000, 0x61_F000):
        with pytest.raises(FormatError, match=r"over .* expected no overlap"):
            check_map([UNACCEPTED, *inside, MemoryDescriptor(7, start, 1, 0)], "map")


def test_an_overlap_below_names_the_higher_one():
    """The descriptor that starts higher is the one in question, wherever it stands in the map."""
    with pytest.raises(FormatError) as refused:
        check_map([MemoryDescriptor(7, 0x2000, 1, 0), MemoryDescriptor(4, 0x1000, 2, 0)], "map")
    assert refused.value.what == "map: descriptor 0"
    assert refused.value.found == "[0x2000, 0x3000) over [0x1000, 0x3000) of descriptor 1"
