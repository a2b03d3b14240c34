"""Which memory the firmware accepts itself, and how: OVMF's policy, all of it in this file.

Upstream OVMF accepts every unaccepted range below 4 GiB and leaves the rest to the operating system ("first stage
of lazy accept", edk2 commit d1e41c620f, November 2022). Source: OvmfPkg/Library/PlatformInitLib/IntelTdx.c,
ProcessHobList() and BspAcceptMemoryResourceRange().
"""

from __future__ import annotations

from firmware.hob import Resource, ResourceType
from guest.machine import Machine
from guest.units import PMD_SIZE, SZ_4G, round_up
from tdx.guest import accept_pages
from tdx.sept import LEVEL_2M, LEVEL_4K


def accept_below_4g(machine: Machine, resources: list[Resource]) -> list[Resource]:
    """Accept the unaccepted resources below 4 GiB, each clamped to it; return what stays unaccepted."""
    left = []
    if any(resource.type == ResourceType.EFI_RESOURCE_MEMORY_UNACCEPTED for resource in resources):
        machine.print("AcceptMemory under address of 4G")
    for resource in resources:
        if resource.type != ResourceType.EFI_RESOURCE_MEMORY_UNACCEPTED:
            continue
        if resource.start < SZ_4G:
            accept_range(machine, resource.start, min(resource.end, SZ_4G))
        if resource.end > SZ_4G:
            left.append(Resource(resource.type, max(resource.start, SZ_4G), resource.end))
    return left


def accept_range(machine: Machine, start: int, end: int) -> None:
    """Accept ``[start, end)`` as OVMF cuts it: 4 KiB up to a 2 MiB border, 2 MiB pages, a 4 KiB tail.

    2 MiB pages are used only where strictly more than 2 MiB are left behind the border. A refused 2 MiB page is
    accepted as 4 KiB pages; a refused 4 KiB page stops the firmware.
    """
    border = min(round_up(start, PMD_SIZE), end)
    tail = border + (end - border) // PMD_SIZE * PMD_SIZE if end - border > PMD_SIZE else border
    machine.print(f"MpAccept : {start:#x} - {end:#x} ({end - start:#x})")
    ok = accept_pages(machine, start, border, (LEVEL_4K,))
    ok = ok and accept_pages(machine, border, tail, (LEVEL_2M, LEVEL_4K))
    ok = ok and accept_pages(machine, tail, end, (LEVEL_4K,))
    if not ok:
        raise machine.panic(f"Accept memory failed: {start:#x} - {end:#x}")
