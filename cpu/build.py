"""The build of Unicorn: is it there, is it known, and where in this process's memory does it keep things?"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guest.errors import BootError
from guest.ranges import TOP, RangeSet

KNOWN_VERSION = "2.1.4"
EXTRA = "unaccepted[cpu]"

_MARKERS = (0x5A5A_1234_DEAD_BEEF, 0x3C3C_4321_FEED_F00D, 0x6996_5555_0FF1_CE00)
_ENGINE_SCAN, _STATE_SCAN = 4096, 1 << 16


class EngineError(BootError):
    """Unicorn is missing, or it is not the build that is known."""


def import_unicorn() -> Any:
    """The module ``unicorn``, which comes with an extra."""
    try:
        import unicorn
    except ImportError as error:
        raise EngineError(f"running machine code needs unicorn: pip install '{EXTRA}'") from error
    return unicorn


def find_register(uc: Any, register: int) -> int:
    """Address of a 64-bit register of the engine ``uc``: the one place, near a pointer in it, that follows it."""
    uc.reg_write(register, _MARKERS[0])
    candidates = set(_pointed_to(uc._uch.value, _MARKERS[0].to_bytes(8, "little")))
    for marker in _MARKERS[1:]:  # a copy of the first marker, in this very function for one, does not follow
        uc.reg_write(register, marker)
        candidates = {at for at in candidates if ctypes.c_uint64.from_address(at).value == marker}
    uc.reg_write(register, 0)
    if len(candidates) != 1:
        raise EngineError(f"unicorn: CPU state found in {len(candidates)} places; known to work: {KNOWN_VERSION}")
    return candidates.pop()


def _pointed_to(engine: int, pattern: bytes) -> Iterator[int]:
    """Addresses of ``pattern`` near what the words of the engine's structure point to."""
    writable = _writable_memory()
    for word in struct.unpack(f"<{_ENGINE_SCAN // 8}Q", ctypes.string_at(engine, _ENGINE_SCAN)):
        for start, end in writable.within(word, min(word + _STATE_SCAN, TOP)):
            if start == word:
                near = ctypes.string_at(start, end - start)
                yield from (start + match.start() for match in re.finditer(re.escape(pattern), near))


def _writable_memory() -> RangeSet:
    """Where this process may read and write.

    Mappings that touch are one range: the heap of a process that was forked off is two of them, and what is allocated
    lies across their border at times.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError as error:
        raise EngineError(f"running machine code needs Linux: {error}") from error
    writable = RangeSet()
    for line in lines:
        where, permissions = line.split()[:2]
        if permissions == "rw-p":
            start, end = (int(address, 16) for address in where.split("-"))
            writable.add(start, end)
    return writable
