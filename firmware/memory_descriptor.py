"""EFI_MEMORY_DESCRIPTOR and the memory map as GetMemoryMap() returns it.

Source: UEFI 2.10, section 7.2.3. The distance between two descriptors is DescriptorSize, which OVMF makes 48 on
purpose so that callers do not rely on the size of the structure, 40.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import construct as c

from firmware.efi_types import EfiMemoryType
from guest.errors import FormatError
from guest.records import fast
from guest.units import PAGE_SHIFT, PAGE_SIZE, PHYSICAL_ADDRESS_END

EFI_MEMORY_DESCRIPTOR = c.Struct(
    "Type" / c.Int32ul,
    c.Padding(4),
    "PhysicalStart" / c.Int64ul,
    "VirtualStart" / c.Int64ul,
    "NumberOfPages" / c.Int64ul,
    "Attribute" / c.Int64ul,
)
EFI_MEMORY_DESCRIPTOR_VERSION = 1
OVMF_DESCRIPTOR_SIZE = 48

_FAST, _ = fast(EFI_MEMORY_DESCRIPTOR)
_SOURCE = "UEFI 2.10, 7.2.3 GetMemoryMap"


@dataclass(frozen=True, slots=True)
class MemoryDescriptor:
    """One range of the map: ``type`` and ``attribute`` as in the specification, ``start`` in bytes."""

    type: int
    start: int
    pages: int
    attribute: int

    @property
    def end(self) -> int:
        """First address behind the range."""
        return self.start + (self.pages << PAGE_SHIFT)

    @classmethod
    def of_range(cls, type: int, start: int, end: int, attribute: int) -> MemoryDescriptor:
        """The descriptor of ``[start, end)``, whole pages."""
        return cls(type, start, (end - start) >> PAGE_SHIFT, attribute)


def pack_map(descriptors: Iterable[MemoryDescriptor], stride: int = OVMF_DESCRIPTOR_SIZE) -> bytes:
    """The map as it stands in a GetMemoryMap() buffer, ``stride`` bytes a descriptor."""
    pad = bytes(stride - _FAST.size)
    return b"".join(_FAST.pack(d.type, d.start, 0, d.pages, d.attribute) + pad for d in descriptors)


def unpack_map(data: bytes, stride: int, *, at: int) -> list[MemoryDescriptor]:
    """The descriptors in ``data``, which was found at ``at``, in their order.

    A stride below 40 or one that does not divide the size is a ``FormatError``. Ranges are taken as they are:
    a map may be unsorted and may overlap.
    """
    if stride < _FAST.size:
        raise FormatError(
            "EFI memory map DescriptorSize", at=at, found=stride, expected=f"at least {_FAST.size}", source=_SOURCE
        )
    if len(data) % stride:
        raise FormatError(
            "EFI memory map", at=at, found=f"{len(data)} bytes", expected=f"a multiple of {stride}", source=_SOURCE
        )
    fields = (_FAST.unpack_from(data, offset) for offset in range(0, len(data), stride))
    return [MemoryDescriptor(kind, start, pages, attribute) for kind, start, _, pages, attribute in fields]


def check_descriptors(descriptors: Sequence[MemoryDescriptor], name: str) -> None:
    """Refuse descriptors that no firmware has: not of whole pages, empty, or beyond 52 bits.

    Raises ``FormatError`` that names the descriptor by its number in ``name``.
    """
    for number, d in enumerate(descriptors):
        where = f"{name}: descriptor {number}"
        if d.start % PAGE_SIZE:
            raise FormatError(where, at=d.start, found="a start inside a page", expected="4 KiB pages", source=_SOURCE)
        if d.pages == 0:
            raise FormatError(where, at=d.start, found="0 pages", expected="at least one", source=_SOURCE)
        if d.end > PHYSICAL_ADDRESS_END:
            found = f"{d.pages:#x} pages, which end at {d.end:#x}"
            raise FormatError(where, at=d.start, found=found, expected="an end up to 2^52", source=_SOURCE)


def check_map(descriptors: Sequence[MemoryDescriptor], name: str) -> None:
    """Refuse a map that a firmware cannot have: :func:`check_descriptors`, or two descriptors for one page.

    Two of unaccepted memory may share pages: a firmware that lists memory twice goes unnoticed until it is accepted.
    Raises ``FormatError`` that names the descriptor by its number in ``name``, or both that overlap.
    """
    check_descriptors(descriptors, name)
    last: dict[bool, tuple[int, MemoryDescriptor]] = {}  # the one that ends last, by whether it is unaccepted
    for high_number, high in sorted(enumerate(descriptors), key=lambda item: item[1].start):
        unaccepted = high.type == EfiMemoryType.EfiUnacceptedMemoryType
        for low_unaccepted, (low_number, low) in last.items():
            if low.end <= high.start or (unaccepted and low_unaccepted):
                continue
            found = f"[{high.start:#x}, {high.end:#x}) over [{low.start:#x}, {low.end:#x}) of descriptor {low_number}"
            where = f"{name}: descriptor {high_number}"
            raise FormatError(where, at=high.start, found=found, expected="no overlap", source=_SOURCE)
        if unaccepted not in last or last[unaccepted][1].end < high.end:
            last[unaccepted] = high_number, high


RAM_TYPES = frozenset(
    {
        EfiMemoryType.EfiLoaderCode,
        EfiMemoryType.EfiLoaderData,
        EfiMemoryType.EfiBootServicesCode,
        EfiMemoryType.EfiBootServicesData,
        EfiMemoryType.EfiRuntimeServicesCode,
        EfiMemoryType.EfiRuntimeServicesData,
        EfiMemoryType.EfiConventionalMemory,
        EfiMemoryType.EfiACPIReclaimMemory,
        EfiMemoryType.EfiACPIMemoryNVS,
        EfiMemoryType.EfiUnacceptedMemoryType,
    }
)
"""Types that only RAM can have; a descriptor of another type may or may not have memory behind it."""
