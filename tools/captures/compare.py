"""Comparing our stages with a captured boot: lines of the log by subject, then zones and watermarks.

A ``Row`` is one subject; what is not equal in it is a ``Difference``, with a cause if there is a known one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tools.captures.capture import Capture


@dataclass(frozen=True, slots=True)
class Difference:
    """Ours and the captured one, empty where there is none; ``cause`` says why, if that is known."""

    ours: str
    captured: str
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A subject: how many things were compared, and what differs."""

    subject: str
    compared: int
    differences: tuple[Difference, ...] = ()

    @property
    def unexplained(self) -> list[Difference]:
        """Differences without a cause."""
        return [difference for difference in self.differences if difference.cause is None]


SUBJECTS = {
    "e820": (
        r"(BIOS-\w+|extended|reserve setup_data|user): \[mem |e820: (update|remove) |"
        r"(BIOS-provided|extended|user-defined) physical RAM map:"
    ),
    "last page frames": r"last_pfn = ",
    "PCI gap": r"\[mem .*available for PCI devices",
    "EFI": r"efi: (EFI v|Remove mem)",
    "initrd": r"(RAMDISK|Allocated new RAMDISK|Move RAMDISK)",
    "ACPI": r"ACPI: Reserving ",
    "nodes": r"(No NUMA conf|NUMA turned off|Faking a node|NUMA: Node|ACPI: SRAT: Node|(    )?NODE_DATA\()",
    "zone ranges": r"(Zone ranges:|  (DMA|DMA32|Normal|Device) +(\[mem|empty)|Movable zone start|  Node \d+: 0x)",
    "early node ranges": r"(Early memory node ranges|  node +\d+: \[mem|Initmem setup node)",
    "unavailable ranges": r"On node \d+, zone \w+: \d+ pages in unavailable ranges",
    "nosave ranges": r"PM: hibernation: Registered nosave",
    "crash kernel": r"(crashkernel (low memory )?reserved|Reserving \d+MB of (low )?memory)",
    "per-CPU areas": r"percpu: Embedded",
    "hash tables": r"(Dentry cache|Inode-cache) hash table entries: .* linear\)",
    "swiotlb": r"software IO TLB: (area num|SWIOTLB)",
    "zonelists": r"(Fallback order for Node|Built \d+ zonelists)",
    "boot services": r"Freeing EFI boot services memory",
    "log buffer": r"(printk: )?log_buf_len: ",
    "memblock calls": r"memblock_(add|remove|phys_alloc_range|alloc_\w+): ",
    "memblock arrays": r"(memblock: \w+ is doubled|memblock_(reserve|phys_free): | (memory|reserved)[.\[ ])",
}  # fmt: skip
"""Lines that both kernels print, by what they are about; every line in the order of the log."""

_PREFIX = re.compile(r"^printk: ")
_OFFSET = re.compile(r"(\.constprop\.\d+)?(\.isra\.\d+)?\+0x[0-9a-f]+/0x[0-9a-f]+$")


def lines_of(log: Sequence[str], subject: str) -> list[str]:
    """The lines of the log about ``subject``, without offsets behind function names."""
    match = re.compile(SUBJECTS[subject]).match
    return [_OFFSET.sub("", _PREFIX.sub("", line)).rstrip() for line in log if match(line)]


Cause = Callable[[str, str, str], str | None]
"""``cause(subject, ours, captured)``: why these two differ, or None."""


def compare_lines(capture: Capture, ours: Sequence[str], cause: Cause) -> Iterator[Row]:
    """A row for each subject that either log speaks of."""
    for subject in SUBJECTS:
        mine, theirs = lines_of(ours, subject), lines_of(capture.log, subject)
        if not theirs and not mine:
            continue
        if not capture.complete and subject in ("e820", "EFI", "memblock calls", "memblock arrays"):
            mine = mine[len(mine) - len(theirs) :] if theirs else []
        yield Row(subject, max(len(mine), len(theirs)), tuple(_differences(subject, mine, theirs, cause)))


def _differences(subject: str, ours: Sequence[str], captured: Sequence[str], cause: Cause) -> Iterator[Difference]:
    for mine, theirs in zip_longest(ours, captured, fillvalue=""):
        if mine != theirs:
            yield Difference(mine, theirs, cause(subject, mine, theirs))
