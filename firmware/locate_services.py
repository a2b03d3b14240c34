"""Finding handles: by protocol, by device path, as they come (UEFI 2.10, sections 7.3.10 to 7.3.15)."""

from __future__ import annotations

from firmware.boot_services import EfiServices, Handler
from firmware.device_path import first_instance
from firmware.efi_types import EFI_DEVICE_PATH_PROTOCOL_GUID, GUID_SIZE, EfiStatus, LocateSearchType, guid_bytes
from firmware.events import EventType
from firmware.protocols import Registration

_DEVICE_PATH = guid_bytes(EFI_DEVICE_PATH_PROTOCOL_GUID)


class LocateServices:
    """RegisterProtocolNotify() and the Locate services, on the handle database."""

    def __init__(self, services: EfiServices) -> None:
        self._services, self._handles = services, services.handles
        self._guest = services.machine.memory

    def handlers(self) -> dict[str, Handler]:
        """The services of this family, by name."""
        return {
            "RegisterProtocolNotify": self.register_protocol_notify,
            "LocateHandle": self.locate_handle,
            "LocateHandleBuffer": self.locate_handle_buffer,
            "LocateProtocol": self.locate_protocol,
            "LocateDevicePath": self.locate_device_path,
        }

    def register_protocol_notify(self, protocol: int, event_at: int, registration_at: int) -> int:
        """RegisterProtocolNotify(): the event is signalled for each interface to come."""
        event = self._services.events.find(event_at)
        if 0 in (protocol, registration_at) or event is None or not event.type & EventType.EVT_NOTIFY_SIGNAL:
            return EfiStatus.EFI_INVALID_PARAMETER
        key = self._services.new_object(b"prtn")
        self._handles.registrations[key] = Registration(self._guest.read(protocol, GUID_SIZE), event)
        self._guest.write_uint(registration_at, key, 8)
        return EfiStatus.EFI_SUCCESS

    def locate_handle(self, search: int, protocol: int, key: int, size_at: int, buffer: int) -> int:
        """LocateHandle(): EFI_BUFFER_TOO_SMALL tells the size that is needed."""
        if size_at == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        found = self._search(search, protocol, key)
        if isinstance(found, EfiStatus):
            return found
        room = self._guest.read_uint(size_at, 8)
        self._guest.write_uint(size_at, 8 * len(found), 8)
        if room < 8 * len(found):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        if buffer == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        self._guest.write(buffer, _packed(found))
        self._seen(search, key)
        return EfiStatus.EFI_SUCCESS

    def locate_handle_buffer(self, search: int, protocol: int, key: int, count_at: int, buffer_at: int) -> int:
        """LocateHandleBuffer(): the handles in a pool buffer; none are a count of 0 and a null pointer."""
        if 0 in (count_at, buffer_at):
            return EfiStatus.EFI_INVALID_PARAMETER
        found = self._search(search, protocol, key)
        handles = [] if isinstance(found, EfiStatus) else found
        self._guest.write_uint(count_at, len(handles), 8)
        self._guest.write_uint(buffer_at, 0, 8)
        if isinstance(found, EfiStatus):
            return found
        self._seen(search, key)
        return self._services.hand_out(_packed(handles), buffer_at)

    def locate_protocol(self, protocol: int, key: int, interface: int) -> int:
        """LocateProtocol(): the first handle's interface, or that of a new one if ``key`` is a registration."""
        if 0 in (protocol, interface):
            return EfiStatus.EFI_INVALID_PARAMETER
        self._guest.write_uint(interface, 0, 8)
        search = LocateSearchType.ByRegisterNotify if key else LocateSearchType.ByProtocol
        found = self._search(search, protocol, key)
        if isinstance(found, EfiStatus):
            return EfiStatus.EFI_NOT_FOUND
        guid = self._handles.registrations[key].guid if key else self._guest.read(protocol, GUID_SIZE)
        self._seen(search, key)
        self._guest.write_uint(interface, self._handles.interfaces(found[0])[guid].address, 8)
        return EfiStatus.EFI_SUCCESS

    def locate_device_path(self, protocol: int, path_at: int, device_at: int) -> int:
        """LocateDevicePath(): the handle with ``protocol`` whose device path is the longest start of the path.

        ``*path_at`` moves behind that start.
        """
        if 0 in (protocol, path_at):
            return EfiStatus.EFI_INVALID_PARAMETER
        at = self._guest.read_uint(path_at, 8)
        path = first_instance(self._guest.read, at) if at else None
        if path is None:
            return EfiStatus.EFI_INVALID_PARAMETER
        best: tuple[int, int] | None = None
        for handle in self._handles.carriers(self._guest.read(protocol, GUID_SIZE)):
            interface = self._handles.find(handle, _DEVICE_PATH)
            own = first_instance(self._guest.read, interface.address) if interface is not None else None
            if own is not None and path.startswith(own) and (best is None or len(own) > best[0]):
                best = len(own), handle
        if best is None:
            return EfiStatus.EFI_NOT_FOUND
        if device_at == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        self._guest.write_uint(device_at, best[1], 8)
        self._guest.write_uint(path_at, at + best[0], 8)
        return EfiStatus.EFI_SUCCESS

    def _search(self, search: int, protocol: int, key: int) -> list[int] | EfiStatus:
        """The handles that are looked for, at least one; or why there are none."""
        if search == LocateSearchType.AllHandles:
            found = list(self._handles)
        elif search == LocateSearchType.ByRegisterNotify and key in self._handles.registrations:
            found = self._handles.registrations[key].fresh[:1]
        elif search == LocateSearchType.ByProtocol and protocol:
            found = self._handles.carriers(self._guest.read(protocol, GUID_SIZE))
        else:
            return EfiStatus.EFI_INVALID_PARAMETER
        return found or EfiStatus.EFI_NOT_FOUND

    def _seen(self, search: int, key: int) -> None:
        """A handle that a registration told of is not told again."""
        if search == LocateSearchType.ByRegisterNotify:
            del self._handles.registrations[key].fresh[0]


def _packed(handles: list[int]) -> bytes:
    return b"".join(handle.to_bytes(8, "little") for handle in handles)
