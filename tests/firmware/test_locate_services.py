"""Finding handles by protocol, by device path, and as they come."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware.device_path import first_instance
from tests.firmware.conftest import build_efi, install

SUCCESS = 0
INVALID_PARAMETER, BUFFER_TOO_SMALL, NOT_FOUND = (1 << 63 | n for n in (2, 5, 14))
A, B = (f"{n:08x}-0000-4000-8000-000000000001" for n in (0xA, 0xB))
DEVICE_PATH = "09576e91-6d3f-11d2-8e39-00a0c969723b"
ALL, BY_NOTIFY, BY_PROTOCOL = 0, 1, 2
END, END_INSTANCE = b"\x7f\xff\x04\x00", b"\x7f\x01\x04\x00"
NOTIFY_SIGNAL, TPL_CALLBACK = 0x200, 8


def locate(efi, search: int, guid: str | None, key: int = 0, room: int = 0x100) -> tuple[int, list[int]]:
    """LocateHandle(): status and handles."""
    size, buffer = efi.word(room), efi.put(bytes(0x100))
    status = efi.call("LocateHandle", search, efi.id(guid) if guid else 0, key, size, buffer)
    count = efi.load(size) // 8 if status == SUCCESS else 0
    return status, [efi.load(buffer + 8 * n) for n in range(count)]


def node(number: int) -> bytes:
    """A hardware device node that differs from those of other numbers."""
    return struct.pack("<BBHI", 1, 4, 8, number)


# By protocol


def test_handles_by_protocol(efi):
    """Those that carry it, in the order of their making; nobody carries another one."""
    one, other, two = install(efi, A, 1), install(efi, B, 2), install(efi, A, 3)
    assert locate(efi, BY_PROTOCOL, A) == (SUCCESS, [one, two])
    assert locate(efi, BY_PROTOCOL, B) == (SUCCESS, [other])
    assert locate(efi, BY_PROTOCOL, "00000000-0000-0000-0000-000000000001") == (NOT_FOUND, [])
    assert {one, other, two} <= set(locate(efi, ALL, None)[1])


@pytest.mark.parametrize("room", [0, 8, 15])
def test_a_buffer_that_is_too_small_learns_the_size(efi, room):
    """The size of the answer comes back, and nothing is stored."""
    install(efi, A, 1)
    install(efi, A, 2)
    size, buffer = efi.word(room), efi.put(b"\xa5" * 16)
    assert efi.call("LocateHandle", BY_PROTOCOL, efi.id(A), 0, size, buffer) == BUFFER_TOO_SMALL
    assert efi.load(size) == 16
    assert efi.memory.read(buffer, 16) == b"\xa5" * 16


def test_wrong_arguments_of_locate_handle(efi):
    """An unknown search, and null pointers that the search needs."""
    install(efi, A, 1)
    assert locate(efi, 3, A)[0] == locate(efi, BY_PROTOCOL, None)[0] == INVALID_PARAMETER
    assert locate(efi, BY_NOTIFY, A)[0] == locate(efi, BY_NOTIFY, A, 0x1234)[0] == INVALID_PARAMETER
    assert efi.call("LocateHandle", BY_PROTOCOL, efi.id(A), 0, 0, 0) == INVALID_PARAMETER
    assert efi.call("LocateHandle", BY_PROTOCOL, efi.id(A), 0, efi.word(8), 0) == INVALID_PARAMETER


def test_handles_in_a_buffer(efi):
    """LocateHandleBuffer() allocates the answer; without one there is a count of 0 and a null pointer."""
    handles = [install(efi, A, 1), install(efi, A, 2)]
    count, buffer = efi.word(), efi.word()
    assert efi.call("LocateHandleBuffer", BY_PROTOCOL, efi.id(A), 0, count, buffer) == SUCCESS
    assert [efi.load(efi.load(buffer) + 8 * n) for n in range(efi.load(count))] == handles
    assert efi.call("FreePool", efi.load(buffer)) == SUCCESS
    assert efi.call("LocateHandleBuffer", BY_PROTOCOL, efi.id(B), 0, count, buffer) == NOT_FOUND
    assert (efi.load(count), efi.load(buffer)) == (0, 0)
    for args in (
        (BY_PROTOCOL, efi.id(A), 0, 0, buffer),
        (BY_PROTOCOL, efi.id(A), 0, count, 0),
        (9, 0, 0, count, buffer),
    ):
        assert efi.call("LocateHandleBuffer", *args) == INVALID_PARAMETER


def test_locate_protocol(efi):
    """The first handle's interface; a null pointer if nobody carries it."""
    install(efi, A, 0x7100)
    install(efi, A, 0x7200)
    at = efi.word(0xAA)
    assert (efi.call("LocateProtocol", efi.id(A), 0, at), efi.load(at)) == (SUCCESS, 0x7100)
    assert (efi.call("LocateProtocol", efi.id(B), 0, at), efi.load(at)) == (NOT_FOUND, 0)
    assert efi.call("LocateProtocol", 0, 0, at) == efi.call("LocateProtocol", efi.id(A), 0, 0) == INVALID_PARAMETER


