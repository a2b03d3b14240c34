"""Maps in raw bytes: EFI descriptors, a boot_params page, and guest memory with either of them in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE, check_size, e820_table_of, parse_e820_table
from bootstub.setup_data import SetupDataType, walk_setup_data
from firmware.memory_descriptor import (
    EFI_MEMORY_DESCRIPTOR,
    EFI_MEMORY_DESCRIPTOR_VERSION,
    OVMF_DESCRIPTOR_SIZE,
    MemoryDescriptor,
    check_descriptors,
    unpack_map,
)
from guest.errors import FormatError
from guest.records import RecordCopy
from guest.units import SZ_16M
from tools.files import file_path
from tools.maps.platform_map import PlatformMap, e820_map, efi_map

BOOT_PARAMS_FORM = "boot_params"
RAW_FORM = "raw EFI memory descriptors"
IMAGE_FORM = "efi_info of boot_params in guest memory"
_MIN_STRIDE = EFI_MEMORY_DESCRIPTOR.sizeof()
_STRIDES = (OVMF_DESCRIPTOR_SIZE, _MIN_STRIDE)
"""What is tried if nobody says: edk2's, and the structure's own size, which kexec-tools uses."""
_LAST_TYPE = 15
_OEM_TYPES = 0x7000_0000


def parse_boot_params(data: bytes, name: str) -> PlatformMap:
    """The e820 table of a boot_params page alone; entries beyond 128 lie elsewhere and are missing."""
    return e820_map(e820_table_of(data), name, BOOT_PARAMS_FORM)


def parse_raw(data: bytes, name: str, stride: int | None = None) -> PlatformMap:
    """A map as GetMemoryMap() leaves it, ``stride`` bytes a descriptor; without one, the one that makes sense."""
    if stride is not None:
        return efi_map(unpack_map(data, stride, at=0), name, RAW_FORM)
    for guess in _STRIDES:
        if len(data) % guess == 0 and _is_sensible(unpack_map(data, guess, at=0)):
            return efi_map(unpack_map(data, guess, at=0), name, RAW_FORM)
    raise FormatError(
        name, found=f"no memory descriptor in {len(data)} bytes, none of {' or '.join(map(str, _STRIDES))} bytes",
        expected="--stride N, a boot_params page, or --boot-params for an image of memory", source=RAW_FORM,
    )  # fmt: skip


def _is_sensible(descriptors: list[MemoryDescriptor]) -> bool:
    try:
        check_descriptors(descriptors, "")
    except FormatError:
        return False
    return all(d.type <= _LAST_TYPE or d.type >= _OEM_TYPES for d in descriptors)


@dataclass(frozen=True, slots=True)
class Image:
    """A file that is guest memory from address 0. Reading beyond its end gives fewer bytes than asked for."""

    file: BinaryIO

    def read(self, gpa: int, size: int) -> bytes:
        if gpa >= 1 << 63:  # no file is so long
            return b""
        self.file.seek(gpa)
        return self.file.read(size)


def read_image(path: str, boot_params: int | bytes) -> PlatformMap:
    """The map that the stub left in guest memory; the e820 table with its extension, if there is no EFI map.

    ``boot_params`` is the page, or its address in the image. Raises ``FormatError`` and ``OSError``.
    """
    with file_path(path).open("rb") as file:
        image = Image(file)
        page = image.read(boot_params, BOOT_PARAMS_SIZE) if isinstance(boot_params, int) else boot_params
        return parse_image(image, page, path)


def parse_image(image: Image, page: bytes, name: str) -> PlatformMap:
    """The map of guest memory whose boot_params page is ``page``. Raises ``FormatError``."""
    check_size(page)
    params = RecordCopy(page, BOOT_PARAMS)
    if params["efi_info.efi_memmap_size"]:
        return efi_map(_memmap(image, params), name, IMAGE_FORM)
    entries = e820_table_of(page)
    for node in walk_setup_data(image.read, params["hdr.setup_data"]):
        if node.type == SetupDataType.SETUP_E820_EXT:
            entries += parse_e820_table(image.read(node.data_gpa, node.len))
    return e820_map(entries, name, BOOT_PARAMS_FORM)


def _memmap(image: Image, params: RecordCopy) -> list[MemoryDescriptor]:
    at = params["efi_info.efi_memmap_hi"] << 32 | params["efi_info.efi_memmap"]
    size, version = params["efi_info.efi_memmap_size"], params["efi_info.efi_memdesc_version"]
    if version != EFI_MEMORY_DESCRIPTOR_VERSION:
        raise FormatError(
            "efi_info.efi_memdesc_version", found=version, expected=EFI_MEMORY_DESCRIPTOR_VERSION, source=IMAGE_FORM
        )
    data = image.read(at, size) if size <= SZ_16M else b""
    if len(data) != size:
        expected = f"{size} bytes of EFI memory map, at most {SZ_16M}"
        raise FormatError("image of memory", at=at, found=f"{len(data)} bytes", expected=expected, source=IMAGE_FORM)
    return unpack_map(data, params["efi_info.efi_memdesc_size"], at=at)
