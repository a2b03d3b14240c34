"""Variables: named bytes with attributes that say who may see and change them.

Source: UEFI 2.10, section 8.2; edk2 MdeModulePkg/Universal/Variable/RuntimeDxe/Variable.c for the order of checks
and for what the specification leaves open. Signed updates are not offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntFlag
from uuid import UUID

from firmware.char16 import char16_bytes
from firmware.efi_types import (
    EFI_GLOBAL_VARIABLE_GUID,
    EFI_SHIM_LOCK_GUID,
    LINUX_EFI_RANDOM_SEED_TABLE_GUID,
    MEMORY_ONLY_RESET_CONTROL_GUID,
    EfiStatus,
)

MAX_VARIABLE_SIZE = 0x8400
"""Bytes of name, with its end, and data together: PcdMaxVariableSize of OVMF's 4 MiB build."""
VARIABLE_STORE_SIZE = 0x4_0000
"""Bytes of all variables of one kind, volatile or not: OVMF's PcdVariableStoreSize."""


class VariableAttribute(IntFlag):
    """Attributes of a variable (UEFI 2.10, section 8.2.1)."""

    EFI_VARIABLE_NON_VOLATILE = 0x01
    EFI_VARIABLE_BOOTSERVICE_ACCESS = 0x02
    EFI_VARIABLE_RUNTIME_ACCESS = 0x04
    EFI_VARIABLE_HARDWARE_ERROR_RECORD = 0x08
    EFI_VARIABLE_AUTHENTICATED_WRITE_ACCESS = 0x10
    EFI_VARIABLE_TIME_BASED_AUTHENTICATED_WRITE_ACCESS = 0x20
    EFI_VARIABLE_APPEND_WRITE = 0x40
    EFI_VARIABLE_ENHANCED_AUTHENTICATED_ACCESS = 0x80


_NV = VariableAttribute.EFI_VARIABLE_NON_VOLATILE
_BS = VariableAttribute.EFI_VARIABLE_BOOTSERVICE_ACCESS
_RT = VariableAttribute.EFI_VARIABLE_RUNTIME_ACCESS
_APPEND = VariableAttribute.EFI_VARIABLE_APPEND_WRITE
_KEPT = _NV | _BS | _RT
_NOT_OFFERED = 0xBF & ~int(_KEPT)
"""Hardware error records and the three ways of signing."""