# By device path


def find(efi, path: bytes, guid: str = A) -> tuple[int, int, int]:
    """LocateDevicePath(): status, how far the path pointer went, and the handle."""
    node_at = efi.put(path)
    at, device = efi.word(node_at), efi.word()
    status = efi.call("LocateDevicePath", efi.id(guid), at, device)
    return status, efi.load(at) - node_at, efi.load(device)


def device(efi, path: bytes, guid: str = A) -> int:
    """A handle with a device path and a protocol."""
    return install(efi, guid, 0x7000, install(efi, DEVICE_PATH, efi.put(path)))


def test_the_longest_start_wins(efi):
    """Of two handles whose path begins the path, the longer one is found; what is behind it remains."""
    short, long = device(efi, node(1) + END), device(efi, node(1) + node(2) + END)
    assert find(efi, node(1) + node(2) + node(3) + END) == (SUCCESS, 16, long)
    assert find(efi, node(1) + node(2) + END) == (SUCCESS, 16, long)
    assert find(efi, node(1) + node(3) + END) == (SUCCESS, 8, short)
    assert find(efi, node(2) + END) == (NOT_FOUND, 0, 0)
    assert find(efi, END) == (NOT_FOUND, 0, 0)


def test_only_handles_with_the_protocol_count(efi):
    """A longer path without the protocol is passed over, and so is a handle that has no path."""
    short = device(efi, node(1) + END)
    device(efi, node(1) + node(2) + END, B)
    install(efi, A, 1)
    assert find(efi, node(1) + node(2) + END) == (SUCCESS, 8, short)
    assert find(efi, node(1) + END, DEVICE_PATH)[0] == SUCCESS


def test_the_first_instance_of_a_path_counts(efi):
    """A path of several instances is looked for up to the end of the first one."""
    device(efi, node(2) + END)
    first = device(efi, node(1) + END)
    assert find(efi, node(1) + END_INSTANCE + node(2) + END) == (SUCCESS, 8, first)


def test_wrong_arguments_of_locate_device_path(efi):
    """Null pointers, a null path, a node that is too short, and a found handle without a place for it."""
    device(efi, node(1) + END)
    path = efi.put(node(1) + END)
    assert efi.call("LocateDevicePath", 0, efi.word(path), efi.word()) == INVALID_PARAMETER
    assert efi.call("LocateDevicePath", efi.id(A), 0, efi.word()) == INVALID_PARAMETER
    assert efi.call("LocateDevicePath", efi.id(A), efi.word(0), efi.word()) == INVALID_PARAMETER
    assert efi.call("LocateDevicePath", efi.id(A), efi.word(path), 0) == INVALID_PARAMETER
    assert find(efi, b"\x01\x04\x03\x00" + END) == (INVALID_PARAMETER, 0, 0)


