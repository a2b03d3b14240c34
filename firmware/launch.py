"""Stage ``host``: what a VMM does with a TDVF image before the TD runs.

Source: QEMU hw/i386/tdvf.c, tdvf-hob.c and target/i386/kvm/tdx.c.
"""

from __future__ import annotations

from collections.abc import Iterable

from firmware.efi_types import EfiMemoryType
from firmware.hob import Resource, ResourceType, build_hob_list
from firmware.hob_lies import tell
from firmware.memory_descriptor import MemoryDescriptor
from firmware.tdvf import SectionType, Tdvf, TdvfSection
from guest.errors import FormatError
from guest.ranges import Range, RangeMap
from guest.registers import Registers
from guest.units import SZ_64K
from tdx.faults import Rule
from tdx.vmm import Host

UNACCEPTED = ResourceType.EFI_RESOURCE_MEMORY_UNACCEPTED
SYSTEM = ResourceType.EFI_RESOURCE_SYSTEM_MEMORY
_IN_RAM = (SectionType.TD_HOB, SectionType.TempMem, SectionType.Payload, SectionType.PayloadParam)
_HOB_LIST_ROOM = SZ_64K


def launch_td(
    host: Host, tdvf: Tdvf, private: Iterable[Range], regs: Registers, faults: Iterable[Rule] = ()
) -> list[Resource]:
    """Build the TD: add the sections' pages and the HOB list, and leave all other RAM to the host's policy.

    ``private`` are further ranges of RAM that are added, zeroed, as firmware of an earlier life would have left
    them (a memory map that was brought along). RCX and R8 get the address of the HOB list. Returns the resources as
    the list has them: of ``faults``, those about HOBs make it untrue.
    """
    private = tuple(private)
    (hob,) = tdvf.of_type(SectionType.TD_HOB)
    in_ram = [s for s in tdvf.sections if s.type in _IN_RAM]
    for section in in_ram:
        if not host.ram.covers(section.address, section.end):
            raise FormatError(
                f"TDVF section {section.type.name}", at=section.address, found="no RAM there",
                expected="RAM for the whole section", source="QEMU hw/i386/tdvf-hob.c",
            )  # fmt: skip
    resources = tell(_resources(host, in_ram, private), faults)
    regs.rcx = regs.r8 = hob.address
    for section in tdvf.sections:
        data = tdvf.data(section)
        if section is hob:
            data = build_hob_list(hob.address, resources)
            if len(data) > hob.memory_size:
                raise FormatError(
                    "TD HOB list", at=hob.address, found=f"{len(data)} bytes",
                    expected=f"at most {hob.memory_size}", source="QEMU hw/i386/tdvf-hob.c",
                )  # fmt: skip
        host.page_add(section.address, data, section.memory_size, section.type.name, section.is_measured)
    for start, end in private:
        for gap in host.sept.mapped(start, end).gaps(start, end):
            host.page_add(gap.start, b"", gap.size, "RAM")
    host.finalize()
    return resources


def launch_guest(host: Host, tdvf: Tdvf, regs: Registers) -> None:
    """Start a guest that is no TD: all its RAM is there, and the HOB list says so."""
    (hob,) = tdvf.of_type(SectionType.TD_HOB)
    if not host.ram.covers(hob.address, hob.end):
        raise FormatError(
            "the firmware's place for HOBs", at=hob.address, found="no RAM there",
            expected="RAM", source="QEMU hw/i386/tdvf-hob.c",
        )  # fmt: skip
    for part in host.ram:
        host.sept.page_add(part.start, part.end)
    host.physical.write(hob.address, build_hob_list(hob.address, [Resource(SYSTEM, *part) for part in host.ram]))
    regs.rcx = regs.r8 = hob.address


def _resources(host: Host, added: list[TdvfSection], private: Iterable[Range]) -> list[Resource]:
    """RAM by address: what the host adds is system memory, one entry each, the rest is unaccepted."""
    owners: RangeMap[object] = RangeMap(None)
    for part in host.ram:
        owners.assign(part.start, part.end, UNACCEPTED)
    for start, end in private:
        owners.assign(start, end, SYSTEM)
    for section in added:
        owners.assign(section.address, section.end, section)
    return [
        Resource(UNACCEPTED if owner is UNACCEPTED else SYSTEM, start, end)
        for start, end, owner in owners.runs()
        if owner is not None
    ]


def sections_for_map(descriptors: Iterable[MemoryDescriptor]) -> Tdvf:
    """A firmware without an image, for a memory map that was brought along: it needs a place for the HOB list."""
    for d in descriptors:
        if d.type == EfiMemoryType.EfiConventionalMemory and d.start and d.end - d.start >= _HOB_LIST_ROOM:
            return Tdvf(b"", (TdvfSection(0, 0, d.start, _HOB_LIST_ROOM, SectionType.TD_HOB, 0),))
    raise FormatError(
        "EFI memory map", at=0, found="no conventional memory of 64 KiB",
        expected="room for the HOB list", source="UEFI 2.10, 7.2",
    )  # fmt: skip
