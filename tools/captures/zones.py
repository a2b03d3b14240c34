"""Comparing our zones with a capture's /proc/zoneinfo.

Spanned, present and managed pages are ours; the captured kernel has freed its init sections and more since, by its log.
Watermarks, reserves and batches are computed from the captured managed pages, as they were when the kernel set the
watermarks: without what it freed later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from guest.units import PAGE_SHIFT, PFN_DOWN
from kernel.mmzone import (
    THP_MIN_PAGES,
    Zone,
    ZoneType,
    setup_per_zone_lowmem_reserve,
    setup_per_zone_wmarks,
    setup_zone_wmarks,
)
from kernel.per_cpu_pages import zone_batchsize, zone_highsize
from tools.captures.capture import Capture
from tools.captures.compare import Difference, Row
from tools.captures.zoneinfo import CapturedZone, parse_zoneinfo

_FREED = re.compile(r"Freeing (SMP alternatives|initrd|unused [\w ]+(?:\([\w/ ]+\))?) memory: (\d+)K$")
_BEFORE = "SMP alternatives"
"""What is freed before the kernel sets its watermarks."""
_PLUGGED = "memory that was plugged in, or taken over by a driver, after the boot"
_EFI_FREED = re.compile(r"Freeing EFI boot services memory: (\d+)K$")


def compare_zones(capture: Capture, zones: Sequence[Zone]) -> Iterator[Row]:
    """Rows about zones; none without zoneinfo."""
    text = capture.text("zoneinfo.txt")
    if text is None:
        return
    captured = parse_zoneinfo(text)
    ours = {(zone.node, zone.name): zone for zone in zones}
    plugged = _plugged(capture, captured, ours)
    yield _sizes(captured, ours, plugged)
    yield _managed(capture, captured, ours, plugged)
    populated = [zone for zone in captured if zone.present]
    then = _at_watermarks(capture, populated)
    yield _min_free_kbytes(capture, then)
    yield from _watermarks(capture, populated, then)
    yield _pcp(capture, populated, then)


def _row(subject: str, pairs: Sequence[tuple[str, str]], cause: str | None = None) -> Row:
    differences = tuple(Difference(ours, theirs, cause) for ours, theirs in pairs if ours != theirs)
    return Row(subject, len(pairs), differences)


def _name(zone: CapturedZone) -> str:
    return f"node {zone.node} {zone.name}"


def _sizes(captured: Sequence[CapturedZone], ours: dict[tuple[int, str], Zone], plugged: set[tuple[int, str]]) -> Row:
    """Start, spanned and present pages of every zone."""
    differences = []
    for zone in captured:
        mine = ours.get((zone.node, zone.name))
        start, spanned, present = (mine.zone_start_pfn, mine.spanned_pages, mine.present_pages) if mine else (0, 0, 0)
        form = "{} start {:#x} spanned {} present {}".format
        start = start if zone.present else zone.start_pfn  # not shown where there is no memory
        mine_text = form(_name(zone), start, spanned, present)
        theirs = form(_name(zone), zone.start_pfn, zone.spanned, zone.present)
        if mine_text != theirs:
            cause = _PLUGGED if (zone.node, zone.name) in plugged else None
            differences.append(Difference(mine_text, theirs, cause))
    return Row("zones: spanned and present", len(captured), tuple(differences))


def freed_later(capture: Capture) -> list[tuple[str, int, int]]:
    """What the kernel freed after mm_init, by its log: name, pages, an address in its zone."""
    image, params = capture.image, capture.params
    ramdisk = params["ext_ramdisk_image"] << 32 | params["hdr.ramdisk_image"]
    moved = next((m for line in capture.log if (m := re.match(r"Allocated new RAMDISK: \[mem (0x\w+)-", line))), None)
    freed = []
    for line in capture.log:
        found = _FREED.match(line)
        if found:
            place = (int(moved[1], 16) if moved else ramdisk) if found[1] == "initrd" else image.start if image else 0
            freed.append((found[1], int(found[2]) >> PAGE_SHIFT - 10, place))
    return freed


def _at_watermarks(capture: Capture, captured: Sequence[CapturedZone]) -> list[Zone]:
    """The captured zones with the managed pages that they had when the kernel set the watermarks."""
    freed, efi = freed_later(capture), [m for line in capture.log if (m := _EFI_FREED.match(line))]
    zones = []
    for zone in captured:
        kind = ZoneType[f"ZONE_{zone.name.upper()}"]
        late = sum(n for what, n, at in freed if what != _BEFORE and _holds(zone, at))
        zones.append(Zone(kind, zone.start_pfn, zone.spanned, zone.present, zone.managed - late, node=zone.node))
    if efi and sum(zone.managed_pages for zone in zones) < THP_MIN_PAGES:  # set once, before boot services were freed
        low = max((zone for zone in zones if zone.zone_type <= ZoneType.ZONE_DMA32), key=lambda z: z.present_pages)
        low.managed_pages -= int(efi[0][1]) >> PAGE_SHIFT - 10
    return zones


def _managed(
    capture: Capture, captured: Sequence[CapturedZone], ours: dict[tuple[int, str], Zone], plugged: set[tuple[int, str]]
) -> Row:
    """Managed pages, which differ by what was freed after mm_init."""
    freed = freed_later(capture)
    differences = []
    for zone in captured:
        mine = ours.get((zone.node, zone.name))
        managed = mine.managed_pages if mine else 0
        late = [(n, what) for what, n, at in freed if _holds(zone, at)]
        rest = zone.managed - managed - sum(n for n, _ in late)
        if zone.managed == managed:
            continue
        cause = "freed later: " + ", ".join(f"{n} pages {what}" for n, what in late) if not rest else None
        if (zone.node, zone.name) in plugged:
            cause = _PLUGGED
        differences.append(
            Difference(f"{_name(zone)} managed {managed}", f"{_name(zone)} managed {zone.managed}", cause)
        )
    return Row("zones: managed", len(captured), tuple(differences))


def _plugged(
    capture: Capture, captured: Sequence[CapturedZone], ours: dict[tuple[int, str], Zone]
) -> set[tuple[int, str]]:
    """Zones where /proc/iomem has RAM, though the boot knew of none there."""
    text = capture.text("iomem.txt") or ""
    ram = [int(at, 16) for at in re.findall(r"^ *([0-9a-f]+)-[0-9a-f]+ : System RAM(?: \(\w+\))?$", text, re.MULTILINE)]
    empty = [z for z in captured if (z.node, z.name) not in ours or not ours[z.node, z.name].present_pages]
    return {(zone.node, zone.name) for zone in empty if any(_holds(zone, at) for at in ram)}


def _holds(zone: CapturedZone, address: int) -> bool:
    return zone.start_pfn <= PFN_DOWN(address) < zone.start_pfn + zone.spanned


def _min_free_kbytes(capture: Capture, then: Sequence[Zone]) -> Row:
    """vm.min_free_kbytes by our formula, unless the user set it."""
    ours = setup_zone_wmarks([replace(zone) for zone in then], transparent_hugepage=True)
    theirs = str(capture.vm.get("min_free_kbytes", ours))
    asked = re.search(r"sysctl\.vm\.min_free_kbytes=(\d+)", capture.command_line)
    return _row("min_free_kbytes", [(str(ours), theirs)], "set by the command line" if asked else None)


def _watermarks(capture: Capture, captured: Sequence[CapturedZone], then: Sequence[Zone]) -> Iterator[Row]:
    """Watermarks and protection by our formulas from the captured managed pages."""
    min_free = int(capture.vm.get("min_free_kbytes", 0))
    at_boot, at_end = list(then), [replace(z, managed_pages=c.managed) for z, c in zip(then, captured, strict=True)]
    setup_per_zone_wmarks(at_boot, min_free)
    setup_per_zone_lowmem_reserve(at_boot)
    setup_per_zone_wmarks(at_end, min_free)
    late = "sysctl.vm.min_free_kbytes" in capture.command_line
    zones = at_end if late else at_boot
    marks, protections = [], []
    for zone, boot, theirs in zip(zones, at_boot, captured, strict=True):
        mark = zone.watermark
        mine = (mark.min, mark.low, mark.high, mark.promo)[: len(theirs.marks)]
        marks.append((f"{_name(theirs)} {mine}", f"{_name(theirs)} {theirs.marks}"))
        mine = boot.lowmem_reserve  # what sysctl leaves alone
        protections.append((f"{_name(theirs)} {mine}", f"{_name(theirs)} {theirs.protection}"))
    yield _row("watermarks from managed", marks)
    yield _row("lowmem protection", protections)


def _pcp(capture: Capture, captured: Sequence[CapturedZone], then: Sequence[Zone]) -> Row:
    """Batch, and where the kernel does not tune it, high of the per-CPU lists."""
    cpus = max(len(re.findall(r"^processor\s*:", str(capture.vm.get("cpuinfo", "")), re.MULTILINE)), 1)
    nodes = len({zone.node for zone in captured})
    pairs = []
    for zone, theirs in zip(then, captured, strict=True):
        batch = zone_batchsize(zone.managed_pages)
        mine = f"{_name(theirs)} batch {max(batch, 1)}"
        said = f"{_name(theirs)} batch {theirs.batch}"
        if capture.version.name == "6.1":
            high = zone_highsize(zone.watermark.low, batch, max(cpus // nodes, 1))
            mine, said = f"{mine} high {high}", f"{said} high {theirs.pcp_high}"
        pairs.append((mine, said))
    return _row("per-CPU lists", pairs)
