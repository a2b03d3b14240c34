"""Calling UEFI from the stub: through the function pointers in the tables, with arguments in guest memory.

Source: drivers/firmware/efi/libstub/{efi-stub-helper,printk,mem,alignedmem}.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from uuid import UUID

from bootstub.stub_options import CONSOLE_LOGLEVEL_DEFAULT
from firmware.console import EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL
from firmware.efi_types import (
    LINUX_EFI_BOOT_MEMMAP_GUID,
    LOCATE_BY_PROTOCOL,
    AllocateType,
    EfiMemoryType,
    EfiStatus,
    guid_bytes,
)
from firmware.memory_descriptor import MemoryDescriptor, unpack_map
from firmware.tables import (
    EFI_BOOT_SERVICES,
    EFI_CONFIGURATION_TABLE,
    EFI_RUNTIME_SERVICES,
    EFI_SYSTEM_TABLE,
    EFI_SYSTEM_TABLE_SIGNATURE,
    MAX_CONFIGURATION_TABLES,
)
from guest.machine import Machine
from guest.records import GuestRecord
from guest.units import PFN_UP, SZ_1K

ULONG_MAX = (1 << 64) - 1
_SCRATCH_SIZE = 512
_SLOTS = 8
_MAX_MAP_SIZE = 1 << 24
_KERN_ERR, _KERN_WARNING, _KERN_INFO = 3, 4, 6
_PRINT_PIECE = 96
"""Characters that one OutputString() gets: what the scratch has room for."""
_PRINTF_BUF = 256
"""Bytes of efi_printk()'s buffer, the last of them NUL."""
EFI_BOOT_MEMMAP = struct.Struct("<QQI4xQQ")
"""struct efi_boot_memmap before its descriptors: map_size, desc_size, desc_ver, map_key, buff_size."""


