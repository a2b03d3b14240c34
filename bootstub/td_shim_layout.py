"""Where td-shim keeps things when it starts a Linux kernel, and the sections by which the host brings the kernel.

Source: td-shim td-layout/src/runtime/linux.rs and td-shim/src/bin/td-shim/memory.rs. The image of td-shim itself, and
stack and heap at its place below 4 GiB, are left out: none of it is RAM that a kernel gets.
"""

from __future__ import annotations

from dataclasses import dataclass

from bootstub.e820_types import E820_TYPE_ACPI, E820_TYPE_NVS, E820_TYPE_RESERVED
from firmware.tdvf import SectionType, Tdvf, TdvfSection
from guest.errors import FormatError
from guest.ranges import Range
from guest.units import SZ_1M, SZ_128K, SZ_128M

TD_HOB = Range(0x80_0000, 0x82_0000)
UNACCEPTED_MEMORY_BITMAP = Range(0x82_0000, 0x86_0000)
"""256 KiB: up to 4 TiB of memory."""
PAYLOAD_PARAMETER = Range(0x86_0000, 0x86_1000)
PAYLOAD = Range(0x86_1000, 0x86_1000 + SZ_128M)

_AT_THE_TOP = (
    ("event_log", SZ_1M, E820_TYPE_NVS),
    ("mailbox", 0x2000, E820_TYPE_NVS),
    ("page_table", SZ_128K, E820_TYPE_RESERVED),
    ("acpi", SZ_1M, E820_TYPE_ACPI),
)
"""From the top of the accepted memory below 4 GiB downwards: name, bytes and e820 type."""


@dataclass(frozen=True, slots=True)
class TopRegions:
    """The regions at the top of the memory below 4 GiB."""

    event_log: Range
    mailbox: Range
    page_table: Range
    acpi: Range

    @property
    def e820_types(self) -> tuple[tuple[Range, int], ...]:
        """The e820 type of each region."""
        return tuple((getattr(self, name), kind) for name, _, kind in _AT_THE_TOP)


def top_regions(top: int) -> TopRegions | None:
    """The regions below ``top``; None if they would reach into the payload."""
    regions, end = {}, top
    for name, size, _ in _AT_THE_TOP:
        regions[name] = Range(end - size, end)
        end -= size
    return TopRegions(**regions) if end >= PAYLOAD.end else None


def td_shim_sections(kernel: bytes, cmdline: str) -> Tdvf:
    """What a host adds for td-shim: room for the HOB list, the command line, and the kernel's file as the payload."""
    line = cmdline.encode() + b"\0"
    for what, data, room in (("command line", line, PAYLOAD_PARAMETER), ("kernel", kernel, PAYLOAD)):
        if len(data) > room.size:
            raise FormatError(
                what, found=f"{len(data)} bytes", expected=f"at most {room.size}",
                source="td-shim td-layout/src/runtime/linux.rs",
            )  # fmt: skip
    return Tdvf(
        kernel + line,
        (
            TdvfSection(0, 0, TD_HOB.start, TD_HOB.size, SectionType.TD_HOB, 0),
            TdvfSection(len(kernel), len(line), *_place(PAYLOAD_PARAMETER), SectionType.PayloadParam, 0),
            TdvfSection(0, len(kernel), *_place(PAYLOAD), SectionType.Payload, 0),
        ),
    )


def _place(region: Range) -> tuple[int, int]:
    return region.start, region.size
