"""Stage ``firmware``: from the HOB list to the kernel's entry point.

Order as in OVMF: read the HOBs, accept memory by policy, publish the memory map, build tables and services, load
the kernel and start it.
"""

from __future__ import annotations

from firmware.accept_policy import accept_below_4g
from firmware.acpi import build_acpi
from firmware.arena import Arena
from firmware.boot_services import EfiServices
from firmware.efi_types import ACPI_20_TABLE_GUID, CACHEABLE, EfiMemoryType, guid_bytes
from firmware.hob import Resource, ResourceType, read_hob_list
from firmware.load_image import FwCfg, install_initrd, load_image
from firmware.memory_descriptor import MemoryDescriptor
from firmware.memory_map import MemoryMap
from firmware.ovmf_layout import low_memory, mmio
from firmware.paging import build_identity_map
from firmware.system_table import build_system_table
from guest.machine import Machine
from guest.ranges import TOP, RangeSet
from guest.units import SZ_4G, SZ_128M

_STACK_SIZE = SZ_128M >> 10
"""128 KiB (UEFI 2.10, section 2.3.4)."""

_ALLOCATOR_TYPES = frozenset(EfiMemoryType) - {
    EfiMemoryType.EfiReservedMemoryType,
    EfiMemoryType.EfiMemoryMappedIO,
    EfiMemoryType.EfiMemoryMappedIOPortSpace,
    EfiMemoryType.EfiPersistentMemory,
    EfiMemoryType.EfiUnacceptedMemoryType,
}
"""What GetMemoryMap() takes from the page allocator; the rest comes from the GCD map, behind it."""


def firmware(machine: Machine, fw_cfg: FwCfg, given_map: list[MemoryDescriptor] | None = None) -> MemoryMap:
    """Run the firmware on the HOB list at RCX.

    It leaves the image handle in RCX, the system table in RDX, a stack in RSP and the entry point in RIP. With
    ``given_map`` the firmware accepts nothing and publishes that map, in its order; the host has added all of it
    but the unaccepted ranges. Returns the map, for a look from outside.
    """
    resources = read_hob_list(machine.memory, machine.regs.rcx)
    memory_map = _given_map(given_map) if given_map is not None else _ovmf_map(machine, resources, fw_cfg.pci_express)
    arena = Arena(machine.memory, memory_map)
    services = EfiServices(machine, memory_map, arena)
    machine.regs.rdx = build_system_table(services)
    guid = arena.put(EfiMemoryType.EfiBootServicesData, guid_bytes(ACPI_20_TABLE_GUID))
    services.install_configuration_table(guid, build_acpi(arena, fw_cfg.cpus))
    if fw_cfg.initrd:
        install_initrd(services, fw_cfg.initrd)
    image = load_image(services, fw_cfg)
    machine.regs.cr3 = build_identity_map(machine.memory, arena)
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


def _ovmf_map(machine: Machine, resources: list[Resource], pci_express: bool) -> MemoryMap:
    """Accept by OVMF's policy; what stays unaccepted is listed behind everything else.

    Where nothing is unaccepted, this is no TD, and memory above 4 GiB is free too.
    """
    left = accept_below_4g(machine, resources)
    kind = EfiMemoryType.EfiUnacceptedMemoryType
    unaccepted = [MemoryDescriptor.of_range(kind, r.start, r.end, 0) for r in left]
    return MemoryMap([*low_memory(resources), *_high_memory(resources)], [*mmio(pci_express), *unaccepted])


def _high_memory(resources: list[Resource]) -> list[MemoryDescriptor]:
    """Descriptors of the RAM above 4 GiB of a guest that is no TD; in a TD all of it is unaccepted."""
    if any(r.type == ResourceType.EFI_RESOURCE_MEMORY_UNACCEPTED for r in resources):
        return []
    kind = EfiMemoryType.EfiConventionalMemory
    ram = RangeSet((r.start, r.end) for r in resources if r.type == ResourceType.EFI_RESOURCE_SYSTEM_MEMORY)
    return [MemoryDescriptor.of_range(kind, r.start, r.end, CACHEABLE) for r in ram.within(SZ_4G, TOP)]


def _given_map(descriptors: list[MemoryDescriptor]) -> MemoryMap:
    """A memory map that was brought along."""
    owned = [d for d in descriptors if d.type in _ALLOCATOR_TYPES]
    return MemoryMap(owned, [d for d in descriptors if d.type not in _ALLOCATOR_TYPES])
