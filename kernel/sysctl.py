"""/proc/sys: the settings of memory that can be changed while the kernel runs (mm/page_alloc.c, kernel/watchdog.c)."""

from __future__ import annotations

import errno
import re

from kernel.cpus import Cpus
from kernel.hugetlb import set_max_huge_pages
from kernel.mmzone import THP_MIN_PAGES, setup_per_zone_wmarks
from kernel.page_alloc import PageAllocator
from kernel.watermark import WATERMARK_SCALE_FACTOR

_INT_MAX = (1 << 31) - 1
_INTEGER = re.compile(r"\s*(-?)(0[xX][0-9a-fA-F]{1,15}|[0-9]{1,15})\s*")
_WATERMARK_SCALE_FACTORS = range(1, 3001)
_WATCHDOG_THRESHOLDS = range(61)


def parse_integer(text: str) -> int | None:
    """An ``int`` as proc_dointvec() reads it, with white space around it; None if the text is none."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match[2]
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" and digits.isdecimal() else 10
    try:
        value = int(digits, base)
    except ValueError:  # an 8 or 9 in an octal number
        return None
    return (-value if match[1] else value) if value <= _INT_MAX else None


class Sysctl:
    """The values, and what a write to one does. A write returns its number of characters or -EINVAL."""

    def __init__(self, allocator: PageAllocator, cpus: Cpus) -> None:
        self._allocator, self._zones, self._cpus = allocator, allocator.zones, cpus
        self.min_free_kbytes = 0
        self.watermark_scale_factor = WATERMARK_SCALE_FACTOR
        self._user_min_free_kbytes = -1

    def init_per_zone_wmark_min(self) -> None:
        """Watermarks and reserves from the managed pages of now, unless the user has set a larger minimum.

        One of the first initcalls does this; until then all watermarks are 0. It is done again when memory is added.
        khugepaged's part is included.
        """
        managed = sum(zone.managed_pages for zone in self._zones)
        computed = self._allocator.init_per_zone_wmark_min(transparent_hugepage=managed >= THP_MIN_PAGES)
        self.min_free_kbytes = max(computed, self._user_min_free_kbytes)
        if self.min_free_kbytes != computed or self.watermark_scale_factor != WATERMARK_SCALE_FACTOR:
            self.setup_per_zone_wmarks()

    def write_min_free_kbytes(self, text: str) -> int:
        """vm.min_free_kbytes: any number from 0 on."""
        value = parse_integer(text)
        if value is None or value < 0:
            return -errno.EINVAL
        self.min_free_kbytes = self._user_min_free_kbytes = value
        self.setup_per_zone_wmarks()
        return len(text)

    def write_nr_hugepages(self, text: str) -> int:
        """vm.nr_hugepages: any number; there are less if memory does not last."""
        value = parse_integer(text)
        if value is None or value < 0:
            return -errno.EINVAL
        set_max_huge_pages(self._allocator, value)
        return len(text)

    @property
    def nr_hugepages(self) -> int:
        return self._allocator.hugetlb.default.nr_huge_pages()

    def write_watermark_scale_factor(self, text: str) -> int:
        """vm.watermark_scale_factor: 1 to 3000 ten-thousandths."""
        value = parse_integer(text)
        if value is None or value not in _WATERMARK_SCALE_FACTORS:
            return -errno.EINVAL
        self.watermark_scale_factor = value
        self.setup_per_zone_wmarks()
        return len(text)

    def write_watchdog_thresh(self, text: str) -> int:
        """kernel.watchdog_thresh: 0, which is off, to 60 seconds."""
        value = parse_integer(text)
        if value is None or value not in _WATCHDOG_THRESHOLDS:
            return -errno.EINVAL
        self._cpus.watchdog_thresh = value
        return len(text)

    @property
    def watchdog_thresh(self) -> int:
        return self._cpus.watchdog_thresh

    def setup_per_zone_wmarks(self) -> None:
        """Again, for the managed pages of now."""
        setup_per_zone_wmarks(self._zones, self.min_free_kbytes, self.watermark_scale_factor)
        self._allocator.setup_per_cpu_pageset()
