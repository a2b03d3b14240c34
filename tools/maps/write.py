"""A map in each form that it can leave in."""

from __future__ import annotations

from collections.abc import Callable

from bootstub.boot_params import BootE820Entry
from firmware.memory_descriptor import pack_map
from kernel.e820 import E820Table
from kernel.efi_memmap import memmap_lines
from tools.maps.description import to_data, toml_text
from tools.maps.firmware_memmap import to_rows
from tools.maps.memmap_args import memmap_args
from tools.maps.platform_map import PlatformMap
from tools.output import json_text

_STAMP = "[    0.000000] "


def kernel_table(platform: PlatformMap) -> list[BootE820Entry]:
    """The e820 table as the kernel has it after its first update: sorted, overlaps resolved."""
    entries = platform.entries()
    table = E820Table(entries, capacity=2 * len(entries) + 1)
    table.update_table()
    return list(table)


def efi_lines(platform: PlatformMap) -> list[str]:
    """``efi: mem00: [...] range=[...]``, as with efi=debug."""
    return list(memmap_lines(list(platform.descriptors)))


def e820_lines(platform: PlatformMap) -> list[str]:
    """``BIOS-e820: [mem 0x...-0x...] usable``, with no limit to their number."""
    entries = kernel_table(platform)
    return E820Table(entries, capacity=len(entries)).print_lines("BIOS-e820")


def dmesg_lines(platform: PlatformMap) -> list[str]:
    """What a kernel's log has of the map: e820, the nodes, and EFI's map where there was one."""
    lines = ["BIOS-provided physical RAM map:", *e820_lines(platform)]
    if not platform.is_e820:
        lines += efi_lines(platform)
    for n in platform.nodes:
        plug = " hotplug" if n.hotplug else ""
        lines.append(f"ACPI: SRAT: Node {n.node} PXM {n.node} [mem {n.start:#010x}-{n.end - 1:#010x}]{plug}")
    return [_STAMP + line for line in lines]


def table_lines(platform: PlatformMap) -> list[str]:
    """The map as dmesg prints it, in the form that it came in."""
    return e820_lines(platform) if platform.is_e820 else efi_lines(platform)


WRITERS: dict[str, Callable[[PlatformMap], str | bytes]] = {
    "efi": lambda platform: "\n".join(efi_lines(platform)) + "\n",
    "e820": lambda platform: "\n".join(e820_lines(platform)) + "\n",
    "json": lambda platform: json_text(to_data(platform), "pretty") + "\n",
    "toml": toml_text,
    "dmesg": lambda platform: "\n".join(dmesg_lines(platform)) + "\n",
    "memmap-args": lambda platform: memmap_args(kernel_table(platform)) + "\n",
    "firmware-memmap": lambda platform: json_text(to_rows(kernel_table(platform)), "pretty") + "\n",
    "raw": lambda platform: pack_map(platform.descriptors),
}
"""The forms of ``unaccepted map --to``. Raw descriptors, 48 bytes each as OVMF has them, are no text."""
