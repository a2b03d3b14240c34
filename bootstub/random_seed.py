"""Randomness that the firmware gives: for KASLR, and a seed that the kernel finds in a configuration table.

Source: drivers/firmware/efi/libstub/random.c, efi_get_random_bytes() and efi_random_get_seed().
"""

from __future__ import annotations

from bootstub.efi_call import EfiCalls, EfiError
from firmware.efi_types import (
    EFI_RNG_ALGORITHM_RAW,
    EFI_RNG_PROTOCOL_GUID,
    LINUX_EFI_RANDOM_SEED_TABLE_GUID,
    EfiMemoryType,
    EfiStatus,
    guid_bytes,
)
from firmware.rng import EFI_RNG_PROTOCOL
from guest.records import GuestRecord

EFI_RANDOM_SEED_SIZE = 32
_MAX_SEED = 512
_SIZE_FIELD = 4


def random_bytes(efi: EfiCalls, size: int) -> bytes | None:
    """``size`` bytes, 8 at most, of the firmware's default generator; None if it has none."""
    protocol = efi.locate_protocol(EFI_RNG_PROTOCOL_GUID)
    if protocol is None:
        return None
    at = efi.slot(1)
    return efi.memory.read(at, size) if _get_rng(efi, protocol, 0, size, at) == EfiStatus.EFI_SUCCESS else None


def install_random_seed(efi: EfiCalls) -> None:
    """efi_random_get_seed(): a table of new random bytes, those in the variable RandomSeed, and those of an old table.

    Nothing is installed if there is no source; a source that fails is no error.
    """
    protocol = efi.locate_protocol(EFI_RNG_PROTOCOL_GUID)
    old = _old_seed(efi)
    status, _ = efi.get_variable("RandomSeed", LINUX_EFI_RANDOM_SEED_TABLE_GUID, size=0)
    stored = efi.load(1) if status == EfiStatus.EFI_BUFFER_TOO_SMALL and efi.load(1) <= _MAX_SEED else 0
    room = (EFI_RANDOM_SEED_SIZE if protocol else 0) + len(old) + stored
    if not room:
        return
    try:
        table = efi.allocate_pool(_SIZE_FIELD + room, EfiMemoryType.EfiACPIReclaimMemory)
    except EfiError:
        return
    size = _fill(efi, protocol, table + _SIZE_FIELD) if protocol else 0
    size += efi.read_variable("RandomSeed", LINUX_EFI_RANDOM_SEED_TABLE_GUID, table + _SIZE_FIELD + size, stored)
    efi.memory.write(table + _SIZE_FIELD + size, old)
    efi.memory.write_uint(table, size + len(old), _SIZE_FIELD)
    if size + len(old):
        efi.install_configuration_table(LINUX_EFI_RANDOM_SEED_TABLE_GUID, table)
    else:
        efi.free_pool(table)


def _fill(efi: EfiCalls, protocol: int, at: int) -> int:
    """Put new random bytes at ``at``, raw ones if the generator has them; returns their number."""
    algorithm = efi.bytes_at_scratch(guid_bytes(EFI_RNG_ALGORITHM_RAW))
    status = _get_rng(efi, protocol, algorithm, EFI_RANDOM_SEED_SIZE, at)
    if status == EfiStatus.EFI_UNSUPPORTED:
        status = _get_rng(efi, protocol, 0, EFI_RANDOM_SEED_SIZE, at)
    return EFI_RANDOM_SEED_SIZE if status == EfiStatus.EFI_SUCCESS else 0


def _old_seed(efi: EfiCalls) -> bytes:
    """The bytes of a seed table that is installed already; one that is too long is left alone."""
    table = efi.configuration_table(LINUX_EFI_RANDOM_SEED_TABLE_GUID)
    if table is None:
        return b""
    size = efi.memory.read_uint(table, _SIZE_FIELD)
    return efi.memory.read(table + _SIZE_FIELD, size) if size <= _MAX_SEED else b""


def _get_rng(efi: EfiCalls, protocol: int, algorithm: int, size: int, at: int) -> int:
    return efi.call(GuestRecord(efi.memory, protocol, EFI_RNG_PROTOCOL)["GetRNG"], protocol, algorithm, size, at)
