"""What is derived from one construct declaration."""

from __future__ import annotations

import struct

import construct as c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.errors import FormatError
from guest.records import GuestRecord, RecordCopy, bare, fast, field_extents, offsets, parse

INNER = c.Struct("kind" / c.Int8ul, c.Padding(3), "word" / c.Int32ul)
RECORD = c.Struct("magic" / c.Bytes(4), "hdr" / INNER, c.Padding(4), "long" / c.Int64ul, "tail" / c.Int16ul)
FLAT = c.Struct("a" / c.Int8ul, c.Padding(3), "b" / c.Int32ul, "c" / c.Int64ul, c.Padding(2), "d" / c.Int16ul)


def test_offsets_are_counted_from_the_sizes():
    """Every named field has an offset, nested ones by their dotted name."""
    assert offsets(RECORD) == {"magic": 0, "hdr": 4, "hdr.kind": 4, "hdr.word": 8, "long": 16, "tail": 24}


def test_extents_are_those_of_the_leaves():
    """Offset and size are known of each integer and each run of bytes, not of a nested record."""
    assert field_extents(RECORD) == {
        "magic": (0, 4), "hdr.kind": (4, 1), "hdr.word": (8, 4), "long": (16, 8), "tail": (24, 2)
    }  # fmt: skip


def test_a_name_is_no_part_of_a_construct():
    """bare() is the construct behind its names."""
    assert bare("a" / ("b" / INNER)) is INNER
    assert bare(INNER) is INNER
    assert offsets("named" / INNER) == offsets(INNER)


def test_a_field_is_read_and_written_alone(bench):
    """A field of a record in memory is its own bytes, little endian, and no others."""
    record = GuestRecord(bench.memory, 0x1000, RECORD)
    record["hdr.word"] = 0x11223344
    record["tail"] = 0xABCD
    expected = bytes(8) + b"\x44\x33\x22\x11" + bytes(12) + b"\xcd\xab"
    assert bench.physical.read(0x1000, RECORD.sizeof()) == expected
    assert (record["hdr.word"], record["tail"], record["long"]) == (0x11223344, 0xABCD, 0)
    assert bench.memory.writes == [(0, 0x1008, 0x100C), (0, 0x1018, 0x101A)]


@given(st.binary(min_size=RECORD.sizeof(), max_size=RECORD.sizeof()))
def test_a_copy_of_a_record_reads_as_the_record_does(make_bench, data):
    """Every field of the copied bytes has the value that it has in memory."""
    memory = make_bench().memory
    memory.write(0x1000, data)
    record, copy = GuestRecord(memory, 0x1000, RECORD), RecordCopy(data, RECORD)
    assert copy.data == data
    for name in field_extents(RECORD):
        assert copy[name] == record[name]
    with pytest.raises(KeyError):
        copy["hdr"]


def test_a_wrong_name_or_value_changes_nothing(bench):
    """An unknown field is a KeyError, a value that does not fit an OverflowError."""
    record = GuestRecord(bench.memory, 0x1000, RECORD)
    for name in ("hdr", "word", "hdr.none", ""):
        with pytest.raises(KeyError):
            record[name]
        with pytest.raises(KeyError):
            record[name] = 1
    for value in (1 << 16, -1):
        with pytest.raises(OverflowError):
            record["tail"] = value
    assert bench.memory.writes == []


@given(st.binary(min_size=FLAT.sizeof(), max_size=FLAT.sizeof()))
def test_the_fast_form_reads_what_construct_reads(data):
    """The struct.Struct has the same size, reads the same values and packs the same bytes."""
    form, names = fast(FLAT)
    assert isinstance(form, struct.Struct)
    values = dict(zip(names, form.unpack(data), strict=True))
    parsed = FLAT.parse(data)
    assert values == {name: parsed[name] for name in ("a", "b", "c", "d")}
    assert form.pack(*values.values()) == FLAT.build(values)


@pytest.mark.parametrize("field", [c.Int32ub, c.Bytes(4), INNER, c.Int32ul[2], c.Int24ul])
def test_the_fast_form_refuses_what_struct_cannot_say(field):
    """A field that is no little-endian integer is a TypeError that names it."""
    with pytest.raises(TypeError, match=r"odd: \w+ has no struct format"):
        fast(c.Struct("good" / c.Int8ul, "odd" / field))


@pytest.mark.parametrize(
    "length, field, at, found, expected",
    [(0, "magic", 0, 0, 4), (3, "magic", 0, 3, 4), (4, "hdr.kind", 4, 0, 1), (11, "hdr.word", 8, 3, 4),
     (20, "long", 16, 4, 8), (25, "tail", 24, 1, 2)],
)  # fmt: skip
def test_too_few_bytes_are_reported_with_field_and_address(length, field, at, found, expected):
    """Short input names the field that is cut off, where it starts, and how many bytes are there."""
    with pytest.raises(FormatError) as refused:
        parse(RECORD, "rec", bytes(length), at=0x9000, source="the test")
    error = refused.value
    assert (error.what, error.at, error.source) == (f"rec.{field}", 0x9000 + at, "the test")
    assert (error.found, error.expected) == (f"{found} bytes", f"{expected} bytes")
    assert str(error) == f"rec.{field} at {0x9000 + at:#x}: found {found} bytes, expected {expected} bytes [the test]"


def test_a_wrong_constant_is_reported_with_both_values():
    """A constant that does not match is reported as found and expected."""
    record = c.Struct("size" / c.Int8ul, "sig" / c.Const(b"HdrS"))
    with pytest.raises(FormatError) as refused:
        parse(record, "hdr", b"\1abcd", at=0x200, source="the test")
    error = refused.value
    assert (error.what, error.at, error.found, error.expected) == ("hdr.sig", 0x201, "b'abcd'", "b'HdrS'")


def test_any_other_construct_error_is_a_format_error():
    """Whatever construct has to say, it says it as a FormatError."""
    record = c.Struct("value" / c.Int8ul, c.Check(lambda this: this.value == 1))
    with pytest.raises(FormatError) as refused:
        parse(record, "rec", b"\2", at=0, source="the test")
    assert refused.value.found == "bytes that do not parse"


@given(st.binary(max_size=40))
def test_parse_gives_a_value_or_a_format_error(data):
    """Enough bytes give a value, fewer a FormatError inside the record."""
    if len(data) >= RECORD.sizeof():
        parsed = parse(RECORD, "rec", data, at=0, source="the test")
        assert RECORD.build(parsed)[16:24] == data[16:24]
    else:
        with pytest.raises(FormatError) as refused:
            parse(RECORD, "rec", data, at=0x1000, source="the test")
        assert 0x1000 <= refused.value.at <= 0x1000 + len(data)
