"""Where OVMF keeps its own things: the sections it asks the host for, and its use of low memory.

Sizes are those that Debian's OVMF 2022.11 leaves behind on a q35 machine when the kernel starts, read from its
memory map; the boot services ranges, which alternate there in pieces of a few KiB, are one range here.
"""

from __future__ import annotations

from collections.abc import Iterable

from firmware.efi_types import CACHEABLE, EfiMemoryAttribute, EfiMemoryType
from firmware.hob import Resource, ResourceType
from firmware.memory_descriptor import MemoryDescriptor
from firmware.tdvf import SectionType, Tdvf, TdvfSection
from guest.errors import FormatError
from guest.ranges import RangeMap, RangeSet
from guest.units import PAGE_SIZE, SZ_1M, SZ_4G

_RUNTIME = CACHEABLE | EfiMemoryAttribute.EFI_MEMORY_RUNTIME

BUILT_IN_SECTIONS = (
    TdvfSection(0, 0, 0xFFC8_4000, 0x37_C000, SectionType.BFV, 1),
    TdvfSection(0, 0, 0xFFC0_0000, 0x8_4000, SectionType.CFV, 0),
    TdvfSection(0, 0, 0x81_0000, 0x1_0000, SectionType.TempMem, 0),
    TdvfSection(0, 0, 0x80_B000, 0x2000, SectionType.TempMem, 0),
    TdvfSection(0, 0, 0x80_9000, 0x2000, SectionType.TD_HOB, 0),
    TdvfSection(0, 0, 0x80_0000, 0x6000, SectionType.TempMem, 0),
)
"""The sections of OVMF's 4 MiB build (OvmfPkg/OvmfPkgX64.fdf), in its order; they have no data here."""

BUILT_IN = Tdvf(b"", BUILT_IN_SECTIONS)
"""The firmware of a boot that was given no image."""

NVS_RANGES = ((0x80_0000, 0x80_6000), (0x80_B000, 0x80_D000))
"""SEC page tables (AP wake-up needs them), work area and mailbox: ACPI NVS (PlatformTdxPublishRamRegions())."""

TOP_OF_LOW_RAM = (
    (EfiMemoryType.EfiACPIMemoryNVS, 0x8_8000),
    (EfiMemoryType.EfiRuntimeServicesData, 0x8_4000),
    (EfiMemoryType.EfiBootServicesData, 0x6F_6000),
    (EfiMemoryType.EfiACPIMemoryNVS, 0x8_0000),
    (EfiMemoryType.EfiACPIReclaimMemory, 0x1_2000),
    (EfiMemoryType.EfiReservedMemoryType, 0x8_0000),
    (EfiMemoryType.EfiRuntimeServicesCode, 0x10_0000),
    (EfiMemoryType.EfiRuntimeServicesData, 0x10_0000),
    (EfiMemoryType.EfiBootServicesData, 0x94_A000),
    (EfiMemoryType.EfiRuntimeServicesData, 0x10_2000),
    (EfiMemoryType.EfiBootServicesCode, 0x17_6000),
    (EfiMemoryType.EfiBootServicesData, 0x100_D000),
)
"""What lies at the top of the RAM below 4 GiB, from the top downwards: type and bytes."""

PCIE_CONFIGURATION_SPACE = MemoryDescriptor.of_range(EfiMemoryType.EfiReservedMemoryType, 0xE000_0000, 0xF000_0000, 0)
FLASH = MemoryDescriptor.of_range(
    EfiMemoryType.EfiMemoryMappedIO, 0xFFC0_0000, SZ_4G, EfiMemoryAttribute.EFI_MEMORY_RUNTIME
)


def mmio(pci_express: bool) -> list[MemoryDescriptor]:
    """What is no RAM: flash, and PCIe configuration space if the machine has it."""
    return [PCIE_CONFIGURATION_SPACE, FLASH] if pci_express else [FLASH]


def accepted_ram(resources: Iterable[Resource], unaccepted: Iterable[Resource] = ()) -> RangeSet:
    """All RAM of the HOBs ``resources`` but what stays ``unaccepted``."""
    ram = RangeSet(
        (r.start, r.end)
        for r in resources
        if r.type in (ResourceType.EFI_RESOURCE_SYSTEM_MEMORY, ResourceType.EFI_RESOURCE_MEMORY_UNACCEPTED)
    )
    for r in unaccepted:
        ram.remove(r.start, r.end)
    return ram


def high_memory(ram: RangeSet) -> list[MemoryDescriptor]:
    """Descriptors of the accepted ``ram`` above 4 GiB: none of it is the firmware's own."""
    kind = EfiMemoryType.EfiConventionalMemory
    return [MemoryDescriptor.of_range(kind, max(r.start, SZ_4G), r.end, int(CACHEABLE)) for r in ram if r.end > SZ_4G]


def low_memory(accepted: RangeSet) -> list[MemoryDescriptor]:
    """Descriptors of the accepted RAM below 4 GiB, ascending, neighbours of one kind joined.

    Raises ``FormatError`` if the firmware does not fit.
    """
    ram = RangeSet((part.start, min(part.end, SZ_4G)) for part in accepted if part.start < SZ_4G)
    ram.remove(0xA_0000, SZ_1M)
    uses: RangeMap[EfiMemoryType | None] = RangeMap(None)
    for part in ram:
        uses.assign(part.start, part.end, EfiMemoryType.EfiConventionalMemory)
    page_0 = (EfiMemoryType.EfiBootServicesCode, 0, PAGE_SIZE)
    nvs = [(EfiMemoryType.EfiACPIMemoryNVS, start, end) for start, end in NVS_RANGES]
    for kind, start, end in [page_0, *nvs, *_at_the_top(ram)]:
        if not ram.covers(start, end):
            raise FormatError(
                "RAM below 4 GiB", at=start, found=f"not all of [{start:#x}, {end:#x})",
                expected="RAM for the firmware's own ranges", source="TD HOB list",
            )  # fmt: skip
        uses.assign(start, end, kind)
    return [
        MemoryDescriptor.of_range(kind, start, end, int(_attribute(kind)))
        for start, end, kind in uses.runs(0, SZ_4G)
        if kind is not None
    ]


def _at_the_top(ram: RangeSet) -> list[tuple[EfiMemoryType, int, int]]:
    """Ranges of ``TOP_OF_LOW_RAM`` in the highest part of ``ram``."""
    needed = sum(size for _, size in TOP_OF_LOW_RAM)
    highest = max(ram, key=lambda part: part.start, default=None)
    if highest is None or highest.end - needed < NVS_RANGES[-1][1]:
        top = highest.end if highest else 0
        raise FormatError(
            "RAM below 4 GiB", at=top, found=f"an end at {top:#x}",
            expected=f"at least {NVS_RANGES[-1][1] + needed:#x} for the firmware", source="TD HOB list",
        )  # fmt: skip
    out, end = [], highest.end
    for kind, size in TOP_OF_LOW_RAM:
        out.append((kind, end - size, end))
        end -= size
    return out


def _attribute(kind: EfiMemoryType) -> int:
    runtime = kind in (EfiMemoryType.EfiRuntimeServicesCode, EfiMemoryType.EfiRuntimeServicesData)
    return _RUNTIME if runtime else CACHEABLE
