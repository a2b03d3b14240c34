"""Protocol handler services, called as a boot loader and its drivers call them."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest

from guest.errors import MemoryFault
from tests.firmware.conftest import install

SUCCESS = 0
INVALID_PARAMETER, UNSUPPORTED, NOT_FOUND, ACCESS_DENIED, ALREADY_STARTED = (1 << 63 | n for n in (2, 3, 14, 15, 20))
A, B, C = (f"{n:08x}-0000-4000-8000-000000000001" for n in (0xA, 0xB, 0xC))
DEVICE_PATH = "09576e91-6d3f-11d2-8e39-00a0c969723b"
BY_HANDLE, GET, TEST, BY_CHILD, BY_DRIVER, EXCLUSIVE = (1 << n for n in range(6))
NOWHERE = 0x1234_0000
PATH = bytes.fromhex("0102040001010400") + b"\x7f\xff\x04\x00"


def interface_of(efi, handle: int, guid: str) -> int | None:
    """HandleProtocol(): the interface, None if the handle does not carry it."""
    at = efi.word()
    status = efi.call("HandleProtocol", handle, efi.id(guid), at)
    assert status in (SUCCESS, UNSUPPORTED, INVALID_PARAMETER)
    return efi.load(at) if status == SUCCESS else None


def opened(efi, handle: int, guid: str) -> list[tuple[int, ...]]:
    """OpenProtocolInformation(): agent, controller, attributes, count of each entry."""
    entries, count = efi.word(), efi.word()
    assert efi.call("OpenProtocolInformation", handle, efi.id(guid), entries, count) == SUCCESS
    at = efi.load(entries)
    rows = [struct.unpack("<QQII", efi.memory.read(at + 24 * n, 24)) for n in range(efi.load(count))]
    assert efi.call("FreePool", at) == SUCCESS
    return rows


def open_protocol(efi, handle: int, guid: str, agent: int, controller: int, attributes: int) -> int:
    return efi.call("OpenProtocol", handle, efi.id(guid), efi.word(), agent, controller, attributes)


# Install, handle, reinstall, uninstall


def test_a_null_handle_becomes_a_new_one(efi):
    """Each null handle is replaced by a handle of its own; a handle takes further protocols, null ones too."""
    one, two = install(efi, A, 0x7100), install(efi, A, 0x7200)
    assert 0 not in (one, two) and one != two
    assert install(efi, B, 0, one) == one
    assert [interface_of(efi, one, guid) for guid in (A, B, C)] == [0x7100, 0, None]
    assert interface_of(efi, two, A) == 0x7200


def test_handles_are_of_boot_services_memory(efi):
    """A handle is an address in boot services data."""
    handle = install(efi, A, 0x7100)
    (kind,) = [d.type for d in efi.services.memory_map.descriptors() if d.start <= handle < d.end]
    assert kind == 4


@pytest.mark.parametrize("wrong", ["handle_at", "protocol", "type", "twice", "no handle"])
def test_what_cannot_be_installed(efi, wrong):
    """Null pointers, another type of interface, a second interface of one kind, and a handle that is none."""
    handle = install(efi, A, 0x7100)
    at, guid = efi.word({"twice": handle, "no handle": NOWHERE}.get(wrong, 0)), efi.id(A)
    args = [0 if wrong == "handle_at" else at, 0 if wrong == "protocol" else guid, int(wrong == "type"), 0x7200]
    assert efi.call("InstallProtocolInterface", *args) == INVALID_PARAMETER
    assert interface_of(efi, handle, A) == 0x7100


def test_a_handle_ends_with_its_last_protocol(efi):
    """What was taken away is not found, and a handle without protocols is no handle."""
    handle = install(efi, A, 0x7100)
    install(efi, B, 0x7200, handle)
    assert efi.call("UninstallProtocolInterface", handle, efi.id(A), 0x7100) == SUCCESS
    assert interface_of(efi, handle, A) is None
    assert efi.call("UninstallProtocolInterface", handle, efi.id(B), 0x7200) == SUCCESS
    assert efi.call("HandleProtocol", handle, efi.id(B), efi.word()) == INVALID_PARAMETER


@pytest.mark.parametrize(
    "guid, interface, status", [(A, 0x7200, NOT_FOUND), (B, 0x7100, NOT_FOUND), (None, 0x7100, INVALID_PARAMETER)]
)
def test_what_is_not_installed_cannot_be_taken_away(efi, guid, interface, status):
    """Another structure, another protocol, and none."""
    handle = install(efi, A, 0x7100)
    for name, rest in (("UninstallProtocolInterface", ()), ("ReinstallProtocolInterface", (0x7300,))):
        assert efi.call(name, handle, efi.id(guid) if guid else 0, interface, *rest) == status
        assert efi.call(name, NOWHERE, efi.id(A), 0x7100, *rest) == INVALID_PARAMETER
    assert interface_of(efi, handle, A) == 0x7100


def test_an_interface_is_replaced(efi):
    """ReinstallProtocolInterface() puts another structure into the place of the old one."""
    handle = install(efi, A, 0x7100)
    assert efi.call("ReinstallProtocolInterface", handle, efi.id(A), 0x7100, 0x7200) == SUCCESS
    assert interface_of(efi, handle, A) == 0x7200


@pytest.mark.parametrize("null", [1, 2])
def test_handle_protocol_needs_its_pointers(efi, null):
    """A null protocol or result is an invalid parameter."""
    args = [install(efi, A, 0x7100), efi.id(A), efi.word()]
    args[null] = 0
    assert efi.call("HandleProtocol", *args) == INVALID_PARAMETER


def test_a_pointer_into_unaccepted_memory_is_fatal(efi):
    """The firmware reads and writes through the platform's gate as everybody does."""
    handle = install(efi, A, 0x7100)
    for args in ((handle, 5 << 30, efi.word()), (handle, efi.id(A), 5 << 30)):
        with pytest.raises(MemoryFault):
            efi.call("HandleProtocol", *args)