KNOWN = {
    "SecureBoot": (EFI_GLOBAL_VARIABLE_GUID, _BS | _RT),
    "SetupMode": (EFI_GLOBAL_VARIABLE_GUID, _BS | _RT),
    "OsIndications": (EFI_GLOBAL_VARIABLE_GUID, _NV | _BS | _RT),
    "OsIndicationsSupported": (EFI_GLOBAL_VARIABLE_GUID, _BS | _RT),
    "MokSBState": (EFI_SHIM_LOCK_GUID, _NV | _BS),
    "MokSBStateRT": (EFI_SHIM_LOCK_GUID, _BS | _RT),
    "MemoryOverwriteRequestControl": (MEMORY_ONLY_RESET_CONTROL_GUID, _NV | _BS | _RT),
    "RandomSeed": (LINUX_EFI_RANDOM_SEED_TABLE_GUID, _NV | _BS),
}
"""Vendor and attributes of variables that have a meaning to Linux's stub or to the firmware."""
DEFAULT_ATTRIBUTES = _NV | _BS | _RT
_READ_ONLY = {(EFI_GLOBAL_VARIABLE_GUID, name) for name in ("SecureBoot", "SetupMode", "OsIndicationsSupported")}


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable: its name, the GUID of who defined it, its attributes and its bytes."""

    name: str
    vendor: UUID
    attributes: int
    data: bytes

    @property
    def size(self) -> int:
        """What it takes of a store: name and data."""
        return len(char16_bytes(self.name)) + len(self.data)


class VariableStore:
    """The variables of a firmware, in the order of their creation; ``runtime`` once boot services are gone."""

    def __init__(self, variables: Iterable[Variable] = ()) -> None:
        self._variables = {(each.vendor, each.name): each for each in variables}
        self.runtime = False

    def __iter__(self) -> Iterator[Variable]:
        """All of them, in that order."""
        return iter(self._variables.values())

    def find(self, vendor: UUID, name: str) -> Variable | None:
        """The variable, if it can be seen now."""
        found = self._variables.get((vendor, name))
        return found if found is not None and self._visible(found) else None

    def after(self, vendor: UUID, name: str) -> Variable | None:
        """The next variable that can be seen; the first one behind an empty name."""
        listed = [each for each in self._variables.values() if self._visible(each)]
        place = 1 + listed.index(self._variables[vendor, name]) if name else 0
        return listed[place] if place < len(listed) else None

    def remaining(self, attributes: int) -> int:
        """Bytes that are left in the store for variables with ``attributes``."""
        kept = [each.size for each in self._variables.values() if each.attributes & _NV == attributes & _NV]
        return VARIABLE_STORE_SIZE - sum(kept)

    def set(self, vendor: UUID, name: str, attributes: int, data: bytes) -> EfiStatus:
        """SetVariable(): create, change, append to or, with no data or no access, delete."""
        refused = _refuse_attributes(attributes)
        if refused is not None:
            return refused
        if (vendor, name) in _READ_ONLY:
            return EfiStatus.EFI_WRITE_PROTECTED
        old = self._variables.get((vendor, name))
        if old is not None:
            refused = self._refuse_change(old, attributes)
            if refused is not None:
                return refused
        append = bool(attributes & _APPEND)
        if append and not data:
            return EfiStatus.EFI_SUCCESS
        if not attributes & (_BS | _RT) or not data:
            return self._delete(old)
        return self._write(old, Variable(name, vendor, attributes & int(_KEPT), data), append)

    def _refuse_change(self, old: Variable, attributes: int) -> EfiStatus | None:
        """Why ``old`` cannot be changed or deleted by a caller that gives it these attributes; None if it can.

        Only one that gives no access at all, which deletes, need not name the attributes that the variable has.
        """
        if not self._visible(old):
            return EfiStatus.EFI_WRITE_PROTECTED
        if attributes & (_BS | _RT) and attributes & int(_KEPT) != old.attributes:
            return EfiStatus.EFI_INVALID_PARAMETER
        return EfiStatus.EFI_WRITE_PROTECTED if self.runtime and not old.attributes & _NV else None

    def _delete(self, old: Variable | None) -> EfiStatus:
        if old is None:
            return EfiStatus.EFI_NOT_FOUND
        del self._variables[old.vendor, old.name]
        return EfiStatus.EFI_SUCCESS

    def _write(self, old: Variable | None, new: Variable, append: bool) -> EfiStatus:
        """Keep ``new`` in the place of ``old``, if there is room."""
        if self.runtime and new.attributes & (_NV | _RT) != _NV | _RT:
            return EfiStatus.EFI_INVALID_PARAMETER
        if old is not None and append:
            new = Variable(new.name, new.vendor, new.attributes, old.data + new.data)
        if new.size > MAX_VARIABLE_SIZE:
            return EfiStatus.EFI_INVALID_PARAMETER
        if new.size - (old.size if old else 0) > self.remaining(new.attributes):
            return EfiStatus.EFI_OUT_OF_RESOURCES
        self._variables[new.vendor, new.name] = new
        return EfiStatus.EFI_SUCCESS

    def _visible(self, variable: Variable) -> bool:
        return not self.runtime or bool(variable.attributes & _RT)


def _refuse_attributes(attributes: int) -> EfiStatus | None:
    """Why no variable can have these attributes; None if one can."""
    if attributes & ~0xFF or attributes & (_BS | _RT) == _RT:
        return EfiStatus.EFI_INVALID_PARAMETER
    if attributes & _NOT_OFFERED:
        return EfiStatus.EFI_UNSUPPORTED
    return None


def refuse_query(attributes: int, runtime: bool) -> EfiStatus | None:
    """Why QueryVariableInfo() has nothing to say of these attributes; None if it has."""
    if attributes & int(_KEPT) == 0 and not attributes & ~0xFF:
        return EfiStatus.EFI_UNSUPPORTED
    if runtime and not attributes & _RT:
        return EfiStatus.EFI_INVALID_PARAMETER
    return _refuse_attributes(attributes)
