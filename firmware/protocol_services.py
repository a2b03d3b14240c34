"""Protocol handler services: who installs, opens and closes which interface (UEFI 2.10, section 7.3)."""

from __future__ import annotations

import struct
from uuid import UUID

from firmware.boot_services import EfiServices, Handler
from firmware.device_path import first_instance
from firmware.efi_types import EFI_DEVICE_PATH_PROTOCOL_GUID, GUID_SIZE, EfiMemoryType, EfiStatus, guid_bytes
from firmware.protocols import OpenAttribute

_EFI_NATIVE_INTERFACE = 0
_DEVICE_PATH = guid_bytes(EFI_DEVICE_PATH_PROTOCOL_GUID)
_OPEN_INFORMATION_ENTRY = struct.Struct("<QQII")
"""EFI_OPEN_PROTOCOL_INFORMATION_ENTRY: AgentHandle, ControllerHandle, Attributes, OpenCount."""

_NEEDS_AGENT = {
    OpenAttribute.BY_HANDLE_PROTOCOL: False,
    OpenAttribute.GET_PROTOCOL: False,
    OpenAttribute.TEST_PROTOCOL: False,
    OpenAttribute.BY_CHILD_CONTROLLER: True,
    OpenAttribute.BY_DRIVER: True,
    OpenAttribute.EXCLUSIVE: True,
    OpenAttribute.BY_DRIVER | OpenAttribute.EXCLUSIVE: True,
}
"""The attributes that OpenProtocol() takes, and whether it must then know who opens."""
_NEEDS_CONTROLLER = OpenAttribute.BY_CHILD_CONTROLLER | OpenAttribute.BY_DRIVER


