"""The TD HOB list, written and read back, and hostile lists."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware.hob import Resource, build_hob_list, read_hob_list
from guest.errors import FormatError, MemoryFault

GPA = 0x80_9000
HANDOFF = struct.pack("<HHIII5Q", 1, 56, 0, 9, 0, 0, 0, 0, 0, 0)
END = struct.pack("<HHI", 0xFFFF, 8, 0)
PAGE_RULE = "whole pages below 2^52"
PAGES = st.integers(0, 1 << 40)

resources = st.lists(
    st.builds(
        lambda type, a, b: Resource(type, min(a, b) << 12, max(a, b) << 12),
        st.sampled_from([0, 1, 5, 7, 99]),
        PAGES,
        PAGES,
    ),
    max_size=40,
)


def resource_hob(kind: int, start: int, size: int, *, length: int = 48) -> bytes:
    """A resource descriptor HOB."""
    hob = struct.pack("<HHI16sIIQQ", 3, length, 0, bytes(16), kind, 7, start, size)
    return hob[:length].ljust(length, b"\0")


def read_slowly(data: bytes, gpa: int) -> list[tuple[int, int, int, int]]:
    """A reader that trusts its list: (type, attribute, start, length) of each resource."""
    kind, length, _, version, boot_mode, *_, end = struct.unpack_from("<HHIII5Q", data)
    assert (kind, length, version, boot_mode) == (1, 56, 9, 0)
    assert end == gpa + len(data)
    at, out = length, []
    while True:
        kind, length = struct.unpack_from("<HH", data, at)
        if kind == 0xFFFF:
            assert (length, at + 8) == (8, len(data))
            return out
        assert (kind, length) == (3, 48)
        owner, *fields = struct.unpack_from("<16sIIQQ", data, at + 8)
        assert owner == bytes(16)
        out.append(tuple(fields))
        at += length


@pytest.fixture(scope="session")
def guest_with(make_lab):
    """A function that makes a guest's memory with bytes at ``GPA``, in 16 pages that the host added."""

    def build(data: bytes):
        lab = make_lab(1 << 24)
        lab.host.page_add(GPA, data, 0x1_0000, "TD_HOB")
        return lab.machine.memory

    return build


@given(resources)
def test_a_list_is_read_back_as_it_was_written(guest_with, wanted):
    """What the host writes is a list as the specification has it, and the firmware reads the same resources."""
    data = build_hob_list(GPA, wanted)
    assert read_slowly(data, GPA) == [(r.type, 7, r.start, r.end - r.start) for r in wanted]
    assert read_hob_list(guest_with(data), GPA) == wanted


def test_other_hobs_are_passed_over(guest_with):
    """A HOB of an unknown type is skipped by its length, and a longer resource HOB is read."""
    guid = struct.pack("<HHI16s8x", 4, 32, 0, b"g" * 16)
    data = HANDOFF + guid + resource_hob(7, 0x1000, 0x2000, length=56) + guid + END
    assert read_hob_list(guest_with(data), GPA) == [Resource(7, 0x1000, 0x3000)]


HOSTILE = [
    # list, what, offset, found, expected
    (END, "first HOB", 0, 0xFFFF, "handoff (1)"),
    (resource_hob(0, 0, 0x1000) + END, "first HOB", 0, 3, "handoff (1)"),
    (b"", "HOB length", 2, 0, "8 or more, by 8"),
    (HANDOFF, "HOB length", 58, 0, "8 or more, by 8"),
    (HANDOFF + struct.pack("<HHI", 3, 7, 0), "HOB length", 58, 7, "8 or more, by 8"),
    (HANDOFF + struct.pack("<HHI", 3, 50, 0), "HOB length", 58, 50, "8 or more, by 8"),
    (HANDOFF + resource_hob(0, 0x800, 0x1000) + END, "resource HOB", 56, "[0x800, 0x1800)", PAGE_RULE),
    (HANDOFF + resource_hob(0, 0x1000, 0x800) + END, "resource HOB", 56, "[0x1000, 0x1800)", PAGE_RULE),
    (HANDOFF + resource_hob(7, (1 << 52) - 0x1000, 0x2000) + END, "resource HOB", 56,
     "[0xffffffffff000, 0x10000000001000)", PAGE_RULE),
    (HANDOFF + resource_hob(7, (1 << 64) - 0x1000, 0x2000) + END, "resource HOB", 56,
     "[0xfffffffffffff000, 0x10000000000001000)", PAGE_RULE),
    (HANDOFF + resource_hob(0, 0, 0x1000, length=40) + END, "resource HOB.ResourceLength", 96,
     "0 bytes", "8 bytes"),
    (HANDOFF + struct.pack("<HHI", 3, 8, 0) + END, "resource HOB.Owner", 64, "0 bytes", "16 bytes"),
    (HANDOFF + struct.pack("<HHI", 9, 8, 0) * 4096, "HOB list", 0, "no end in 4096 HOBs", "an end HOB"),
]  # fmt: skip


@pytest.mark.parametrize("data, what, offset, found, expected", HOSTILE)
def test_a_hostile_list_is_refused(guest_with, data, what, offset, found, expected):
    """A list that does not follow its layout is refused with the place in guest memory."""
    with pytest.raises(FormatError) as refused:
        read_hob_list(guest_with(data), GPA)
    error = refused.value
    assert (error.what, error.at, error.found, error.expected) == (what, GPA + offset, found, expected)


def test_a_list_that_leaves_memory_kills_the_guest(guest_with):
    """A length that leads out of the pages that were added ends in a memory fault."""
    data = HANDOFF + struct.pack("<HHI", 9, 0xFFF8, 0)
    with pytest.raises(MemoryFault):
        read_hob_list(guest_with(data), GPA)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_give_resources_or_an_error_of_ours(guest_with, data, with_handoff):
    """Whatever the host writes, the firmware has a list, a FormatError, or a memory fault."""
    try:
        found = read_hob_list(guest_with(HANDOFF * with_handoff + data), GPA)
    except (FormatError, MemoryFault):
        return
    assert all(r.start <= r.end <= 1 << 52 for r in found)
