"""Image services, and the end of boot services (UEFI 2.10, section 7.4)."""

from __future__ import annotations

from dataclasses import replace

from firmware.boot_services import EfiServices, Handler, Image, Phase
from firmware.efi_types import (
    EFI_EVENT_GROUP_BEFORE_EXIT_BOOT_SERVICES,
    EFI_EVENT_GROUP_EXIT_BOOT_SERVICES,
    EFI_LOADED_IMAGE_PROTOCOL_GUID,
    EfiStatus,
    guid_bytes,
    status_name,
)
from firmware.load_image import install_loaded_image, load_pe
from firmware.tables import EFI_LOADED_IMAGE_PROTOCOL, EFI_SYSTEM_TABLE, seal
from guest.errors import FormatError
from guest.records import GuestRecord
from guest.units import SZ_1G

_LOADED_IMAGE = guid_bytes(EFI_LOADED_IMAGE_PROTOCOL_GUID)
_ONLY_AT_BOOT = (
    "ConsoleInHandle", "ConIn", "ConsoleOutHandle", "ConOut", "StandardErrorHandle", "StdErr", "BootServices"
)  # fmt: skip
"""Fields of the system table that are null once boot services are gone."""


class _Exited(Exception):
    """An image called Exit(): back to who started it."""

    def __init__(self, image: int, status: int, size: int, data: int) -> None:
        super().__init__(status)
        self.image, self.status, self.size, self.data = image, status, size, data


class ImageServices:
    """LoadImage() to ExitBootServices()."""

    def __init__(self, services: EfiServices) -> None:
        self._services = services
        self._machine, self._guest = services.machine, services.machine.memory
        self._running: list[int] = []
        self._told_before_exit = False

    def handlers(self) -> dict[str, Handler]:
        """The services of this family, by name."""
        return {
            "LoadImage": self.load_image,
            "StartImage": self.start_image,
            "Exit": self.exit,
            "UnloadImage": self.unload_image,
            "ExitBootServices": self.exit_boot_services,
        }

    def load_image(self, boot_policy: int, parent: int, path: int, source: int, size: int, handle_at: int) -> int:
        """LoadImage() from memory. By a device path nothing is found: this firmware has no file systems."""
        if handle_at == 0 or self._services.handles.find(parent, _LOADED_IMAGE) is None:
            return EfiStatus.EFI_INVALID_PARAMETER
        if source == 0:
            return EfiStatus.EFI_NOT_FOUND if path else EfiStatus.EFI_INVALID_PARAMETER
        if not 0 < size <= SZ_1G:
            return EfiStatus.EFI_LOAD_ERROR
        try:
            image = load_pe(self._services, self._guest.read(source, size))
        except FormatError:
            return EfiStatus.EFI_LOAD_ERROR
        if image is None:
            return EfiStatus.EFI_OUT_OF_RESOURCES
        handle = install_loaded_image(self._services, image, parent=parent)
        self._guest.write_uint(handle_at, handle, 8)
        return EfiStatus.EFI_SUCCESS

    def start_image(self, handle: int, size_at: int, data_at: int) -> int:
        """StartImage(): the image's own status; it is unloaded when it comes back.

        Its entry point must be a call gate: EFI_UNSUPPORTED for machine code, which the firmware does not call.
        """
        image = self._services.images.get(handle)
        if image is None or image.started:
            return EfiStatus.EFI_INVALID_PARAMETER
        if self._machine.gates.at(image.entry) is None:
            return EfiStatus.EFI_UNSUPPORTED
        self._services.images[handle] = replace(image, started=True)
        self._running.append(handle)
        try:
            status = self._machine.call(image.entry, handle, self._services.system_table)
        except _Exited as exited:
            if exited.image != handle:
                raise
            status = exited.status
            if size_at and data_at:
                self._guest.write_uint(size_at, exited.size, 8)
                self._guest.write_uint(data_at, exited.data, 8)
        finally:
            self._running.pop()
        self._unload(handle)
        return status

    def exit(self, handle: int, status: int, size: int, data: int) -> int:
        """Exit(): back to who started the image. Behind the first image there is nobody: the guest ends.

        An image that was not started is unloaded.
        """
        image = self._services.images.get(handle)
        if self._running and self._running[-1] == handle:
            raise _Exited(handle, status, size, data)
        if image is not None and not image.started:
            self._unload(handle)
            return EfiStatus.EFI_SUCCESS
        if image is None or self._running:
            return EfiStatus.EFI_INVALID_PARAMETER
        raise self._machine.panic(f"the image called Exit with {status_name(status)}")

    def unload_image(self, handle: int) -> int:
        """UnloadImage(): a started image must have a function for it, which may refuse."""
        image = self._services.images.get(handle)
        found = self._services.handles.find(handle, _LOADED_IMAGE)
        if image is None or found is None:
            return EfiStatus.EFI_INVALID_PARAMETER
        if image.started:
            unload = GuestRecord(self._guest, found.address, EFI_LOADED_IMAGE_PROTOCOL)["Unload"]
            if self._machine.gates.at(unload) is None:
                return EfiStatus.EFI_UNSUPPORTED
            status = self._machine.call(unload, handle)
            if status != EfiStatus.EFI_SUCCESS:
                return status
        self._unload(handle)
        return EfiStatus.EFI_SUCCESS

    def exit_boot_services(self, image: int, key: int) -> int:
        """ExitBootServices(): EFI_INVALID_PARAMETER if the map changed since ``key`` was handed out.

        After that the image may ask for the map and try again, or give up, and nothing else. The event group for
        drivers that still use boot services is told once, before the key is looked at: they may change the map.
        """
        services = self._services
        if not self._told_before_exit:
            self._told_before_exit = True
            services.events.signal_group(EFI_EVENT_GROUP_BEFORE_EXIT_BOOT_SERVICES)
        services.events.stop_timers()
        if key != services.memory_map.key:
            services.phase = Phase.EXIT_FAILED
            return EfiStatus.EFI_INVALID_PARAMETER
        services.phase = Phase.EXITING
        services.events.signal_group(EFI_EVENT_GROUP_EXIT_BOOT_SERVICES)
        services.phase = Phase.RUNTIME
        services.variables.runtime = True
        self._clear_system_table()
        return EfiStatus.EFI_SUCCESS

    def _clear_system_table(self) -> None:
        """What is no more is null. The table of boot services stays: a late call by it is to be seen as such."""
        at = self._services.system_table
        system_table = GuestRecord(self._guest, at, EFI_SYSTEM_TABLE)
        for name in _ONLY_AT_BOOT:
            system_table[name] = 0
        seal(self._guest, at, EFI_SYSTEM_TABLE.sizeof())

    def _unload(self, handle: int) -> None:
        image: Image = self._services.images.pop(handle)
        self._services.memory_map.free(image.base, image.size)
        self._services.handles.uninstall(handle, _LOADED_IMAGE)
