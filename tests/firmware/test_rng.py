"""EFI_RNG_PROTOCOL as an image finds it."""

from __future__ import annotations

from firmware.rng import install_rng

SUCCESS = 0
INVALID_PARAMETER, UNSUPPORTED, NOT_READY = (1 << 63 | n for n in (2, 3, 6))
GUID = "3152bca5-eade-433d-862e-c01cdc291f44"
GET_INFO, GET_RNG = 0, 8
SCRATCH = 0x10_0000


def get(efi, size: int) -> tuple[int, bytes]:
    """GetRNG(): status and bytes, by the protocol that LocateProtocol() gives."""
    assert efi.call("LocateProtocol", efi.guid(GUID), 0, SCRATCH) == SUCCESS
    this = efi.memory.read_uint(SCRATCH, 8)
    efi.memory.write(SCRATCH, bytes(64))
    status = efi.machine.call(efi.memory.read_uint(this + GET_RNG, 8), this, 0, size, SCRATCH)
    return status, efi.memory.read(SCRATCH, 64).rstrip(b"\0")


def test_bytes_come_in_order_and_again(efi):
    """Each call goes on where the last one ended, and from the end of the source to its start."""
    install_rng(efi.services, b"abcdefg")
    assert get(efi, 3) == (SUCCESS, b"abc")
    assert get(efi, 10) == (SUCCESS, b"defgabcdef")


def test_too_little_and_too_much(efi):
    """No bytes are an invalid parameter, more than a generator has at once are not ready; none are handed out."""
    install_rng(efi.services, b"abc")
    assert get(efi, 0) == (INVALID_PARAMETER, b"")
    assert get(efi, 1 << 62) == (NOT_READY, b"")
    assert get(efi, 1) == (SUCCESS, b"a")


def test_get_info_is_not_built(efi):
    """GetInfo() answers EFI_UNSUPPORTED."""
    install_rng(efi.services, b"abc")
    efi.call("LocateProtocol", efi.guid(GUID), 0, SCRATCH)
    this = efi.memory.read_uint(SCRATCH, 8)
    assert efi.machine.call(efi.memory.read_uint(this + GET_INFO, 8), this, SCRATCH, SCRATCH) == UNSUPPORTED
