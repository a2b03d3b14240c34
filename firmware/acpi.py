"""The ACPI tables of a minimal machine: processors with a local APIC, one serial port, and no ACPI hardware.

A machine with NUMA nodes has SRAT too, and SLIT if it says how far they are from each other.

The serial port has no interrupt, as nothing but the local APIC gives interrupts: the kernel then serves it by timer.
WAET is what QEMU writes for Windows, and asks for nothing.
Sources: ACPI 6.4, sections 5.2.5 (RSDP), 5.2.6 and 5.2.8 (XSDT), 5.2.9 (FADT), 5.2.12 (MADT), 6.4.2.5 (I/O port
descriptor), 20.2 (AML); Windows ACPI Emulated Devices Table.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import cycle

from firmware.acpi_table import HEADER_SIZE, checksum, table
from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType
from firmware.srat import REVISION, SLIT_REVISION, Distances, NodeRange, slit, srat
from guest.units import SZ_4G

_RSDP_V1_SIZE = 20
_WAET_RTC_GOOD_TIMER_GOOD = 3
_LOCAL_APIC_ADDRESS = 0xFEE0_0000
_MADT_LOCAL_APIC, _MADT_LOCAL_X2APIC, _MADT_ENABLED = 0, 9, 1
_FIRST_X2APIC = 255
_FADT_SIZE, _FADT_DSDT, _FADT_BOOT_ARCH, _FADT_FLAGS, _FADT_X_DSDT = 276, 40, 109, 112, 140
_BOOT_ARCH_LEGACY_DEVICES, _BOOT_ARCH_NO_VGA = 1 << 0, 1 << 2
_WBINVD, _NO_POWER_BUTTON, _NO_SLEEP_BUTTON, _HW_REDUCED_ACPI = 1 << 0, 1 << 4, 1 << 5, 1 << 20
_COM1_PORT, _COM1_PORTS = 0x3F8, 8
_EISAID_PNP0501 = 0x0105_D041


def build_acpi(arena: Arena, nodes: Sequence[NodeRange] = (), cpus: int = 1, distances: Distances = ()) -> int:
    """Write the tables of a machine with ``cpus`` processors into ACPI reclaim memory; returns the RSDP's address.

    If there are nodes, SRAT is among them, SLIT with ``distances``, and the processors belong to the nodes by turns.
    """
    kind = EfiMemoryType.EfiACPIReclaimMemory
    dsdt = arena.put(kind, table(b"DSDT", _serial_port(), revision=2))
    bodies = {
        b"FACP": (_fadt(dsdt), 6),
        b"APIC": (_madt(cpus), 5),
        b"WAET": (struct.pack("<I", _WAET_RTC_GOOD_TIMER_GOOD), 1),
    }
    if nodes:
        processors = list(zip(range(cpus), cycle(sorted({r.node for r in nodes})), strict=False))
        bodies[b"SRAT"] = (srat(nodes, processors), REVISION)
    if distances:
        bodies[b"SLIT"] = (slit(distances), SLIT_REVISION)
    tables = [arena.put(kind, table(signature, *body)) for signature, body in bodies.items()]
    xsdt = arena.put(kind, table(b"XSDT", struct.pack(f"<{len(tables)}Q", *tables)))
    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"UNACPT", 2, 0, 36, xsdt, 0)
    return arena.put(kind, checksum(checksum(rsdp, 8, _RSDP_V1_SIZE), 32, len(rsdp)))


def _madt(cpus: int) -> bytes:
    """The processors, from number 255 on as x2APICs; without PCAT_COMPAT in the flags, as there is no 8259."""
    return struct.pack("<II", _LOCAL_APIC_ADDRESS, 0) + b"".join(map(_processor, range(cpus)))


def _processor(number: int) -> bytes:
    if number < _FIRST_X2APIC:
        return struct.pack("<BBBBI", _MADT_LOCAL_APIC, 8, number, number, _MADT_ENABLED)
    return struct.pack("<BBHIII", _MADT_LOCAL_X2APIC, 16, 0, number, _MADT_ENABLED, number)


def _fadt(dsdt: int) -> bytes:
    """Hardware-reduced ACPI: no registers at all, only the address of the DSDT, and that twice if it has 32 bits."""
    fadt = bytearray(_FADT_SIZE)
    flags = _WBINVD | _NO_POWER_BUTTON | _NO_SLEEP_BUTTON | _HW_REDUCED_ACPI
    struct.pack_into("<I", fadt, _FADT_DSDT, dsdt if dsdt < SZ_4G else 0)
    struct.pack_into("<H", fadt, _FADT_BOOT_ARCH, _BOOT_ARCH_LEGACY_DEVICES | _BOOT_ARCH_NO_VGA)
    struct.pack_into("<I", fadt, _FADT_FLAGS, flags)
    struct.pack_into("<Q", fadt, _FADT_X_DSDT, dsdt)
    return bytes(fadt[HEADER_SIZE:])


def _serial_port() -> bytes:
    """AML of ``Scope (\\_SB) { Device (COM1) { _HID "PNP0501", _UID 0, _CRS: ports 0x3F8 to 0x3FF } }``."""
    ports = struct.pack("<BBHHBB", 0x47, 1, _COM1_PORT, _COM1_PORT, 1, _COM1_PORTS) + b"\x79\0"
    crs = b"\x11" + _package(b"\x0a" + bytes([len(ports)]) + ports)
    names = b"\x08_HID\x0c" + struct.pack("<I", _EISAID_PNP0501) + b"\x08_UID\0" + b"\x08_CRS" + crs
    return b"\x10" + _package(b"\\_SB_" + b"\x5b\x82" + _package(b"COM1" + names))


def _package(body: bytes) -> bytes:
    """``body`` behind its PkgLength of one byte, which counts itself."""
    assert len(body) < 63
    return bytes([len(body) + 1]) + body
