"""Room for the firmware's own tables, inside memory of the right type."""

from __future__ import annotations

from collections.abc import Mapping

from firmware.efi_types import EfiMemoryType
from firmware.memory_map import MemoryMap
from guest.errors import GuestPanic
from guest.memory import GuestMemory
from guest.ranges import Range
from guest.units import PHYSICAL_ADDRESS_END, SZ_64K, round_up


class Arena:
    """Hands out pieces of memory of each type.

    A type's room is the start of the map's first range of that type that is large enough, so that tables do not
    change the map's shape; if there is none, new pages are allocated.
    """

    ROOM = SZ_64K

    def __init__(
        self, memory: GuestMemory, memory_map: MemoryMap, rooms: Mapping[EfiMemoryType, Range] | None = None
    ) -> None:
        """``rooms`` were set aside beforehand, as edk2 does by its memory type information."""
        self._memory = memory
        self._map = memory_map
        self._next: dict[int, int] = {kind: room.start for kind, room in (rooms or {}).items()}
        self._end: dict[int, int] = {kind: room.end for kind, room in (rooms or {}).items()}

    def put(self, type: EfiMemoryType, data: bytes) -> int:
        """Store ``data`` 16-byte aligned in memory of ``type``; returns its guest physical address."""
        gpa = self.reserve(type, len(data))
        self._memory.write(gpa, data)
        return gpa

    def reserve(self, type: EfiMemoryType, size: int) -> int:
        """Set ``size`` bytes of ``type`` aside without writing; returns their address."""
        at = self._next.get(type, 0)
        if at + size > self._end.get(type, 0):
            at = self._open(type, max(self.ROOM, size))
        self._next[type] = round_up(at + size, 16)
        return at

    def _open(self, type: EfiMemoryType, size: int) -> int:
        found = None if type in self._next else self._map.find(type, size)
        at = found if found is not None else self._map.allocate(type, size, PHYSICAL_ADDRESS_END)
        if at is None:
            raise GuestPanic("firmware", f"no {size:#x} bytes left for tables of type {type.name}")
        self._end[type] = at + size
        return at
