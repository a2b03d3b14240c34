"""Random numbers for an image: EFI_RNG_PROTOCOL (UEFI 2.10, section 37.5)."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import construct as c

from firmware.boot_services import EfiServices
from firmware.efi_types import EFI_RNG_ALGORITHM_RAW, EFI_RNG_PROTOCOL_GUID, EfiMemoryType, EfiStatus, guid_bytes
from guest.units import SZ_1M

EFI_RNG_PROTOCOL = c.Struct("GetInfo" / c.Int64ul, "GetRNG" / c.Int64ul)
ALGORITHMS = guid_bytes(EFI_RNG_ALGORITHM_RAW)
"""What GetInfo() lists, the default first; an algorithm is 16 bytes."""


def seeded(seed: int) -> Callable[[int], bytes]:
    """A source of random bytes that ``seed`` decides."""
    return Random(f"EFI_RNG_PROTOCOL {seed}").randbytes


def repeating(source: bytes) -> Callable[[int], bytes]:
    """A source that hands out ``source``, which must not be empty, over and over."""
    position = 0

    def draw(size: int) -> bytes:
        nonlocal position
        data = bytes(source[(position + n) % len(source)] for n in range(size))
        position += size
        return data

    return draw


def install_rng(services: EfiServices, draw: Callable[[int], bytes]) -> None:
    """Offer a generator that hands out what ``draw`` gives, by the raw algorithm only."""
    memory = services.machine.memory

    def get_info(this: int, size_at: int, algorithms: int) -> int:
        if size_at == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        room = memory.read_uint(size_at, 8)
        memory.write_uint(size_at, len(ALGORITHMS), 8)
        if room < len(ALGORITHMS):
            return EfiStatus.EFI_BUFFER_TOO_SMALL
        if algorithms == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        memory.write(algorithms, ALGORITHMS)
        return EfiStatus.EFI_SUCCESS

    def get_rng(this: int, algorithm: int, size: int, value: int) -> int:
        if size == 0 or value == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        if algorithm and memory.read(algorithm, 16) != ALGORITHMS:
            return EfiStatus.EFI_UNSUPPORTED
        if size > SZ_1M:
            return EfiStatus.EFI_NOT_READY
        memory.write(value, draw(size))
        return EfiStatus.EFI_SUCCESS

    code = EfiMemoryType.EfiBootServicesCode
    gates = services.install_gates((("GetInfo", 3),), code, get_info)
    gates += services.install_gates((("GetRNG", 4),), code, get_rng)
    fields = dict(zip(("GetInfo", "GetRNG"), gates, strict=True))
    protocol = services.arena.put(EfiMemoryType.EfiBootServicesData, EFI_RNG_PROTOCOL.build(fields))
    services.install_protocol(services.new_object(), EFI_RNG_PROTOCOL_GUID, protocol)
