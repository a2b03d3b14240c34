"""The table of unaccepted memory that mainline Linux hands on as an EFI configuration table.

Source: include/linux/efi.h, struct efi_unaccepted_memory: a header, and a bitmap behind it. A bit stands for
``unit_size`` bytes, counted from ``phys_base``.
"""

from __future__ import annotations

import hashlib
from typing import Any

from bitarray import bitarray

from bootstub.unaccepted_table import EFI_UNACCEPTED_MEMORY
from guest.memory import PhysicalMemory
from guest.units import BITS_PER_BYTE, SZ_64M

_MAX_SIZE = SZ_64M


def build_table(version: int, unit_size: int, phys_base: int, size: int, bits: list[list[int]]) -> bytes:
    """A table whose bitmap of ``size`` bytes has the runs ``bits`` set, ``[first, end)`` each."""
    if not 0 <= size <= _MAX_SIZE:
        raise ValueError(f"a bitmap of {size} bytes")
    bitmap = bitarray(BITS_PER_BYTE * size, endian="little")
    for first, end in bits:
        bitmap[first:end] = 1
    header = {"version": version, "unit_size": unit_size, "phys_base": phys_base, "size": size}
    return EFI_UNACCEPTED_MEMORY.build(header) + bitmap.tobytes()


def read_table(memory: PhysicalMemory, gpa: int) -> dict[str, Any]:
    """The table at ``gpa``: its fields, its set bits, and the SHA-256 of all of it."""
    data = memory.read(gpa, EFI_UNACCEPTED_MEMORY.sizeof())
    header = EFI_UNACCEPTED_MEMORY.parse(data)
    bitmap = memory.read(gpa + len(data), header.size)
    return {
        "pa": gpa,
        "version": header.version,
        "unit_size": header.unit_size,
        "phys_base": header.phys_base,
        "size": header.size,
        "bits": _runs(bitmap),
        "sha256": hashlib.sha256(data + bitmap).hexdigest(),
    }


def _runs(bitmap: bytes) -> list[list[int]]:
    """The runs of set bits, ``[first, end)``."""
    bits = bitarray(endian="little")
    bits.frombytes(bitmap)
    runs, end = [], 0
    while (first := bits.find(1, end)) >= 0:
        end = bits.find(0, first)
        end = end if end >= 0 else len(bits)
        runs.append([first, end])
    return runs
