"""EFI memory types to e820 types, as the stub translates them, and the way back.

Source: drivers/firmware/efi/libstub/x86-stub.c (6.3) with v9 05/14, setup_e820(). The way back is ours: no kernel
does it, and several EFI types have become one e820 type.
"""

from __future__ import annotations

from collections.abc import Iterable

from bootstub.boot_params import BootE820Entry
from bootstub.e820_types import (
    E820_TYPE_ACPI,
    E820_TYPE_NVS,
    E820_TYPE_PMEM,
    E820_TYPE_PRAM,
    E820_TYPE_RAM,
    E820_TYPE_RESERVED,
    E820_TYPE_RESERVED_KERN,
    E820_TYPE_SOFT_RESERVED,
    E820_TYPE_UNUSABLE,
)
from firmware.efi_types import CACHEABLE, EfiMemoryAttribute, EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.ranges import TOP, RangeMap
from guest.units import PAGE_SIZE, round_down, round_up

_E820_TYPES = {
    EfiMemoryType.EfiReservedMemoryType: E820_TYPE_RESERVED,
    EfiMemoryType.EfiLoaderCode: E820_TYPE_RAM,
    EfiMemoryType.EfiLoaderData: E820_TYPE_RAM,
    EfiMemoryType.EfiBootServicesCode: E820_TYPE_RAM,
    EfiMemoryType.EfiBootServicesData: E820_TYPE_RAM,
    EfiMemoryType.EfiRuntimeServicesCode: E820_TYPE_RESERVED,
    EfiMemoryType.EfiRuntimeServicesData: E820_TYPE_RESERVED,
    EfiMemoryType.EfiConventionalMemory: E820_TYPE_RAM,
    EfiMemoryType.EfiUnusableMemory: E820_TYPE_UNUSABLE,
    EfiMemoryType.EfiACPIReclaimMemory: E820_TYPE_ACPI,
    EfiMemoryType.EfiACPIMemoryNVS: E820_TYPE_NVS,
    EfiMemoryType.EfiMemoryMappedIO: E820_TYPE_RESERVED,
    EfiMemoryType.EfiMemoryMappedIOPortSpace: E820_TYPE_RESERVED,
    EfiMemoryType.EfiPalCode: E820_TYPE_RESERVED,
    EfiMemoryType.EfiPersistentMemory: E820_TYPE_PMEM,
    EfiMemoryType.EfiUnacceptedMemoryType: E820_TYPE_RAM,
}
_SOFT_RESERVABLE = frozenset(
    {
        EfiMemoryType.EfiLoaderCode,
        EfiMemoryType.EfiLoaderData,
        EfiMemoryType.EfiBootServicesCode,
        EfiMemoryType.EfiBootServicesData,
        EfiMemoryType.EfiConventionalMemory,
    }
)
_EFI_USES = {
    E820_TYPE_RAM: (EfiMemoryType.EfiConventionalMemory, CACHEABLE),
    E820_TYPE_RESERVED_KERN: (EfiMemoryType.EfiConventionalMemory, CACHEABLE),
    E820_TYPE_SOFT_RESERVED: (EfiMemoryType.EfiConventionalMemory, CACHEABLE | EfiMemoryAttribute.EFI_MEMORY_SP),
    E820_TYPE_ACPI: (EfiMemoryType.EfiACPIReclaimMemory, CACHEABLE),
    E820_TYPE_NVS: (EfiMemoryType.EfiACPIMemoryNVS, CACHEABLE),
    E820_TYPE_UNUSABLE: (EfiMemoryType.EfiUnusableMemory, CACHEABLE),
    E820_TYPE_PMEM: (EfiMemoryType.EfiPersistentMemory, CACHEABLE | EfiMemoryAttribute.EFI_MEMORY_NV),
    E820_TYPE_PRAM: (EfiMemoryType.EfiPersistentMemory, CACHEABLE | EfiMemoryAttribute.EFI_MEMORY_NV),
}
_RAM = frozenset({E820_TYPE_RAM, E820_TYPE_RESERVED_KERN})


def e820_type_of(d: MemoryDescriptor, soft_reserve: bool = True) -> int | None:
    """The e820 type of a descriptor; None if the stub drops it.

    ``soft_reserve``: memory with EFI_MEMORY_SP becomes soft reserved.
    """
    if soft_reserve and d.attribute & EfiMemoryAttribute.EFI_MEMORY_SP and d.type in _SOFT_RESERVABLE:
        return E820_TYPE_SOFT_RESERVED
    return _E820_TYPES.get(d.type)  # type: ignore[call-overload, no-any-return]  # types > 15 occur


def continues(last: BootE820Entry | None, d: MemoryDescriptor, kind: int) -> bool:
    """True if the previous entry grows by ``d`` instead of a new entry: same type, and it ends where ``d`` starts."""
    return last is not None and last.type == kind and last.addr + last.size == d.start


def e820_entries(descriptors: Iterable[MemoryDescriptor], soft_reserve: bool = True) -> list[BootE820Entry]:
    """The table that the stub makes of a memory map, unsorted, with no limit to its length."""
    entries: list[BootE820Entry] = []
    for d in descriptors:
        kind = e820_type_of(d, soft_reserve)
        if kind is None:
            continue
        last = entries[-1] if entries else None
        if last is not None and continues(last, d, kind):
            entries[-1] = BootE820Entry(last.addr, last.size + d.end - d.start, kind)
        else:
            entries.append(BootE820Entry(d.start, d.end - d.start, kind))
    return entries


def efi_descriptors(entries: Iterable[BootE820Entry]) -> list[MemoryDescriptor]:
    """A memory map that the stub would turn into this table, ascending, as far as EFI has words for it.

    Where entries overlap the larger type wins, as in the kernel; a page that is RAM in part is not RAM. RAM becomes
    conventional memory, soft reserved memory conventional with EFI_MEMORY_SP, both persistent types Persistent, and
    every type that the kernel does not know Reserved. Entries must end below 2^64.
    """
    types: RangeMap[int] = RangeMap(0)
    for entry in sorted(entries, key=lambda entry: (entry.type not in _RAM, entry.type)):
        start, end = entry.addr, entry.addr + entry.size
        if entry.type in _RAM:
            start, end = round_up(start, PAGE_SIZE), round_down(end, PAGE_SIZE)
        elif entry.size:
            start, end = round_down(start, PAGE_SIZE), min(round_up(end, PAGE_SIZE), TOP)
        if entry.type and start < end:
            types.assign(start, end, E820_TYPE_RAM if entry.type in _RAM else entry.type)
    reserved = (EfiMemoryType.EfiReservedMemoryType, 0)
    return [
        MemoryDescriptor.of_range(kind, start, end, int(attribute))
        for start, end, e820_type in types.runs()
        if e820_type
        for kind, attribute in [_EFI_USES.get(e820_type, reserved)]
    ]
