"""A plain guest, without TDX, with a capture's bytes in its memory: as the captured kernel found it.

What a capture has only as lines of its log is built from them: EFI's system table with its configuration tables, and
ACPI's tables where their bytes were not kept, which then are empty.
"""

from __future__ import annotations

import re
import struct

from bootstub.boot_params import BOOT_PARAMS
from firmware.efi_types import (
    ACPI_20_TABLE_GUID,
    ACPI_TABLE_GUID,
    EFI_MEMORY_ATTRIBUTES_TABLE_GUID,
    LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID,
    SMBIOS_TABLE_GUID,
    guid_bytes,
)
from firmware.memory_descriptor import MemoryDescriptor, pack_map
from guest.bare import BareMetal
from guest.clock import VirtualClock
from guest.machine import Machine
from guest.memory import PhysicalMemory
from guest.records import GuestRecord
from guest.trace import Trace
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_1M, SZ_2M, SZ_16M
from tools.captures.capture import Capture

SCRATCH = PHYSICAL_ADDRESS_END - SZ_16M
"""Where lies what had an address of the loader's own: boot_params, command line, what was built from the log."""
_COMMAND_LINE, _VENDOR, _TABLES, _ACPI_ROOT = (SCRATCH + offset * SZ_1M for offset in (1, 2, 3, 4))
_BIOS_SEGMENT = 0xF0000
_GUIDS = {
    "SMBIOS": SMBIOS_TABLE_GUID,
    "ACPI": ACPI_TABLE_GUID,
    "ACPI 2.0": ACPI_20_TABLE_GUID,
    "MEMATTR": EFI_MEMORY_ATTRIBUTES_TABLE_GUID,
    "Unaccepted": LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID,
}
_ACPI_LINE = re.compile(r"ACPI: ([A-Z0-9]{4}) 0x([0-9A-F]{16}) ([0-9A-F]{6})")
_CPUID_LA57, _CPUID_GBPAGES = 1 << 16, 1 << 26
_EFI32 = int.from_bytes(b"EL32", "little")


def machine_of(capture: Capture) -> Machine:
    """The machine at the kernel's entry: RSI = boot_params, RIP in the image."""
    physical, clock = PhysicalMemory(), VirtualClock()
    machine = Machine.build(physical, BareMetal(_cpuid(capture)), Trace(clock), clock)
    physical.write(_COMMAND_LINE, capture.command_line.encode() + b"\0")
    physical.write(SCRATCH, capture.boot_params)
    record = GuestRecord(machine.memory, SCRATCH, BOOT_PARAMS)
    record["hdr.cmd_line_ptr"] = _COMMAND_LINE & 0xFFFFFFFF
    record["ext_cmd_line_ptr"] = _COMMAND_LINE >> 32
    _put_setup_data(capture, physical, record)
    _put_efi(capture, physical, record)
    _put_acpi(capture, physical, record)
    if any(line.startswith("SMBIOS ") for line in capture.log):
        physical.write(_BIOS_SEGMENT, b"_SM_")
    image = capture.image
    machine.regs.rsi, machine.regs.rip = SCRATCH, image.start if image else SZ_16M
    return machine


def image_size(capture: Capture) -> int:
    """Bytes from ``_text`` to ``__bss_stop``; 0 if that is not known."""
    image = capture.image
    return image.end - image.start // SZ_2M * SZ_2M if image else 0


def _cpuid(capture: Capture) -> dict[int, tuple[int, int, int, int]]:
    flags = capture.cpu_flags
    return {
        0: (7, 0, 0, 0),
        7: (0, 0, _CPUID_LA57 if "la57" in flags else 0, 0),
        0x80000000: (0x80000001, 0, 0, 0),
        0x80000001: (0, 0, 0, _CPUID_GBPAGES if "pdpe1gb" in flags else 0),
    }


def _put_setup_data(capture: Capture, physical: PhysicalMemory, params: GuestRecord) -> None:
    nodes = [node for node in capture.setup_data if node[0]]
    following = [*(node[0] for node in nodes[1:]), 0][: len(nodes)]
    for (at, kind, data), after in zip(nodes, following, strict=True):
        physical.write(at, struct.pack("<QII", after, kind, len(data)) + data)
    params["hdr.setup_data"] = nodes[0][0] if nodes else 0


