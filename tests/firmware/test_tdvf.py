"""TDVF metadata: images that a small writer makes, each field falsified, any bytes, and Debian's OVMF."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware.ovmf_layout import BUILT_IN
from firmware.tdvf import SectionType, parse_tdvf
from guest.errors import FormatError

ROWS = [
    (0x1000, 0x7000, 0xFFFF_9000, 0x7000, 0, 1),
    (0, 0x1000, 0xFFFF_8000, 0x1000, 1, 0),
    (0, 0, 0x81_0000, 0x1_0000, 3, 0),
    (0, 0, 0x80_9000, 0x2000, 2, 0),
]
SIZE = 0x8000
DESCRIPTOR = 0x100
SECTION = [DESCRIPTOR + 16 + 32 * n for n in range(len(ROWS))]
FOOTER = SIZE - 0x30
ENTRY_END = FOOTER - 2 - 26
"""Where the TDX entry of the GUIDed table ends: below it is its GUID, its length, and its four bytes of data."""


def fields(section) -> tuple[int, ...]:
    """A section as a row."""
    return (
        section.data_offset,
        section.raw_size,
        section.address,
        section.memory_size,
        section.type,
        section.attributes,
    )


@pytest.mark.parametrize("other_entries", [0, 1, 5])
def test_sections_are_read_in_their_order(tdvf_image, other_entries):
    """The sections of an image come with their fields and data, wherever the entry stands in the table."""
    image = bytes(tdvf_image(ROWS, other_entries=other_entries))
    tdvf = parse_tdvf(image)
    assert [fields(section) for section in tdvf.sections] == ROWS
    assert tdvf.image == image
    assert tdvf.data(tdvf.sections[0]) == image[0x1000:]
    assert tdvf.data(tdvf.sections[3]) == b""
    assert tdvf.of_type(SectionType.TempMem) == [tdvf.sections[2]]
    assert tdvf.sections[3].end == 0x80_B000


FALSIFIED = [
    # what is stored where, and the error that follows: what, at, found, expected
    ("<16s", FOOTER, bytes(16), "firmware image GUIDed table", FOOTER, "no table footer",
     "GUID 96b582de-1fb2-45f7-baea-a366c55a082d"),
    ("<H", FOOTER - 2, 18, "firmware image GUIDed table", FOOTER - 2, "no TDX metadata entry",
     "GUID e47a6535-984a-4798-865e-4685a7bf8ec2"),
    ("<H", FOOTER - 2, 0, "GUIDed table length", FOOTER - 2, 0, f"18 to {FOOTER + 16}"),
    ("<H", FOOTER - 2, 17, "GUIDed table length", FOOTER - 2, 17, f"18 to {FOOTER + 16}"),
    ("<H", FOOTER - 2, FOOTER + 17, "GUIDed table length", FOOTER - 2, FOOTER + 17, f"18 to {FOOTER + 16}"),
    ("<H", FOOTER - 2, 18 + 26, "firmware image GUIDed table", FOOTER - 2 - 26, "no TDX metadata entry",
     "GUID e47a6535-984a-4798-865e-4685a7bf8ec2"),
    ("<16s", ENTRY_END - 16, bytes(16), "firmware image GUIDed table", ENTRY_END - 22 - 26,
     "no TDX metadata entry", "GUID e47a6535-984a-4798-865e-4685a7bf8ec2"),
    ("<H", ENTRY_END - 18, 17, "GUIDed table entry length", ENTRY_END - 18, 17, "an entry inside the table"),
    ("<H", ENTRY_END - 18, 0, "GUIDed table entry length", ENTRY_END - 18, 0, "an entry inside the table"),
    ("<H", ENTRY_END - 18, 49, "GUIDed table entry length", ENTRY_END - 18, 49, "an entry inside the table"),
    ("<I", ENTRY_END - 22, 15, "TDX metadata offset", ENTRY_END - 22, "0xf bytes before the end",
     "a place inside the image of 0x8000 bytes"),
    ("<I", ENTRY_END - 22, SIZE + 1, "TDX metadata offset", ENTRY_END - 22, "0x8001 bytes before the end",
     "a place inside the image of 0x8000 bytes"),
    ("<4s", DESCRIPTOR, b"TDVX", "TDVF descriptor Signature", DESCRIPTOR, b"TDVX", b"TDVF"),
    ("<I", DESCRIPTOR + 4, 143, "TDVF descriptor Length", DESCRIPTOR + 4, 143, 144),
    ("<I", DESCRIPTOR + 8, 2, "TDVF descriptor Version", DESCRIPTOR + 8, 2, 1),
    ("<I", DESCRIPTOR + 12, 5, "TDVF descriptor Length", DESCRIPTOR + 4, 144, 176),
    ("<I8xI", DESCRIPTOR + 4, (48, 1), "TDVF descriptor Version", DESCRIPTOR + 8, 0, 1),
    ("<III", DESCRIPTOR + 4, (48, 1, 1), "TDVF descriptor NumberOfSectionEntry", DESCRIPTOR + 12, 1, "2 to 64"),
    ("<III", DESCRIPTOR + 4, (16 + 32 * 65, 1, 65), "TDVF descriptor NumberOfSectionEntry", DESCRIPTOR + 12, 65,
     "2 to 64"),
    ("<I", SECTION[0], 0x1001, "TDVF section 0 DataOffset", SECTION[0], "0x1001 + 0x7000",
     "a range inside the image of 0x8000 bytes"),
    ("<I", SECTION[1] + 4, 0x1001, "TDVF section 1 MemoryDataSize", SECTION[1] + 16, "0x1000",
     "at least RawDataSize 0x1001"),
    ("<I", SECTION[1] + 4, 0, "TDVF section 1 RawDataSize", SECTION[1] + 4, "0x0", "data"),
    ("<I", SECTION[2] + 4, 1, "TDVF section 2 RawDataSize", SECTION[2] + 4, "0x1", "0"),
    ("<Q", SECTION[2] + 8, 0x81_0800, "TDVF section 2 MemoryAddress", SECTION[2] + 8, "0x810800 + 0x10000",
     "whole 4 KiB pages"),
    ("<Q", SECTION[2] + 16, 0x1_0800, "TDVF section 2 MemoryAddress", SECTION[2] + 8, "0x810000 + 0x10800",
     "whole 4 KiB pages"),
    ("<Q", SECTION[2] + 16, 0, "TDVF section 2 MemoryAddress", SECTION[2] + 8, "0x810000 + 0x0",
     "whole 4 KiB pages"),
    ("<Q", SECTION[2] + 8, 0xFFFF_1000, "TDVF section 2 MemoryAddress", SECTION[2] + 8, "0xffff1000 + 0x10000",
     "an end up to 4 GiB"),
    ("<Q", SECTION[2] + 8, (1 << 64) - 0x1_0000, "TDVF section 2 MemoryAddress", SECTION[2] + 8,
     "0xffffffffffff0000 + 0x10000", "an end up to 4 GiB"),
    ("<Q", SECTION[2] + 8, 0x80_A000, "TDVF sections", DESCRIPTOR,
     "TempMem at 0x80a000 over TD_HOB [0x809000, 0x80b000)", "no overlap"),
    ("<I", SECTION[2] + 24, 9, "TDVF section 2 Type", SECTION[2] + 24, 9, "0 to 8"),
    ("<I", SECTION[2] + 24, 4, "TDVF section 2 Attributes", SECTION[2] + 28, "0x0", "PAGE.AUG, bit 1"),
    ("<II", SECTION[2] + 24, (4, 2), "TDVF section 2 Type", SECTION[2] + 24, 4, "BFV 0, CFV 1, TD_HOB 2 or TempMem 3"),
    ("<I", SECTION[2] + 24, 7, "TDVF section 2 Type", SECTION[2] + 24, 7, "BFV 0, CFV 1, TD_HOB 2 or TempMem 3"),
    ("<I", SECTION[3] + 24, 3, "TDVF sections of type TD_HOB", DESCRIPTOR, 0, 1),
    ("<I", SECTION[2] + 24, 2, "TDVF sections of type TD_HOB", DESCRIPTOR, 2, 1),
]  # fmt: skip


@pytest.mark.parametrize("form, offset, value, what, at, found, expected", FALSIFIED)
def test_a_false_field_is_refused(tdvf_image, form, offset, value, what, at, found, expected):
    """Each field that a host would refuse is refused, with its place, what stands there, and what may."""
    image = tdvf_image(ROWS)
    struct.pack_into(form, image, offset, *(value if isinstance(value, tuple) else (value,)))
    with pytest.raises(FormatError) as refused:
        parse_tdvf(bytes(image))
    error = refused.value
    assert (error.what, error.at, error.found, error.expected) == (what, at, found, expected)


@pytest.mark.parametrize(
    "form, offset, value",
    [("<I", SECTION[0] + 28, 0xFFFF_FFFF), ("<Q", SECTION[3] + 8, 0x80_E000), ("<Q", SECTION[2] + 16, 0x2000)],
)
def test_other_values_are_taken_as_they_are(tdvf_image, form, offset, value):
    """Attributes, and addresses and sizes that overlap nothing, are the firmware's own business."""
    image = tdvf_image(ROWS)
    struct.pack_into(form, image, offset, value)
    assert value in {number for section in parse_tdvf(bytes(image)).sections for number in fields(section)}


