"""Words of the UEFI specification: status codes, GUIDs, memory types and attributes.

Sources: UEFI 2.10, appendix D (status), section 7.2 (memory types); include/linux/efi.h for Linux's GUIDs.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from uuid import UUID

_ERROR = 1 << 63


class EfiStatus(IntEnum):
    """EFI_STATUS, 64 bits; errors have the highest bit set."""

    EFI_SUCCESS = 0
    EFI_LOAD_ERROR = _ERROR | 1
    EFI_INVALID_PARAMETER = _ERROR | 2
    EFI_UNSUPPORTED = _ERROR | 3
    EFI_BUFFER_TOO_SMALL = _ERROR | 5
    EFI_NOT_READY = _ERROR | 6
    EFI_DEVICE_ERROR = _ERROR | 7
    EFI_WRITE_PROTECTED = _ERROR | 8
    EFI_OUT_OF_RESOURCES = _ERROR | 9
    EFI_NOT_FOUND = _ERROR | 14
    EFI_ACCESS_DENIED = _ERROR | 15
    EFI_ALREADY_STARTED = _ERROR | 20


def status_name(status: int) -> str:
    """Name of an EFI_STATUS, or the number."""
    try:
        return EfiStatus(status).name
    except ValueError:
        return f"{status:#x}"


class EfiMemoryType(IntEnum):
    """EFI_MEMORY_TYPE (UEFI 2.10, table 7.6)."""

    EfiReservedMemoryType = 0
    EfiLoaderCode = 1
    EfiLoaderData = 2
    EfiBootServicesCode = 3
    EfiBootServicesData = 4
    EfiRuntimeServicesCode = 5
    EfiRuntimeServicesData = 6
    EfiConventionalMemory = 7
    EfiUnusableMemory = 8
    EfiACPIReclaimMemory = 9
    EfiACPIMemoryNVS = 10
    EfiMemoryMappedIO = 11
    EfiMemoryMappedIOPortSpace = 12
    EfiPalCode = 13
    EfiPersistentMemory = 14
    EfiUnacceptedMemoryType = 15


class EfiMemoryAttribute(IntFlag):
    """Attribute field of EFI_MEMORY_DESCRIPTOR (UEFI 2.10, section 7.2.3)."""

    EFI_MEMORY_UC = 1 << 0
    EFI_MEMORY_WC = 1 << 1
    EFI_MEMORY_WT = 1 << 2
    EFI_MEMORY_WB = 1 << 3
    EFI_MEMORY_UCE = 1 << 4
    EFI_MEMORY_WP = 1 << 12
    EFI_MEMORY_RP = 1 << 13
    EFI_MEMORY_XP = 1 << 14
    EFI_MEMORY_NV = 1 << 15
    EFI_MEMORY_MORE_RELIABLE = 1 << 16
    EFI_MEMORY_RO = 1 << 17
    EFI_MEMORY_SP = 1 << 18
    EFI_MEMORY_CPU_CRYPTO = 1 << 19
    EFI_MEMORY_HOT_PLUGGABLE = 1 << 20
    EFI_MEMORY_RUNTIME = 1 << 63


CACHEABLE = 0xF
"""UC, WC, WT and WB: what OVMF says of ordinary RAM."""


class AllocateType(IntEnum):
    """EFI_ALLOCATE_TYPE (UEFI 2.10, section 7.2.1)."""

    AllocateAnyPages = 0
    AllocateMaxAddress = 1
    AllocateAddress = 2


class LocateSearchType(IntEnum):
    """EFI_LOCATE_SEARCH_TYPE (UEFI 2.10, section 7.3.13)."""

    AllHandles = 0
    ByRegisterNotify = 1
    ByProtocol = 2


LOCATE_BY_PROTOCOL = LocateSearchType.ByProtocol

EFI_GLOBAL_VARIABLE_GUID = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
ACPI_20_TABLE_GUID = UUID("8868e871-e4f1-11d3-bc22-0080c73c8881")
SMBIOS3_TABLE_GUID = UUID("f2fd1544-9794-4a2c-992e-e5bbcf20e394")
EFI_RNG_ALGORITHM_RAW = UUID("e43176d7-b6e8-4827-b784-7ffdc4b68561")
ACPI_TABLE_GUID = UUID("eb9d2d30-2d88-11d3-9a16-0090273fc14d")
SMBIOS_TABLE_GUID = UUID("eb9d2d31-2d88-11d3-9a16-0090273fc14d")
EFI_MEMORY_ATTRIBUTES_TABLE_GUID = UUID("dcfa911d-26eb-469f-a220-38b7dc461220")
EFI_RNG_PROTOCOL_GUID = UUID("3152bca5-eade-433d-862e-c01cdc291f44")
EFI_LOADED_IMAGE_PROTOCOL_GUID = UUID("5b1b31a1-9562-11d2-8e3f-00a0c969723b")
EFI_LOAD_FILE2_PROTOCOL_GUID = UUID("4006c0c1-fcb3-403e-996d-4a6c8724e06d")
EFI_CC_MEASUREMENT_PROTOCOL_GUID = UUID("96751a3d-72f4-41a6-a794-ed5d0e67ae6b")
EFI_DEVICE_PATH_PROTOCOL_GUID = UUID("09576e91-6d3f-11d2-8e39-00a0c969723b")
EFI_EVENT_GROUP_EXIT_BOOT_SERVICES = UUID("27abf055-b1b8-4c26-8048-748f37baa2df")
EFI_EVENT_GROUP_BEFORE_EXIT_BOOT_SERVICES = UUID("8be0e274-3970-4b44-80c5-1ab9502f3b3b")
EFI_EVENT_GROUP_VIRTUAL_ADDRESS_CHANGE = UUID("13fa7698-c831-49c7-87ea-8f43fcc25196")
EFI_GRAPHICS_OUTPUT_PROTOCOL_GUID = UUID("9042a9de-23dc-4a38-96fb-7aded080516a")
EFI_MEMORY_ATTRIBUTE_PROTOCOL_GUID = UUID("f4560cf6-40ec-4b4a-a192-bf1d57d0b189")
EFI_PCI_IO_PROTOCOL_GUID = UUID("4cf5b200-68b8-4ca5-9eec-b23e3f50029a")
EFI_SHIM_LOCK_GUID = UUID("605dab50-e046-4300-abb6-3dd810dd8b23")
EFI_TCG2_PROTOCOL_GUID = UUID("607f766c-7455-42be-930b-e4d76db2720f")
EFI_UGA_PROTOCOL_GUID = UUID("982c298b-f4fa-41cb-b838-77aa688fb839")
EDKII_MEMORY_ACCEPT_PROTOCOL_GUID = UUID("38c74800-5590-4db4-a0f3-675d9b8e8026")
MEMORY_ONLY_RESET_CONTROL_GUID = UUID("e20939be-32d4-41be-a150-897f85d49829")
OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL_GUID = UUID("c5a010fe-38a7-4531-8a4a-0500d2fd1649")
QEMU_KERNEL_LOADER_FS_MEDIA_GUID = UUID("1428f772-b64a-441e-b8c3-9ebdd7f893c7")
LINUX_EFI_BOOT_MEMMAP_GUID = UUID("800f683f-d08b-423a-a293-965c3c6fe2b4")
LINUX_EFI_RANDOM_SEED_TABLE_GUID = UUID("1ce1e5bc-7ceb-42f2-81e5-8aadf180f57b")
LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID = UUID("d5d1de3c-105c-44f9-9ea9-bcef98120031")
LINUX_EFI_INITRD_MEDIA_GUID = UUID("5568e427-68fc-4f3d-ac74-ca555231cc68")
GUID_SIZE = 16


def guid_bytes(guid: UUID) -> bytes:
    """The 16 bytes of an EFI_GUID in memory: the first three fields little endian (UEFI 2.10, appendix A)."""
    return guid.bytes_le
