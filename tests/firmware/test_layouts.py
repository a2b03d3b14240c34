"""Sizes and offsets of the firmware's records, typed from the specifications."""

from __future__ import annotations

import pytest

from firmware import hob, memory_descriptor, pe, tables, tdvf
from firmware.efi_types import (
    ACPI_20_TABLE_GUID,
    CACHEABLE,
    EFI_LOADED_IMAGE_PROTOCOL_GUID,
    EfiMemoryAttribute,
    EfiMemoryType,
    EfiStatus,
    guid_bytes,
    status_name,
)
from guest.records import bare, field_extents

HDR = {
    "Hdr.Signature": (0, 8), "Hdr.Revision": (8, 4), "Hdr.HeaderSize": (12, 4), "Hdr.CRC32": (16, 4),
    "Hdr.Reserved": (20, 4),
}  # fmt: skip
HOB_HEADER = {"Header.HobType": (0, 2), "Header.HobLength": (2, 2), "Header.Reserved": (4, 4)}
LAYOUTS = [
    ("UEFI 2.10, 7.2.3", memory_descriptor.EFI_MEMORY_DESCRIPTOR, 40, {
        "Type": (0, 4), "PhysicalStart": (8, 8), "VirtualStart": (16, 8), "NumberOfPages": (24, 8),
        "Attribute": (32, 8)}),
    ("UEFI 2.10, 4.2", tables.EFI_TABLE_HEADER, 24, {
        "Signature": (0, 8), "Revision": (8, 4), "HeaderSize": (12, 4), "CRC32": (16, 4), "Reserved": (20, 4)}),
    ("UEFI 2.10, 4.3", tables.EFI_SYSTEM_TABLE, 120, HDR | {
        "FirmwareVendor": (24, 8), "FirmwareRevision": (32, 4), "ConsoleInHandle": (40, 8), "ConIn": (48, 8),
        "ConsoleOutHandle": (56, 8), "ConOut": (64, 8), "StandardErrorHandle": (72, 8), "StdErr": (80, 8),
        "RuntimeServices": (88, 8), "BootServices": (96, 8), "NumberOfTableEntries": (104, 8),
        "ConfigurationTable": (112, 8)}),
    ("UEFI 2.10, 4.4", tables.EFI_BOOT_SERVICES, 376, HDR | {
        "RaiseTPL": (24, 8), "RestoreTPL": (32, 8), "AllocatePages": (40, 8), "FreePages": (48, 8),
        "GetMemoryMap": (56, 8), "AllocatePool": (64, 8), "FreePool": (72, 8), "CreateEvent": (80, 8),
        "SetTimer": (88, 8), "WaitForEvent": (96, 8), "SignalEvent": (104, 8), "CloseEvent": (112, 8),
        "CheckEvent": (120, 8), "InstallProtocolInterface": (128, 8), "ReinstallProtocolInterface": (136, 8),
        "UninstallProtocolInterface": (144, 8), "HandleProtocol": (152, 8), "Reserved": (160, 8),
        "RegisterProtocolNotify": (168, 8), "LocateHandle": (176, 8), "LocateDevicePath": (184, 8),
        "InstallConfigurationTable": (192, 8), "LoadImage": (200, 8), "StartImage": (208, 8), "Exit": (216, 8),
        "UnloadImage": (224, 8), "ExitBootServices": (232, 8), "GetNextMonotonicCount": (240, 8),
        "Stall": (248, 8), "SetWatchdogTimer": (256, 8), "ConnectController": (264, 8),
        "DisconnectController": (272, 8), "OpenProtocol": (280, 8), "CloseProtocol": (288, 8),
        "OpenProtocolInformation": (296, 8), "ProtocolsPerHandle": (304, 8), "LocateHandleBuffer": (312, 8),
        "LocateProtocol": (320, 8), "InstallMultipleProtocolInterfaces": (328, 8),
        "UninstallMultipleProtocolInterfaces": (336, 8), "CalculateCrc32": (344, 8), "CopyMem": (352, 8),
        "SetMem": (360, 8), "CreateEventEx": (368, 8)}),
    ("UEFI 2.10, 4.5", tables.EFI_RUNTIME_SERVICES, 136, HDR | {
        "GetTime": (24, 8), "SetTime": (32, 8), "GetWakeupTime": (40, 8), "SetWakeupTime": (48, 8),
        "SetVirtualAddressMap": (56, 8), "ConvertPointer": (64, 8), "GetVariable": (72, 8),
        "GetNextVariableName": (80, 8), "SetVariable": (88, 8), "GetNextHighMonotonicCount": (96, 8),
        "ResetSystem": (104, 8), "UpdateCapsule": (112, 8), "QueryCapsuleCapabilities": (120, 8),
        "QueryVariableInfo": (128, 8)}),
    ("UEFI 2.10, 4.6", tables.EFI_CONFIGURATION_TABLE, 24, {"VendorGuid": (0, 16), "VendorTable": (16, 8)}),
    ("UEFI 2.10, 9.1.1", tables.EFI_LOADED_IMAGE_PROTOCOL, 96, {
        "Revision": (0, 4), "ParentHandle": (8, 8), "SystemTable": (16, 8), "DeviceHandle": (24, 8),
        "FilePath": (32, 8), "Reserved": (40, 8), "LoadOptionsSize": (48, 4), "LoadOptions": (56, 8),
        "ImageBase": (64, 8), "ImageSize": (72, 8), "ImageCodeType": (80, 4), "ImageDataType": (84, 4),
        "Unload": (88, 8)}),
    ("UEFI 2.10, 13.2", tables.EFI_LOAD_FILE2_PROTOCOL, 8, {"LoadFile": (0, 8)}),
    ("PI 1.8 vol. 3, 5.2", hob._HEADER, 8, {"HobType": (0, 2), "HobLength": (2, 2), "Reserved": (4, 4)}),
    ("PI 1.8 vol. 3, 5.3", hob._HANDOFF, 56, HOB_HEADER | {
        "Version": (8, 4), "BootMode": (12, 4), "EfiMemoryTop": (16, 8), "EfiMemoryBottom": (24, 8),
        "EfiFreeMemoryTop": (32, 8), "EfiFreeMemoryBottom": (40, 8), "EfiEndOfHobList": (48, 8)}),
    ("PI 1.8 vol. 3, 5.5", hob._RESOURCE, 48, HOB_HEADER | {
        "Owner": (8, 16), "ResourceType": (24, 4), "ResourceAttribute": (28, 4), "PhysicalStart": (32, 8),
        "ResourceLength": (40, 8)}),
    ("TDVF design guide, 11.2, descriptor", tdvf._DESCRIPTOR, 16, {
        "Signature": (0, 4), "Length": (4, 4), "Version": (8, 4), "NumberOfSectionEntry": (12, 4)}),
    ("TDVF design guide, 11.2, section", tdvf._SECTION, 32, {
        "DataOffset": (0, 4), "RawDataSize": (4, 4), "MemoryAddress": (8, 8), "MemoryDataSize": (16, 8),
        "Type": (24, 4), "Attributes": (28, 4)}),
    ("PE/COFF, 3.3", pe._COFF, 24, {
        "Signature": (0, 4), "Machine": (4, 2), "NumberOfSections": (6, 2), "SizeOfOptionalHeader": (20, 2),
        "Characteristics": (22, 2)}),
    ("PE/COFF, 3.4", pe._OPTIONAL, 64, {
        "Magic": (0, 2), "AddressOfEntryPoint": (16, 4), "ImageBase": (24, 8), "SectionAlignment": (32, 4),
        "SizeOfImage": (56, 4), "SizeOfHeaders": (60, 4)}),
    ("PE/COFF, 4", pe._SECTION, 40, {
        "VirtualSize": (8, 4), "VirtualAddress": (12, 4), "SizeOfRawData": (16, 4), "PointerToRawData": (20, 4)}),
]  # fmt: skip


