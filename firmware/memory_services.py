"""Memory allocation services (UEFI 2.10, section 7.2)."""

from __future__ import annotations

from firmware.boot_services import EfiServices, Handler
from firmware.efi_types import AllocateType, EfiMemoryType, EfiStatus
from firmware.memory_descriptor import EFI_MEMORY_DESCRIPTOR_VERSION, pack_map
from guest.units import PAGE_SHIFT, PAGE_SIZE

_NOT_ALLOCATABLE = (
    EfiMemoryType.EfiConventionalMemory,
    EfiMemoryType.EfiPersistentMemory,
    EfiMemoryType.EfiUnacceptedMemoryType,
)
_OEM_RESERVED_MIN = 0x7000_0000
"""Types from here on are those of an OEM, and from 0x80000000 on those of an OS loader (UEFI 2.10, section 7.2.1)."""


class MemoryServices:
    """AllocatePages() to FreePool(), on the firmware's memory map."""

    def __init__(self, services: EfiServices) -> None:
        self._services = services
        self._map = services.memory_map
        self._guest = services.machine.memory

    def handlers(self) -> dict[str, Handler]:
        """The services of this family, by name."""
        return {
            "AllocatePages": self.allocate_pages,
            "FreePages": self.free_pages,
            "GetMemoryMap": self.get_memory_map,
            "AllocatePool": self.allocate_pool,
            "FreePool": self.free_pool,
        }

    def allocate_pages(self, type: int, memory_type: int, pages: int, memory: int) -> int:
        """AllocatePages(): EFI_NOT_FOUND or EFI_OUT_OF_RESOURCES if nothing fits, as edk2 answers, also to 0 pages."""
        if type not in set(AllocateType) or not _is_allocatable(memory_type) or memory == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        size = pages << PAGE_SHIFT
        if type == AllocateType.AllocateAddress:
            done = self._map.allocate_at(memory_type, self._guest.read_uint(memory, 8), size)
            return EfiStatus.EFI_SUCCESS if done else EfiStatus.EFI_NOT_FOUND
        below = self._services.top
        if type == AllocateType.AllocateMaxAddress:
            below = min(self._guest.read_uint(memory, 8) + 1, below)
        address = self._map.allocate(memory_type, size, below) if size else None
        if address is None:
            return EfiStatus.EFI_OUT_OF_RESOURCES
        self._guest.write_uint(memory, address, 8)
        return EfiStatus.EFI_SUCCESS

    def free_pages(self, memory: int, pages: int) -> int:
        """FreePages(): EFI_NOT_FOUND for what AllocatePages() did not give."""
        if memory % PAGE_SIZE or pages == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        done = self._map.free(memory, pages << PAGE_SHIFT)
        return EfiStatus.EFI_SUCCESS if done else EfiStatus.EFI_NOT_FOUND

    def get_memory_map(self, size_at: int, buffer: int, key_at: int, stride_at: int, version_at: int) -> int:
        """GetMemoryMap(): EFI_BUFFER_TOO_SMALL tells the size that is needed."""
        if size_at == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        stride = self._services.descriptor_size
        data = pack_map(self._map.descriptors(), stride)
        room = self._guest.read_uint(size_at, 8)
        if room >= len(data) and buffer == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        self._guest.write_uint(size_at, len(data), 8)
        for at, value, size in (
            (stride_at, stride, 8),
            (version_at, EFI_MEMORY_DESCRIPTOR_VERSION, 4),
            (key_at, self._map.key, 8),
        ):
            if at:
                self._guest.write_uint(at, value, size)
        if room < len(data):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        self._guest.write(buffer, data)
        return EfiStatus.EFI_SUCCESS

    def allocate_pool(self, memory_type: int, size: int, buffer: int) -> int:
        """AllocatePool()."""
        if not _is_allocatable(memory_type) or buffer == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        address = self._services.allocate_pool(memory_type, size)
        if address is None:
            return EfiStatus.EFI_OUT_OF_RESOURCES
        self._guest.write_uint(buffer, address, 8)
        return EfiStatus.EFI_SUCCESS

    def free_pool(self, buffer: int) -> int:
        """FreePool(): EFI_INVALID_PARAMETER for what AllocatePool() did not give."""
        return EfiStatus.EFI_SUCCESS if self._services.free_pool(buffer) else EfiStatus.EFI_INVALID_PARAMETER


def _is_allocatable(memory_type: int) -> bool:
    """Whether a caller may ask for memory of this type."""
    if memory_type >= _OEM_RESERVED_MIN:
        return True
    return memory_type in set(EfiMemoryType) and memory_type not in _NOT_ALLOCATABLE
