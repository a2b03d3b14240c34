"""LoadImage(), StartImage(), Exit() and UnloadImage(), as a boot loader that starts another one calls them."""

from __future__ import annotations

import struct

import pytest

from firmware.load_image import FwCfg, load_image
from guest.errors import GuestPanic
from guest.gates import CallGate

SUCCESS, LOAD_ERROR = 0, 1 << 63 | 1
INVALID_PARAMETER, UNSUPPORTED, OUT_OF_RESOURCES, NOT_FOUND = (1 << 63 | n for n in (2, 3, 9, 14))
LOADED_IMAGE = "5b1b31a1-9562-11d2-8e3f-00a0c969723b"
UNLOAD = 88
ENTRY = 0x1010
SECTIONS = [(0x1800, 0x1000, 0x800, b"k" * 0x800)]


class Loader:
    """A boot loader that was started, and an image that it can load."""

    def __init__(self, efi, pe_image) -> None:
        self.efi = efi
        self.handle = load_image(efi.services, FwCfg(bytes(pe_image(SECTIONS)))).handle
        self.data = bytes(pe_image(SECTIONS, AddressOfEntryPoint=ENTRY, ImageBase=0x200_0000))
        self.source = efi.put(self.data)

    def load(self, **changed: int) -> tuple[int, int]:
        """LoadImage(): status and handle."""
        at = self.efi.word()
        args = {"policy": 0, "parent": self.handle, "path": 0, "source": self.source, "size": len(self.data)}
        return self.efi.call("LoadImage", *(args | changed).values(), at), self.efi.load(at)

    def protocol(self, handle: int) -> int | None:
        """Address of a handle's loaded image protocol."""
        at = self.efi.word()
        status = self.efi.call("HandleProtocol", handle, self.efi.id(LOADED_IMAGE), at)
        return self.efi.load(at) if status == SUCCESS else None

    def runs(self, handle: int, answer) -> None:
        """Let the image's entry point be ``answer``."""
        protocol = self.protocol(handle)
        entry = self.efi.load(protocol + 64) + ENTRY
        self.efi.machine.gates.install(entry, CallGate("entry", 2, answer))


@pytest.fixture
def loader(efi, pe_image):
    return Loader(efi, pe_image)


def test_an_image_is_loaded_from_memory(efi, loader):
    """It lies at its base, and its protocol names its parent, the system table, and where and what it is."""
    status, handle = loader.load()
    assert status == SUCCESS
    found = struct.unpack("<I4xQQQQQI4xQQQIIQ", efi.memory.read(loader.protocol(handle), 96))
    assert found == (0x1000, loader.handle, efi.system_table, 0, 0, 0, 0, 0, 0x200_0000, 0x4000, 1, 2, 0)
    assert efi.memory.read(0x200_1000, 0x800) == b"k" * 0x800


@pytest.mark.parametrize(
    "changed, status",
    [
        ({"parent": 0}, INVALID_PARAMETER),
        ({"parent": 0x1234}, INVALID_PARAMETER),
        ({"source": 0}, INVALID_PARAMETER),
        ({"source": 0, "path": 0x1000}, NOT_FOUND),
        ({"size": 0}, LOAD_ERROR),
        ({"size": 0x100}, LOAD_ERROR),
        ({"size": 1 << 62}, LOAD_ERROR),
    ],
)
def test_what_cannot_be_loaded(efi, loader, changed, status):
    """No parent, nothing to load, a path that leads nowhere, bytes that are no image; the map stays."""
    key = efi.key()
    assert loader.load(**changed) == (status, 0)
    assert efi.key() == key


def test_no_room(efi, loader, pe_image):
    """An image that is larger than what is free is out of resources."""
    efi.allocate_pages(2, 2, 0x2_0000, 0x2000_0000)
    efi.allocate_pages(2, 2, 0x2_0000, 0x5000_0000)
    data = bytes(pe_image(SECTIONS, SizeOfImage=1 << 30))
    assert loader.load(source=efi.put(data), size=len(data))[0] == OUT_OF_RESOURCES


def test_an_image_is_started_once_and_its_status_comes_back(efi, loader):
    """The entry point gets handle and system table; when it returns, the image is gone and its memory is free."""
    before, calls = efi.memory_map()[5], []
    _, handle = loader.load()
    loader.runs(handle, lambda *args: calls.append(args) or 42)
    assert efi.call("StartImage", handle, 0, 0) == 42
    assert calls == [(handle, efi.system_table)]
    assert loader.protocol(handle) is None
    assert efi.memory_map()[5] == before
    assert efi.call("StartImage", handle, 0, 0) == INVALID_PARAMETER


def test_exit_comes_back_from_the_depth(efi, loader):
    """Exit() ends the started image, with status and data for who started it."""
    _, handle = loader.load()
    loader.runs(handle, lambda image, table: efi.call("Exit", image, 7, 16, 0x5000))
    size, data = efi.word(), efi.word()
    assert efi.call("StartImage", handle, size, data) == 7
    assert (efi.load(size), efi.load(data)) == (16, 0x5000)
    assert efi.call("Exit", handle, 0, 0, 0) == INVALID_PARAMETER


def test_only_the_running_image_can_exit(efi, loader):
    """While another image runs, its parent cannot; the running one goes on."""
    _, handle = loader.load()
    loader.runs(handle, lambda image, table: efi.call("Exit", loader.handle, 7, 0, 0))
    assert efi.call("StartImage", handle, 0, 0) == INVALID_PARAMETER


def test_an_image_that_was_not_started_goes_by_exit(efi, loader):
    """Exit() of it is UnloadImage()."""
    _, handle = loader.load()
    assert efi.call("Exit", handle, 0, 0, 0) == SUCCESS
    assert loader.protocol(handle) is None


def test_the_first_image_has_nobody_to_come_back_to(efi, loader):
    """Its Exit() ends the guest, with the status by its name."""
    with pytest.raises(GuestPanic) as died:
        efi.call("Exit", loader.handle, LOAD_ERROR, 0, 0)
    assert died.value.text == "the image called Exit with EFI_LOAD_ERROR"


def test_machine_code_is_not_started(efi, loader):
    """An entry point that is no call gate is not supported, and the image stays to be unloaded."""
    _, handle = loader.load()
    assert efi.call("StartImage", handle, 0, 0) == UNSUPPORTED
    assert efi.call("UnloadImage", handle) == SUCCESS
    assert efi.call("UnloadImage", handle) == INVALID_PARAMETER


@pytest.mark.parametrize("answer, gone", [(SUCCESS, True), (UNSUPPORTED, False)])
def test_a_started_image_is_asked_before_it_is_unloaded(efi, loader, answer, gone):
    """Its own function decides; without one it cannot be unloaded."""
    assert efi.call("UnloadImage", loader.handle) == UNSUPPORTED
    efi.memory.write_uint(loader.protocol(loader.handle) + UNLOAD, efi.function(lambda image: answer, 1), 8)
    assert efi.call("UnloadImage", loader.handle) == answer
    assert (loader.protocol(loader.handle) is None) is gone
