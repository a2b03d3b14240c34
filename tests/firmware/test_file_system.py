"""The file system on a device, as an image finds it by its handle."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest

from firmware.file_system import FileSystem

SUCCESS = 0
INVALID_PARAMETER, UNSUPPORTED, BUFFER_TOO_SMALL, DEVICE_ERROR, WRITE_PROTECTED, NOT_FOUND = (
    1 << 63 | n for n in (2, 3, 5, 7, 8, 14)
)
GUID = "964e5b22-6459-11d2-8e39-00a0c969723b"
FILE_INFO = UUID("09576e92-6d3f-11d2-8e39-00a0c969723b").bytes_le
OPEN, CLOSE, DELETE, READ, WRITE, GET_POSITION, SET_POSITION, GET_INFO = range(8, 72, 8)
SLOT, NAME, BUFFER = 0x10_0000, 0x10_0100, 0x10_0800
FILES = {"initrd": bytes(range(100)), "empty": b""}


@pytest.fixture
def root(efi) -> int:
    """The root directory of a device with two files."""
    device = efi.services.new_object()
    FileSystem(efi.services, FILES).install(device)
    assert efi.call("HandleProtocol", device, efi.guid(GUID), SLOT) == SUCCESS
    volume = efi.load(SLOT)
    assert efi.machine.call(efi.load(volume + 8), volume, SLOT) == SUCCESS
    return efi.load(SLOT)


def call(efi, file: int, function: int, *args: int) -> int:
    return efi.machine.call(efi.load(file + function), file, *args)


def opened(efi, root: int, name: str, mode: int = 1) -> tuple[int, int]:
    """Open(): status and handle."""
    efi.memory.write(NAME, (name + "\0").encode("utf-16-le"))
    return call(efi, root, OPEN, SLOT, NAME, mode, 0), efi.load(SLOT)


def read(efi, file: int, size: int) -> tuple[int, bytes]:
    efi.memory.write_uint(SLOT, size, 8)
    status = call(efi, file, READ, SLOT, BUFFER)
    return status, efi.memory.read(BUFFER, efi.load(SLOT)) if status == SUCCESS else b""


def test_a_file_in_pieces(efi, root):
    """Read() goes on where the last one ended, gives what there is, and nothing at the end."""
    status, file = opened(efi, root, "\\initrd")
    assert status == SUCCESS
    assert [read(efi, file, 60) for _ in range(3)] == [
        (SUCCESS, FILES["initrd"][:60]),
        (SUCCESS, FILES["initrd"][60:]),
        (SUCCESS, b""),
    ]
    assert call(efi, file, SET_POSITION, 98) == SUCCESS
    assert read(efi, file, 1 << 62) == (SUCCESS, b"bc")
    assert (call(efi, file, SET_POSITION, (1 << 64) - 1), call(efi, file, GET_POSITION, SLOT)) == (SUCCESS, SUCCESS)
    assert efi.load(SLOT) == 100
    assert (call(efi, file, SET_POSITION, 101), read(efi, file, 1)) == (SUCCESS, (DEVICE_ERROR, b""))
    assert (call(efi, file, CLOSE), call(efi, file, CLOSE), read(efi, file, 1)[0]) == (
        SUCCESS,
        INVALID_PARAMETER,
        INVALID_PARAMETER,
    )


def test_names(efi, root):
    """A file is opened for reading, by its name in the root directory."""
    assert opened(efi, root, "Initrd")[0] == NOT_FOUND
    assert opened(efi, root, "initrd", mode=3)[0] == WRITE_PROTECTED
    assert opened(efi, opened(efi, root, "initrd")[1], "initrd")[0] == UNSUPPORTED
    status, directory = opened(efi, root, ".")
    assert (status, read(efi, directory, 1)[0]) == (SUCCESS, UNSUPPORTED)
    assert opened(efi, directory, "empty")[0] == SUCCESS
    assert call(efi, root, DELETE) == call(efi, root, WRITE, SLOT, BUFFER) == UNSUPPORTED


@pytest.mark.parametrize(("name", "size", "attribute"), [("initrd", 100, 0x01), ("empty", 0, 0x01), ("", 0, 0x11)])
def test_file_info(efi, root, name, size, attribute):
    """EFI_FILE_INFO has the size and the name; a buffer that is too small learns how large it should be."""
    _, file = opened(efi, root, name)
    efi.memory.write(NAME, FILE_INFO)
    efi.memory.write_uint(SLOT, 10, 8)
    assert call(efi, file, GET_INFO, NAME, SLOT, BUFFER) == BUFFER_TOO_SMALL
    assert efi.load(SLOT) == 80 + 2 * len(name) + 2
    assert call(efi, file, GET_INFO, NAME, SLOT, BUFFER) == SUCCESS
    info = efi.memory.read(BUFFER, 80 + 2 * len(name))
    assert struct.unpack_from("<QQQ48xQ", info) == (len(info) + 2, size, size, attribute)
    assert info[80:].decode("utf-16-le") == name
    efi.memory.write(NAME, bytes(16))
    assert call(efi, file, GET_INFO, NAME, SLOT, BUFFER) == UNSUPPORTED
