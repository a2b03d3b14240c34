"""UEFI boot and runtime services, reached through the function pointers of the tables in guest memory.

Arguments and results travel as the specification has them: pointers into guest memory, EFI_STATUS as the return
value. A service that is not built yet answers EFI_UNSUPPORTED, and the trace shows the call.
Source: UEFI 2.10, chapters 7 and 8; behaviour of edk2 where the specification leaves a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from firmware.arena import Arena
from firmware.efi_types import (
    LOCATE_BY_PROTOCOL,
    AllocateType,
    EfiMemoryType,
    EfiStatus,
    guid_bytes,
    status_name,
)
from firmware.memory_descriptor import (
    EFI_MEMORY_DESCRIPTOR,
    EFI_MEMORY_DESCRIPTOR_VERSION,
    OVMF_DESCRIPTOR_SIZE,
    pack_map,
)
from firmware.memory_map import MemoryMap
from firmware.tables import BOOT_SERVICES, EFI_CONFIGURATION_TABLE, EFI_SYSTEM_TABLE, MAX_CONFIGURATION_TABLES, seal
from firmware.virtual_map import VirtualMap, move_runtime_services
from guest.gates import CallGate
from guest.machine import Machine
from guest.records import GuestRecord
from guest.units import PAGE_SHIFT, PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_1M

_GATE_SIZE = 16
_MAX_VIRTUAL_MAP = SZ_1M
_UD2 = b"\x0f\x0b"  # what an emulated CPU finds at a gate: it stops there
_ALLOCATABLE = frozenset(EfiMemoryType) - {
    EfiMemoryType.EfiConventionalMemory,
    EfiMemoryType.EfiPersistentMemory,
    EfiMemoryType.EfiUnacceptedMemoryType,
}
_GONE_AFTER_A_FAILED_EXIT = frozenset(name for name, _ in BOOT_SERVICES) - {"GetMemoryMap", "ExitBootServices", "Exit"}


@dataclass(slots=True)
class EfiServices:
    """State behind the services: the memory map, protocols by handle, and the configuration tables."""

    machine: Machine
    memory_map: MemoryMap
    arena: Arena
    system_table: int = 0
    protocols: dict[int, dict[bytes, int]] = field(default_factory=dict)
    exited: bool = False
    exit_failed: bool = False
    is_virtual: bool = False
    """The runtime services were told their virtual addresses."""
    top: int = PHYSICAL_ADDRESS_END
    """Nothing is allocated from here on."""
    descriptor_size: int = OVMF_DESCRIPTOR_SIZE
    _pools: dict[int, int] = field(default_factory=dict)

    def install_gates(
        self, names: tuple[tuple[str, int], ...], code: EfiMemoryType, handler: Callable[..., int] | None = None
    ) -> list[int]:
        """A call gate in memory of type ``code`` for each (name, number of arguments); returns their addresses.

        ``handler`` answers them; by default the service of that name does. Gates in boot services code answer
        until ExitBootServices().
        """
        at = self.arena.put(code, _UD2.ljust(_GATE_SIZE, b"\xcc") * len(names))
        addresses = [at + _GATE_SIZE * number for number in range(len(names))]
        for address, (name, nargs) in zip(addresses, names, strict=True):
            answer = self._guarded(name, code, handler or self._services().get(name))
            self.machine.gates.install(address, CallGate(name, nargs, answer))
        return addresses

    def new_handle(self) -> int:
        """An EFI_HANDLE: the address of an object that only the firmware looks into, as in edk2 (``hndl``)."""
        return self.arena.put(EfiMemoryType.EfiBootServicesData, b"hndl")

    def install_protocol(self, handle: int, guid: UUID, interface: int) -> None:
        """Let ``handle`` carry the protocol ``guid`` whose structure is at ``interface``."""
        self.protocols.setdefault(handle, {})[guid_bytes(guid)] = interface

    def _guarded(self, name: str, code: EfiMemoryType, handler: Callable[..., int] | None) -> Callable[..., int]:
        """``handler``, refusing to run after ExitBootServices() if it is a boot service.

        A failed call ends most of them too: the firmware may have shut down in part (UEFI 2.10, section 7.4.6).
        """

        def answer(*args: int) -> int:
            if self.exited and code == EfiMemoryType.EfiBootServicesCode:
                raise self.machine.panic(f"boot service {name} called after ExitBootServices")
            if self.exit_failed and name in _GONE_AFTER_A_FAILED_EXIT:
                raise self.machine.panic(f"boot service {name} called after ExitBootServices failed")
            return EfiStatus.EFI_UNSUPPORTED if handler is None else handler(*args)

        return answer

    # Memory: UEFI 2.10, section 7.2

    def allocate_pages(self, type: int, memory_type: int, pages: int, memory: int) -> int:
        """AllocatePages(): EFI_NOT_FOUND or EFI_OUT_OF_RESOURCES if nothing fits, as edk2 answers."""
        guest = self.machine.memory
        if memory_type not in _ALLOCATABLE:
            return EfiStatus.EFI_INVALID_PARAMETER
        size = pages << PAGE_SHIFT
        if type == AllocateType.AllocateAddress:
            done = self.memory_map.allocate_at(memory_type, guest.read_uint(memory, 8), size)
            return EfiStatus.EFI_SUCCESS if done else EfiStatus.EFI_NOT_FOUND
        if type not in (AllocateType.AllocateAnyPages, AllocateType.AllocateMaxAddress) or pages == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        below = self.top
        if type == AllocateType.AllocateMaxAddress:
            below = min(guest.read_uint(memory, 8) + 1, self.top)
        address = self.memory_map.allocate(memory_type, size, below)
        if address is None:
            return EfiStatus.EFI_OUT_OF_RESOURCES
        guest.write_uint(memory, address, 8)
        return EfiStatus.EFI_SUCCESS

    def free_pages(self, memory: int, pages: int) -> int:
        """FreePages(): EFI_NOT_FOUND for what AllocatePages() did not give."""
        if memory % PAGE_SIZE or pages == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        done = self.memory_map.free(memory, pages << PAGE_SHIFT)
        return EfiStatus.EFI_SUCCESS if done else EfiStatus.EFI_NOT_FOUND

    def get_memory_map(self, size_at: int, buffer: int, key_at: int, stride_at: int, version_at: int) -> int:
        """GetMemoryMap(): EFI_BUFFER_TOO_SMALL tells the size that is needed."""
        guest = self.machine.memory
        data = pack_map(self.memory_map.descriptors(), self.descriptor_size)
        room = guest.read_uint(size_at, 8)
        guest.write_uint(size_at, len(data), 8)
        for at, value, size in (
            (stride_at, self.descriptor_size, 8),
            (version_at, EFI_MEMORY_DESCRIPTOR_VERSION, 4),
            (key_at, self.memory_map.key, 8),
        ):
            if at:
                guest.write_uint(at, value, size)
        if room < len(data):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        guest.write(buffer, data)
        return EfiStatus.EFI_SUCCESS

    def allocate_pool(self, memory_type: int, size: int, buffer: int) -> int:
        """AllocatePool(): every pool buffer has pages of its own here."""
        if memory_type not in _ALLOCATABLE:
            return EfiStatus.EFI_INVALID_PARAMETER
        address = self.memory_map.allocate(memory_type, max(size, 1), self.top)
        if address is None:
            return EfiStatus.EFI_OUT_OF_RESOURCES
        self._pools[address] = max(size, 1)
        self.machine.memory.write_uint(buffer, address, 8)
        return EfiStatus.EFI_SUCCESS

    def free_pool(self, buffer: int) -> int:
        """FreePool(): EFI_INVALID_PARAMETER for what AllocatePool() did not give."""
        size = self._pools.pop(buffer, None)
        if size is None:
            return EfiStatus.EFI_INVALID_PARAMETER
        self.memory_map.free(buffer, size)
        return EfiStatus.EFI_SUCCESS

    # Protocols and tables: UEFI 2.10, sections 7.3 and 7.5

    def handle_protocol(self, handle: int, protocol: int, interface: int) -> int:
        """HandleProtocol()."""
        found = self.protocols.get(handle, {}).get(self.machine.memory.read(protocol, 16))
        if found is None:
            return EfiStatus.EFI_UNSUPPORTED
        self.machine.memory.write_uint(interface, found, 8)
        return EfiStatus.EFI_SUCCESS

    def locate_protocol(self, protocol: int, registration: int, interface: int) -> int:
        """LocateProtocol()."""
        guid = self.machine.memory.read(protocol, 16)
        for carried in self.protocols.values():
            if guid in carried:
                self.machine.memory.write_uint(interface, carried[guid], 8)
                return EfiStatus.EFI_SUCCESS
        return EfiStatus.EFI_NOT_FOUND

    def locate_device_path(self, protocol: int, path_at: int, device: int) -> int:
        """LocateDevicePath(), for a path of one vendor media node: the handle that carries its GUID.

        The path pointer is advanced to the end node. Source: UEFI 2.10, sections 7.3.11 and 10.3.5.3.
        """
        guest = self.machine.memory
        path = guest.read_uint(path_at, 8)
        node = guest.read(path, 20)
        wanted = guest.read(protocol, 16)
        for handle, carried in self.protocols.items():
            if node[:4] == b"\x04\x03\x14\x00" and node[4:] in carried and wanted in carried:
                guest.write_uint(path_at, path + len(node), 8)
                guest.write_uint(device, handle, 8)
                return EfiStatus.EFI_SUCCESS
        return EfiStatus.EFI_NOT_FOUND

    def locate_handle(self, search: int, protocol: int, key: int, size_at: int, buffer: int) -> int:
        """LocateHandle(), by protocol: the handles that carry it."""
        guest = self.machine.memory
        if search != LOCATE_BY_PROTOCOL:
            return EfiStatus.EFI_UNSUPPORTED
        guid = guest.read(protocol, 16)
        handles = b"".join(h.to_bytes(8, "little") for h, carried in self.protocols.items() if guid in carried)
        if not handles:
            return EfiStatus.EFI_NOT_FOUND
        room = guest.read_uint(size_at, 8)
        guest.write_uint(size_at, len(handles), 8)
        if room < len(handles):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        guest.write(buffer, handles)
        return EfiStatus.EFI_SUCCESS

    def exit(self, image: int, status: int, size: int, data: int) -> int:
        """Exit(): the image gives up."""
        raise self.machine.panic(f"the image called Exit with {status_name(status)}")

    def install_configuration_table(self, guid_at: int, table: int) -> int:
        """InstallConfigurationTable(): add, replace, or (with a null ``table``) remove."""
        guest, entry_size = self.machine.memory, EFI_CONFIGURATION_TABLE.sizeof()
        guid = guest.read(guid_at, 16)
        system_table = GuestRecord(guest, self.system_table, EFI_SYSTEM_TABLE)
        at, count = system_table["ConfigurationTable"], system_table["NumberOfTableEntries"]
        data = guest.read(at, count * entry_size)
        entries = {data[n : n + 16]: data[n + 16 : n + 24] for n in range(0, len(data), entry_size)}
        if table == 0 and entries.pop(guid, None) is None:
            return EfiStatus.EFI_NOT_FOUND
        if table:
            entries[guid] = table.to_bytes(8, "little")
        if len(entries) > MAX_CONFIGURATION_TABLES:
            return EfiStatus.EFI_OUT_OF_RESOURCES
        guest.write(at, b"".join(key + value for key, value in entries.items()))
        system_table["NumberOfTableEntries"] = len(entries)
        seal(guest, self.system_table, EFI_SYSTEM_TABLE.sizeof())
        return EfiStatus.EFI_SUCCESS

    def exit_boot_services(self, image: int, key: int) -> int:
        """ExitBootServices(): EFI_INVALID_PARAMETER if the map changed since ``key`` was handed out.

        After that the image may ask for the map and try again, or give up, and nothing else.
        """
        if key != self.memory_map.key:
            self.exit_failed = True
            return EfiStatus.EFI_INVALID_PARAMETER
        self.exited = True
        return EfiStatus.EFI_SUCCESS

    # Runtime: UEFI 2.10, section 8.2

    def get_variable(self, name: int, vendor: int, attributes: int, size: int, data: int) -> int:
        """GetVariable(): this firmware has no variables, so Secure Boot is off."""
        return EfiStatus.EFI_NOT_FOUND

    def get_next_variable_name(self, size: int, name: int, vendor: int) -> int:
        """GetNextVariableName(): there is none."""
        return EfiStatus.EFI_NOT_FOUND

    def set_virtual_address_map(self, size: int, stride: int, version: int, virtual_map: int) -> int:
        """SetVirtualAddressMap(): once, and only after ExitBootServices()."""
        if not self.exited or self.is_virtual:
            return EfiStatus.EFI_UNSUPPORTED
        least = EFI_MEMORY_DESCRIPTOR.sizeof()
        if version != EFI_MEMORY_DESCRIPTOR_VERSION or stride < least or size > _MAX_VIRTUAL_MAP or size % stride:
            return EfiStatus.EFI_INVALID_PARAMETER
        converted = VirtualMap(self.machine.memory.read(virtual_map, size), stride)
        self.is_virtual = move_runtime_services(self.machine, self.system_table, converted)
        return EfiStatus.EFI_SUCCESS if self.is_virtual else EfiStatus.EFI_NOT_FOUND

    def _services(self) -> dict[str, Callable[..., int]]:
        """The services that are built, by name."""
        return {
            "AllocatePages": self.allocate_pages,
            "FreePages": self.free_pages,
            "GetMemoryMap": self.get_memory_map,
            "AllocatePool": self.allocate_pool,
            "FreePool": self.free_pool,
            "HandleProtocol": self.handle_protocol,
            "LocateHandle": self.locate_handle,
            "LocateProtocol": self.locate_protocol,
            "Exit": self.exit,
            "LocateDevicePath": self.locate_device_path,
            "InstallConfigurationTable": self.install_configuration_table,
            "ExitBootServices": self.exit_boot_services,
            "GetVariable": self.get_variable,
            "GetNextVariableName": self.get_next_variable_name,
            "SetVirtualAddressMap": self.set_virtual_address_map,
        }
