"""Bringing the kernel in: LoadImage(), the loaded image protocol with the command line, and the initrd.

Source: UEFI 2.10, sections 7.4.1, 9.1 and 13.2; edk2 CoreLoadPeImage() for the choice of the address;
include/linux/efi.h LINUX_EFI_INITRD_MEDIA_GUID for the initrd.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from firmware.boot_services import EfiServices, Image
from firmware.device_path import END_NODE, file_path, first_instance, vendor_media
from firmware.efi_types import (
    EFI_DEVICE_PATH_PROTOCOL_GUID,
    EFI_LOAD_FILE2_PROTOCOL_GUID,
    EFI_LOADED_IMAGE_PROTOCOL_GUID,
    LINUX_EFI_INITRD_MEDIA_GUID,
    QEMU_KERNEL_LOADER_FS_MEDIA_GUID,
    EfiMemoryType,
    EfiStatus,
    guid_bytes,
)
from firmware.pe import PeImage, parse_pe
from firmware.srat import Distances, NodeRange
from firmware.tables import (
    EFI_LOAD_FILE2_PROTOCOL,
    EFI_LOADED_IMAGE_PROTOCOL,
    EFI_LOADED_IMAGE_PROTOCOL_REVISION,
)
from guest.records import GuestRecord
from guest.units import PAGE_SIZE, SZ_1M, round_up


@dataclass(frozen=True, slots=True)
class FwCfg:
    """What the host hands to the firmware beside memory, as QEMU's fw_cfg device does."""

    kernel: bytes
    initrd: bytes = b""
    cmdline: str = ""
    pci_express: bool = True
    """The machine has PCIe configuration space in memory: q35, not pc. A real firmware asks the host bridge."""
    nodes: tuple[NodeRange, ...] = ()
    """NUMA nodes, for the ACPI tables; none is no NUMA."""
    cpus: int = 1
    distances: Distances = ()
    """Between the nodes; none is no SLIT."""


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """Where the kernel's image lies, its entry point, and the handles that name it and the device it came from."""

    handle: int
    device: int
    base: int
    size: int
    entry: int


def load_image(services: EfiServices, fw_cfg: FwCfg) -> LoadedImage:
    """Load the kernel, and install its loaded image protocol with the command line as load options.

    Its device is the one that OVMF makes for files that QEMU hands over (OvmfPkg/QemuKernelLoaderFsDxe).
    """
    image = load_pe(services, fw_cfg.kernel)
    if image is None:
        raise services.machine.panic(f"LoadImage: no room for {_pages_of(parse_pe(fw_cfg.kernel)):#x} bytes")
    handle = install_loaded_image(services, replace(image, started=True), cmdline=fw_cfg.cmdline)
    protocol = services.handles.interfaces(handle)[guid_bytes(EFI_LOADED_IMAGE_PROTOCOL_GUID)]
    record = GuestRecord(services.machine.memory, protocol.address, EFI_LOADED_IMAGE_PROTOCOL)
    device = record["DeviceHandle"] = _install_path(services, vendor_media(QEMU_KERNEL_LOADER_FS_MEDIA_GUID))
    record["FilePath"] = services.arena.put(EfiMemoryType.EfiBootServicesData, file_path("kernel") + END_NODE)
    return LoadedImage(handle, device, image.base, image.size, image.entry)


def load_pe(services: EfiServices, data: bytes) -> Image | None:
    """Copy a PE image to its place; None if there is no room. Raises ``FormatError``.

    It goes to its preferred base if that is at or above 1 MiB and free, else to the highest free address.
    """
    pe = parse_pe(data)
    size = _pages_of(pe)
    code, base = EfiMemoryType.EfiLoaderCode, pe.image_base
    if base < SZ_1M or not services.memory_map.allocate_at(code, base, size):
        found = services.memory_map.allocate(code, size, services.top)
        if found is None:
            return None
        base = found
    services.machine.memory.clear(base, base + size)
    for offset, piece in pe.pieces:
        services.machine.memory.write(base + offset, piece)
    return Image(base, size, pe.size_of_image, base + pe.entry_point)


def install_loaded_image(services: EfiServices, image: Image, cmdline: str = "", parent: int = 0) -> int:
    """A handle with EFI_LOADED_IMAGE_PROTOCOL for ``image``, which ``parent`` loaded, null for the firmware itself."""
    handle = services.new_object()
    protocol = _loaded_image_protocol(services, image, cmdline, parent)
    services.install_protocol(handle, EFI_LOADED_IMAGE_PROTOCOL_GUID, protocol)
    services.images[handle] = image
    return handle


def install_initrd(services: EfiServices, initrd: bytes) -> None:
    """Offer the initrd by LoadFile2 on a handle whose device path is Linux's initrd media GUID.

    Source of the checks: edk2 OvmfPkg/QemuKernelLoaderFsDxe, InitrdLoadFile2().
    """

    def load_file(this: int, path: int, boot_policy: int, size_at: int, buffer: int) -> int:
        memory = services.machine.memory
        if boot_policy:
            return EfiStatus.EFI_UNSUPPORTED
        rest = first_instance(memory.read, path) if path else None
        if size_at == 0 or rest is None:
            return EfiStatus.EFI_INVALID_PARAMETER
        if rest:
            return EfiStatus.EFI_NOT_FOUND
        room = memory.read_uint(size_at, 8)
        memory.write_uint(size_at, len(initrd), 8)
        if buffer == 0 or room < len(initrd):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        memory.write(buffer, initrd)
        return EfiStatus.EFI_SUCCESS

    (gate,) = services.install_gates((("LoadFile", 5),), EfiMemoryType.EfiBootServicesCode, load_file)
    data = EfiMemoryType.EfiBootServicesData
    protocol = services.arena.put(data, EFI_LOAD_FILE2_PROTOCOL.build({"LoadFile": gate}))
    handle = _install_path(services, vendor_media(LINUX_EFI_INITRD_MEDIA_GUID))
    services.install_protocol(handle, EFI_LOAD_FILE2_PROTOCOL_GUID, protocol)


def _pages_of(pe: PeImage) -> int:
    """Bytes of the pages that an image takes."""
    return round_up(pe.size_of_image, PAGE_SIZE)


def _install_path(services: EfiServices, nodes: bytes) -> int:
    """A new handle with the device path of ``nodes``."""
    handle = services.new_object()
    path = services.arena.put(EfiMemoryType.EfiBootServicesData, nodes + END_NODE)
    services.install_protocol(handle, EFI_DEVICE_PATH_PROTOCOL_GUID, path)
    return handle


def _loaded_image_protocol(services: EfiServices, image: Image, cmdline: str, parent: int) -> int:
    """Write EFI_LOADED_IMAGE_PROTOCOL and the load options; returns its address."""
    data = EfiMemoryType.EfiBootServicesData
    options = (cmdline + "\0").encode("utf-16-le") if cmdline else b""
    fields = {
        "Revision": EFI_LOADED_IMAGE_PROTOCOL_REVISION,
        "ParentHandle": parent,
        "SystemTable": services.system_table,
        "DeviceHandle": 0,
        "FilePath": 0,
        "Reserved": 0,
        "LoadOptionsSize": len(options),
        "LoadOptions": services.arena.put(data, options) if options else 0,
        "ImageBase": image.base,
        "ImageSize": image.size_of_image,
        "ImageCodeType": EfiMemoryType.EfiLoaderCode,
        "ImageDataType": EfiMemoryType.EfiLoaderData,
        "Unload": 0,
    }
    return services.arena.put(data, EFI_LOADED_IMAGE_PROTOCOL.build(fields))
