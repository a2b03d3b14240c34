"""Short names of the GUIDs that Linux's EFI stub asks for.

Sources: UEFI 2.10 and include/linux/efi.h, where most have the same name with ``EFI_`` before and ``_GUID`` behind.
"""

from __future__ import annotations

from uuid import UUID

from firmware.efi_types import (
    ACPI_20_TABLE_GUID,
    EFI_GLOBAL_VARIABLE_GUID,
    EFI_LOAD_FILE2_PROTOCOL_GUID,
    EFI_LOADED_IMAGE_PROTOCOL_GUID,
    EFI_RNG_PROTOCOL_GUID,
    guid_bytes,
)

_NAMES = {
    ACPI_20_TABLE_GUID: "ACPI_20_TABLE",
    EFI_GLOBAL_VARIABLE_GUID: "GLOBAL_VARIABLE",
    EFI_LOAD_FILE2_PROTOCOL_GUID: "LOAD_FILE2",
    EFI_LOADED_IMAGE_PROTOCOL_GUID: "LOADED_IMAGE",
    EFI_RNG_PROTOCOL_GUID: "RNG",
    UUID("96751a3d-72f4-41a6-a794-ed5d0e67ae6b"): "CC_MEASUREMENT",
    UUID("9042a9de-23dc-4a38-96fb-7aded080516a"): "GOP",
    UUID("800f683f-d08b-423a-a293-965c3c6fe2b4"): "LINUX_BOOT_MEMMAP",
    UUID("1ce1e5bc-7ceb-42f2-81e5-8aadf180f57b"): "LINUX_RANDOM_SEED",
    UUID("d5d1de3c-105c-44f9-9ea9-bcef98120031"): "LINUX_UNACCEPTED_MEM_TABLE",
    UUID("e20939be-32d4-41be-a150-897f85d49829"): "MEM_OVERWRITE_CTRL",
    UUID("f4560cf6-40ec-4b4a-a192-bf1d57d0b189"): "MEMORY_ATTRIBUTE",
    UUID("4cf5b200-68b8-4ca5-9eec-b23e3f50029a"): "PCI_IO",
    UUID("c5a010fe-38a7-4531-8a4a-0500d2fd1649"): "SEV_MEM_ACCEPT",
    UUID("607f766c-7455-42be-930b-e4d76db2720f"): "TCG2",
    UUID("982c298b-f4fa-41cb-b838-77aa688fb839"): "UGA",
}
_BY_BYTES = {guid_bytes(guid): name for guid, name in _NAMES.items()}


def guid_name(data: bytes) -> str:
    """Name of the EFI_GUID ``data``, 16 bytes, or the usual text form."""
    return _BY_BYTES.get(data) or str(UUID(bytes_le=data))


def guid_of(name: str) -> bytes:
    """The 16 bytes of the GUID that has this short name."""
    return next(data for data, known in _BY_BYTES.items() if known == name)
