"""The handle database: which handle carries which protocols, and who has opened them.

Handles and interfaces are addresses in guest memory; the database itself is the firmware's own, as in edk2.
Source: UEFI 2.10, section 7.3; edk2 MdeModulePkg/Core/Dxe/Hand/Handle.c for what the specification leaves open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntFlag

from firmware.efi_types import EfiStatus
from firmware.events import Event


class OpenAttribute(IntFlag):
    """Attributes of OpenProtocol() (UEFI 2.10, section 7.3.9)."""

    BY_HANDLE_PROTOCOL = 0x01
    GET_PROTOCOL = 0x02
    TEST_PROTOCOL = 0x04
    BY_CHILD_CONTROLLER = 0x08
    BY_DRIVER = 0x10
    EXCLUSIVE = 0x20


_HOLDS = OpenAttribute.BY_CHILD_CONTROLLER | OpenAttribute.BY_DRIVER | OpenAttribute.EXCLUSIVE
"""Opened so, an interface cannot be taken away."""


@dataclass(slots=True)
class OpenInformation:
    """EFI_OPEN_PROTOCOL_INFORMATION_ENTRY: who has opened an interface, for which controller, how, how often."""

    agent: int
    controller: int
    attributes: int
    count: int = 1


@dataclass(slots=True)
class Interface:
    """A protocol on a handle: the address of its structure, which may be null, and who has opened it."""

    address: int
    opened: list[OpenInformation] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Somebody has opened it in a way that keeps it from being taken away."""
        return any(entry.attributes & _HOLDS for entry in self.opened)

    def open(self, agent: int, controller: int, attributes: int) -> EfiStatus:
        """Note that ``agent`` opens it, if who opened it before leaves that possible.

        No driver of this firmware gives a protocol back, so EXCLUSIVE cannot win over BY_DRIVER.
        """
        shared = not attributes & (OpenAttribute.BY_DRIVER | OpenAttribute.EXCLUSIVE)
        for entry in self.opened:
            if (entry.agent, entry.controller, entry.attributes) != (agent, controller, attributes):
                continue
            if attributes & OpenAttribute.BY_DRIVER:
                return EfiStatus.EFI_ALREADY_STARTED
            if shared:
                entry.count += 1
                return EfiStatus.EFI_SUCCESS
        taken = any(entry.attributes & (OpenAttribute.BY_DRIVER | OpenAttribute.EXCLUSIVE) for entry in self.opened)
        if taken and not shared:
            return EfiStatus.EFI_ACCESS_DENIED
        if agent:
            self.opened.append(OpenInformation(agent, controller, attributes))
        return EfiStatus.EFI_SUCCESS

    def close(self, agent: int, controller: int) -> bool:
        """Forget what ``agent`` opened for ``controller``; False if it has opened nothing."""
        left = [entry for entry in self.opened if (entry.agent, entry.controller) != (agent, controller)]
        done = len(left) < len(self.opened)
        self.opened = left
        return done


@dataclass(slots=True)
class Registration:
    """RegisterProtocolNotify(): ``event`` is signalled for each new interface; ``fresh`` are not asked for yet."""

    guid: bytes
    event: Event
    fresh: list[int] = field(default_factory=list)


class HandleDatabase:
    """Handles in the order of their creation, each with its interfaces by the 16 bytes of their GUID."""

    def __init__(self) -> None:
        self._handles: dict[int, dict[bytes, Interface]] = {}
        self.registrations: dict[int, Registration] = {}
        """By the key that RegisterProtocolNotify() gave."""

    def __contains__(self, handle: object) -> bool:
        return handle in self._handles

    def __iter__(self) -> Iterator[int]:
        return iter(self._handles)

    def interfaces(self, handle: int) -> dict[bytes, Interface]:
        """The interfaces of ``handle``, by GUID; none for what is no handle."""
        return self._handles.get(handle, {})

    def find(self, handle: int, guid: bytes) -> Interface | None:
        """The interface ``guid`` of ``handle``."""
        return self.interfaces(handle).get(guid)

    def carriers(self, guid: bytes) -> list[int]:
        """The handles that carry ``guid``."""
        return [handle for handle, carried in self._handles.items() if guid in carried]

    def install(self, handle: int, guid: bytes, address: int) -> list[Event]:
        """Let ``handle`` carry ``guid``, which it does not yet; returns the events to signal."""
        self._handles.setdefault(handle, {})[guid] = Interface(address)
        found = [registration for registration in self.registrations.values() if registration.guid == guid]
        for registration in found:
            registration.fresh.append(handle)
        return [registration.event for registration in found]

    def uninstall(self, handle: int, guid: bytes) -> None:
        """Take ``guid`` from ``handle``; a handle that carries nothing any more is gone."""
        del self._handles[handle][guid]
        if not self._handles[handle]:
            del self._handles[handle]
        for registration in self.registrations.values():
            if registration.guid == guid and handle in registration.fresh:
                registration.fresh.remove(handle)
