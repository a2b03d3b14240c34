"""Bringing the kernel in: LoadImage(), the loaded image protocol with the command line, and the initrd.

Source: UEFI 2.10, sections 7.4.1, 9.1 and 13.2; edk2 CoreLoadPeImage() for the choice of the address;
include/linux/efi.h LINUX_EFI_INITRD_MEDIA_GUID for the initrd.
"""

from __future__ import annotations

from dataclasses import dataclass

from firmware.boot_services import EfiServices
from firmware.efi_types import (
    EFI_LOAD_FILE2_PROTOCOL_GUID,
    EFI_LOADED_IMAGE_PROTOCOL_GUID,
    LINUX_EFI_INITRD_MEDIA_GUID,
    EfiMemoryType,
    EfiStatus,
)
from firmware.pe import parse_pe
from firmware.tables import (
    EFI_LOAD_FILE2_PROTOCOL,
    EFI_LOADED_IMAGE_PROTOCOL,
    EFI_LOADED_IMAGE_PROTOCOL_REVISION,
)
from guest.units import PAGE_SIZE, SZ_1M, round_up


@dataclass(frozen=True, slots=True)
class FwCfg:
    """What the host hands to the firmware beside memory, as QEMU's fw_cfg device does."""

    kernel: bytes
    initrd: bytes = b""
    cmdline: str = ""
    pci_express: bool = True
    """The machine has PCIe configuration space in memory: q35, not pc. A real firmware asks the host bridge."""
    cpus: int = 1


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """Where the kernel's image lies, its entry point, and the handle that names it."""

    handle: int
    base: int
    size: int
    entry: int


def load_image(services: EfiServices, fw_cfg: FwCfg) -> LoadedImage:
    """Load the kernel, and install its loaded image protocol with the command line as load options.

    The image goes to its preferred base if that is at or above 1 MiB and free, else to the highest free address.
    """
    image = parse_pe(fw_cfg.kernel)
    size = round_up(image.size_of_image, PAGE_SIZE)
    code, base = EfiMemoryType.EfiLoaderCode, image.image_base
    if base < SZ_1M or not services.memory_map.allocate_at(code, base, size):
        found = services.memory_map.allocate(code, size, services.top)
        if found is None:
            raise services.machine.panic(f"LoadImage: no room for {size:#x} bytes")
        base = found
    services.machine.memory.clear(base, base + size)
    for offset, data in image.pieces:
        services.machine.memory.write(base + offset, data)
    handle = services.new_handle()
    protocol = _loaded_image_protocol(services, base, image.size_of_image, fw_cfg.cmdline)
    services.install_protocol(handle, EFI_LOADED_IMAGE_PROTOCOL_GUID, protocol)
    return LoadedImage(handle, base, size, base + image.entry_point)


def install_initrd(services: EfiServices, initrd: bytes) -> None:
    """Offer the initrd by LoadFile2 on a handle with Linux's initrd media GUID."""

    def load_file(this: int, path: int, boot_policy: int, size_at: int, buffer: int) -> int:
        memory = services.machine.memory
        room = memory.read_uint(size_at, 8)
        memory.write_uint(size_at, len(initrd), 8)
        if buffer == 0 or room < len(initrd):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        memory.write(buffer, initrd)
        return EfiStatus.EFI_SUCCESS

    (gate,) = services.install_gates((("LoadFile", 5),), EfiMemoryType.EfiBootServicesCode, load_file)
    data = EfiMemoryType.EfiBootServicesData
    protocol = services.arena.put(data, EFI_LOAD_FILE2_PROTOCOL.build({"LoadFile": gate}))
    handle = services.new_handle()
    services.install_protocol(handle, EFI_LOAD_FILE2_PROTOCOL_GUID, protocol)
    services.install_protocol(handle, LINUX_EFI_INITRD_MEDIA_GUID, 0)


def _loaded_image_protocol(services: EfiServices, base: int, size: int, cmdline: str) -> int:
    """Write EFI_LOADED_IMAGE_PROTOCOL and the load options; returns its address."""
    data = EfiMemoryType.EfiBootServicesData
    options = (cmdline + "\0").encode("utf-16-le") if cmdline else b""
    fields = {
        "Revision": EFI_LOADED_IMAGE_PROTOCOL_REVISION,
        "ParentHandle": 0,
        "SystemTable": services.system_table,
        "DeviceHandle": 0,
        "FilePath": 0,
        "Reserved": 0,
        "LoadOptionsSize": len(options),
        "LoadOptions": services.arena.put(data, options) if options else 0,
        "ImageBase": base,
        "ImageSize": size,
        "ImageCodeType": EfiMemoryType.EfiLoaderCode,
        "ImageDataType": EfiMemoryType.EfiLoaderData,
        "Unload": 0,
    }
    return services.arena.put(data, EFI_LOADED_IMAGE_PROTOCOL.build(fields))