@pytest.mark.parametrize("count", [0, 1, 15, 16, 47])
def test_metadata_at_the_end_of_the_image_is_cut_off(tdvf_image, count):
    """Metadata that does not fit between its offset and the end of the image is refused where it stops."""
    image = tdvf_image(ROWS)
    at = SIZE - count
    struct.pack_into("<I", image, ENTRY_END - 22, count)
    image[at:] = struct.pack("<4sIII", b"TDVF", 16 + 64, 1, 2).ljust(count, b"\0")[:count]
    with pytest.raises(FormatError):
        parse_tdvf(bytes(image))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    """Bytes without metadata are a FormatError, whatever they are."""
    with pytest.raises(FormatError):
        parse_tdvf(data)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_table_is_walked_to_its_end(data, total):
    """A footer behind any bytes gives a FormatError, never another one and never a loop without end."""
    footer = struct.pack("<H", total) + UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    with pytest.raises(FormatError):
        parse_tdvf(data + footer + bytes(0x20))


places = st.integers(DESCRIPTOR, SECTION[-1] + 31) | st.integers(ENTRY_END - 50, SIZE - 1)


@given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, SIZE))
def test_a_mutated_image_gives_sections_or_a_format_error(tdvf_image, changes, cut):
    """Changed bytes and a missing head leave sections that obey every rule, or a FormatError."""
    image = tdvf_image(ROWS)
    for place, value in changes:
        image[place] = value
    data = bytes(image[cut if cut < DESCRIPTOR else 0 :])
    try:
        tdvf = parse_tdvf(data)
    except FormatError as error:
        assert 0 <= error.at <= len(data)
        return
    for section in tdvf.sections:
        assert section.address % 0x1000 == section.memory_size % 0x1000 == 0
        assert section.raw_size <= section.memory_size
        assert section.end <= 1 << 32
        assert len(tdvf.data(section)) == section.raw_size


