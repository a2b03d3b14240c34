"""Bringing the kernel, its command line and the initrd in."""

from __future__ import annotations

import struct

import pytest

from firmware.load_image import FwCfg, install_initrd, load_image
from guest.errors import FormatError, GuestPanic
from tests.firmware.conftest import type_at

LOADED_IMAGE = "5b1b31a1-9562-11d2-8e3f-00a0c969723b"
LOAD_FILE2 = "4006c0c1-fcb3-403e-996d-4a6c8724e06d"
DEVICE_PATH = "09576e91-6d3f-11d2-8e39-00a0c969723b"
KERNEL_DEVICE = bytes.fromhex("0403140072f728144ab61e44b8c39ebdd7f893c77fff0400")
"""A vendor media node with OVMF's GUID for files of QEMU's, and the end node."""
SCRATCH = 0x10_0000
SUCCESS = 0
INVALID_PARAMETER, UNSUPPORTED, BUFFER_TOO_SMALL, NOT_FOUND = (1 << 63 | n for n in (2, 3, 5, 14))
END = b"\x7f\xff\x04\x00"
SECTIONS = [(0x1800, 0x1000, 0x800, b"k" * 0x800)]


def loaded_image_of(efi, handle: int) -> tuple[int, ...]:
    """EFI_LOADED_IMAGE_PROTOCOL of a handle, by HandleProtocol()."""
    assert efi.call("HandleProtocol", handle, efi.guid(LOADED_IMAGE), SCRATCH) == SUCCESS
    return struct.unpack("<I4xQQQQQI4xQQQIIQ", efi.memory.read(efi.memory.read_uint(SCRATCH, 8), 96))


def test_the_image_goes_to_its_preferred_base(efi, pe_image):
    """A free base is taken; sections lie at their addresses, all else is zero, whatever was there before."""
    data = bytes(pe_image(SECTIONS, SizeOfImage=0x3800, AddressOfEntryPoint=0x1010))
    efi.memory.write(0x100_0000, b"\xee" * 0x4000)
    image = load_image(efi.services, FwCfg(data))
    assert (image.base, image.size, image.entry) == (0x100_0000, 0x4000, 0x100_1010)
    assert efi.memory.read(0x100_0000, 0x4000) == data[:0x400].ljust(0x1000, b"\0") + (b"k" * 0x800).ljust(
        0x3000, b"\0"
    )
    assert [type_at(efi, address) for address in (0xFF_F000, 0x100_0000, 0x100_3FFF, 0x100_4000)] == [7, 1, 1, 7]


@pytest.mark.parametrize(
    "base", [0, 0x1000, 0xF_F000, 0x80_0000, 0x7FFF_F000, 0x100_0800, 1 << 32, (1 << 64) - 0x1000, (1 << 64) - 1]
)
def test_an_image_that_cannot_have_its_base_goes_to_the_top(efi, pe_image, base):
    """A base below 1 MiB, in use, not RAM, or impossible is replaced by the highest free address."""
    top = max(d.end for d in efi.services.memory_map.descriptors() if d.type == 7)
    image = load_image(efi.services, FwCfg(bytes(pe_image(SECTIONS, ImageBase=base))))
    assert image.base == top - 0x4000
    assert efi.memory.read(image.base + 0x1000, 0x800) == b"k" * 0x800


@pytest.mark.parametrize("base", [0x10_0000, 0x7F_C000])
def test_a_base_may_be_just_inside_free_memory(efi, pe_image, base):
    """1 MiB is the lowest base, and an image may end where somebody else's memory begins."""
    assert load_image(efi.services, FwCfg(bytes(pe_image(SECTIONS, ImageBase=base)))).base == base


def test_an_image_without_room_stops_the_firmware(efi, pe_image):
    """If no free range is large enough, LoadImage gives up."""
    efi.allocate_pages(2, 2, 0x2_0000, 0x2000_0000)
    efi.allocate_pages(2, 2, 0x2_0000, 0x5000_0000)
    data = bytes(pe_image(SECTIONS, SizeOfImage=1 << 30))
    with pytest.raises(GuestPanic) as died:
        load_image(efi.services, FwCfg(data))
    assert died.value.text == "LoadImage: no room for 0x40000000 bytes"


def test_a_kernel_that_is_none_is_refused_before_anything_changes(efi):
    """Bytes that are no PE image are a FormatError, and the map stays."""
    key = efi.key()
    with pytest.raises(FormatError):
        load_image(efi.services, FwCfg(b"\x7fELF"))
    assert efi.key() == key


@pytest.mark.parametrize("cmdline", ["", "console=ttyS0 accept_memory=lazy", "x" * 2047, "root=\u00fc"])
def test_the_loaded_image_has_the_command_line(efi, pe_image, cmdline):
    """The protocol tells base, size, types and the load options: UTF-16 with a terminator, or none."""
    data = bytes(pe_image(SECTIONS, SizeOfImage=0x3800))
    handle = load_image(efi.services, FwCfg(data, cmdline=cmdline)).handle
    (revision, parent, table, device, path, reserved, size, options, base, image_size, code, kind, unload) = (
        loaded_image_of(efi, handle)
    )
    assert (revision, table, base, image_size, code, kind) == (0x1000, efi.system_table, 0x100_0000, 0x3800, 1, 2)
    assert (parent, reserved, unload) == (0, 0, 0)
    assert efi.call("HandleProtocol", device, efi.guid(DEVICE_PATH), SCRATCH) == SUCCESS
    assert efi.memory.read(efi.memory.read_uint(SCRATCH, 8), 24) == KERNEL_DEVICE
    assert efi.memory.read(path, 22) == b"\x04\x04\x12\x00" + "kernel\0".encode("utf-16-le") + b"\x7f\xff\x04\x00"
    if cmdline:
        assert efi.memory.read(options, size) == (cmdline + "\0").encode("utf-16-le")
    else:
        assert (size, options) == (0, 0)


