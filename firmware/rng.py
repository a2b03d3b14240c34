"""Random numbers for an image: EFI_RNG_PROTOCOL (UEFI 2.10, section 37.5)."""

from __future__ import annotations

import construct as c

from firmware.boot_services import EfiServices
from firmware.efi_types import EFI_RNG_PROTOCOL_GUID, EfiMemoryType, EfiStatus
from guest.units import SZ_1M

EFI_RNG_PROTOCOL = c.Struct("GetInfo" / c.Int64ul, "GetRNG" / c.Int64ul)


def install_rng(services: EfiServices, source: bytes) -> None:
    """Offer a generator of every algorithm that hands out ``source``, which must not be empty, over and over."""
    position = 0

    def get_rng(this: int, algorithm: int, size: int, value: int) -> int:
        nonlocal position
        if size == 0 or value == 0:
            return EfiStatus.EFI_INVALID_PARAMETER
        if size > SZ_1M:
            return EfiStatus.EFI_NOT_READY
        data = bytes(source[(position + n) % len(source)] for n in range(size))
        services.machine.memory.write(value, data)
        position += size
        return EfiStatus.EFI_SUCCESS

    code = EfiMemoryType.EfiBootServicesCode
    gates = services.install_gates((("GetInfo", 3),), code) + services.install_gates((("GetRNG", 4),), code, get_rng)
    fields = dict(zip(("GetInfo", "GetRNG"), gates, strict=True))
    protocol = services.arena.put(EfiMemoryType.EfiBootServicesData, EFI_RNG_PROTOCOL.build(fields))
    services.install_protocol(services.new_handle(), EFI_RNG_PROTOCOL_GUID, protocol)
