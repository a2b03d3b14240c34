"""Why two maps of one machine may differ: the reasons that are known, each with the differences that it covers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guest.units import SZ_1M, SZ_4G, SZ_32M, SZ_64K

NOTHING = "-"
"""What stands for a range that a map does not mention."""


@dataclass(frozen=True, slots=True)
class Difference:
    """``[start, end)`` is ``a`` in one map and ``b`` in the other; ``low_end`` is where RAM below 4 GiB ends in both.

    The words are dmesg's for e820 types, besides ``unaccepted`` and ``MMIO``; where both maps agree in that, they are
    the kernel's names of EFI types. ``low_end`` is 0 if the maps do not agree on it.
    """

    start: int
    end: int
    a: str
    b: str
    low_end: int = 0

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def words(self) -> frozenset[str]:
        return frozenset((self.a, self.b))

    def inside(self, start: int, end: int) -> bool:
        return start <= self.start and self.end <= end


@dataclass(frozen=True, slots=True)
class Reason:
    """A reason: its short name, the sentence, and the test of a difference."""

    name: str
    text: str
    covers: Callable[[Difference], bool]


_FREE = frozenset({"Conventional", "Boot Code", "Boot Data"})
_LOADER = frozenset({"Loader Code", "Loader Data"})
_RUNTIME = frozenset({"Runtime Code", "Runtime Data", "Reserved"})
_POOLS = frozenset({"usable", "reserved", "ACPI data", "ACPI NVS"})
_MAX_POOL_SHIFT = 2 * SZ_64K
_MAX_STUB_TABLES = SZ_64K
_MMCONFIG = ((0xB000_0000, 0x1000_0000), (0xE000_0000, 0x1000_0000))

REASONS = (
    Reason(
        "unaccepted", "the kernel's to accept on one side; the other has accepted it, or is no TD",
        lambda d: d.words == {"unaccepted", "usable"},
    ),
    Reason(
        "boot-services", "boot services use free memory in pieces of a few KiB, which differ from build to build",
        lambda d: d.words <= _FREE,
    ),
    Reason(
        "image", "kernel image, command line, initrd and the stub's data lie where there was room",
        lambda d: bool(d.words & _LOADER) and d.words <= _FREE | _LOADER,
    ),
    Reason(
        "stub-tables", "tables that the stub allocates as ACPI data: its memory map, random seed, event log",
        lambda d: d.words == {"usable", "ACPI data"} and d.size <= _MAX_STUB_TABLES,
    ),
    Reason(
        "runtime-types", "reserved in both; which runtime service has it differs from build to build",
        lambda d: d.words <= _RUNTIME,
    ),
    Reason(
        "td-low-memory",
        "OVMF keeps page tables, work area and mailbox of a TD (0x800000, 0x80b000) as ACPI NVS, and of a VM that is "
        "no TD the lock box and temporary RAM for S3 (0x806000, 0x810000)",
        lambda d: d.words == {"usable", "ACPI NVS"} and d.inside(8 * SZ_1M, 9 * SZ_1M),
    ),
    Reason(
        "mmconfig", "PCIe configuration space: at 0xb0000000 in Debian's OVMF 2022.11, at 0xe0000000 in later builds",
        lambda d: d.words == {NOTHING, "reserved"} and (d.start, d.size) in _MMCONFIG,
    ),
    Reason(
        "grub-type-20", "GRUB hands on runtime code as e820 type 20; the kernel keeps away from what it does not know",
        lambda d: d.words == {"reserved", "type 20"},
    ),
    Reason(
        "flash", "flash is in the map if the image was given as pflash, not with -bios",
        lambda d: d.words in ({NOTHING, "reserved"}, {NOTHING, "MMIO"}) and d.inside(SZ_4G - 4 * SZ_1M, SZ_4G),
    ),
    Reason(
        "pools", "sizes of ACPI and runtime pools at the end of low RAM follow OVMF's version and the number of CPUs",
        lambda d: d.words <= _POOLS and d.size <= _MAX_POOL_SHIFT and d.inside(d.low_end - SZ_32M, d.low_end),
    ),
)  # fmt: skip


def reason_for(difference: Difference) -> Reason | None:
    """The first reason that covers the difference; None if it is unexplained."""
    return next((reason for reason in REASONS if reason.covers(difference)), None)
