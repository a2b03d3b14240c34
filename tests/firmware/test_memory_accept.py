"""The protocols by which an image and the firmware agree on unaccepted memory."""

from __future__ import annotations

import pytest

from firmware.memory_accept import install_memory_accept, install_memory_acceptance
from guest.errors import MemoryFault
from guest.units import SZ_4G

SUCCESS = 0
INVALID_PARAMETER, DEVICE_ERROR = (1 << 63 | n for n in (2, 7))
EDKII_MEMORY_ACCEPT = "38c74800-5590-4db4-a0f3-675d9b8e8026"
SEV_MEMORY_ACCEPTANCE = "c5a010fe-38a7-4531-8a4a-0500d2fd1649"
PAGE, SZ_2M, END = 0x1000, 0x20_0000, 6 << 30
CONVENTIONAL, UNACCEPTED = 7, 15


def call(efi, guid: str, *args: int) -> int:
    """Call the one function of the protocol that LocateProtocol() gives, which is handed itself."""
    at = efi.word()
    assert efi.call("LocateProtocol", efi.id(guid), 0, at) == SUCCESS
    this = efi.load(at)
    return efi.machine.call(efi.load(this), this, *args)


def types(efi) -> list[tuple[int, int, int]]:
    """The map from 4 GiB on: type, start, end."""
    return [(d.type, d.start, d.end) for d in efi.services.memory_map.descriptors() if d.start >= SZ_4G]


@pytest.fixture
def efi(make_efi):
    """Firmware of a TD with 4 GiB, 2 of them unaccepted."""
    return make_efi(unaccepted=True)


# EDKII_MEMORY_ACCEPT_PROTOCOL


def test_a_range_is_accepted_for_the_image(efi):
    """2 MiB pages where they fit, 4 KiB before and behind; then it can be used, and the map has not changed."""
    install_memory_accept(efi.services)
    before, key, done = types(efi), efi.key(), len(efi.lab.accepts())
    start, end = SZ_4G + SZ_2M - PAGE, SZ_4G + 3 * SZ_2M + PAGE
    assert call(efi, EDKII_MEMORY_ACCEPT, start, end - start) == SUCCESS
    expected = [(start, 0, 1), (SZ_4G + SZ_2M, 1, 2), (SZ_4G + 3 * SZ_2M, 0, 1)]
    assert efi.lab.accepts()[done:] == expected
    efi.memory.write(start, bytes(end - start))
    with pytest.raises(MemoryFault):
        efi.memory.write(end, b"x")
    assert (types(efi), efi.key()) == (before, key)


def test_what_is_accepted_already_stays(efi):
    """Single accepted pages in the range keep what is in them, and the rest of the range is accepted."""
    install_memory_accept(efi.services)
    for page in (SZ_4G, SZ_4G + 5 * PAGE):
        assert call(efi, EDKII_MEMORY_ACCEPT, page, PAGE) == SUCCESS
        efi.memory.write(page, b"kept")
    for _ in range(2):
        assert call(efi, EDKII_MEMORY_ACCEPT, SZ_4G, 2 * SZ_2M) == SUCCESS
    assert efi.memory.read(SZ_4G, 4) == efi.memory.read(SZ_4G + 5 * PAGE, 4) == b"kept"
    assert efi.memory.read(SZ_4G + 2 * SZ_2M - 1, 1) == b"\0"


@pytest.mark.parametrize(
    "start, size", [(SZ_4G + 1, PAGE), (SZ_4G, PAGE - 1), ((1 << 64) - PAGE, 2 * PAGE), (1 << 52, PAGE)]
)
def test_a_range_that_is_none(efi, start, size):
    """Parts of pages, and addresses that no guest has."""
    install_memory_accept(efi.services)
    done = efi.lab.accepts()
    assert call(efi, EDKII_MEMORY_ACCEPT, start, size) == INVALID_PARAMETER
    assert efi.lab.accepts() == done


def test_no_pages_are_accepted_with_success(efi):
    """An empty range is accepted without a call."""
    install_memory_accept(efi.services)
    assert call(efi, EDKII_MEMORY_ACCEPT, SZ_4G, 0) == SUCCESS


def test_shared_addresses_are_no_memory(efi):
    """The TDX module refuses an address with the shared bit: a device error."""
    install_memory_accept(efi.services)
    assert call(efi, EDKII_MEMORY_ACCEPT, 1 << 51, PAGE) == DEVICE_ERROR


# OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL


def test_without_the_call_all_memory_is_accepted_at_the_exit(efi):
    """The map changes under the caller: the first call fails, and the second one hands over ordinary memory."""
    install_memory_acceptance(efi.services)
    key = efi.key()
    assert efi.call("ExitBootServices", 0, key) == INVALID_PARAMETER
    assert types(efi) == [(CONVENTIONAL, SZ_4G, END)]
    assert efi.key() != key
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS
    assert efi.lab.host.sept.mapped()
    efi.memory.write(END - PAGE, bytes(PAGE))


def test_with_the_call_memory_stays_as_it_is(efi):
    """The exit succeeds at once, and the map still lists unaccepted memory."""
    install_memory_acceptance(efi.services)
    assert call(efi, SEV_MEMORY_ACCEPTANCE) == SUCCESS
    done = efi.lab.accepts()
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS
    assert types(efi) == [(UNACCEPTED, SZ_4G, END)]
    assert efi.lab.accepts() == done


def test_a_bad_key_accepts_as_well(efi):
    """The firmware does not know yet that the key is stale; a call after that is too late."""
    install_memory_acceptance(efi.services)
    assert efi.call("ExitBootServices", 0, efi.key() + 7) == INVALID_PARAMETER
    assert types(efi) == [(CONVENTIONAL, SZ_4G, END)]


def test_a_descriptor_goes_over_to_the_allocator(efi):
    """What was accepted is listed with the allocator's ranges, before those that it does not own, and can be had."""
    install_memory_acceptance(efi.services)
    before = efi.services.memory_map.descriptors()
    efi.call("ExitBootServices", 0, 0)
    after = efi.services.memory_map.descriptors()
    assert sum(d.pages for d in after) == sum(d.pages for d in before)
    assert [d.type for d in after[-3:]] == [CONVENTIONAL, 0, 11]
    assert efi.services.memory_map.allocate(2, PAGE, END) == END - PAGE
