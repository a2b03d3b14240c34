"""Stage ``firmware``: from the HOB list to the kernel's entry point.

Order as in OVMF: read the HOBs, accept memory by policy, publish the memory map, build tables and services, load
the kernel and start it.
"""

from __future__ import annotations

from uuid import UUID

from firmware.accept_policy import accept_resources
from firmware.acpi import build_acpi
from firmware.arena import Arena
from firmware.boot_services import EfiServices
from firmware.efi_types import ACPI_20_TABLE_GUID, SMBIOS3_TABLE_GUID, EfiMemoryType, guid_bytes
from firmware.file_system import FileSystem
from firmware.hob import Resource, ResourceType, read_hob_list
from firmware.load_image import FwCfg, install_initrd, load_image
from firmware.memory_descriptor import MemoryDescriptor
from firmware.memory_map import MemoryMap
from firmware.ovmf_layout import accepted_ram, high_memory, low_memory, mmio
from firmware.paging import build_identity_map
from firmware.setup import DEFAULT_SETUP, INITRD_FILE, Setup, install_offers
from firmware.smbios import build_smbios
from firmware.system_table import build_system_table
from firmware.variables import VariableStore
from guest.machine import Machine
from guest.units import SZ_4G, SZ_128M

_STACK_SIZE = SZ_128M >> 10
"""128 KiB (UEFI 2.10, section 2.3.4)."""

_DEFAULT_END = SZ_4G
"""edk2's default bin ends below its memory type bins, which lie in the first RAM that it is told of: below 4 GiB."""

_ALLOCATOR_TYPES = frozenset(EfiMemoryType) - {
    EfiMemoryType.EfiReservedMemoryType,
    EfiMemoryType.EfiMemoryMappedIO,
    EfiMemoryType.EfiMemoryMappedIOPortSpace,
    EfiMemoryType.EfiPersistentMemory,
    EfiMemoryType.EfiUnacceptedMemoryType,
}
"""What GetMemoryMap() takes from the page allocator; the rest comes from the GCD map, behind it."""


def firmware(
    machine: Machine, fw_cfg: FwCfg, given_map: list[MemoryDescriptor] | None = None, setup: Setup = DEFAULT_SETUP
) -> MemoryMap:
    """Run the firmware on the HOB list at RCX.

    It leaves the image handle in RCX, the system table in RDX, a stack in RSP and the entry point in RIP. With
    ``given_map`` the firmware accepts nothing and publishes that map, in its order; the host has added all of it
    but the unaccepted ranges. Returns the map, for a look from outside.
    """
    resources = read_hob_list(machine.memory, machine.regs.rcx)
    if given_map is not None:
        memory_map = _given_map(given_map)
    else:
        left = accept_resources(machine, resources, setup.accept, setup.accept_cpus)
        memory_map = _ovmf_map(resources, left, fw_cfg.pci_express)
    arena = Arena(machine.memory, memory_map)
    services = EfiServices(machine, memory_map, arena, VariableStore(setup.variables))
    machine.regs.rdx = build_system_table(services)
    acpi = build_acpi(arena, fw_cfg.nodes, fw_cfg.cpus, fw_cfg.distances)
    _install_table(services, ACPI_20_TABLE_GUID, acpi)
    if fw_cfg.initrd and INITRD_FILE not in setup.offers:
        install_initrd(services, fw_cfg.initrd)
    image = load_image(services, fw_cfg)
    install_offers(services, setup)
    if INITRD_FILE in setup.offers:
        FileSystem(services, {"kernel": fw_cfg.kernel, "initrd": fw_cfg.initrd}).install(image.device)
    machine.regs.cr3 = build_identity_map(machine.memory, arena)
    _install_table(services, SMBIOS3_TABLE_GUID, build_smbios(arena, accepted_ram(resources)))
    machine.regs.rsp = build_stack(services)
    machine.regs.rcx, machine.regs.rip = image.handle, image.entry
    machine.note(f"kernel image at {image.base:#x}, {image.size:#x} bytes")
    return memory_map


def build_stack(services: EfiServices) -> int:
    """A stack with the image's return address on it; returns RSP at the image's entry."""
    machine = services.machine

    def returned() -> int:
        raise machine.panic("the image returned to the firmware")

    (gate,) = services.install_gates((("return", 0),), EfiMemoryType.EfiBootServicesCode, returned)
    stack = services.arena.reserve(EfiMemoryType.EfiBootServicesData, _STACK_SIZE)
    rsp = stack + _STACK_SIZE - 8
    machine.memory.write_uint(rsp, gate, 8)
    return rsp


def _install_table(services: EfiServices, guid: UUID, table: int) -> None:
    """InstallConfigurationTable() for the firmware's own tables."""
    at = services.arena.put(EfiMemoryType.EfiBootServicesData, guid_bytes(guid))
    services.handlers["InstallConfigurationTable"](at, table)


def _ovmf_map(resources: list[Resource], left: list[Resource], pci_express: bool) -> MemoryMap:
    """The map after acceptance; what is unaccepted or no RAM is listed behind everything else, by address.

    Above 4 GiB only what the firmware accepted itself is in use; what the host says to have added there is left out.
    Where nothing is unaccepted, this is no TD, and all memory is in use.
    """
    own = [r for r in resources if r.type == ResourceType.EFI_RESOURCE_MEMORY_UNACCEPTED] or resources
    kind = EfiMemoryType.EfiUnacceptedMemoryType
    unaccepted = [MemoryDescriptor.of_range(kind, r.start, r.end, 0) for r in left]
    behind = sorted([*mmio(pci_express), *unaccepted], key=lambda d: d.start)
    low, high = low_memory(accepted_ram(resources, left)), high_memory(accepted_ram(own, left))
    return MemoryMap([*low, *high], behind, joined=True, default_end=_DEFAULT_END)


def _given_map(descriptors: list[MemoryDescriptor]) -> MemoryMap:
    """A memory map that was brought along."""
    owned = [d for d in descriptors if d.type in _ALLOCATOR_TYPES]
    fixed = [d for d in descriptors if d.type not in _ALLOCATOR_TYPES]
    return MemoryMap(owned, fixed, default_end=_DEFAULT_END)