def locate(efi, path: bytes, protocol: str = LOAD_FILE2) -> tuple[int, int, int]:
    """LocateDevicePath(): status, how far the path pointer went, and the handle."""
    at, device, node = SCRATCH, SCRATCH + 8, SCRATCH + 0x100
    efi.memory.write_uint(at, node, 8)
    efi.memory.write_uint(device, 0, 8)
    efi.memory.write(node, path)
    status = efi.call("LocateDevicePath", efi.guid(protocol), at, device)
    return status, efi.memory.read_uint(at, 8) - node, efi.memory.read_uint(device, 8)


INITRD_PATH = bytes.fromhex("0403140027e46855fc683d4fac74ca555231cc687fff0400")
"""A vendor media node with LINUX_EFI_INITRD_MEDIA_GUID, and the end node."""


def load_file(efi, handle: int, room: int, *, null: bool = False) -> tuple[int, int, bytes]:
    """LoadFile() of the handle's LoadFile2: status, size, and 0x40 bytes of the buffer."""
    size, buffer = SCRATCH + 0x200, SCRATCH + 0x1000
    assert efi.call("HandleProtocol", handle, efi.guid(LOAD_FILE2), SCRATCH) == SUCCESS
    this = efi.memory.read_uint(SCRATCH, 8)
    efi.memory.write_uint(size, room, 8)
    efi.memory.write(buffer, b"\xa5" * 0x40)
    rest = SCRATCH + 0x100 + 20
    status = efi.machine.call(efi.memory.read_uint(this, 8), this, rest, 0, size, 0 if null else buffer)
    return status, efi.memory.read_uint(size, 8), efi.memory.read(buffer, 0x40)


def test_the_initrd_is_loaded_by_its_device_path(efi):
    """The handle with Linux's GUID is found by the path, tells the size, and then gives the bytes."""
    initrd = bytes(range(1, 0x31))
    install_initrd(efi.services, initrd)
    status, advanced, handle = locate(efi, INITRD_PATH)
    assert (status, advanced) == (SUCCESS, 20)
    assert handle != 0
    untouched = b"\xa5" * 0x40
    assert load_file(efi, handle, 0, null=True) == (BUFFER_TOO_SMALL, 0x30, untouched)
    assert load_file(efi, handle, 0x2F) == (BUFFER_TOO_SMALL, 0x30, untouched)
    assert load_file(efi, handle, 0x1000, null=True) == (BUFFER_TOO_SMALL, 0x30, untouched)
    assert load_file(efi, handle, 0x30) == (SUCCESS, 0x30, initrd + b"\xa5" * 0x10)
    assert load_file(efi, handle, 0x40) == (SUCCESS, 0x30, initrd + b"\xa5" * 0x10)


@pytest.mark.parametrize(
    "path, policy, size, status",
    [(END, 1, True, UNSUPPORTED), (END, 0, False, INVALID_PARAMETER), (None, 0, True, INVALID_PARAMETER),
     (b"\x01\x01\x02\x00" + END, 0, True, INVALID_PARAMETER), (INITRD_PATH, 0, True, NOT_FOUND)],
)  # fmt: skip
def test_wrong_arguments_of_load_file(efi, path, policy, size, status):
    """A boot policy, null pointers, a path that is none, and a path to a file behind the device."""
    install_initrd(efi.services, b"initrd")
    _, _, handle = locate(efi, INITRD_PATH)
    efi.call("HandleProtocol", handle, efi.guid(LOAD_FILE2), SCRATCH)
    this = efi.load(SCRATCH)
    args = (this, efi.put(path) if path else 0, policy, efi.word(8) if size else 0, 0)
    assert efi.machine.call(efi.load(this), *args) == status


@pytest.mark.parametrize(
    "path, protocol",
    [
        (INITRD_PATH, LOADED_IMAGE),
        (INITRD_PATH[:4] + bytes(16) + INITRD_PATH[20:], LOAD_FILE2),
        (b"\x04\x04" + INITRD_PATH[2:], LOAD_FILE2),
        (b"\x01" + INITRD_PATH[1:], LOAD_FILE2),
        (INITRD_PATH[20:].ljust(20, b"\0"), LOAD_FILE2),
    ],
)
def test_another_path_is_not_found(efi, path, protocol):
    """Another protocol, GUID or kind of node finds no device, and the path pointer stays."""
    install_initrd(efi.services, b"initrd")
    assert locate(efi, path, protocol) == (NOT_FOUND, 0, 0)


def test_without_an_initrd_there_is_no_device(efi):
    """Nothing is found if nothing was offered."""
    assert locate(efi, INITRD_PATH) == (NOT_FOUND, 0, 0)


def test_the_initrd_is_gone_after_exit(efi):
    """LoadFile() is a boot service as well."""
    install_initrd(efi.services, b"initrd")
    _, _, handle = locate(efi, INITRD_PATH)
    efi.call("HandleProtocol", handle, efi.guid(LOAD_FILE2), SCRATCH)
    this = efi.memory.read_uint(SCRATCH, 8)
    load = efi.memory.read_uint(this, 8)
    assert efi.call("ExitBootServices", 0, efi.key()) == SUCCESS
    with pytest.raises(GuestPanic, match="LoadFile called after ExitBootServices"):
        efi.machine.call(load, this, 0, 0, SCRATCH, 0)
