"""The EFI memory map as the kernel prints it.

Sources: arch/x86/platform/efi/efi.c, efi_print_memmap(); drivers/firmware/efi/efi.c, efi_md_typeattr_format().
"""

from __future__ import annotations

from collections.abc import Iterator

from firmware.efi_types import EfiMemoryAttribute
from firmware.memory_descriptor import MemoryDescriptor
from guest.units import SZ_1M

MEMORY_TYPE_NAMES = (
    "Reserved",
    "Loader Code",
    "Loader Data",
    "Boot Code",
    "Boot Data",
    "Runtime Code",
    "Runtime Data",
    "Conventional",
    "Unusable",
    "ACPI Reclaim",
    "ACPI Mem NVS",
    "MMIO",
    "MMIO Port",
    "PAL Code",
    "Persistent",
    "Unaccepted",
)
"""memory_type_name[] by EFI_MEMORY_TYPE."""

ATTRIBUTE_COLUMNS = (
    (EfiMemoryAttribute.EFI_MEMORY_RUNTIME, "RUN"),
    (EfiMemoryAttribute.EFI_MEMORY_HOT_PLUGGABLE, "HP"),
    (EfiMemoryAttribute.EFI_MEMORY_MORE_RELIABLE, "MR"),
    (EfiMemoryAttribute.EFI_MEMORY_CPU_CRYPTO, "CC"),
    (EfiMemoryAttribute.EFI_MEMORY_SP, "SP"),
    (EfiMemoryAttribute.EFI_MEMORY_NV, "NV"),
    (EfiMemoryAttribute.EFI_MEMORY_XP, "XP"),
    (EfiMemoryAttribute.EFI_MEMORY_RP, "RP"),
    (EfiMemoryAttribute.EFI_MEMORY_WP, "WP"),
    (EfiMemoryAttribute.EFI_MEMORY_RO, "RO"),
    (EfiMemoryAttribute.EFI_MEMORY_UCE, "UCE"),
    (EfiMemoryAttribute.EFI_MEMORY_WB, "WB"),
    (EfiMemoryAttribute.EFI_MEMORY_WT, "WT"),
    (EfiMemoryAttribute.EFI_MEMORY_WC, "WC"),
    (EfiMemoryAttribute.EFI_MEMORY_UC, "UC"),
)
"""The columns of an attribute text, in the order in which the kernel prints them."""

_TYPEATTR_SIZE = 64


def efi_md_typeattr_format(d: MemoryDescriptor) -> str:
    """``[Boot Data   |RUN|  |...|UC]``; 63 characters at most, as the kernel's buffer cuts it."""
    name = MEMORY_TYPE_NAMES[d.type] if d.type < len(MEMORY_TYPE_NAMES) else f"type={d.type}"
    text = f"[{name:<12}"
    known = sum(flag for flag, _ in ATTRIBUTE_COLUMNS)
    if d.attribute & ~known:
        text += f"|attr={d.attribute:#018x}]"
    else:
        text += "".join(f"|{word if d.attribute & flag else '':{len(word)}}" for flag, word in ATTRIBUTE_COLUMNS)
        text += "]"
    return text[: _TYPEATTR_SIZE - 1]


def memmap_lines(descriptors: list[MemoryDescriptor]) -> Iterator[str]:
    """The lines of efi_print_memmap()."""
    for number, d in enumerate(descriptors):
        attributes, size = efi_md_typeattr_format(d), d.end - d.start
        yield f"efi: mem{number:02}: {attributes} range=[{d.start:#018x}-{d.end - 1:#018x}] ({size // SZ_1M}MB)"
