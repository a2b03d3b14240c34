"""Texts of /proc/meminfo, /proc/vmstat and /proc/buddyinfo.

Only the lines whose numbers are known here; format and order are the kernel's (fs/proc/meminfo.c, mm/vmstat.c;
``Unaccepted`` and ``nr_unaccepted``: v9 02/14).
"""

from __future__ import annotations

from collections.abc import Sequence

from kernel.free_area import NR_PAGE_ORDERS
from kernel.mmzone import Zone, totalreserve_pages
from kernel.watermark import KBYTES_SHIFT


def meminfo(zones: Sequence[Zone]) -> str:
    """/proc/meminfo. Unaccepted memory is part of all three lines above its own."""
    nr_free_pages = sum(zone.nr_free_pages for zone in zones)
    values = {
        "MemTotal": sum(zone.managed_pages for zone in zones),
        "MemFree": nr_free_pages,
        "MemAvailable": max(nr_free_pages - totalreserve_pages(zones), 0),
        "Unaccepted": sum(zone.nr_unaccepted for zone in zones),
    }
    return "".join(f"{name + ':':<16}{pages << KBYTES_SHIFT:8} kB\n" for name, pages in values.items())


def vmstat(zones: Sequence[Zone]) -> str:
    """/proc/vmstat: free and unaccepted pages of all zones."""
    nr_free_pages = sum(zone.nr_free_pages for zone in zones)
    nr_unaccepted = sum(zone.nr_unaccepted for zone in zones)
    return f"nr_free_pages {nr_free_pages}\nnr_unaccepted {nr_unaccepted}\n"


def buddyinfo(zones: Sequence[Zone]) -> str:
    """/proc/buddyinfo: free blocks of each order. Unaccepted blocks are on no free list and do not count."""
    return "".join(_buddyinfo_line(zone) for zone in zones if zone.populated)


def _buddyinfo_line(zone: Zone) -> str:
    counts = "".join(f"{zone.free_area.nr_free(order):6} " for order in range(NR_PAGE_ORDERS))
    return f"Node 0, zone {zone.name:>8} {counts}\n"
