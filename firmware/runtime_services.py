"""Runtime services beside the variables: virtual memory, reset, the high monotonic count (UEFI 2.10, chapter 8)."""

from __future__ import annotations

from firmware.boot_services import EfiServices, Handler, Phase
from firmware.counter import MonotonicCounter
from firmware.efi_types import EFI_EVENT_GROUP_VIRTUAL_ADDRESS_CHANGE, EfiStatus, status_name
from firmware.memory_descriptor import EFI_MEMORY_DESCRIPTOR, EFI_MEMORY_DESCRIPTOR_VERSION
from firmware.virtual_map import VirtualMap, move_runtime_services
from guest.units import SZ_1M

_MAX_VIRTUAL_MAP = SZ_1M
_EFI_OPTIONAL_PTR = 1
_RESET_TYPES = ("EfiResetCold", "EfiResetWarm", "EfiResetShutdown", "EfiResetPlatformSpecific")


class RuntimeServices:
    """SetVirtualAddressMap(), ConvertPointer(), GetNextHighMonotonicCount() and ResetSystem()."""

    def __init__(self, services: EfiServices, counter: MonotonicCounter) -> None:
        self._services, self._counter, self._machine = services, counter, services.machine
        self._virtual_map: VirtualMap | None = None
        """While the firmware's drivers convert their pointers."""
        self._is_virtual = False

    def handlers(self) -> dict[str, Handler]:
        """The services of this family, by name."""
        return {
            "SetVirtualAddressMap": self.set_virtual_address_map,
            "ConvertPointer": self.convert_pointer,
            "GetNextHighMonotonicCount": self.get_next_high_monotonic_count,
            "ResetSystem": self.reset_system,
        }

    def set_virtual_address_map(self, size: int, stride: int, version: int, virtual_map: int) -> int:
        """SetVirtualAddressMap(): once, and only after ExitBootServices()."""
        if self._services.phase is not Phase.RUNTIME or self._is_virtual:
            return EfiStatus.EFI_UNSUPPORTED
        least = EFI_MEMORY_DESCRIPTOR.sizeof()
        if version != EFI_MEMORY_DESCRIPTOR_VERSION or stride < least or size > _MAX_VIRTUAL_MAP or size % stride:
            return EfiStatus.EFI_INVALID_PARAMETER
        self._virtual_map = VirtualMap(self._machine.caller.read(virtual_map, size), stride)
        self._services.events.signal_group(EFI_EVENT_GROUP_VIRTUAL_ADDRESS_CHANGE)
        self._is_virtual = move_runtime_services(self._machine, self._services.system_table, self._virtual_map)
        self._virtual_map = None
        return EfiStatus.EFI_SUCCESS if self._is_virtual else EfiStatus.EFI_NOT_FOUND

    def convert_pointer(self, disposition: int, pointer: int) -> int:
        """ConvertPointer(): for the functions of the virtual address change; at any other time nothing is found."""
        if pointer == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        memory = self._machine.memory
        address = memory.read_uint(pointer, 8)
        if address == 0:
            optional = disposition & _EFI_OPTIONAL_PTR
            return EfiStatus.EFI_SUCCESS if optional else EfiStatus.EFI_INVALID_PARAMETER
        virtual = self._virtual_map.convert(address) if self._virtual_map is not None else None
        if virtual is None:
            return EfiStatus.EFI_NOT_FOUND
        memory.write_uint(pointer, virtual, 8)
        return EfiStatus.EFI_SUCCESS

    def get_next_high_monotonic_count(self, count_at: int) -> int:
        """GetNextHighMonotonicCount(): 32 bits."""
        if count_at == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        self._machine.caller.write(count_at, self._counter.next_high().to_bytes(4, "little"))
        return EfiStatus.EFI_SUCCESS

    def reset_system(self, kind: int, status: int, size: int, data: int) -> int:
        """ResetSystem(): the guest ends."""
        name = _RESET_TYPES[kind] if kind < len(_RESET_TYPES) else f"{kind:#x}"
        raise self._machine.panic(f"the guest called ResetSystem({name}) with {status_name(status)}")
