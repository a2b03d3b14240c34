"""What ``unaccepted dump hob`` shows: a HOB list, from a file or as the host writes it for a TD of some size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from uuid import UUID

from firmware.hob import (
    EFI_HOB_TYPE_END_OF_HOB_LIST,
    EFI_HOB_TYPE_HANDOFF,
    EFI_HOB_TYPE_RESOURCE_DESCRIPTOR,
    Hob,
    ResourceType,
    handoff_of,
    resource_of,
    walk_hobs,
)
from guest.units import size_text
from tools.files import read_file
from tools.maps.td import PREFIX, td_boot

_EFI_HOB_TYPE_GUID_EXTENSION = 4
_NAMES = {
    EFI_HOB_TYPE_HANDOFF: "HANDOFF",
    2: "MEMORY_ALLOCATION",
    EFI_HOB_TYPE_RESOURCE_DESCRIPTOR: "RESOURCE_DESCRIPTOR",
    _EFI_HOB_TYPE_GUID_EXTENSION: "GUID_EXTENSION",
    5: "FV",
    6: "CPU",
    7: "MEMORY_POOL",
    9: "FV2",
    0xB: "UEFI_CAPSULE",
    0xC: "FV3",
    0xFFFE: "UNUSED",
    EFI_HOB_TYPE_END_OF_HOB_LIST: "END_OF_HOB_LIST",
}
"""Types without ``EFI_HOB_TYPE_`` (PI 1.8, volume 3, 5)."""
_GUIDS = {
    UUID("6a0c5870-d4ed-44f4-a135-dd238b6f0c8d"): "ACPI table",
    UUID("8f8072ea-3486-4b47-86a7-2353b88a8773"): "E820 map",
    UUID("b96fa412-461f-4be3-8c0d-ad805a497ac0"): "payload info",
}
"""Extensions of the td-shim specification, part II."""


@dataclass(frozen=True, slots=True)
class HobList:
    """A list: its address, its bytes up to the end HOB, and the HOBs. A file's list has its offsets for addresses."""

    gpa: int
    data: bytes
    hobs: tuple[Hob, ...]


def read(source: str) -> HobList:
    """The list of a file, or of ``td:MEMORY[,MACHINE]``. Raises ``FormatError`` and ``OSError``."""
    if source.startswith(PREFIX):
        boot = td_boot(source)
        boot.run("host")
        return hob_list(boot.physical.read, boot.machine.regs.rcx)
    data = read_file(source)
    return hob_list(lambda at, size: data[at : at + size], 0)


def hob_list(read: Callable[[int, int], bytes], gpa: int) -> HobList:
    """The list at ``gpa``, by ``read(address, size)``; its ``data`` goes from there to the end HOB."""
    hobs = tuple(walk_hobs(read, gpa))
    return HobList(gpa, read(gpa, hobs[-1].at + hobs[-1].length - gpa), hobs)


def text(found: HobList) -> Iterator[str]:
    """A line for each HOB."""
    for hob in found.hobs:
        yield f"{hob.at:#x} {_NAMES.get(hob.type, f'type {hob.type:#x}')}, {hob.length} bytes{_details(hob)}"


def to_json(found: HobList) -> dict[str, object]:
    """The list for programs; addresses are text, since JSON readers lose low bits."""
    return {"address": f"{found.gpa:#x}", "size": len(found.data), "hobs": [_json(hob) for hob in found.hobs]}


def _details(hob: Hob) -> str:
    """What a HOB of a known type says."""
    if hob.type == EFI_HOB_TYPE_HANDOFF:
        version, mode, end = handoff_of(hob)
        return f": version {version}, boot mode {mode}, list ends at {end:#x}"
    if hob.type == EFI_HOB_TYPE_RESOURCE_DESCRIPTOR:
        found = resource_of(hob)
        span = f"[{found.start:#x}, {found.end:#x})"
        return f": {span} {_kind(found.type)}, attributes {found.attributes:#x}, {size_text(found.end - found.start)}"
    if hob.type == _EFI_HOB_TYPE_GUID_EXTENSION:
        guid = _guid(hob)
        return f": {guid} {_GUIDS.get(guid, '')}".rstrip() if guid else ""
    return ""


def _json(hob: Hob) -> dict[str, object]:
    out: dict[str, object] = {"at": f"{hob.at:#x}", "type": hob.type, "length": hob.length}
    if hob.type == EFI_HOB_TYPE_HANDOFF:
        version, mode, end = handoff_of(hob)
        out |= {"version": version, "boot_mode": mode, "end_of_hob_list": f"{end:#x}"}
    elif hob.type == EFI_HOB_TYPE_RESOURCE_DESCRIPTOR:
        found = resource_of(hob)
        out |= {"resource": found.type, "name": _kind(found.type), "attributes": found.attributes}
        out |= {"start": f"{found.start:#x}", "end": f"{found.end:#x}"}
    elif hob.type == _EFI_HOB_TYPE_GUID_EXTENSION and (guid := _guid(hob)):
        out["guid"] = str(guid)
    return out


def _kind(type: int) -> str:
    known = type in set(ResourceType)
    return ResourceType(type).name.removeprefix("EFI_RESOURCE_") if known else f"resource type {type:#x}"


def _guid(hob: Hob) -> UUID | None:
    data = hob.data[8:24]
    return UUID(bytes_le=data) if len(data) == 16 else None
