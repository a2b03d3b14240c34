"""EFI_RNG_PROTOCOL as an image finds it."""

from __future__ import annotations

from uuid import UUID

import pytest

from firmware.rng import install_rng, repeating, seeded

SUCCESS = 0
INVALID_PARAMETER, UNSUPPORTED, BUFFER_TOO_SMALL, NOT_READY = (1 << 63 | n for n in (2, 3, 5, 6))
GUID = "3152bca5-eade-433d-862e-c01cdc291f44"
RAW = UUID("e43176d7-b6e8-4827-b784-7ffdc4b68561").bytes_le
GET_INFO, GET_RNG = 0, 8
SCRATCH, ALGORITHM = 0x10_0000, 0x10_0400


def call(efi, function: int, *args: int) -> int:
    """Call a function of the protocol that LocateProtocol() gives."""
    assert efi.call("LocateProtocol", efi.guid(GUID), 0, SCRATCH) == SUCCESS
    this = efi.memory.read_uint(SCRATCH, 8)
    return efi.machine.call(efi.memory.read_uint(this + function, 8), this, *args)


def get(efi, size: int, algorithm: bytes | None = None) -> tuple[int, bytes]:
    """GetRNG(): status and bytes."""
    efi.memory.write(ALGORITHM, algorithm or bytes(16))
    efi.memory.write(SCRATCH + 0x100, bytes(64))
    status = call(efi, GET_RNG, ALGORITHM if algorithm else 0, size, SCRATCH + 0x100)
    return status, efi.memory.read(SCRATCH + 0x100, 64).rstrip(b"\0")


def test_bytes_come_in_order_and_again(efi):
    """Each call goes on where the last one ended, and from the end of the source to its start."""
    install_rng(efi.services, repeating(b"abcdefg"))
    assert get(efi, 3) == (SUCCESS, b"abc")
    assert get(efi, 10) == (SUCCESS, b"defgabcdef")


def test_too_little_and_too_much(efi):
    """No bytes are an invalid parameter, more than a generator has at once are not ready; none are handed out."""
    install_rng(efi.services, repeating(b"abc"))
    assert get(efi, 0) == (INVALID_PARAMETER, b"")
    assert get(efi, 1 << 62) == (NOT_READY, b"")
    assert call(efi, GET_RNG, 0, 8, 0) == INVALID_PARAMETER
    assert get(efi, 1) == (SUCCESS, b"a")


def test_the_algorithm_may_be_left_to_the_firmware_or_be_the_raw_one(efi):
    """A null algorithm and the raw one give bytes of one source; another one is not supported and takes none."""
    install_rng(efi.services, repeating(b"abcdef"))
    assert get(efi, 2) == (SUCCESS, b"ab")
    assert get(efi, 2, bytes(range(16))) == (UNSUPPORTED, b"")
    assert get(efi, 2, RAW) == (SUCCESS, b"cd")


@pytest.mark.parametrize("room, status", [(0, BUFFER_TOO_SMALL), (15, BUFFER_TOO_SMALL), (16, SUCCESS), (99, SUCCESS)])
def test_get_info_lists_the_algorithms(efi, room, status):
    """The size comes back in any case, the list if there is room for it."""
    install_rng(efi.services, repeating(b"abc"))
    size, buffer = SCRATCH + 0x200, SCRATCH + 0x300
    efi.memory.write_uint(size, room, 8)
    efi.memory.write(buffer, bytes(16))
    assert call(efi, GET_INFO, size, buffer) == status
    assert efi.memory.read_uint(size, 8) == 16
    assert efi.memory.read(buffer, 16) == (RAW if status == SUCCESS else bytes(16))


def test_get_info_needs_its_pointers(efi):
    """A null size, and a null list with room for it, are invalid parameters."""
    install_rng(efi.services, repeating(b"abc"))
    assert call(efi, GET_INFO, 0, SCRATCH) == INVALID_PARAMETER
    efi.memory.write_uint(SCRATCH + 0x200, 16, 8)
    assert call(efi, GET_INFO, SCRATCH + 0x200, 0) == INVALID_PARAMETER


def test_a_seed_decides_the_bytes():
    """The same seed, the same bytes; another seed, others."""
    first, again, other = seeded(1), seeded(1), seeded(2)
    assert first(8) + first(8) == again(16)
    assert other(16) != seeded(1)(16)