def test_debian_ovmf_has_its_six_sections(exact_debian_ovmf):
    """Debian's OVMF asks for code, variables, heap, mailbox, HOB list and page tables, in this order."""
    tdvf = parse_tdvf(exact_debian_ovmf.read_bytes())
    assert [fields(section) for section in tdvf.sections] == [
        (0x20000, 0x1E0000, 0xFFE20000, 0x1E0000, 0, 1),
        (0x0, 0x20000, 0xFFE00000, 0x20000, 1, 0),
        (0x0, 0x0, 0x810000, 0x10000, 3, 0),
        (0x0, 0x0, 0x80B000, 0x2000, 3, 0),
        (0x0, 0x0, 0x809000, 0x2000, 2, 0),
        (0x0, 0x0, 0x800000, 0x6000, 3, 0),
    ]
    in_ram = [s for s in tdvf.sections if s.type not in (SectionType.BFV, SectionType.CFV)]
    assert in_ram == [s for s in BUILT_IN.sections if s.type not in (SectionType.BFV, SectionType.CFV)]


def test_any_ovmf_of_debian_can_be_parsed(debian_ovmf):
    """Another version of the package has one HOB list, code up to 4 GiB, and no overlap."""
    tdvf = parse_tdvf(debian_ovmf.read_bytes())
    assert len(tdvf.of_type(SectionType.TD_HOB)) == 1
    assert max(section.end for section in tdvf.of_type(SectionType.BFV)) == 1 << 32
