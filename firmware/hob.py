"""The TD HOB list: how the host tells the firmware which memory there is.

Sources: PI 1.8 volume 3, HOB definitions; QEMU hw/i386/tdvf-hob.c for what a host writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import construct as c

from guest.errors import FormatError
from guest.memory import GuestMemory
from guest.records import parse
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END

_SOURCE = "PI 1.8, volume 3, section 5"
_MAX_HOBS = 4096

EFI_HOB_TYPE_HANDOFF = 1
EFI_HOB_TYPE_RESOURCE_DESCRIPTOR = 3
EFI_HOB_TYPE_END_OF_HOB_LIST = 0xFFFF
EFI_HOB_HANDOFF_TABLE_VERSION = 9
RESOURCE_ATTRIBUTES = 7
"""PRESENT | INITIALIZED | TESTED, which QEMU writes for every kind of memory."""

_HEADER = c.Struct("HobType" / c.Int16ul, "HobLength" / c.Int16ul, "Reserved" / c.Int32ul)
_HANDOFF = c.Struct(
    "Header" / _HEADER,
    "Version" / c.Int32ul,
    "BootMode" / c.Int32ul,
    "EfiMemoryTop" / c.Int64ul,
    "EfiMemoryBottom" / c.Int64ul,
    "EfiFreeMemoryTop" / c.Int64ul,
    "EfiFreeMemoryBottom" / c.Int64ul,
    "EfiEndOfHobList" / c.Int64ul,
)
_RESOURCE = c.Struct(
    "Header" / _HEADER,
    "Owner" / c.Bytes(16),
    "ResourceType" / c.Int32ul,
    "ResourceAttribute" / c.Int32ul,
    "PhysicalStart" / c.Int64ul,
    "ResourceLength" / c.Int64ul,
)


class ResourceType(IntEnum):
    """EFI_RESOURCE_TYPE of a resource descriptor."""

    EFI_RESOURCE_SYSTEM_MEMORY = 0
    EFI_RESOURCE_MEMORY_MAPPED_IO = 1
    EFI_RESOURCE_MEMORY_RESERVED = 5
    EFI_RESOURCE_MEMORY_UNACCEPTED = 7


@dataclass(frozen=True, slots=True)
class Resource:
    """``[start, end)`` of one resource descriptor HOB; ``type`` is a ``ResourceType`` or unknown to us."""

    type: int
    start: int
    end: int
    attributes: int = RESOURCE_ATTRIBUTES


@dataclass(frozen=True, slots=True)
class Hob:
    """One HOB of a list: its address, type and length. Its bytes are read when somebody asks."""

    at: int
    type: int
    length: int
    read: Callable[[int, int], bytes]

    @property
    def data(self) -> bytes:
        """All bytes of the HOB, header included."""
        return self.read(self.at, self.length)


def build_hob_list(gpa: int, resources: Iterable[Resource]) -> bytes:
    """The HOB list that a host puts at ``gpa``: handoff, one descriptor for each resource, end."""
    body = b"".join(
        _RESOURCE.build(
            {
                "Header": _header(EFI_HOB_TYPE_RESOURCE_DESCRIPTOR, _RESOURCE.sizeof()),
                "Owner": bytes(16),
                "ResourceType": resource.type,
                "ResourceAttribute": resource.attributes,
                "PhysicalStart": resource.start,
                "ResourceLength": resource.end - resource.start,
            }
        )
        for resource in resources
    )
    end = _HEADER.build(_header(EFI_HOB_TYPE_END_OF_HOB_LIST, _HEADER.sizeof()))
    handoff = _HANDOFF.build(
        {
            "Header": _header(EFI_HOB_TYPE_HANDOFF, _HANDOFF.sizeof()),
            "Version": EFI_HOB_HANDOFF_TABLE_VERSION,
            "BootMode": 0,
            "EfiMemoryTop": 0,
            "EfiMemoryBottom": 0,
            "EfiFreeMemoryTop": 0,
            "EfiFreeMemoryBottom": 0,
            "EfiEndOfHobList": gpa + _HANDOFF.sizeof() + len(body) + len(end),
        }
    )
    return handoff + body + end


def read_hob_list(memory: GuestMemory, gpa: int) -> list[Resource]:
    """The resource descriptors of the HOB list at ``gpa``, checked: the list comes from an untrusted host."""
    hobs = walk_hobs(memory.read, gpa)
    return [resource_of(hob) for hob in hobs if hob.type == EFI_HOB_TYPE_RESOURCE_DESCRIPTOR]


def walk_hobs(read: Callable[[int, int], bytes], gpa: int) -> Iterator[Hob]:
    """Every HOB of the list at ``gpa``, from the handoff to the end; ``read`` gives bytes. Raises ``FormatError``."""
    at = gpa
    for _ in range(_MAX_HOBS):
        header = parse(_HEADER, "HOB", read(at, _HEADER.sizeof()), at=at, source=_SOURCE)
        kind, length = header.HobType, header.HobLength
        if length < _HEADER.sizeof() or length % 8:
            raise FormatError("HOB length", at=at + 2, found=length, expected="8 or more, by 8", source=_SOURCE)
        if at == gpa and kind != EFI_HOB_TYPE_HANDOFF:
            raise FormatError("first HOB", at=at, found=kind, expected="handoff (1)", source=_SOURCE)
        yield Hob(at, kind, length, read)
        if kind == EFI_HOB_TYPE_END_OF_HOB_LIST:
            return
        at += length
    raise FormatError("HOB list", at=gpa, found=f"no end in {_MAX_HOBS} HOBs", expected="an end HOB", source=_SOURCE)


def handoff_of(hob: Hob) -> tuple[int, int, int]:
    """Version, boot mode and end of the list, as the handoff HOB has them. Raises ``FormatError``."""
    raw = parse(_HANDOFF, "handoff HOB", hob.data, at=hob.at, source=_SOURCE)
    return raw.Version, raw.BootMode, raw.EfiEndOfHobList


def resource_of(hob: Hob) -> Resource:
    """The memory of a resource descriptor HOB. Raises ``FormatError``."""
    return _resource(hob.data, hob.at)


def _resource(data: bytes, at: int) -> Resource:
    raw = parse(_RESOURCE, "resource HOB", data, at=at, source=_SOURCE)
    start, end = raw.PhysicalStart, raw.PhysicalStart + raw.ResourceLength
    if start % PAGE_SIZE or end % PAGE_SIZE or end > PHYSICAL_ADDRESS_END:
        found = f"[{start:#x}, {end:#x})"
        raise FormatError("resource HOB", at=at, found=found, expected="whole pages below 2^52", source=_SOURCE)
    return Resource(raw.ResourceType, start, end, raw.ResourceAttribute)


def _header(kind: int, length: int) -> dict[str, int]:
    return {"HobType": kind, "HobLength": length, "Reserved": 0}
