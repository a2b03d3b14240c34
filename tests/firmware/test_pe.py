"""PE32+ images: a writer's, the sample kernel, and hostile ones."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.sample_kernel import sample_bzimage
from firmware.pe import PeImage, parse_pe
from guest.errors import FormatError

SECTIONS = [
    (0x800, 0x1000, 0x800, b"a" * 0x800),
    (0x1800, 0x2000, 0x400, b"b" * 0x400),
    (0x100, 0x3800, 0x200, b"c" * 0x200),
]
COFF, OPTIONAL, TABLE = 0x80, 0x98, 0x108


def test_sections_are_cut_out_of_the_file(pe_image):
    """Headers and sections are cut by size in the file or in memory, whichever is smaller."""
    image = bytes(pe_image(SECTIONS, ImageBase=0x123_4000, AddressOfEntryPoint=0x1234))
    assert parse_pe(image) == PeImage(
        0x123_4000, 0x4000, 0x1234,
        ((0, image[:0x400]), (0x1000, b"a" * 0x800), (0x2000, b"b" * 0x400), (0x3800, b"c" * 0x100)),
    )  # fmt: skip


def test_the_sample_kernel_is_a_pe_image():
    """The sample kernel's headers and its one section come out as they lie in the file."""
    data = sample_bzimage()
    (setup_sects,) = struct.unpack_from("<B", data, 0x1F1)
    (init_size, handover) = struct.unpack_from("<II", data, 0x260)
    setup = (setup_sects + 1) * 512
    image = parse_pe(data)
    assert image.image_base == 0x100_0000
    assert image.entry_point == setup + handover + 0x400
    assert image.size_of_image >= setup + init_size
    assert image.pieces == ((0, data[:setup]), (setup, data[setup:]))


def test_a_section_may_end_where_file_and_image_end(pe_image):
    """The last byte of the file may be the last byte of the image."""
    image = bytes(pe_image([(0x1000, 0x3000, 0x1000, b"z" * 0x1000)]))
    assert parse_pe(image).pieces[1] == (0x3000, b"z" * 0x1000)


def test_96_sections_are_the_most(pe_image):
    """As many sections as the Windows loader takes are taken."""
    image = pe_image([])
    image[0x86:0x88] = struct.pack("<H", 96)
    image += bytes(0x1000)
    assert len(parse_pe(bytes(image)).pieces) == 97


FALSIFIED = [
    # what is stored where, and the error that follows: what, at, found, expected
    ("<2s", 0, b"ZM", "PE image", 0, b"ZM", b"MZ"),
    ("<I", 0x3C, 0xFFFF_FFFF, "COFF header.Signature", 0xFFFF_FFFF, "0 bytes", "4 bytes"),
    ("<I", 0x3C, 0x84, "COFF header Signature", 0x84, b"\x64\x86\x03\0", b"PE\0\0"),
    ("<4s", COFF, b"PE\0\1", "COFF header Signature", COFF, b"PE\0\1", b"PE\0\0"),
    ("<H", COFF + 4, 0x14C, "COFF header Machine", COFF + 4, 0x14C, 0x8664),
    ("<H", OPTIONAL, 0x10B, "optional header Magic", OPTIONAL, 0x10B, 0x20B),
    ("<I", OPTIONAL + 56, 0x3FF, "optional header", OPTIONAL, "SizeOfImage 0x3ff, SizeOfHeaders 0x400",
     "headers in image, up to 1 GiB"),
    ("<I", OPTIONAL + 56, 0x4000_0001, "optional header", OPTIONAL, "SizeOfImage 0x40000001, SizeOfHeaders 0x400",
     "headers in image, up to 1 GiB"),
    ("<I", OPTIONAL + 60, 0, "optional header", OPTIONAL, "SizeOfImage 0x4000, SizeOfHeaders 0x0",
     "headers in image, up to 1 GiB"),
    ("<I", OPTIONAL + 60, 0x1201, "optional header", OPTIONAL, "SizeOfImage 0x4000, SizeOfHeaders 0x1201",
     "headers in image, up to 1 GiB"),
    ("<I", TABLE + 20, 0xA01, "PE section 0", TABLE, "0x800 bytes from 0xa01 to 0x1000",
     "a range inside file and image"),
    ("<I", TABLE + 20, 0xFFFF_FFFF, "PE section 0", TABLE, "0x800 bytes from 0xffffffff to 0x1000",
     "a range inside file and image"),
    ("<I", TABLE + 40 + 12, 0x3C01, "PE section 1", TABLE + 40, "0x400 bytes from 0xc00 to 0x3c01",
     "a range inside file and image"),
    ("<H", COFF + 6, 97, "COFF header NumberOfSections", COFF + 6, 97, "up to 96"),
    ("<H", COFF + 6, 0xFFFF, "COFF header NumberOfSections", COFF + 6, 0xFFFF, "up to 96"),
    ("<H", COFF + 20, 0xFFFF, "PE section 0", OPTIONAL + 0xFFFF, "0 bytes", "8 bytes"),
]  # fmt: skip


@pytest.mark.parametrize("form, offset, value, what, at, found, expected", FALSIFIED)
def test_a_false_field_is_refused(pe_image, form, offset, value, what, at, found, expected):
    """Each field that would lead outside the file or the image is refused, with its place."""
    image = pe_image(SECTIONS)
    assert len(image) == 0x1200
    struct.pack_into(form, image, offset, value)
    with pytest.raises(FormatError) as refused:
        parse_pe(bytes(image))
    error = refused.value
    assert (error.what, error.found, error.expected) == (what, found, expected)
    assert error.at == at


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    """Bytes that are no image are a FormatError, also behind the right magic."""
    for image in (data, b"MZ" + data):
        with pytest.raises(FormatError):
            parse_pe(image)


header_places = st.integers(0x80, 0x180) | st.integers(0x3C, 0x3F)


@given(st.lists(st.tuples(header_places, st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 0x1200))
def test_a_mutated_image_gives_pieces_or_a_format_error(pe_image, changes, cut):
    """Changed headers and a missing tail leave pieces that lie inside the image, or a FormatError."""
    data = pe_image(SECTIONS)
    for place, value in changes:
        data[place] = value
    data = bytes(data[:cut]) if cut > 0x180 else bytes(data)
    try:
        image = parse_pe(data)
    except FormatError:
        return
    assert sum(len(piece) for _, piece in image.pieces) <= 97 * len(data)
    assert all(offset + len(piece) <= image.size_of_image <= 1 << 30 for offset, piece in image.pieces)
