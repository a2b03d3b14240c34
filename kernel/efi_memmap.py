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

ATTRIBUTE_COLUMNS: tuple[tuple[int, str], ...] = (
    (EfiMemoryAttribute.EFI_MEMORY_RUNTIME.value, "RUN"),
    (EfiMemoryAttribute.EFI_MEMORY_HOT_PLUGGABLE.value, "HP"),
    (EfiMemoryAttribute.EFI_MEMORY_MORE_RELIABLE.value, "MR"),
    (EfiMemoryAttribute.EFI_MEMORY_CPU_CRYPTO.value, "CC"),
    (EfiMemoryAttribute.EFI_MEMORY_SP.value, "SP"),
    (EfiMemoryAttribute.EFI_MEMORY_NV.value, "NV"),
    (EfiMemoryAttribute.EFI_MEMORY_XP.value, "XP"),
    (EfiMemoryAttribute.EFI_MEMORY_RP.value, "RP"),
    (EfiMemoryAttribute.EFI_MEMORY_WP.value, "WP"),
    (EfiMemoryAttribute.EFI_MEMORY_RO.value, "RO"),
    (EfiMemoryAttribute.EFI_MEMORY_UCE.value, "UCE"),
    (EfiMemoryAttribute.EFI_MEMORY_WB.value, "WB"),
    (EfiMemoryAttribute.EFI_MEMORY_WT.value, "WT"),
    (EfiMemoryAttribute.EFI_MEMORY_WC.value, "WC"),
    (EfiMemoryAttribute.EFI_MEMORY_UC.value, "UC"),
)
"""The columns of an attribute text, in the order in which the kernel prints them: bits as plain numbers."""

_KNOWN_ATTRIBUTES = sum(flag for flag, _ in ATTRIBUTE_COLUMNS)
_TYPEATTR_SIZE = 64


def efi_md_typeattr_format(d: MemoryDescriptor) -> str:
    """``[Boot Data   |RUN|  |...|UC]``; 63 characters at most, as the kernel's buffer cuts it."""
    name = MEMORY_TYPE_NAMES[d.type] if d.type < len(MEMORY_TYPE_NAMES) else f"type={d.type}"
    text = f"[{name:<12}"
    if d.attribute & ~_KNOWN_ATTRIBUTES:
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
