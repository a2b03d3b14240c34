"""What memory is for, as a person looks at a map, and the address space cut up by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from firmware.efi_types import EfiMemoryAttribute, EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.ranges import RangeMap
from tools.maps.platform_map import PlatformMap


@dataclass(frozen=True, slots=True)
class Kind:
    """A use of memory: its word, the letter and the ANSI colour that a drawing has for it, and a web colour."""

    word: str
    letter: str
    ansi: int
    web: str


HOLE = Kind("hole", ".", 90, "#e8e8e8")
WINDOW = Kind("hot-plug window", "w", 37, "#c9c9f0")
CONVENTIONAL = Kind("conventional", "C", 32, "#4caf50")
LOADER = Kind("loader", "L", 92, "#8bc34a")
BOOT_SERVICES = Kind("boot services", "B", 36, "#26a69a")
UNACCEPTED = Kind("unaccepted", "U", 33, "#ffb300")
SOFT_RESERVED = Kind("soft reserved", "S", 35, "#ab47bc")
PERSISTENT = Kind("persistent", "P", 94, "#5c6bc0")
RUNTIME = Kind("runtime services", "F", 34, "#1e88e5")
ACPI = Kind("ACPI", "A", 96, "#00acc1")
MMIO = Kind("MMIO", "M", 95, "#ec407a")
RESERVED = Kind("reserved", "R", 31, "#e53935")
UNUSABLE = Kind("unusable", "X", 91, "#6d4c41")

KINDS = (
    HOLE, WINDOW, CONVENTIONAL, LOADER, BOOT_SERVICES, UNACCEPTED, SOFT_RESERVED, PERSISTENT, RUNTIME, ACPI, MMIO,
    RESERVED, UNUSABLE,
)  # fmt: skip
"""Where descriptors overlap, what stands later here is what a reader should see."""

_TYPE = EfiMemoryType
_OF_TYPE = {
    _TYPE.EfiLoaderCode: LOADER,
    _TYPE.EfiLoaderData: LOADER,
    _TYPE.EfiBootServicesCode: BOOT_SERVICES,
    _TYPE.EfiBootServicesData: BOOT_SERVICES,
    _TYPE.EfiRuntimeServicesCode: RUNTIME,
    _TYPE.EfiRuntimeServicesData: RUNTIME,
    _TYPE.EfiConventionalMemory: CONVENTIONAL,
    _TYPE.EfiUnusableMemory: UNUSABLE,
    _TYPE.EfiACPIReclaimMemory: ACPI,
    _TYPE.EfiACPIMemoryNVS: ACPI,
    _TYPE.EfiMemoryMappedIO: MMIO,
    _TYPE.EfiMemoryMappedIOPortSpace: MMIO,
    _TYPE.EfiPersistentMemory: PERSISTENT,
    _TYPE.EfiUnacceptedMemoryType: UNACCEPTED,
}
_RANKS = {kind: rank for rank, kind in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class Span:
    """A range of one kind."""

    start: int
    end: int
    kind: Kind

    @property
    def size(self) -> int:
        return self.end - self.start


def kind_of(d: MemoryDescriptor) -> Kind:
    """What a descriptor is for; a type that nobody knows is reserved."""
    kind = _OF_TYPE.get(d.type, RESERVED)  # type: ignore[call-overload]  # types > 15 occur
    if kind is CONVENTIONAL and d.attribute & EfiMemoryAttribute.EFI_MEMORY_SP:
        return SOFT_RESERVED
    return kind  # type: ignore[no-any-return]


def spans(platform: PlatformMap) -> list[Span]:
    """The address space from 0 to the end of the map, in maximal ranges of one kind, ascending, without gaps."""
    kinds: RangeMap[Kind] = RangeMap(HOLE)
    for node in platform.nodes:
        if node.hotplug:
            kinds.assign(node.start, node.end, WINDOW)
    for d in sorted(platform.descriptors, key=lambda d: _RANKS[kind_of(d)]):
        kinds.assign(d.start, d.end, kind_of(d))
    end = max([d.end for d in platform.descriptors] + [node.end for node in platform.nodes])
    return [Span(*run) for run in kinds.runs(0, end)]


def totals(cut: Iterable[Span]) -> list[tuple[Kind, int, int]]:
    """Kind, number of ranges and bytes, of the kinds that occur."""
    found: dict[Kind, tuple[int, int]] = {}
    for span in cut:
        count, size = found.get(span.kind, (0, 0))
        found[span.kind] = count + 1, size + span.size
    return [(kind, *found[kind]) for kind in KINDS if kind in found]