class EfiError(Exception):
    """A service answered with an error status; it never leaves the stub."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{status:#x}")


@dataclass(frozen=True, slots=True)
class BootMemmap:
    """``struct efi_boot_memmap``: descriptors in ``buff_size`` bytes at ``gpa``, behind their header in one buffer."""

    gpa: int
    map_size: int
    desc_size: int
    desc_ver: int
    map_key: int
    buff_size: int

    @property
    def nr_desc(self) -> int:
        return self.map_size // self.desc_size

    @property
    def pool(self) -> int:
        """Address of the buffer, which begins with the header."""
        return self.gpa - EFI_BOOT_MEMMAP.size


class EfiCalls:
    """The services of the system table at ``system_table``; scratch for arguments lies below RSP."""

    def __init__(self, machine: Machine, system_table: int) -> None:
        self._machine = machine
        self.memory = machine.memory
        self.system_table = GuestRecord(machine.memory, system_table, EFI_SYSTEM_TABLE)
        self._boot = GuestRecord(machine.memory, self.system_table["BootServices"], EFI_BOOT_SERVICES)
        self._runtime = GuestRecord(machine.memory, self.system_table["RuntimeServices"], EFI_RUNTIME_SERVICES)
        self._scratch = machine.regs.rsp - _SCRATCH_SIZE
        self.loglevel = CONSOLE_LOGLEVEL_DEFAULT

    def valid(self) -> bool:
        """True if the system table has its signature."""
        return self.system_table["Hdr.Signature"] == EFI_SYSTEM_TABLE_SIGNATURE

    def boot(self, service: str, *args: int) -> int:
        """Call a boot service; returns its status."""
        return self._machine.call(self._boot[service], *args)

    def runtime(self, service: str, *args: int) -> int:
        """Call a runtime service; returns its status."""
        return self._machine.call(self._runtime[service], *args)

    def call(self, function: int, *args: int) -> int:
        """Call a protocol's function; returns its status."""
        return self._machine.call(function, *args)

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

    def buffer_below_scratch(self, data: bytes) -> int:
        """Address of 1 KiB below the scratch, which begins with ``data``."""
        at = self._scratch - SZ_1K
        if data:
            self.memory.write(at, data)
        return at

    def allocate_pages(self, size: int, max_address: int = ULONG_MAX) -> int:
        """efi_allocate_pages(): whole pages of EfiLoaderData below ``max_address``. Raises ``EfiError``."""
        at = self.slot(0, max_address)
        kind, data = AllocateType.AllocateMaxAddress, EfiMemoryType.EfiLoaderData
        _check(self.boot("AllocatePages", kind, data, PFN_UP(size), at))
        return self.load(0)

    def allocate_pages_at(self, address: int, size: int, type: EfiMemoryType = EfiMemoryType.EfiLoaderData) -> bool:
        """AllocatePages() at ``address``; False if that is taken."""
        at = self.slot(0, address)
        status = self.boot("AllocatePages", AllocateType.AllocateAddress, type, PFN_UP(size), at)
        return status == EfiStatus.EFI_SUCCESS

    def allocate_pool(self, size: int, type: EfiMemoryType = EfiMemoryType.EfiLoaderData) -> int:
        """AllocatePool(). Raises ``EfiError``."""
        _check(self.boot("AllocatePool", type, size, self.slot(0)))
        return self.load(0)

    def free_pool(self, buffer: int) -> None:
        """FreePool()."""
        self.boot("FreePool", buffer)

    def free_pages(self, at: int, size: int) -> None:
        """efi_free(): pages that efi_allocate_pages() gave."""
        if size:
            self.boot("FreePages", at, PFN_UP(size))

    def handle_protocol(self, handle: int, guid: UUID) -> int:
        """HandleProtocol(): address of the protocol's structure. Raises ``EfiError``."""
        at = self.bytes_at_scratch(guid_bytes(guid))
        _check(self.boot("HandleProtocol", handle, at, self.slot(0)))
        return self.load(0)

    def locate_protocol(self, guid: UUID) -> int | None:
        """LocateProtocol(): address of the protocol's structure, None if nobody has it."""
        at = self.bytes_at_scratch(guid_bytes(guid))
        found = self.boot("LocateProtocol", at, 0, self.slot(0)) == EfiStatus.EFI_SUCCESS
        return self.load(0) if found else None

    def locate_handles(self, guid: UUID) -> None:
        """LocateHandle() by protocol, asking for the size of the answer: what the stub does with none is nothing."""
        at = self.bytes_at_scratch(guid_bytes(guid))
        self.boot("LocateHandle", LOCATE_BY_PROTOCOL, at, 0, self.slot(1), 0)

    def configuration_table(self, guid: UUID) -> int | None:
        """Address of the configuration table ``guid``, None if there is none (get_efi_config_table())."""
        size = EFI_CONFIGURATION_TABLE.sizeof()
        count = min(self.system_table["NumberOfTableEntries"], MAX_CONFIGURATION_TABLES)
        data = self.memory.read(self.system_table["ConfigurationTable"], count * size)
        for at in range(0, len(data), size):
            if data[at : at + 16] == guid_bytes(guid):
                return int.from_bytes(data[at + 16 : at + size], "little")
        return None

    def install_configuration_table(self, guid: UUID, table: int) -> None:
        """InstallConfigurationTable(); the table's buffer is given back if it fails. Raises ``EfiError``."""
        status = self.boot("InstallConfigurationTable", self.bytes_at_scratch(guid_bytes(guid)), table)
        if status != EfiStatus.EFI_SUCCESS:
            self.free_pool(table)
            raise EfiError(status)

    def get_variable(self, name: str, vendor: UUID, size: int = 1, attributes: bool = False) -> tuple[int, int]:
        """GetVariable() into ``size`` bytes, 8 at most: status and value.

        Slot 1 has the size that it says and, if they are wanted, slot 3 the ``attributes``.
        """
        wanted = self.slot(3) if attributes else 0
        status = self._get_variable(name, vendor, size, self.slot(2) if size else 0, wanted)
        return status, self.load(2) & (1 << 8 * size) - 1

    def read_variable(self, name: str, vendor: UUID, at: int, size: int) -> int:
        """GetVariable() into ``size`` bytes at ``at``; the bytes that it has, 0 if it cannot be read or is too long."""
        if not size or self._get_variable(name, vendor, size, at) != EfiStatus.EFI_SUCCESS:
            return 0
        return self.load(1)

    def set_variable(self, name: str, vendor: UUID, attributes: int, data: bytes) -> int:
        """SetVariable() to ``data``, 8 bytes at most, or none, which deletes it; returns the status."""
        at = self.slot(2, int.from_bytes(data, "little")) if data else 0
        return self.runtime("SetVariable", *self._variable_name(name, vendor), attributes, len(data), at)

    def _get_variable(self, name: str, vendor: UUID, size: int, data: int, attributes: int = 0) -> int:
        name_at, vendor_at = self._variable_name(name, vendor)
        return self.runtime("GetVariable", name_at, vendor_at, attributes, self.slot(1, size), data)

    def _variable_name(self, name: str, vendor: UUID) -> tuple[int, int]:
        """Addresses of the name and of its GUID."""
        text = (name + "\0").encode("utf-16-le")
        name_at = self.bytes_at_scratch(text)
        return name_at, self.bytes_at_scratch(guid_bytes(vendor), behind=len(text))

    def info(self, text: str) -> None:
        """efi_info()."""
        self._print(_KERN_INFO, text)

    def warn(self, text: str, end: str = "\n") -> None:
        """efi_warn()."""
        self._print(_KERN_WARNING, f"WARNING: {text}", end)

    def error(self, text: str) -> None:
        """efi_err()."""
        self._print(_KERN_ERR, f"ERROR: {text}")

    def _print(self, level: int, text: str, end: str = "\n") -> None:
        """efi_printk(): a line on the console, if its level is below ``loglevel``; a long one is cut."""
        if level >= self.loglevel:
            return
        console = self.system_table["ConOut"]
        if not console:
            return
        output = GuestRecord(self.memory, console, EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL)["OutputString"]
        line = f"EFI stub: {_cut(text + end)}".replace("\n", "\r\n")
        for at in range(0, len(line), _PRINT_PIECE):
            piece = self.bytes_at_scratch((line[at : at + _PRINT_PIECE] + "\0").encode("utf-16-le"))
            self._machine.call(output, console, piece)

    def get_memory_map(self, slack_slots: int, install: bool = False) -> BootMemmap:
        """efi_get_memory_map(): the map in a pool buffer with room for ``slack_slots`` descriptors more.

        With ``install`` the buffer outlives the stub, as a configuration table. Raises ``EfiError``.
        """
        needed = self._get_memory_map(0, 0)
        if needed.status != EfiStatus.EFI_BUFFER_TOO_SMALL or needed.desc_size == 0:
            raise EfiError(needed.status)
        buff_size = needed.map_size + needed.desc_size * slack_slots
        if not 0 < buff_size <= _MAX_MAP_SIZE:
            raise EfiError(EfiStatus.EFI_OUT_OF_RESOURCES)
        kind = EfiMemoryType.EfiACPIReclaimMemory if install else EfiMemoryType.EfiLoaderData
        pool = self.allocate_pool(EFI_BOOT_MEMMAP.size + buff_size, kind)
        if install:
            self.install_configuration_table(LINUX_EFI_BOOT_MEMMAP_GUID, pool)
        try:
            return self.refresh_memory_map(pool + EFI_BOOT_MEMMAP.size, buff_size)
        except EfiError:
            self.free_pool(pool)
            raise

    def refresh_memory_map(self, gpa: int, buff_size: int) -> BootMemmap:
        """GetMemoryMap() into the buffer at ``gpa``, behind its header. Raises ``EfiError``."""
        got = self._get_memory_map(gpa, buff_size)
        _check(got.status)
        fields = got.map_size, got.desc_size, got.desc_ver, got.map_key, buff_size
        self.memory.write(gpa - EFI_BOOT_MEMMAP.size, EFI_BOOT_MEMMAP.pack(*fields))
        return BootMemmap(gpa, *fields)

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


def _cut(text: str) -> str:
    """What efi_printk()'s buffer keeps of ``text``, in UTF-8; half a surrogate pair is U+FFFD."""
    line = text.encode("utf-16-le", errors="surrogatepass").decode("utf-16-le", errors="replace").encode()
    if len(line) < _PRINTF_BUF:
        return line.decode()
    return line[: _PRINTF_BUF - 1].decode(errors="ignore") + "[Message truncated]\n"