@pytest.mark.parametrize("record, size, fields", [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
def test_layout(record, size, fields):
    """Size, offset and length of every field are those of the specification."""
    assert (record.sizeof(), field_extents(record)) == (size, fields)


def test_every_record_of_the_firmware_is_in_the_table():
    """A layout that is declared is also typed by hand above."""
    modules = (hob, memory_descriptor, pe, tables, tdvf)
    declared = {
        id(value): name for module in modules for name, value in vars(module).items() if hasattr(value, "subcons")
    }
    known = {id(bare(row[1])) for row in LAYOUTS}
    assert {name for key, name in declared.items() if key not in known} == set()


ARGUMENTS = {
    1: "RaiseTPL RestoreTPL FreePool SignalEvent CloseEvent CheckEvent UnloadImage GetNextMonotonicCount Stall "
    "SetTime GetNextHighMonotonicCount",
    2: "FreePages InstallConfigurationTable ExitBootServices GetTime SetWakeupTime ConvertPointer",
    3: "AllocatePool SetTimer WaitForEvent UninstallProtocolInterface HandleProtocol RegisterProtocolNotify "
    "LocateDevicePath StartImage DisconnectController ProtocolsPerHandle LocateProtocol CalculateCrc32 CopyMem "
    "SetMem GetWakeupTime GetNextVariableName UpdateCapsule",
    4: "AllocatePages InstallProtocolInterface ReinstallProtocolInterface Exit SetWatchdogTimer ConnectController "
    "CloseProtocol OpenProtocolInformation SetVirtualAddressMap ResetSystem QueryCapsuleCapabilities "
    "QueryVariableInfo",
    5: "GetMemoryMap CreateEvent LocateHandle LocateHandleBuffer GetVariable SetVariable",
    6: "LoadImage OpenProtocol CreateEventEx",
}
"""Services by their number of arguments, from the prototypes in chapters 7 and 8 of UEFI 2.10."""


def test_services_take_the_arguments_of_their_prototypes():
    """Each service that has a fixed number of arguments has the specification's."""
    typed = {name: count for count, names in ARGUMENTS.items() for name in names.split()}
    variable = {"InstallMultipleProtocolInterfaces", "UninstallMultipleProtocolInterfaces"}
    declared = dict(tables.BOOT_SERVICES + tables.RUNTIME_SERVICES)
    assert {name: count for name, count in declared.items() if name not in variable | {"Reserved"}} == typed


def test_attributes_have_their_bits():
    """Attribute bits as in section 7.2.3 of the specification."""
    bits = {
        attribute.name.removeprefix("EFI_MEMORY_"): attribute.value.bit_length() - 1 for attribute in EfiMemoryAttribute
    }
    assert bits == {
        "UC": 0, "WC": 1, "WT": 2, "WB": 3, "UCE": 4, "WP": 12, "RP": 13, "XP": 14, "NV": 15, "MORE_RELIABLE": 16,
        "RO": 17, "SP": 18, "CPU_CRYPTO": 19, "HOT_PLUGGABLE": 20, "RUNTIME": 63,
    }  # fmt: skip
    assert all(attribute.value.bit_count() == 1 for attribute in EfiMemoryAttribute)
    assert CACHEABLE == 0b1111


def test_guids_are_stored_with_three_little_endian_fields():
    """The first three fields of a GUID are little endian in memory, the rest are bytes."""
    assert guid_bytes(ACPI_20_TABLE_GUID).hex() == "71e86888f1e4d311bc220080c73c8881"
    assert guid_bytes(EFI_LOADED_IMAGE_PROTOCOL_GUID).hex() == "a1311b5b6295d2118e3f00a0c969723b"


@pytest.mark.parametrize(
    "name, value",
    [
        ("EFI_SUCCESS", 0),
        ("EFI_LOAD_ERROR", 0x8000_0000_0000_0001),
        ("EFI_INVALID_PARAMETER", 0x8000_0000_0000_0002),
        ("EFI_UNSUPPORTED", 0x8000_0000_0000_0003),
        ("EFI_BUFFER_TOO_SMALL", 0x8000_0000_0000_0005),
        ("EFI_NOT_READY", 0x8000_0000_0000_0006),
        ("EFI_DEVICE_ERROR", 0x8000_0000_0000_0007),
        ("EFI_WRITE_PROTECTED", 0x8000_0000_0000_0008),
        ("EFI_OUT_OF_RESOURCES", 0x8000_0000_0000_0009),
        ("EFI_NOT_FOUND", 0x8000_0000_0000_000E),
        ("EFI_ACCESS_DENIED", 0x8000_0000_0000_000F),
        ("EFI_ALREADY_STARTED", 0x8000_0000_0000_0014),
    ],
)
def test_statuses_have_their_numbers(name, value):
    """EFI_STATUS as in appendix D of the specification, and back to its name."""
    assert EfiStatus[name] == value
    assert status_name(value) == name
    assert status_name(0x8000_0000_0000_0077) == "0x8000000000000077"


def test_memory_types_have_their_numbers():
    """EFI_MEMORY_TYPE as in table 7.6 of the specification."""
    assert [kind.value for kind in EfiMemoryType] == list(range(16))
    assert EfiMemoryType.EfiConventionalMemory == 7
    assert EfiMemoryType.EfiACPIReclaimMemory == 9
    assert EfiMemoryType.EfiPersistentMemory == 14
    assert EfiMemoryType.EfiUnacceptedMemoryType == 15
