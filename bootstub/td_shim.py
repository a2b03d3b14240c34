"""Stage ``firmware`` of the profile td-shim: no UEFI, but the Linux boot protocol.

td-shim accepts the first 256 MiB that the host did not add, describes all RAM in an e820 table, the rest of it in a
bitmap at boot_params+0x78, and enters the decompressor at its 64-bit entry point. Unaccepted memory is ordinary RAM
in the table: there is no e820 type for it. It works as firmware and as boot loader, so it stands on this floor.

Source: td-shim td-shim/src/bin/td-shim/memory.rs and linux/boot.rs. Here boot_params are in the region of the page
tables, which the kernel leaves alone; td-shim has them on its stack, inside its own image. HOB lists of older hosts,
without a type for unaccepted memory, are not understood.
"""

from __future__ import annotations

from collections.abc import Iterable

from bootstub.boot_params import (
    BOOT_PARAMS,
    BOOT_PARAMS_SIZE,
    E820_MAX_ENTRIES_ZEROPAGE,
    BootE820Entry,
    build_e820_table,
)
from bootstub.e820_types import E820_TYPE_RAM
from bootstub.kernel_layout import SECTOR, STARTUP_64_OFFSET
from bootstub.setup_header import HEADER_MAGIC, SETUP_HEADER, SETUP_HEADER_OFFSET, LoadFlags
from bootstub.td_shim_layout import PAYLOAD, PAYLOAD_PARAMETER, UNACCEPTED_MEMORY_BITMAP, TopRegions, top_regions
from firmware.accept_policy import AcceptPolicy, accept_range, divide
from firmware.acpi import build_acpi
from firmware.arena import Arena
from firmware.efi_types import EfiMemoryType
from firmware.hob import Resource, read_hob_list
from firmware.memory_descriptor import MemoryDescriptor
from firmware.memory_map import MemoryMap
from firmware.ovmf_layout import accepted_ram
from firmware.paging import build_identity_map
from firmware.srat import Distances, NodeRange
from guest.bitmap import GuestBitmap
from guest.machine import Machine
from guest.ranges import RangeMap, RangeSet
from guest.records import GuestRecord, field_extents
from guest.units import BITS_PER_BYTE, PMD_SIZE, SZ_4G, SZ_256M, round_down, round_up

TD_SHIM_POLICY = AcceptPolicy(size=SZ_256M)
"""TD_PAYLOAD_PARTIAL_ACCEPT_MEMORY_SIZE of a build with lazy-accept."""

_LOADER_UNDEFINED = 0xFF
_SETUP_SECTS_DEFAULT = 4
_VERSION_MIN = 0x200


def td_shim(
    machine: Machine, policy: AcceptPolicy, accept_cpus: int = 1, nodes: tuple[NodeRange, ...] = (), cpus: int = 1,
    distances: Distances = (),
) -> None:  # fmt: skip
    """Run td-shim on the HOB list at RCX; the kernel's file is the payload that the host added.

    ``accept_cpus`` of the machine's ``cpus`` processors accept memory. It leaves boot_params in RSI and startup_64 of
    the decompressor in RIP. What it cannot start ends it.
    """
    memory, regs = machine.memory, machine.regs
    resources = read_hob_list(memory, regs.rcx)
    todo, left = divide(resources, policy)
    for start, end in todo:
        accept_range(machine, start, end, accept_cpus)
    ram = accepted_ram(resources)
    regions = _regions(machine, accepted_ram(resources, left))
    arena = _arena(machine, regions)
    boot_params = arena.put(EfiMemoryType.EfiBootServicesData, bytes(BOOT_PARAMS_SIZE))
    params = GuestRecord(memory, boot_params, BOOT_PARAMS)
    params["acpi_rsdp_addr"] = build_acpi(arena, nodes, cpus, distances)
    _write_e820(machine, params, e820_entries(ram, regions))
    params["unaccepted_memory"] = _build_bitmap(machine, left, accept_cpus)
    startup_32 = _setup_header(machine, params)
    machine.print("Jump to kernel...")
    regs.cr3 = build_identity_map(memory, arena)
    regs.rsi, regs.rdx, regs.rip = boot_params, 0, startup_32 + STARTUP_64_OFFSET


