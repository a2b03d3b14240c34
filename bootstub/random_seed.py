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
_STORED = "RandomSeed", LINUX_EFI_RANDOM_SEED_TABLE_GUID


def random_bytes(efi: EfiCalls, size: int) -> bytes | None:
    """``size`` bytes, 8 at most, of the firmware's default generator; None if it has none."""
    protocol = efi.locate_protocol(EFI_RNG_PROTOCOL_GUID)
    if protocol is None:
        return None
    at = efi.slot(1)
    return efi.memory.read(at, size) if _get_rng(efi, protocol, 0, size, at) == EfiStatus.EFI_SUCCESS else None


def install_random_seed(efi: EfiCalls) -> None:
    """efi_random_get_seed(): a table of new random bytes, those in the variable RandomSeed, and those of an old table.

    The variable is deleted, the old table given back. Without a new source an old table stays as it is; a source that
    fails is no error.
    """
    protocol = efi.locate_protocol(EFI_RNG_PROTOCOL_GUID)
    efi.get_variable(*_STORED, size=0)
    stored = efi.load(1)
    if protocol is None and not stored:
        return
    old, bits = _old_seed(efi)
    installed = _install(efi, protocol, stored, bits)
    if old is not None and not installed:
        efi.warn("Retaining bootloader-supplied seed only", end="")
    elif old is not None and bits:
        efi.memory.clear(old + _SIZE_FIELD, old + _SIZE_FIELD + len(bits))
        efi.free_pool(old)


def _install(efi: EfiCalls, protocol: int | None, stored: int, old_bits: bytes) -> bool:
    """Install a table of new bytes, the ``stored`` ones of the variable, and ``old_bits``; false if there is none."""
    try:
        room = (EFI_RANDOM_SEED_SIZE if protocol else 0) + stored + len(old_bits)
        table = efi.allocate_pool(_SIZE_FIELD + room, EfiMemoryType.EfiACPIReclaimMemory)
    except EfiError:
        efi.warn("Failed to allocate memory for RNG seed.")
        return False
    size = _fill(efi, protocol, table + _SIZE_FIELD) if protocol else 0
    size += _take_stored(efi, table + _SIZE_FIELD + size, stored)
    if size:
        efi.memory.write(table + _SIZE_FIELD + size, old_bits)
        efi.memory.write_uint(table, size + len(old_bits), _SIZE_FIELD)
        guid = efi.bytes_at_scratch(guid_bytes(LINUX_EFI_RANDOM_SEED_TABLE_GUID))
        if efi.boot("InstallConfigurationTable", guid, table) == EfiStatus.EFI_SUCCESS:
            return True
    efi.memory.clear(table, table + _SIZE_FIELD + room)
    efi.free_pool(table)
    efi.warn("Failed to obtain seed from EFI_RNG_PROTOCOL or EFI variable")
    return False


def _take_stored(efi: EfiCalls, at: int, size: int) -> int:
    """Put the ``size`` bytes of the variable at ``at`` and delete it; the number of bytes that count."""
    if not size:
        return 0
    found = efi.read_variable(*_STORED, at, size)
    if found and efi.set_variable(*_STORED, 0, b"") == EfiStatus.EFI_SUCCESS:
        return found
    efi.memory.clear(at, at + size)
    return 0


def _fill(efi: EfiCalls, protocol: int, at: int) -> int:
    """Put new random bytes at ``at``, raw ones if the generator has them; returns their number."""
    algorithm = efi.bytes_at_scratch(guid_bytes(EFI_RNG_ALGORITHM_RAW))
    status = _get_rng(efi, protocol, algorithm, EFI_RANDOM_SEED_SIZE, at)
    if status == EfiStatus.EFI_UNSUPPORTED:
        status = _get_rng(efi, protocol, 0, EFI_RANDOM_SEED_SIZE, at)
    return EFI_RANDOM_SEED_SIZE if status == EfiStatus.EFI_SUCCESS else 0


def _old_seed(efi: EfiCalls) -> tuple[int | None, bytes]:
    """A seed table that is installed already, and its bytes; none of one that is too long."""
    table = efi.configuration_table(LINUX_EFI_RANDOM_SEED_TABLE_GUID)
    if table is None:
        return None, b""
    size = efi.memory.read_uint(table, _SIZE_FIELD)
    return table, efi.memory.read(table + _SIZE_FIELD, size) if size <= _MAX_SEED else b""


def _get_rng(efi: EfiCalls, protocol: int, algorithm: int, size: int, at: int) -> int:
    return efi.call(GuestRecord(efi.memory, protocol, EFI_RNG_PROTOCOL)["GetRNG"], protocol, algorithm, size, at)
