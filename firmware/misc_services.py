"""Miscellaneous boot services (UEFI 2.10, section 7.5): memory, checksums, time, counters, configuration tables."""

from __future__ import annotations

import zlib
from uuid import UUID

from firmware.boot_services import EfiServices, Handler
from firmware.counter import MonotonicCounter
from firmware.efi_types import EfiStatus
from firmware.tables import EFI_CONFIGURATION_TABLE, EFI_SYSTEM_TABLE, MAX_CONFIGURATION_TABLES, seal
from guest.memory import AccessKind
from guest.records import GuestRecord
from guest.units import SZ_16M

_PIECE = SZ_16M
"""What is copied or set at a time."""
_NS_PER_US, _NS_PER_S = 1_000, 1_000_000_000
_MAX_RESERVED_CODE = 0xFFFF
"""Watchdog codes up to here are the firmware's (section 7.5.1)."""


class MiscServices:
    """SetWatchdogTimer() to SetMem()."""

    def __init__(self, services: EfiServices, counter: MonotonicCounter) -> None:
        self._services, self._counter = services, counter
        self._guest, self._clock = services.machine.memory, services.machine.clock

    def handlers(self) -> dict[str, Handler]:
        """The services of this family, by name."""
        return {
            "InstallConfigurationTable": self.install_configuration_table,
            "GetNextMonotonicCount": self.get_next_monotonic_count,
            "Stall": self.stall,
            "SetWatchdogTimer": self.set_watchdog_timer,
            "CalculateCrc32": self.calculate_crc32,
            "CopyMem": self.copy_mem,
            "SetMem": self.set_mem,
        }

    def install_configuration_table(self, guid_at: int, table: int) -> int:
        """InstallConfigurationTable(): add, replace, or (with a null ``table``) remove; tells the GUID's event group.

        Source: UEFI 2.10, sections 7.1.2 (configuration table groups) and 7.5.6.
        """
        if guid_at == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        guest, entry_size = self._guest, EFI_CONFIGURATION_TABLE.sizeof()
        guid = guest.read(guid_at, 16)
        system_table = GuestRecord(guest, self._services.system_table, EFI_SYSTEM_TABLE)
        at, count = system_table["ConfigurationTable"], system_table["NumberOfTableEntries"]
        data = guest.read(at, min(count, MAX_CONFIGURATION_TABLES) * entry_size)
        entries = {data[n : n + 16]: data[n + 16 : n + 24] for n in range(0, len(data), entry_size)}
        if table == 0 and entries.pop(guid, None) is None:
            return EfiStatus.EFI_NOT_FOUND
        if table:
            entries[guid] = table.to_bytes(8, "little")
        if len(entries) > MAX_CONFIGURATION_TABLES:
            return EfiStatus.EFI_OUT_OF_RESOURCES
        guest.write(at, b"".join(key + value for key, value in entries.items()))
        system_table["NumberOfTableEntries"] = len(entries)
        seal(guest, self._services.system_table, EFI_SYSTEM_TABLE.sizeof())
        self._services.events.signal_group(UUID(bytes_le=guid))
        return EfiStatus.EFI_SUCCESS

    def get_next_monotonic_count(self, count_at: int) -> int:
        """GetNextMonotonicCount(): a number that never comes again."""
        if count_at == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        self._guest.write_uint(count_at, self._counter.next(), 8)
        return EfiStatus.EFI_SUCCESS

    def stall(self, microseconds: int) -> int:
        """Stall(): virtual time passes, and timers expire."""
        self._clock.advance(microseconds * _NS_PER_US)
        self._services.events.expire()
        return EfiStatus.EFI_SUCCESS

    def set_watchdog_timer(self, timeout: int, code: int, size: int, data: int) -> int:
        """SetWatchdogTimer(): in seconds; 0 stops it. When it expires, the next boot service ends the guest."""
        if 0 < code <= _MAX_RESERVED_CODE:
            return EfiStatus.EFI_INVALID_PARAMETER
        self._services.watchdog = self._clock.ns + timeout * _NS_PER_S if timeout else None
        return EfiStatus.EFI_SUCCESS

    def calculate_crc32(self, data: int, size: int, crc_at: int) -> int:
        """CalculateCrc32()."""
        if 0 in (data, size, crc_at):
            return EfiStatus.EFI_INVALID_PARAMETER
        crc = 0
        for _, piece in self._guest.views(data, data + size, "read"):
            crc = zlib.crc32(piece, crc)
        self._guest.write_uint(crc_at, crc, 4)
        return EfiStatus.EFI_SUCCESS

    def copy_mem(self, destination: int, source: int, length: int) -> int:
        """CopyMem(): the two may overlap. It has no status."""
        self._check(source, length, "read")
        self._check(destination, length, "write")
        offsets = range(0, length, _PIECE)
        for at in offsets if destination <= source else reversed(offsets):
            self._guest.write(destination + at, self._guest.read(source + at, min(_PIECE, length - at)))
        return EfiStatus.EFI_SUCCESS

    def set_mem(self, buffer: int, size: int, value: int) -> int:
        """SetMem(): ``value`` is one byte. It has no status."""
        if value == 0 and size:
            self._guest.clear(buffer, buffer + size)
            return EfiStatus.EFI_SUCCESS
        self._check(buffer, size, "write")
        for at in range(0, size, _PIECE):
            self._guest.write(buffer + at, bytes([value]) * min(_PIECE, size - at))
        return EfiStatus.EFI_SUCCESS

    def _check(self, start: int, size: int, kind: AccessKind) -> None:
        """Nothing is done unless all of the range can be accessed. Raises ``MemoryFault``."""
        next(self._guest.views(start, start + size, kind), None)
