"""What a boot came to, beyond its table: memory that nobody will use, and whether guest and TDX module agree.

The guest keeps its own record of unaccepted memory in a bitmap; the TDX module keeps the truth in Secure EPT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bootstub.boot_params import BOOT_PARAMS, e820_table_of, parse_e820_table
from bootstub.e820_types import E820_TYPE_RAM
from bootstub.setup_data import SETUP_DATA, SetupDataType, walk_setup_data
from guest.bitmap import GuestBitmap
from guest.ranges import RangeSet
from guest.records import RecordCopy
from guest.units import BITS_PER_BYTE, DIV_ROUND_UP, PHYSICAL_ADDRESS_END, PMD_SIZE, SZ_1G
from tdx.events import Finding
from tools.handover import peek, unaccepted_table
from tools.known_holes import hole_lines

if TYPE_CHECKING:
    from tools.pipeline import Boot

_MAX_BITMAP = SZ_1G
"""Bytes that are read at most: four times what describes 4 PiB."""


def verdict_lines(boot: Boot) -> list[str]:
    """A line for each thing worth knowing: what the sanitizer found, and how the boot stub's record stands."""
    lines = finding_lines(boot) + hole_lines(boot)
    if boot.boot_params is None:
        return lines
    lost = lost_memory(boot)
    if lost:
        lines.append(f"lost: {lost.total() >> 10} KiB of unaccepted memory are not in the kernel's e820 table")
    by_bitmap, by_module = unaccepted_by_bitmap(boot), unaccepted_by_module(boot)
    if by_bitmap is None:
        return [*lines, f"no bitmap of unaccepted memory; {by_module.total() >> 10} KiB are unaccepted"]
    if by_bitmap == by_module:
        return [*lines, f"bitmap and Secure EPT agree: {by_module.total() >> 10} KiB are unaccepted"]
    for text, one, other in (("set in the bitmap", by_bitmap, by_module), ("unaccepted", by_module, by_bitmap)):
        for start, end in one:
            lines += [f"disagree: [{a:#x}, {b:#x}) only {text}" for a, b in other.gaps(start, end)]
    return lines


def finding_lines(boot: Boot) -> list[str]:
    """What the sanitizer found, a line each: stage, event number, rule, address, states."""
    records = boot.sanitizer.findings if boot.sanitizer is not None else []
    return [f"finding: {r.stage}: {r.event.text}" for r in records if isinstance(r.event, Finding)]


def lost_memory(boot: Boot) -> RangeSet:
    """RAM that is neither accepted nor RAM in the table that the kernel got."""
    if boot.boot_params is None:
        return RangeSet()
    lost = unaccepted_by_module(boot)
    params = RecordCopy(boot.boot_params, BOOT_PARAMS)
    entries = e820_table_of(boot.boot_params)
    for node in walk_setup_data(boot.physical.read, params["hdr.setup_data"]):
        if node.type == SetupDataType.SETUP_E820_EXT:
            entries += parse_e820_table(boot.physical.read(node.gpa + SETUP_DATA.sizeof(), node.len))
    for entry in entries:
        if entry.type == E820_TYPE_RAM:
            lost.remove(entry.addr, entry.addr + entry.size)
    return lost


def unaccepted_by_module(boot: Boot) -> RangeSet:
    """RAM that Secure EPT does not have as mapped."""
    ram = boot.host.ram.copy()
    for start, end in boot.sept.mapped():
        ram.remove(start, end)
    return ram


def bitmap(boot: Boot) -> bytes:
    """The bitmap as it is now, v9's or mainline's; empty if the stub left neither."""
    found = unaccepted_table(boot)
    if found is None:
        return boot.bitmap()
    return peek(boot.physical, found.bitmap, min(found.size, _MAX_BITMAP)) or b""


def unaccepted_by_bitmap(boot: Boot) -> RangeSet | None:
    """RAM whose bit is set, in v9's bitmap or in mainline's table; None if the stub left neither."""
    assert boot.boot_params is not None
    params = RecordCopy(boot.boot_params, BOOT_PARAMS)
    found = unaccepted_table(boot)
    if found is None and not params["unaccepted_memory"]:
        return None
    at, unit, base, described = params["unaccepted_memory"], PMD_SIZE, 0, PHYSICAL_ADDRESS_END
    if found is not None:
        at, unit, base, described = found.bitmap, found.unit_size, found.phys_base, found.described_end
    room = max(PHYSICAL_ADDRESS_END - at, 0)
    described = min(described, base + room * BITS_PER_BYTE * unit)
    bitmap = GuestBitmap(boot.physical, at)
    unaccepted = RangeSet()
    for start, end in boot.host.ram.within(base, described):
        for first, last in bitmap.runs((start - base) // unit, DIV_ROUND_UP(end - base, unit)):
            unaccepted.add(max(base + first * unit, start), min(base + last * unit, end))
    return unaccepted
