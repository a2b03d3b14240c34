"""Calling UEFI from the stub: through the function pointers in the tables, with arguments in guest memory.

Source: drivers/firmware/efi/libstub/{efi-stub-helper,mem,alignedmem}.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from firmware.efi_types import AllocateType, EfiMemoryType, EfiStatus, guid_bytes
from firmware.memory_descriptor import MemoryDescriptor, unpack_map
from firmware.tables import (
    EFI_BOOT_SERVICES,
    EFI_RUNTIME_SERVICES,
    EFI_SYSTEM_TABLE,
    EFI_SYSTEM_TABLE_SIGNATURE,
)
from guest.machine import Machine
from guest.records import GuestRecord
from guest.units import PFN_UP

ULONG_MAX = (1 << 64) - 1
_SCRATCH_SIZE = 512
_SLOTS = 8
_MAX_MAP_SIZE = 1 << 24


class EfiError(Exception):
    """A service answered with an error status; it never leaves the stub."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{status:#x}")


@dataclass(frozen=True, slots=True)
class BootMemmap:
    """``struct efi_boot_memmap``: a memory map in a pool buffer of ``buff_size`` bytes at ``gpa``."""

    gpa: int
    map_size: int
    desc_size: int
    desc_ver: int
    map_key: int
    buff_size: int

    @property
    def nr_desc(self) -> int:
        return self.map_size // self.desc_size


class EfiCalls:
    """The services of the system table at ``system_table``; scratch for arguments lies below RSP."""

    def __init__(self, machine: Machine, system_table: int) -> None:
        self._machine = machine
        self.memory = machine.memory
        self.system_table = GuestRecord(machine.memory, system_table, EFI_SYSTEM_TABLE)
        self._boot = GuestRecord(machine.memory, self.system_table["BootServices"], EFI_BOOT_SERVICES)
        self._runtime = GuestRecord(machine.memory, self.system_table["RuntimeServices"], EFI_RUNTIME_SERVICES)
        self._scratch = machine.regs.rsp - _SCRATCH_SIZE

    def valid(self) -> bool:
        """True if the system table has its signature."""
        return self.system_table["Hdr.Signature"] == EFI_SYSTEM_TABLE_SIGNATURE

    def boot(self, service: str, *args: int) -> int:
        """Call a boot service; returns its status."""
        return self._machine.call(self._boot[service], *args)

    def runtime(self, service: str, *args: int) -> int:
        """Call a runtime service; returns its status."""
        return self._machine.call(self._runtime[service], *args)

    def slot(self, number: int, value: int = 0) -> int:
        """Address of scratch slot ``number`` (8 bytes, below 8), which now holds ``value``."""
        at = self._scratch + 8 * number
        self.memory.write_uint(at, value, 8)
        return at

    def load(self, number: int) -> int:
        """What scratch slot ``number`` holds."""
        return self.memory.read_uint(self._scratch + 8 * number, 8)

    def bytes_at_scratch(self, data: bytes, behind: int = 0) -> int:
        """Store ``data`` after the slots, ``behind`` bytes further on, 256 bytes at most; returns its address."""
        at = self._scratch + 8 * _SLOTS + behind
        self.memory.write(at, data)
        return at

    def allocate_pages(self, size: int, max_address: int = ULONG_MAX) -> int:
        """efi_allocate_pages(): whole pages of EfiLoaderData below ``max_address``. Raises ``EfiError``."""
        at = self.slot(0, max_address)
        kind, data = AllocateType.AllocateMaxAddress, EfiMemoryType.EfiLoaderData
        _check(self.boot("AllocatePages", kind, data, PFN_UP(size), at))
        return self.load(0)

    def allocate_pages_at(self, address: int, size: int) -> bool:
        """AllocatePages() of EfiLoaderData at ``address``; False if that is taken."""
        at = self.slot(0, address)
        kind, data = AllocateType.AllocateAddress, EfiMemoryType.EfiLoaderData
        return self.boot("AllocatePages", kind, data, PFN_UP(size), at) == EfiStatus.EFI_SUCCESS

    def allocate_pool(self, size: int, type: EfiMemoryType = EfiMemoryType.EfiLoaderData) -> int:
        """AllocatePool(). Raises ``EfiError``."""
        _check(self.boot("AllocatePool", type, size, self.slot(0)))
        return self.load(0)

    def free_pool(self, buffer: int) -> None:
        """FreePool()."""
        self.boot("FreePool", buffer)

    def handle_protocol(self, handle: int, guid: UUID) -> int:
        """HandleProtocol(): address of the protocol's structure. Raises ``EfiError``."""
        at = self.bytes_at_scratch(guid_bytes(guid))
        _check(self.boot("HandleProtocol", handle, at, self.slot(0)))
        return self.load(0)

    def get_memory_map(self, slack_slots: int, type: EfiMemoryType, header: int = 0) -> BootMemmap:
        """efi_get_memory_map(): the map in a pool buffer with room for ``slack_slots`` descriptors more.

        ``header`` bytes are left free before it. Raises ``EfiError``.
        """
        needed = self._get_memory_map(0, 0)
        if needed.status != EfiStatus.EFI_BUFFER_TOO_SMALL or needed.desc_size == 0:
            raise EfiError(needed.status)
        buff_size = needed.map_size + needed.desc_size * slack_slots
        if not 0 < buff_size <= _MAX_MAP_SIZE:
            raise EfiError(EfiStatus.EFI_OUT_OF_RESOURCES)
        gpa = self.allocate_pool(header + buff_size, type)
        got = self._get_memory_map(gpa + header, buff_size)
        if got.status != EfiStatus.EFI_SUCCESS:
            self.free_pool(gpa)
            raise EfiError(got.status)
        return BootMemmap(gpa + header, got.map_size, got.desc_size, got.desc_ver, got.map_key, buff_size)

    def refresh_memory_map(self, memmap: BootMemmap) -> BootMemmap:
        """GetMemoryMap() into the same buffer again; nothing may be allocated now. Raises ``EfiError``."""
        got = self._get_memory_map(memmap.gpa, memmap.buff_size)
        _check(got.status)
        return BootMemmap(memmap.gpa, got.map_size, got.desc_size, got.desc_ver, got.map_key, memmap.buff_size)

    def descriptors(self, memmap: BootMemmap) -> list[MemoryDescriptor]:
        """The descriptors of a map in guest memory, in their order."""
        return unpack_map(self.memory.read(memmap.gpa, memmap.map_size), memmap.desc_size, at=memmap.gpa)

    def _get_memory_map(self, buffer: int, room: int) -> _MapAnswer:
        size, key, stride, version = self.slot(1, room), self.slot(2), self.slot(3), self.slot(4)
        status = self.boot("GetMemoryMap", size, buffer, key, stride, version)
        return _MapAnswer(status, self.load(1), self.load(2), self.load(3), self.load(4) & 0xFFFF_FFFF)


@dataclass(frozen=True, slots=True)
class _MapAnswer:
    """What GetMemoryMap() left in its out parameters."""

    status: int
    map_size: int
    map_key: int
    desc_size: int
    desc_ver: int


def _check(status: int) -> None:
    if status != EfiStatus.EFI_SUCCESS:
        raise EfiError(status)