class ProtocolServices:
    """InstallProtocolInterface() to UninstallMultipleProtocolInterfaces(), on the handle database."""

    def __init__(self, services: EfiServices) -> None:
        self._services, self._handles = services, services.handles
        self._guest = services.machine.memory

    def handlers(self) -> dict[str, Handler]:
        """The services of this family, by name."""
        return {
            "InstallProtocolInterface": self.install_protocol_interface,
            "ReinstallProtocolInterface": self.reinstall_protocol_interface,
            "UninstallProtocolInterface": self.uninstall_protocol_interface,
            "HandleProtocol": self.handle_protocol,
            "OpenProtocol": self.open_protocol,
            "CloseProtocol": self.close_protocol,
            "OpenProtocolInformation": self.open_protocol_information,
            "ProtocolsPerHandle": self.protocols_per_handle,
            "InstallMultipleProtocolInterfaces": self.install_multiple_protocol_interfaces,
            "UninstallMultipleProtocolInterfaces": self.uninstall_multiple_protocol_interfaces,
            "ConnectController": self.connect_controller,
            "DisconnectController": self.disconnect_controller,
        }

    def install_protocol_interface(self, handle_at: int, protocol: int, interface_type: int, interface: int) -> int:
        """InstallProtocolInterface(): on ``*handle_at``, or on a new handle if that is null."""
        if 0 in (handle_at, protocol) or interface_type != _EFI_NATIVE_INTERFACE:
            return EfiStatus.EFI_INVALID_PARAMETER
        handle, guid = self._guest.read_uint(handle_at, 8), self._guest.read(protocol, GUID_SIZE)
        if handle and (handle not in self._handles or self._handles.find(handle, guid) is not None):
            return EfiStatus.EFI_INVALID_PARAMETER
        if handle == 0:
            handle = self._services.new_object()
            self._guest.write_uint(handle_at, handle, 8)
        self._install(handle, protocol, interface)
        return EfiStatus.EFI_SUCCESS

    def reinstall_protocol_interface(self, handle: int, protocol: int, old: int, new: int) -> int:
        """ReinstallProtocolInterface(): ``new`` takes the place of ``old``, and who waits for one is told."""
        status = self.uninstall_protocol_interface(handle, protocol, old)
        if status == EfiStatus.EFI_SUCCESS:
            self._install(handle, protocol, new)
        return status

    def uninstall_protocol_interface(self, handle: int, protocol: int, interface: int) -> int:
        """UninstallProtocolInterface(): EFI_ACCESS_DENIED while somebody needs it."""
        if protocol == 0 or handle not in self._handles:
            return EfiStatus.EFI_INVALID_PARAMETER
        guid = self._guest.read(protocol, GUID_SIZE)
        found = self._handles.find(handle, guid)
        if found is None or found.address != interface:
            return EfiStatus.EFI_NOT_FOUND
        if found.held:
            return EfiStatus.EFI_ACCESS_DENIED
        self._handles.uninstall(handle, guid)
        return EfiStatus.EFI_SUCCESS

    def install_multiple_protocol_interfaces(self, handle_at: int, *rest: int) -> int:
        """InstallMultipleProtocolInterfaces(): all pairs, or none; a device path that exists is refused."""
        pairs = _pairs(rest)
        if handle_at == 0 or pairs is None:
            return EfiStatus.EFI_INVALID_PARAMETER
        if any(self._is_known_path(protocol, interface) for protocol, interface in pairs):
            return EfiStatus.EFI_ALREADY_STARTED
        before = self._guest.read_uint(handle_at, 8)
        for done, (protocol, interface) in enumerate(pairs):
            status = self.install_protocol_interface(handle_at, protocol, _EFI_NATIVE_INTERFACE, interface)
            if status != EfiStatus.EFI_SUCCESS:
                for undo in pairs[:done]:
                    self.uninstall_protocol_interface(self._guest.read_uint(handle_at, 8), *undo)
                self._guest.write_uint(handle_at, before, 8)
                return status
        return EfiStatus.EFI_SUCCESS

    def uninstall_multiple_protocol_interfaces(self, handle: int, *rest: int) -> int:
        """UninstallMultipleProtocolInterfaces(): all pairs, or none and EFI_INVALID_PARAMETER."""
        pairs = _pairs(rest)
        if pairs is None or handle not in self._handles:
            return EfiStatus.EFI_INVALID_PARAMETER
        for done, (protocol, interface) in enumerate(pairs):
            if self.uninstall_protocol_interface(handle, protocol, interface) != EfiStatus.EFI_SUCCESS:
                for guid_at, address in pairs[:done]:
                    self._install(handle, guid_at, address)
                return EfiStatus.EFI_INVALID_PARAMETER
        return EfiStatus.EFI_SUCCESS

    def handle_protocol(self, handle: int, protocol: int, interface: int) -> int:
        """HandleProtocol(): OpenProtocol() that tells nobody who opens."""
        return self.open_protocol(handle, protocol, interface, 0, 0, OpenAttribute.BY_HANDLE_PROTOCOL)

    def open_protocol(
        self, handle: int, protocol: int, interface: int, agent: int, controller: int, attributes: int
    ) -> int:
        """OpenProtocol(): EFI_UNSUPPORTED for a protocol that the handle does not carry."""
        test = attributes == OpenAttribute.TEST_PROTOCOL
        if protocol == 0 or (interface == 0 and not test) or handle not in self._handles:
            return EfiStatus.EFI_INVALID_PARAMETER
        if not self._may_open(handle, agent, controller, attributes):
            return EfiStatus.EFI_INVALID_PARAMETER
        found = self._handles.find(handle, self._guest.read(protocol, GUID_SIZE))
        if found is None:
            return EfiStatus.EFI_UNSUPPORTED
        status = found.open(agent, controller, attributes)
        if status in (EfiStatus.EFI_SUCCESS, EfiStatus.EFI_ALREADY_STARTED) and not test:
            self._guest.write_uint(interface, found.address, 8)
        return status

    def close_protocol(self, handle: int, protocol: int, agent: int, controller: int) -> int:
        """CloseProtocol(): EFI_NOT_FOUND if the agent has not opened it for the controller."""
        if protocol == 0 or handle not in self._handles or agent not in self._handles:
            return EfiStatus.EFI_INVALID_PARAMETER
        if controller and controller not in self._handles:
            return EfiStatus.EFI_INVALID_PARAMETER
        found = self._handles.find(handle, self._guest.read(protocol, GUID_SIZE))
        done = found is not None and found.close(agent, controller)
        return EfiStatus.EFI_SUCCESS if done else EfiStatus.EFI_NOT_FOUND

    def open_protocol_information(self, handle: int, protocol: int, entries_at: int, count_at: int) -> int:
        """OpenProtocolInformation(): who has opened it, in a pool buffer."""
        if 0 in (protocol, entries_at, count_at):
            return EfiStatus.EFI_INVALID_PARAMETER
        found = self._handles.find(handle, self._guest.read(protocol, GUID_SIZE))
        if found is None:
            return EfiStatus.EFI_NOT_FOUND
        rows = [(entry.agent, entry.controller, entry.attributes, entry.count) for entry in found.opened]
        status = self._services.hand_out(b"".join(_OPEN_INFORMATION_ENTRY.pack(*row) for row in rows), entries_at)
        if status == EfiStatus.EFI_SUCCESS:
            self._guest.write_uint(count_at, len(rows), 8)
        return status

    def protocols_per_handle(self, handle: int, protocols_at: int, count_at: int) -> int:
        """ProtocolsPerHandle(): pointers to the GUIDs in a pool buffer, the GUIDs behind them."""
        if 0 in (protocols_at, count_at) or handle not in self._handles:
            return EfiStatus.EFI_INVALID_PARAMETER
        guids = list(self._handles.interfaces(handle))
        size = (8 + GUID_SIZE) * len(guids)
        buffer = self._services.allocate_pool(EfiMemoryType.EfiBootServicesData, size)
        if buffer is None:
            return EfiStatus.EFI_OUT_OF_RESOURCES
        first = buffer + 8 * len(guids)
        pointers = (first + GUID_SIZE * number for number in range(len(guids)))
        self._guest.write(buffer, b"".join(at.to_bytes(8, "little") for at in pointers) + b"".join(guids))
        self._guest.write_uint(protocols_at, buffer, 8)
        self._guest.write_uint(count_at, len(guids), 8)
        return EfiStatus.EFI_SUCCESS

    def connect_controller(self, controller: int, drivers: int, remaining_path: int, recursive: int) -> int:
        """ConnectController(): no driver waits for a device here."""
        known = controller in self._handles
        return EfiStatus.EFI_NOT_FOUND if known else EfiStatus.EFI_INVALID_PARAMETER

    def disconnect_controller(self, controller: int, driver: int, child: int) -> int:
        """DisconnectController(): no driver manages a device here, which the specification calls a success."""
        known = controller in self._handles and all(each == 0 or each in self._handles for each in (driver, child))
        return EfiStatus.EFI_SUCCESS if known else EfiStatus.EFI_INVALID_PARAMETER

    def _install(self, handle: int, protocol: int, interface: int) -> None:
        guid = UUID(bytes_le=self._guest.read(protocol, GUID_SIZE))
        self._services.install_protocol(handle, guid, interface)

    def _may_open(self, handle: int, agent: int, controller: int, attributes: int) -> bool:
        """Whether who opens, and for whom, is said as ``attributes`` need it."""
        needs_agent = _NEEDS_AGENT.get(OpenAttribute(attributes)) if attributes <= 0x3F else None
        if needs_agent is None:
            return False
        if needs_agent and agent not in self._handles:
            return False
        if attributes & _NEEDS_CONTROLLER and controller not in self._handles:
            return False
        return attributes != OpenAttribute.BY_CHILD_CONTROLLER or controller != handle

    def _is_known_path(self, protocol: int, interface: int) -> bool:
        """Whether this is a device path that a handle has already."""
        if self._guest.read(protocol, GUID_SIZE) != _DEVICE_PATH:
            return False
        path = first_instance(self._guest.read, interface)
        if path is None:
            return False
        carried = [self._handles.interfaces(handle)[_DEVICE_PATH] for handle in self._handles.carriers(_DEVICE_PATH)]
        return any(first_instance(self._guest.read, each.address) == path for each in carried)


def _pairs(arguments: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """The pairs of a variadic service, without the null at their end; None if that is missing."""
    if len(arguments) % 2 == 0 or arguments[-1] != 0:
        return None
    return list(zip(arguments[:-1:2], arguments[1::2], strict=True))
