"""Short names of the GUIDs that Linux's EFI stub asks for.

Sources: UEFI 2.10 and include/linux/efi.h, where most have the same name with ``EFI_`` before and ``_GUID`` behind.
"""

from __future__ import annotations

from uuid import UUID

from firmware import efi_types

_NAMES = {
    efi_types.ACPI_20_TABLE_GUID: "ACPI_20_TABLE",
    efi_types.EFI_CC_MEASUREMENT_PROTOCOL_GUID: "CC_MEASUREMENT",
    efi_types.EFI_GLOBAL_VARIABLE_GUID: "GLOBAL_VARIABLE",
    efi_types.EFI_GRAPHICS_OUTPUT_PROTOCOL_GUID: "GOP",
    efi_types.EFI_LOAD_FILE2_PROTOCOL_GUID: "LOAD_FILE2",
    efi_types.EFI_LOADED_IMAGE_PROTOCOL_GUID: "LOADED_IMAGE",
    efi_types.EFI_MEMORY_ATTRIBUTE_PROTOCOL_GUID: "MEMORY_ATTRIBUTE",
    efi_types.EFI_PCI_IO_PROTOCOL_GUID: "PCI_IO",
    efi_types.EFI_RNG_PROTOCOL_GUID: "RNG",
    efi_types.EFI_TCG2_PROTOCOL_GUID: "TCG2",
    efi_types.EFI_UGA_PROTOCOL_GUID: "UGA",
    efi_types.LINUX_EFI_BOOT_MEMMAP_GUID: "LINUX_BOOT_MEMMAP",
    efi_types.LINUX_EFI_RANDOM_SEED_TABLE_GUID: "LINUX_RANDOM_SEED",
    efi_types.LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID: "LINUX_UNACCEPTED_MEM_TABLE",
    efi_types.MEMORY_ONLY_RESET_CONTROL_GUID: "MEM_OVERWRITE_CTRL",
    efi_types.OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL_GUID: "SEV_MEM_ACCEPT",
}
_BY_BYTES = {efi_types.guid_bytes(guid): name for guid, name in _NAMES.items()}


def guid_name(data: bytes) -> str:
    """Name of the EFI_GUID ``data``, 16 bytes, or the usual text form."""
    return _BY_BYTES.get(data) or str(UUID(bytes_le=data))


def guid_of(name: str) -> bytes:
    """The 16 bytes of the GUID that has this short name."""
    return next(data for data, known in _BY_BYTES.items() if known == name)
