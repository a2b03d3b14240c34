"""EFI system table and the tables it points to: layouts, order of services, checksums.

Source: UEFI 2.10, sections 4.2 to 4.6. The order of ``BOOT_SERVICES`` and ``RUNTIME_SERVICES`` is that of the
function pointers in guest memory; the number behind each name is that of its arguments.
"""

from __future__ import annotations

import zlib

import construct as c

from guest.memory import GuestMemory

EFI_SYSTEM_TABLE_SIGNATURE = 0x5453_5953_2049_4249  # "IBI SYST"
EFI_BOOT_SERVICES_SIGNATURE = 0x5652_4553_544F_4F42  # "BOOTSERV"
EFI_RUNTIME_SERVICES_SIGNATURE = 0x5652_4553_544E_5552  # "RUNTSERV"
EFI_2_70_SYSTEM_TABLE_REVISION = 2 << 16 | 70

BOOT_SERVICES = (
    ("RaiseTPL", 1),
    ("RestoreTPL", 1),
    ("AllocatePages", 4),
    ("FreePages", 2),
    ("GetMemoryMap", 5),
    ("AllocatePool", 3),
    ("FreePool", 1),
    ("CreateEvent", 5),
    ("SetTimer", 3),
    ("WaitForEvent", 3),
    ("SignalEvent", 1),
    ("CloseEvent", 1),
    ("CheckEvent", 1),
    ("InstallProtocolInterface", 4),
    ("ReinstallProtocolInterface", 4),
    ("UninstallProtocolInterface", 3),
    ("HandleProtocol", 3),
    ("Reserved", 0),
    ("RegisterProtocolNotify", 3),
    ("LocateHandle", 5),
    ("LocateDevicePath", 3),
    ("InstallConfigurationTable", 2),
    ("LoadImage", 6),
    ("StartImage", 3),
    ("Exit", 4),
    ("UnloadImage", 1),
    ("ExitBootServices", 2),
    ("GetNextMonotonicCount", 1),
    ("Stall", 1),
    ("SetWatchdogTimer", 4),
    ("ConnectController", 4),
    ("DisconnectController", 3),
    ("OpenProtocol", 6),
    ("CloseProtocol", 4),
    ("OpenProtocolInformation", 4),
    ("ProtocolsPerHandle", 3),
    ("LocateHandleBuffer", 5),
    ("LocateProtocol", 3),
    ("InstallMultipleProtocolInterfaces", 1),
    ("UninstallMultipleProtocolInterfaces", 1),
    ("CalculateCrc32", 3),
    ("CopyMem", 3),
    ("SetMem", 3),
    ("CreateEventEx", 6),
)

VARIADIC = frozenset({"InstallMultipleProtocolInterfaces", "UninstallMultipleProtocolInterfaces"})
"""Services whose arguments end with (EFI_GUID *, interface) pairs, up to a null EFI_GUID *."""

_BITS8, _BITS32 = 0xFF, 0xFFFF_FFFF
NARROW_ARGUMENTS = {
    "AllocatePages": {0: _BITS32, 1: _BITS32},
    "AllocatePool": {0: _BITS32},
    "CreateEvent": {0: _BITS32},
    "CreateEventEx": {0: _BITS32},
    "SetTimer": {1: _BITS32},
    "InstallProtocolInterface": {2: _BITS32},
    "LocateHandle": {0: _BITS32},
    "LocateHandleBuffer": {0: _BITS32},
    "LoadImage": {0: _BITS8},
    "OpenProtocol": {5: _BITS32},
    "SetMem": {2: _BITS8},
    "SetVirtualAddressMap": {2: _BITS32},
    "SetVariable": {2: _BITS32},
    "QueryVariableInfo": {0: _BITS32},
    "ResetSystem": {0: _BITS32},
    "LoadFile": {2: _BITS8},
}
"""Arguments of less than 64 bits: service, number of the argument, mask. Callers leave anything in the bits above.

An argument on the stack is stored as it is wide, into a slot of eight bytes (Microsoft x64 convention).
"""

RUNTIME_SERVICES = (
    ("GetTime", 2),
    ("SetTime", 1),
    ("GetWakeupTime", 3),
    ("SetWakeupTime", 2),
    ("SetVirtualAddressMap", 4),
    ("ConvertPointer", 2),
    ("GetVariable", 5),
    ("GetNextVariableName", 3),
    ("SetVariable", 5),
    ("GetNextHighMonotonicCount", 1),
    ("ResetSystem", 4),
    ("UpdateCapsule", 3),
    ("QueryCapsuleCapabilities", 4),
    ("QueryVariableInfo", 4),
)

EFI_TABLE_HEADER = c.Struct(
    "Signature" / c.Int64ul,
    "Revision" / c.Int32ul,
    "HeaderSize" / c.Int32ul,
    "CRC32" / c.Int32ul,
    "Reserved" / c.Int32ul,
)
EFI_SYSTEM_TABLE = c.Struct(
    "Hdr" / EFI_TABLE_HEADER,
    "FirmwareVendor" / c.Int64ul,
    "FirmwareRevision" / c.Int32ul,
    c.Padding(4),
    "ConsoleInHandle" / c.Int64ul,
    "ConIn" / c.Int64ul,
    "ConsoleOutHandle" / c.Int64ul,
    "ConOut" / c.Int64ul,
    "StandardErrorHandle" / c.Int64ul,
    "StdErr" / c.Int64ul,
    "RuntimeServices" / c.Int64ul,
    "BootServices" / c.Int64ul,
    "NumberOfTableEntries" / c.Int64ul,
    "ConfigurationTable" / c.Int64ul,
)
EFI_BOOT_SERVICES = c.Struct("Hdr" / EFI_TABLE_HEADER, *(name / c.Int64ul for name, _ in BOOT_SERVICES))
EFI_RUNTIME_SERVICES = c.Struct("Hdr" / EFI_TABLE_HEADER, *(name / c.Int64ul for name, _ in RUNTIME_SERVICES))
EFI_CONFIGURATION_TABLE = c.Struct("VendorGuid" / c.Bytes(16), "VendorTable" / c.Int64ul)
MAX_CONFIGURATION_TABLES = 32
"""Entries that the firmware keeps room for."""

EFI_LOADED_IMAGE_PROTOCOL = c.Struct(
    "Revision" / c.Int32ul,
    c.Padding(4),
    "ParentHandle" / c.Int64ul,
    "SystemTable" / c.Int64ul,
    "DeviceHandle" / c.Int64ul,
    "FilePath" / c.Int64ul,
    "Reserved" / c.Int64ul,
    "LoadOptionsSize" / c.Int32ul,
    c.Padding(4),
    "LoadOptions" / c.Int64ul,
    "ImageBase" / c.Int64ul,
    "ImageSize" / c.Int64ul,
    "ImageCodeType" / c.Int32ul,
    "ImageDataType" / c.Int32ul,
    "Unload" / c.Int64ul,
)
"""UEFI 2.10, section 9.1.1."""
EFI_LOADED_IMAGE_PROTOCOL_REVISION = 0x1000

EFI_LOAD_FILE2_PROTOCOL = c.Struct("LoadFile" / c.Int64ul)
"""UEFI 2.10, section 13.2."""


def seal(memory: GuestMemory, gpa: int, size: int) -> None:
    """Put the CRC32 of the table of ``size`` bytes at ``gpa`` into its header (UEFI 2.10, section 4.2)."""
    crc_at = gpa + 16
    memory.write_uint(crc_at, 0, 4)
    memory.write_uint(crc_at, zlib.crc32(memory.read(gpa, size)), 4)