# Several at once


def test_several_protocols_at_once(efi):
    """InstallMultipleProtocolInterfaces() takes pairs up to a null; its counterpart takes all of them away."""
    at, a, b = efi.word(), efi.id(A), efi.id(B)
    assert efi.call("InstallMultipleProtocolInterfaces", at, a, 0x7100, b, 0, 0) == SUCCESS
    handle = efi.load(at)
    assert [interface_of(efi, handle, guid) for guid in (A, B)] == [0x7100, 0]
    assert efi.call("UninstallMultipleProtocolInterfaces", handle, a, 0x7100, b, 0, 0) == SUCCESS
    assert interface_of(efi, handle, A) is None


def test_no_protocols_at_once(efi):
    """A null behind the handle is an empty list, which is installed and taken away."""
    at = efi.word()
    assert efi.call("InstallMultipleProtocolInterfaces", at, 0) == SUCCESS
    assert efi.load(at) == 0
    assert efi.call("UninstallMultipleProtocolInterfaces", install(efi, A, 1), 0) == SUCCESS


def test_all_protocols_or_none(efi):
    """If one cannot be installed or taken away, the others are as before, and so is the handle."""
    at, a, b = efi.word(), efi.id(A), efi.id(B)
    before = efi.services.handles.carriers(UUID(A).bytes_le)
    assert efi.call("InstallMultipleProtocolInterfaces", at, a, 0x7100, b, 1, a, 0x7200, 0) == INVALID_PARAMETER
    assert efi.load(at) == 0
    assert efi.services.handles.carriers(UUID(A).bytes_le) == before
    handle = install(efi, A, 0x7100)
    assert efi.call("UninstallMultipleProtocolInterfaces", handle, a, 0x7100, b, 1, 0) == INVALID_PARAMETER
    assert interface_of(efi, handle, A) == 0x7100


def test_a_device_path_exists_once(efi):
    """A second handle cannot have the path of the first one, whether at the same address or a copy."""
    path = efi.id(DEVICE_PATH)
    first, again, other = efi.put(PATH), efi.put(PATH), efi.put(PATH[4:])
    calls = [efi.call("InstallMultipleProtocolInterfaces", efi.word(), path, at, 0) for at in (first, again, other)]
    assert calls == [SUCCESS, ALREADY_STARTED, SUCCESS]


