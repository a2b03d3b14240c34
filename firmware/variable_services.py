"""Variable services (UEFI 2.10, section 8.2), called by images and by operating systems."""

from __future__ import annotations

from uuid import UUID

from firmware.boot_services import EfiServices, Handler
from firmware.char16 import char16_bytes, find_char16
from firmware.efi_types import EfiStatus
from firmware.variables import MAX_VARIABLE_SIZE, VARIABLE_STORE_SIZE, Variable, refuse_query


class VariableServices:
    """GetVariable() to QueryVariableInfo(), on the firmware's variables."""

    def __init__(self, services: EfiServices) -> None:
        self._machine, self._variables = services.machine, services.variables

    def handlers(self) -> dict[str, Handler]:
        """The services of this family, by name."""
        return {
            "GetVariable": self.get_variable,
            "GetNextVariableName": self.get_next_variable_name,
            "SetVariable": self.set_variable,
            "QueryVariableInfo": self.query_variable_info,
        }

    def get_variable(self, name: int, vendor: int, attributes_at: int, size_at: int, data: int) -> int:
        """GetVariable(): EFI_BUFFER_TOO_SMALL tells size and attributes."""
        if 0 in (name, vendor, size_at):
            return EfiStatus.EFI_INVALID_PARAMETER
        text = find_char16(self._machine.caller, name)
        found = self._variables.find(self._guid(vendor), text) if text else None
        if found is None:
            return EfiStatus.EFI_NOT_FOUND
        room = self._read(size_at, 8)
        if room >= len(found.data) and data == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        self._write(size_at, len(found.data), 8)
        if attributes_at:
            self._write(attributes_at, found.attributes, 4)
        if room < len(found.data):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        self._machine.caller.write(data, found.data)
        return EfiStatus.EFI_SUCCESS

    def get_next_variable_name(self, size_at: int, name: int, vendor: int) -> int:
        """GetNextVariableName(): the first variable behind an empty name, then the one behind that given."""
        if 0 in (size_at, name, vendor):
            return EfiStatus.EFI_INVALID_PARAMETER
        room = self._read(size_at, 8)
        text, guid = find_char16(self._machine.caller, name, room), self._guid(vendor)
        if text is None or (text and self._variables.find(guid, text) is None):
            return EfiStatus.EFI_INVALID_PARAMETER
        found = self._variables.after(guid, text)
        return EfiStatus.EFI_NOT_FOUND if found is None else self._tell(found, room, size_at, name, vendor)

    def set_variable(self, name: int, vendor: int, attributes: int, size: int, data: int) -> int:
        """SetVariable(): see ``VariableStore.set``."""
        if 0 in (name, vendor) or (size and data == 0):
            return EfiStatus.EFI_INVALID_PARAMETER
        text = find_char16(self._machine.caller, name)
        if not text or size > MAX_VARIABLE_SIZE:
            return EfiStatus.EFI_INVALID_PARAMETER
        value = self._machine.caller.read(data, size) if size else b""
        return self._variables.set(self._guid(vendor), text, attributes, value)

    def query_variable_info(self, attributes: int, most_at: int, left_at: int, largest_at: int) -> int:
        """QueryVariableInfo(): size of the store, what is left of it, and of the largest variable, in bytes."""
        if 0 in (most_at, left_at, largest_at):
            return EfiStatus.EFI_INVALID_PARAMETER
        refused = refuse_query(attributes, self._variables.runtime)
        if refused is not None:
            return refused
        left = self._variables.remaining(attributes)
        for at, value in ((most_at, VARIABLE_STORE_SIZE), (left_at, left), (largest_at, min(left, MAX_VARIABLE_SIZE))):
            self._write(at, value, 8)
        return EfiStatus.EFI_SUCCESS

    def _tell(self, found: Variable, room: int, size_at: int, name: int, vendor: int) -> int:
        text = char16_bytes(found.name)
        self._write(size_at, len(text), 8)
        if room < len(text):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        self._machine.caller.write(name, text)
        self._machine.caller.write(vendor, found.vendor.bytes_le)
        return EfiStatus.EFI_SUCCESS

    def _guid(self, at: int) -> UUID:
        return UUID(bytes_le=self._machine.caller.read(at, 16))

    def _read(self, at: int, size: int) -> int:
        return int.from_bytes(self._machine.caller.read(at, size), "little")

    def _write(self, at: int, value: int, size: int) -> None:
        self._machine.caller.write(at, value.to_bytes(size, "little"))