def test_a_path_without_an_end_is_none():
    """Nodes that go on for ever are given up after 64 KiB, a node of 64 KiB included."""
    for length in (4, 0xFFFF):
        header = struct.pack("<BBH", 1, 1, length)
        reads: list[int] = []

        def read(gpa: int, size: int, header: bytes = header, reads: list[int] = reads) -> bytes:
            reads.append(size)
            return header if size == 4 else bytes(size)

        assert first_instance(read, 0) is None
        assert sum(reads) < 0x4_0000


PATHS = st.lists(st.integers(1, 2), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.sets(PATHS, max_size=6), PATHS)
def test_paths_of_any_kind(known: set[tuple[int, ...]], wanted: tuple[int, ...]) -> None:
    """Against a model: the longest of the known paths that the wanted one begins with."""
    efi = build_efi()
    handles = {path: device(efi, b"".join(map(node, path)) + END) for path in sorted(known)}
    starts = [path for path in known if wanted[: len(path)] == path]
    best = max(starts, key=len, default=None)
    found = find(efi, b"".join(map(node, wanted)) + END)
    assert found == ((NOT_FOUND, 0, 0) if best is None else (SUCCESS, 8 * len(best), handles[best]))


# As they come


def test_new_interfaces_are_told(efi):
    """The event is signalled for each new interface; each handle is then found once by its registration."""
    told: list[int] = []
    function = efi.function(lambda event, context: told.append(context) or 0)
    event, key = efi.word(), efi.word()
    install(efi, A, 0x7100)
    assert efi.call("CreateEvent", NOTIFY_SIGNAL, TPL_CALLBACK, function, 77, event) == SUCCESS
    assert efi.call("RegisterProtocolNotify", efi.id(A), efi.load(event), key) == SUCCESS
    assert locate(efi, BY_NOTIFY, None, efi.load(key)) == (NOT_FOUND, [])
    one, two = install(efi, A, 0x7200), install(efi, A, 0x7300)
    install(efi, B, 1)
    assert told == [77, 77]
    assert locate(efi, BY_NOTIFY, None, efi.load(key), room=0) == (BUFFER_TOO_SMALL, [])
    assert locate(efi, BY_NOTIFY, None, efi.load(key)) == (SUCCESS, [one])
    at = efi.word()
    assert efi.call("LocateProtocol", efi.id(A), efi.load(key), at) == SUCCESS
    assert efi.load(at) == 0x7300
    assert efi.call("LocateProtocol", efi.id(A), efi.load(key), at) == NOT_FOUND
    efi.call("ReinstallProtocolInterface", two, efi.id(A), 0x7300, 0x7400)
    assert (told[2:], locate(efi, BY_NOTIFY, None, efi.load(key))) == ([77], (SUCCESS, [two]))


def test_what_was_taken_away_is_not_told_any_more(efi):
    """A handle that lost the protocol, and a registration whose event is closed, are gone."""
    event, key = efi.word(), efi.word()
    function = efi.function(lambda event, context: 0)
    efi.call("CreateEvent", NOTIFY_SIGNAL, TPL_CALLBACK, function, 0, event)
    efi.call("RegisterProtocolNotify", efi.id(A), efi.load(event), key)
    handle = install(efi, A, 0x7100)
    efi.call("UninstallProtocolInterface", handle, efi.id(A), 0x7100)
    assert locate(efi, BY_NOTIFY, None, efi.load(key)) == (NOT_FOUND, [])
    assert efi.call("CloseEvent", efi.load(event)) == SUCCESS
    assert locate(efi, BY_NOTIFY, None, efi.load(key)) == (INVALID_PARAMETER, [])


def test_wrong_arguments_of_register(efi):
    """Null pointers and an event that is none."""
    event = efi.word()
    efi.call("CreateEvent", NOTIFY_SIGNAL, TPL_CALLBACK, efi.function(lambda event, context: 0), 0, event)
    for args in ((0, efi.load(event), event), (efi.id(A), 0, event), (efi.id(A), efi.load(event), 0)):
        assert efi.call("RegisterProtocolNotify", *args) == INVALID_PARAMETER