def _put_efi(capture: Capture, physical: PhysicalMemory, params: GuestRecord) -> None:
    """The memory map; a system table with the configuration tables that the log names."""
    systab = params["efi_info.efi_systab_hi"] << 32 | params["efi_info.efi_systab"]
    banner = next((m for line in capture.log if (m := re.match(r"efi: EFI v(\d+)\.(\d+) by (.*)", line))), None)
    if not systab or banner is None:
        params["efi_info.efi_systab"] = params["efi_info.efi_systab_hi"] = 0
        return
    at = params["efi_info.efi_memmap_hi"] << 32 | params["efi_info.efi_memmap"]
    physical.write(at, _memmap(capture, params))
    tables = _efi_tables(capture)
    is_32bit = params["efi_info.efi_loader_signature"] == _EFI32
    revision = int(banner[1]) << 16 | int(banner[2].ljust(2, "0"))
    pack = "<16sI" if is_32bit else "<16sQ"
    base = min(systab, SCRATCH) & ~0xFFF if is_32bit else _TABLES
    entries = base + 0x800 if is_32bit else _TABLES
    vendor = base + 0xC00 if is_32bit else _VENDOR
    physical.write(entries, b"".join(struct.pack(pack, guid_bytes(_GUIDS[name]), at) for name, at in tables.items()))
    physical.write(vendor, banner[3].encode("utf-16-le") + b"\0\0")
    header = struct.pack("<8sIIII", b"IBI SYST", revision, 0, 0, 0)
    if is_32bit:
        body = struct.pack("<II", vendor, 0) + bytes(32) + struct.pack("<II", len(tables), entries)
    else:
        body = struct.pack("<QQ", vendor, 0) + bytes(64) + struct.pack("<QQ", len(tables), entries)
    physical.write(systab, header + body)
    if "MEMATTR" in tables:
        physical.write(tables["MEMATTR"], _memory_attributes(capture))
    unaccepted = capture.file("efi-raw/efi-unaccepted-table.bin")
    if "Unaccepted" in tables and unaccepted is not None:
        physical.write(tables["Unaccepted"], unaccepted)


def _memmap(capture: Capture, params: GuestRecord) -> bytes:
    """The raw map, or one packed from what the log says of it."""
    raw = capture.file("efi-raw/efi-memmap.bin")
    if raw is not None:
        return raw
    entries = capture.json("efi-memmap.json").get("entries", [])
    descriptors = []
    for entry in entries if isinstance(entries, list) else []:
        kind, start, end, attribute = (int(entry.get(key, 0)) for key in ("type", "start", "end", "attr"))
        descriptors.append(MemoryDescriptor.of_range(kind, start, end + 1, attribute))
    return pack_map(descriptors, max(params["efi_info.efi_memdesc_size"], 40))


def _efi_tables(capture: Capture) -> dict[str, int]:
    """Configuration tables by the name that the log has for them."""
    for line in capture.log:
        found = dict(re.findall(r"(\w[\w .]*)=(0x[0-9a-f]+) ", line.removeprefix("efi: ") + " "))
        if line.startswith("efi: ") and "ACPI" in line and found:
            return {name: int(address, 16) for name, address in found.items() if name in _GUIDS}
    return {}


def _memory_attributes(capture: Capture) -> bytes:
    """The table, or a header that gives it the size that the kernel reserved for it."""
    raw = capture.file("efi-raw/efi-memory-attributes-table.bin")
    if raw is not None:
        return raw
    for line in capture.log:
        found = re.match(r"memblock_reserve: \[(0x\w+)-(0x\w+)\] efi_memattr_init", line)
        if found:
            return struct.pack("<IIII", 1, (int(found[2], 16) + 1 - int(found[1], 16) - 16) // 48, 48, 0)
    return struct.pack("<IIII", 1, 0, 48, 0)


def _put_acpi(capture: Capture, physical: PhysicalMemory, params: GuestRecord) -> None:
    """The tables that the log names, with a root of our own: the real one's order is that of the log."""
    lines = [match for line in capture.log if (match := _ACPI_LINE.match(line))]
    tables = {name: (int(at, 16), int(size, 16)) for name, at, size in (m.groups() for m in lines)}
    if "RSDP" not in tables:
        return
    pointed = [at for name, (at, _) in tables.items() if name not in ("RSDP", "XSDT", "RSDT", "DSDT", "FACS")]
    for name, (at, size) in tables.items():
        data = capture.file(f"acpi/{name}.bin") or name.encode() + struct.pack("<I", size)
        if name not in ("RSDP", "XSDT", "RSDT"):
            physical.write(at, data)
    if "FACP" in tables:
        dsdt, facs = (tables.get(name, (0, 0))[0] for name in ("DSDT", "FACS"))
        physical.write(tables["FACP"][0] + 36, struct.pack("<II", facs, dsdt))
    xsdt = struct.pack(f"<4sI28x{len(pointed)}Q", b"XSDT", 36 + 8 * len(pointed), *pointed)
    physical.write(_ACPI_ROOT + PAGE_SIZE, xsdt)
    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"", 2, 0, 36, _ACPI_ROOT + PAGE_SIZE, 0)
    physical.write(_ACPI_ROOT, rsdp)
    params["acpi_rsdp_addr"] = _ACPI_ROOT
