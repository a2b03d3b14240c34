"""Room for the firmware's tables."""

from __future__ import annotations

from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType
from guest.ranges import Range

DATA = EfiMemoryType.EfiBootServicesData


def test_a_room_that_was_set_aside_is_used_first(efi):
    """Tables go to the given range; when it is full, a room is found or allocated as without it."""
    memory_map = efi.services.memory_map
    start = memory_map.allocate(DATA, 0x1000, 1 << 32)
    arena = Arena(efi.memory, memory_map, {DATA: Range(start, start + 0x1000)})
    assert [arena.put(DATA, bytes(0x7F0)) for _ in range(2)] == [start, start + 0x7F0]
    before = memory_map.key
    elsewhere = arena.put(DATA, bytes(0x100))
    assert memory_map.key == before + 1
    assert not start <= elsewhere < start + 0x1000