def test_wrong_arguments_of_several(efi):
    """A null pointer to the handle, a handle that is none, and arguments that never end."""
    a = efi.id(A)
    assert efi.call("InstallMultipleProtocolInterfaces", 0, a, 1, 0) == INVALID_PARAMETER
    assert efi.call("UninstallMultipleProtocolInterfaces", NOWHERE, a, 1, 0) == INVALID_PARAMETER
    assert efi.call("InstallMultipleProtocolInterfaces", efi.word(), *([a, 1] * 63), a) == INVALID_PARAMETER


# Open and close


def test_who_opens_is_noted(efi):
    """OpenProtocolInformation() lists agent, controller, attributes, and how often the same was opened."""
    handle, agent, controller = install(efi, A, 0x7100), install(efi, B, 1), install(efi, C, 2)
    assert opened(efi, handle, A) == []
    for _ in range(2):
        assert open_protocol(efi, handle, A, agent, 0, GET) == SUCCESS
    assert open_protocol(efi, handle, A, agent, controller, BY_CHILD) == SUCCESS
    assert open_protocol(efi, handle, A, 0, 0, GET) == SUCCESS
    interface_of(efi, handle, A)
    assert opened(efi, handle, A) == [(agent, 0, GET, 2), (agent, controller, BY_CHILD, 1)]
    assert efi.call("CloseProtocol", handle, efi.id(A), agent, controller) == SUCCESS
    assert opened(efi, handle, A) == [(agent, 0, GET, 2)]
    assert efi.call("CloseProtocol", handle, efi.id(A), agent, controller) == NOT_FOUND
    assert efi.call("CloseProtocol", handle, efi.id(A), agent, 0) == SUCCESS
    assert opened(efi, handle, A) == []


def test_open_protocol_gives_the_interface(efi):
    """The structure's address comes back, but a test needs no place for it and leaves it alone."""
    handle, at = install(efi, A, 0x7100), efi.word(0xAA)
    assert efi.call("OpenProtocol", handle, efi.id(A), at, 0, 0, TEST) == SUCCESS
    assert efi.load(at) == 0xAA
    assert efi.call("OpenProtocol", handle, efi.id(A), 0, 0, 0, TEST) == SUCCESS
    assert efi.call("OpenProtocol", handle, efi.id(B), 0, 0, 0, TEST) == UNSUPPORTED
    assert efi.call("OpenProtocol", handle, efi.id(A), at, 0, 0, GET) == SUCCESS
    assert efi.load(at) == 0x7100


@pytest.mark.parametrize(
    "first, second, same, other",
    [
        (BY_DRIVER, BY_DRIVER, ALREADY_STARTED, ACCESS_DENIED),
        (BY_DRIVER, EXCLUSIVE, ACCESS_DENIED, ACCESS_DENIED),
        (EXCLUSIVE, BY_DRIVER, ACCESS_DENIED, ACCESS_DENIED),
        (EXCLUSIVE, EXCLUSIVE, ACCESS_DENIED, ACCESS_DENIED),
        (BY_DRIVER | EXCLUSIVE, BY_DRIVER | EXCLUSIVE, ALREADY_STARTED, ACCESS_DENIED),
        (BY_DRIVER | EXCLUSIVE, BY_DRIVER, ACCESS_DENIED, ACCESS_DENIED),
        (BY_DRIVER, GET, SUCCESS, SUCCESS),
        (EXCLUSIVE, BY_HANDLE, SUCCESS, SUCCESS),
        (BY_CHILD, BY_DRIVER, SUCCESS, SUCCESS),
        (GET, EXCLUSIVE, SUCCESS, SUCCESS),
    ],
)
def test_drivers_exclude_each_other(efi, first, second, same, other):
    """What the second opening by the same agent, and by another one, comes to (UEFI 2.10, section 7.3.9)."""
    controller, one, two = install(efi, C, 2), install(efi, B, 1), install(efi, B, 2)
    for agent, expected in ((one, same), (two, other)):
        handle = install(efi, A, 0x7100)
        assert open_protocol(efi, handle, A, one, controller, first) == SUCCESS
        assert open_protocol(efi, handle, A, agent, controller, second) == expected


@pytest.mark.parametrize("attributes", [0, 3, 0x18, 0x28, 0x40, 0x1_0000_0000])
def test_attributes_that_are_none(efi, attributes):
    """Only the single bits, and BY_DRIVER with EXCLUSIVE, are ways to open."""
    handle = install(efi, A, 0x7100)
    assert open_protocol(efi, handle, A, handle, install(efi, B, 1), attributes) == INVALID_PARAMETER


