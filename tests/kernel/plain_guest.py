"""A guest without TDX and without firmware: boot_params, a command line and ACPI tables that the test made."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from guest.bare import BareMetal
from guest.clock import VirtualClock
from guest.errors import GuestPanic
from guest.machine import Machine
from guest.memory import PhysicalMemory
from guest.trace import Print, Trace
from kernel.kernel import Kernel
from kernel.mm_init import mm_init
from kernel.setup_arch import setup_arch
from kernel.version import V6_12, KernelVersion

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
RAM, RESERVED, ACPI = 1, 2, 3
BOOT_PARAMS, COMMAND_LINE, TABLES = 0x9_0000, 0x9_2000, 2 * GIB - MIB
IMAGE, IMAGE_SIZE = 16 * MIB, 44 * MIB
LOW = ((0, 0x9_FC00, RAM), (MIB, 2 * GIB - MIB, RAM))
HIGH = (4 * GIB, 4 * GIB, RAM)


def table(signature: bytes, body: bytes, revision: int = 1) -> bytes:
    """An ACPI table; nobody looks at its checksum."""
    return struct.pack("<4sIB27x", signature, 36 + len(body), revision) + body


def srat(*memory: tuple[int, int, int, int], cpus: Sequence[tuple[int, int]] = (), revision: int = 3) -> bytes:
    """SRAT with memory (pxm, start, size, flags) and processors (APIC ID, pxm)."""
    entries = b"".join(struct.pack("<BBBBI8x", 0, 16, pxm, apic, 1) for apic, pxm in cpus)
    entries += b"".join(
        struct.pack("<BBI2xQQ4xI8x", 1, 40, pxm, start, size, flags) for pxm, start, size, flags in memory
    )
    return table(b"SRAT", bytes(12) + entries, revision)


def madt(*apic_ids: int) -> bytes:
    """MADT with enabled processors and one IO-APIC."""
    entries = b"".join(struct.pack("<BBBBI", 0, 8, apic, apic, 1) for apic in apic_ids)
    return table(b"APIC", bytes(8) + entries + struct.pack("<BB10x", 1, 12))


def machine_with(
    e820: Sequence[tuple[int, int, int]] = (*LOW, HIGH), cmdline: str = "", acpi: Sequence[bytes] = (),
    leaves: dict[int, tuple[int, int, int, int]] | None = None,
) -> Machine:  # fmt: skip
    """The machine at the kernel's entry."""
    physical, clock = PhysicalMemory(), VirtualClock()
    machine = Machine.build(physical, BareMetal(leaves), Trace(clock), clock)
    params = bytearray(4096)
    params[0x1E8] = len(e820)
    for number, entry in enumerate(e820):
        struct.pack_into("<QQI", params, 0x2D0 + 20 * number, *entry)
    struct.pack_into("<I", params, 0x228, COMMAND_LINE)
    at = TABLES + 0x200
    places = []
    for data in acpi:
        physical.write(at, data)
        places.append(at)
        at = at + len(data) + 15 & ~15
    if acpi:
        physical.write(TABLES + 0x100, table(b"XSDT", struct.pack(f"<{len(places)}Q", *places)))
        physical.write(TABLES, struct.pack("<8s7xBIIQ4x", b"RSD PTR ", 2, 0, 36, TABLES + 0x100))
        struct.pack_into("<Q", params, 0x70, TABLES)
    physical.write(BOOT_PARAMS, bytes(params))
    physical.write(COMMAND_LINE, cmdline.encode() + b"\0")
    machine.regs.rsi, machine.regs.rip = BOOT_PARAMS, IMAGE
    return machine


def log_of(machine: Machine) -> list[str]:
    """What was printed."""
    return [record.event.text for record in machine.trace.records if isinstance(record.event, Print)]


def booted(
    e820: Sequence[tuple[int, int, int]] = (*LOW, HIGH), cmdline: str = "", acpi: Sequence[bytes] = (),
    version: KernelVersion = V6_12, leaves: dict[int, tuple[int, int, int, int]] | None = None,
) -> tuple[Kernel, list[str]]:  # fmt: skip
    """Boot up to the page allocator; the kernel and its log."""
    machine = machine_with(e820, cmdline, acpi, leaves)
    kernel = setup_arch(machine, version, IMAGE_SIZE)
    mm_init(kernel)
    return kernel, log_of(machine)


def panicked(e820: Sequence[tuple[int, int, int]], cmdline: str = "", acpi: Sequence[bytes] = ()) -> str:
    """The text of the panic in which such a boot ends."""
    try:
        booted(e820, cmdline, acpi)
    except GuestPanic as panic:
        return panic.text
    return ""
