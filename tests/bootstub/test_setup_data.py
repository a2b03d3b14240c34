"""The setup_data list: nodes in order, and lists that no boot loader made."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from bootstub.setup_data import (
    MAX_LEN,
    MAX_NODES,
    SETUP_DATA,
    SetupData,
    SetupDataType,
    SetupIndirect,
    read_indirect,
    walk_setup_data,
)
from guest.errors import FormatError
from guest.records import field_extents


def node(next_gpa: int, node_type: int, data: bytes = b"", length: int | None = None) -> bytes:
    """A node's bytes, with a length that may lie."""
    return struct.pack("<QII", next_gpa, node_type, len(data) if length is None else length) + data


def memory(content: dict[int, bytes]) -> Callable[[int, int], bytes]:
    """A reader of what stands at a few addresses; elsewhere memory has ended."""

    def read(gpa: int, size: int) -> bytes:
        for start, data in content.items():
            if start <= gpa < start + len(data):
                return data[gpa - start : gpa - start + size]
        return b""

    return read


def test_setup_data_layout() -> None:
    """struct setup_data is next, type, len and then the data."""
    assert field_extents(SETUP_DATA) == {"next": (0, 8), "type": (8, 4), "len": (12, 4)}
    assert SETUP_DATA.sizeof() == 16
    assert [t.value for t in SetupDataType] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0x80000000]


def test_nodes_in_order() -> None:
    """The walk gives the nodes in the order of their links."""
    read = memory({0x5000: node(0x1000, 3, b"rom"), 0x1000: node(0, 1, bytes(40))})
    first, second = walk_setup_data(read, 0x5000)
    assert first == SetupData(0x5000, 0x1000, SetupDataType.SETUP_PCI, 3)
    assert second == SetupData(0x1000, 0, SetupDataType.SETUP_E820_EXT, 40)
    assert (second.data_gpa, second.end) == (0x1010, 0x1038)


def test_no_list() -> None:
    """A head of 0 is an empty list; nothing is read."""
    assert list(walk_setup_data(memory({}), 0)) == []


@pytest.mark.parametrize(
    ("content", "what", "at"),
    [
        ({0x1000: node(0x2000, 0), 0x2000: node(0x1000, 0)}, "setup_data.next", 0x1000),
        ({0x1000: node(0x1000, 0)}, "setup_data.next", 0x1000),
        ({0x1000: node(0, 0)[:15]}, "setup_data.len", 0x100C),
        ({0x2000: b""}, "setup_data.next", 0x1000),
        ({0x1000: node(1 << 52, 0)}, "setup_data.next", 1 << 52),
        ({0x1000: node((1 << 64) - 1, 0)}, "setup_data.next", (1 << 64) - 1),
        (
            {0x1000: node((1 << 52) - 16, 0), (1 << 52) - 16: node(0, 0, length=1)},
            "setup_data.len",
            (1 << 52) - 16,
        ),
        ({0x1000: node(0, 0, length=MAX_LEN + 1)}, "setup_data.len", 0x1000),
        ({0x1000: node(0, 0, length=0xFFFFFFFF)}, "setup_data.len", 0x1000),
    ],
    ids=["loop", "self", "cut", "nowhere", "above", "top", "over-the-top", "long", "longest"],
)
def test_bad_lists(content: dict[int, bytes], what: str, at: int) -> None:
    """A loop, a node outside memory or an absurd length is refused, and the message says where."""
    with pytest.raises(FormatError) as caught:
        list(walk_setup_data(memory(content), 0x1000))
    assert (caught.value.what, caught.value.at) == (what, at)


def test_endless_list() -> None:
    """A list that never ends is refused after MAX_NODES nodes."""
    seen = []
    with pytest.raises(FormatError, match=f"more than {MAX_NODES} nodes"):
        for entry in walk_setup_data(lambda gpa, size: node(gpa + 16, 0), 0x1000):
            seen.append(entry.gpa)
    assert len(seen) == MAX_NODES


def test_last_node_below_the_top() -> None:
    """A node whose data ends with the address space is a good one."""
    top = (1 << 52) - 20
    assert [n.end for n in walk_setup_data(memory({top: node(0, 9, b"seed")}), top)] == [1 << 52]


def test_indirect() -> None:
    """A node of type SETUP_INDIRECT names data elsewhere; other nodes do not."""
    data = struct.pack("<IIQQ", 0x80000002, 0, 0x3000, 0x7000_0000)
    read = memory({0x1000: node(0x2000, 1 << 31, data), 0x2000: node(0, 2, data)})
    assert [read_indirect(read, n) for n in walk_setup_data(read, 0x1000)] == [
        SetupIndirect(0x80000002, 0x3000, 0x7000_0000),
        None,
    ]


@pytest.mark.parametrize(
    "data",
    [b"short", struct.pack("<IIQQ", 0, 0, 1, (1 << 64) - 1), struct.pack("<IIQQ", 0, 0, (1 << 64) - 1, 0x1000)],
    ids=["short", "above", "long"],
)
def test_bad_indirect(data: bytes) -> None:
    """An indirect node that is too short, or names data outside memory, is refused."""
    read = memory({0x1000: node(0, 1 << 31, data)})
    (only,) = walk_setup_data(read, 0x1000)
    with pytest.raises(FormatError):
        read_indirect(read, only)


def test_random_bytes() -> None:
    """Random memory gives nodes or a FormatError, and never much work."""
    rng = random.Random(9)
    for _ in range(300):
        blob = bytearray(rng.randbytes(512))
        for at in range(0, 512, 16):
            blob[at + 1 : at + 8] = bytes(7)
            blob[at + 14 : at + 16] = bytes(2)
        read = memory({0: bytes(blob)})
        try:
            nodes = list(walk_setup_data(read, rng.randrange(512)))
        except FormatError:
            continue
        assert len(nodes) <= 512