@pytest.mark.parametrize(
    "attributes, agent, controller", [(BY_DRIVER, 0, 1), (BY_DRIVER, 1, 0), (BY_CHILD, 1, 0), (EXCLUSIVE, 0, 1)]
)
def test_who_opens_must_be_known(efi, attributes, agent, controller):
    """Openings that are kept need handles of those who open; a child is another handle than its parent."""
    handle, other = install(efi, A, 0x7100), install(efi, B, 1)
    args = (agent and other, controller and other, attributes)
    assert open_protocol(efi, handle, A, *args) == INVALID_PARAMETER
    assert open_protocol(efi, handle, A, other, handle, BY_CHILD) == INVALID_PARAMETER


@pytest.mark.parametrize("attributes, kept", [(GET, False), (BY_CHILD, True), (BY_DRIVER, True), (EXCLUSIVE, True)])
def test_what_is_in_use_stays(efi, attributes, kept):
    """An interface that a driver holds is not taken away or replaced until it is closed."""
    handle, agent, controller = install(efi, A, 0x7100), install(efi, B, 1), install(efi, C, 2)
    assert open_protocol(efi, handle, A, agent, controller, attributes) == SUCCESS
    if kept:
        assert efi.call("ReinstallProtocolInterface", handle, efi.id(A), 0x7100, 0x7200) == ACCESS_DENIED
        assert efi.call("UninstallProtocolInterface", handle, efi.id(A), 0x7100) == ACCESS_DENIED
        assert efi.call("CloseProtocol", handle, efi.id(A), agent, controller) == SUCCESS
    assert efi.call("UninstallProtocolInterface", handle, efi.id(A), 0x7100) == SUCCESS


def test_wrong_arguments_of_close_and_information(efi):
    """Null pointers and handles that are none are invalid; a protocol that is not carried is not found."""
    handle, at = install(efi, A, 0x7100), efi.word()
    for args in ((handle, 0, handle, 0), (NOWHERE, at, handle, 0), (handle, at, 0, 0), (handle, at, handle, NOWHERE)):
        assert efi.call("CloseProtocol", *args) == INVALID_PARAMETER
    assert efi.call("CloseProtocol", handle, efi.id(B), handle, 0) == NOT_FOUND
    for null in (1, 2, 3):
        args = [handle, efi.id(A), efi.word(), efi.word()]
        args[null] = 0
        assert efi.call("OpenProtocolInformation", *args) == INVALID_PARAMETER
    assert efi.call("OpenProtocolInformation", handle, efi.id(B), at, efi.word()) == NOT_FOUND


def test_protocols_of_a_handle(efi):
    """ProtocolsPerHandle() gives pointers to GUIDs, in one buffer that FreePool() takes back."""
    handle = install(efi, A, 0x7100)
    install(efi, B, 0x7200, handle)
    before, buffer, count = efi.memory_map()[5], efi.word(), efi.word()
    assert efi.call("ProtocolsPerHandle", handle, buffer, count) == SUCCESS
    pointers = [efi.load(efi.load(buffer) + 8 * n) for n in range(efi.load(count))]
    assert [str(UUID(bytes_le=efi.memory.read(at, 16))) for at in pointers] == [A, B]
    assert efi.call("FreePool", efi.load(buffer)) == SUCCESS
    assert efi.memory_map()[5] == before
    for args in ((NOWHERE, buffer, count), (handle, 0, count), (handle, buffer, 0)):
        assert efi.call("ProtocolsPerHandle", *args) == INVALID_PARAMETER


def test_there_are_no_drivers(efi):
    """ConnectController() finds no driver, and to disconnect none succeeds; a handle that is none is invalid."""
    handle = install(efi, A, 0x7100)
    assert efi.call("ConnectController", handle, 0, 0, 1) == NOT_FOUND
    assert efi.call("DisconnectController", handle, 0, 0) == SUCCESS
    assert efi.call("ConnectController", NOWHERE, 0, 0, 1) == INVALID_PARAMETER
    assert efi.call("DisconnectController", handle, NOWHERE, 0) == INVALID_PARAMETER
