"""Writing the EFI system table, the service tables and the configuration table into guest memory."""

from __future__ import annotations

from firmware.boot_services import EfiServices
from firmware.console import install_console
from firmware.efi_types import EfiMemoryType
from firmware.service_table import all_handlers
from firmware.tables import (
    BOOT_SERVICES,
    EFI_2_70_SYSTEM_TABLE_REVISION,
    EFI_BOOT_SERVICES,
    EFI_BOOT_SERVICES_SIGNATURE,
    EFI_CONFIGURATION_TABLE,
    EFI_RUNTIME_SERVICES,
    EFI_RUNTIME_SERVICES_SIGNATURE,
    EFI_SYSTEM_TABLE,
    EFI_SYSTEM_TABLE_SIGNATURE,
    MAX_CONFIGURATION_TABLES,
    RUNTIME_SERVICES,
    seal,
)
from guest.records import Layout

FIRMWARE_VENDOR = "unaccepted"
FIRMWARE_REVISION = 1 << 16


def build_system_table(services: EfiServices) -> int:
    """Write the tables, sealed with their CRC32; returns the address of the system table.

    The configuration table is empty: tables are installed by InstallConfigurationTable(). A service that has a
    handler already keeps it.
    """
    services.handlers = all_handlers(services) | services.handlers
    data = EfiMemoryType.EfiRuntimeServicesData
    boot = _service_table(
        services, EFI_BOOT_SERVICES, EFI_BOOT_SERVICES_SIGNATURE, BOOT_SERVICES,
        EfiMemoryType.EfiBootServicesCode, EfiMemoryType.EfiBootServicesData,
    )  # fmt: skip
    runtime = _service_table(
        services, EFI_RUNTIME_SERVICES, EFI_RUNTIME_SERVICES_SIGNATURE, RUNTIME_SERVICES,
        EfiMemoryType.EfiRuntimeServicesCode, data,
    )  # fmt: skip
    vendor = services.arena.put(data, (FIRMWARE_VENDOR + "\0").encode("utf-16-le"))
    tables = services.arena.reserve(data, MAX_CONFIGURATION_TABLES * EFI_CONFIGURATION_TABLE.sizeof())
    fields = {
        "Hdr": _header(EFI_SYSTEM_TABLE_SIGNATURE, EFI_SYSTEM_TABLE.sizeof()),
        "FirmwareVendor": vendor,
        "FirmwareRevision": FIRMWARE_REVISION,
        "ConsoleInHandle": 0,
        "ConIn": 0,
        "ConsoleOutHandle": 0,
        "ConOut": install_console(services),
        "StandardErrorHandle": 0,
        "StdErr": 0,
        "RuntimeServices": runtime,
        "BootServices": boot,
        "NumberOfTableEntries": 0,
        "ConfigurationTable": tables,
    }
    services.system_table = services.arena.put(data, EFI_SYSTEM_TABLE.build(fields))
    seal(services.machine.memory, services.system_table, EFI_SYSTEM_TABLE.sizeof())
    return services.system_table


def _service_table(
    services: EfiServices, layout: Layout, signature: int, names: tuple[tuple[str, int], ...],
    code: EfiMemoryType, data: EfiMemoryType,
) -> int:  # fmt: skip
    """Install a gate for each service and write the table of pointers to them; returns its address."""
    pointers = services.install_gates(names, code)
    fields = {name: pointer for (name, _), pointer in zip(names, pointers, strict=True)}
    gpa = services.arena.put(data, layout.build({"Hdr": _header(signature, layout.sizeof())} | fields))
    seal(services.machine.memory, gpa, layout.sizeof())
    return gpa


def _header(signature: int, size: int) -> dict[str, int]:
    return {
        "Signature": signature,
        "Revision": EFI_2_70_SYSTEM_TABLE_REVISION,
        "HeaderSize": size,
        "CRC32": 0,
        "Reserved": 0,
    }