def e820_entries(ram: RangeSet, regions: TopRegions) -> list[BootE820Entry]:
    """The table: all ``ram``, accepted or not, less the regions that are more than memory."""
    types: RangeMap[int] = RangeMap(0)
    for part in ram:
        types.assign(part.start, part.end, E820_TYPE_RAM)
    for region, kind in regions.e820_types:
        types.assign(region.start, region.end, kind)
    return [BootE820Entry(start, end - start, kind) for start, end, kind in types.runs() if kind]


def _regions(machine: Machine, accepted: RangeSet) -> TopRegions:
    """The regions at the top of the accepted memory below 4 GiB."""
    found = top_regions(max((part.end for part in accepted if part.end < SZ_4G), default=0))
    if found is None:
        raise machine.panic("td-shim: no accepted memory for its regions behind the payload")
    return found


def _arena(machine: Machine, regions: TopRegions) -> Arena:
    """Room for tables: ACPI's in their region, all else in that of the page tables."""
    rooms = (
        (EfiMemoryType.EfiACPIReclaimMemory, regions.acpi),
        (EfiMemoryType.EfiBootServicesData, regions.page_table),
    )
    return Arena(machine.memory, MemoryMap([MemoryDescriptor.of_range(kind, *room, 0) for kind, room in rooms], []))


def _build_bitmap(machine: Machine, left: Iterable[Resource], cpus: int) -> int:
    """Put whole units of 2 MiB into the bitmap, accept the rest; returns the bitmap's address.

    Memory beyond the bitmap is an index out of bounds, at which td-shim stops.
    """
    bitmap = GuestBitmap(machine.memory, UNACCEPTED_MEMORY_BITMAP.start)
    bits = UNACCEPTED_MEMORY_BITMAP.size * BITS_PER_BYTE
    for r in left:
        first, last = round_up(r.start, PMD_SIZE), round_down(r.end, PMD_SIZE)
        if r.end - r.start < PMD_SIZE:
            accept_range(machine, r.start, r.end, cpus)
            continue
        accept_range(machine, r.start, first, cpus)
        accept_range(machine, last, r.end, cpus)
        if last // PMD_SIZE > bits:
            size, index = UNACCEPTED_MEMORY_BITMAP.size, max(first // PMD_SIZE, bits) // BITS_PER_BYTE
            raise machine.panic(f"index out of bounds: the len is {size} but the index is {index}")
        bitmap.set(first // PMD_SIZE, last // PMD_SIZE)
    return UNACCEPTED_MEMORY_BITMAP.start


def _write_e820(machine: Machine, params: GuestRecord, entries: list[BootE820Entry]) -> None:
    if len(entries) > E820_MAX_ENTRIES_ZEROPAGE:
        raise machine.panic("td-shim: TooManyEntries")
    offset, _ = field_extents(BOOT_PARAMS)["e820_table"]
    machine.memory.write(params.gpa + offset, build_e820_table(entries))
    params["e820_entries"] = len(entries)


def _setup_header(machine: Machine, params: GuestRecord) -> int:
    """The payload's setup header, and what a boot loader fills in; returns the address of startup_32."""
    memory, at = machine.memory, PAYLOAD.start + SETUP_HEADER_OFFSET
    memory.write(params.gpa + SETUP_HEADER_OFFSET, memory.read(at, SETUP_HEADER.sizeof()))
    is_high = params["hdr.loadflags"] & LoadFlags.LOADED_HIGH
    if params["hdr.header"] != HEADER_MAGIC or params["hdr.version"] < _VERSION_MIN or not is_high:
        raise machine.panic("td-shim: InvalidBzImage")
    sectors = (params["hdr.setup_sects"] or _SETUP_SECTS_DEFAULT) + 1
    params["hdr.type_of_loader"] = _LOADER_UNDEFINED
    params["hdr.code32_start"] = PAYLOAD.start + sectors * SECTOR
    params["hdr.cmd_line_ptr"] = PAYLOAD_PARAMETER.start
    return PAYLOAD.start + sectors * SECTOR
