"""A memory map of a machine, wherever it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from bootstub.boot_params import BootE820Entry
from bootstub.efi_e820 import e820_entries, efi_descriptors
from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor, check_descriptors
from firmware.srat import NodeRange
from guest.errors import FormatError
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END

MAX_ENTRIES = 65536
"""More descriptors, entries or nodes than this are no machine's."""


@dataclass(frozen=True, slots=True)
class PlatformMap:
    """The map in EFI's form, in its own order; ``e820`` is the table as it was, if the source had only that.

    ``name`` and ``form`` are for people: where it comes from, and what kind of source that is.
    """

    descriptors: tuple[MemoryDescriptor, ...]
    e820: tuple[BootE820Entry, ...] | None = None
    nodes: tuple[NodeRange, ...] = ()
    name: str = field(default="", compare=False)
    form: str = field(default="", compare=False)

    @property
    def is_e820(self) -> bool:
        return self.e820 is not None

    def entries(self) -> tuple[BootE820Entry, ...]:
        """The e820 table: the source's own, or what the stub makes of the descriptors. Unsorted."""
        return self.e820 if self.e820 is not None else tuple(e820_entries(self.descriptors))


def efi_map(
    descriptors: Iterable[MemoryDescriptor], name: str, form: str, nodes: Iterable[NodeRange] = ()
) -> PlatformMap:
    """The map of a source that has EFI descriptors. One that no firmware has is a ``FormatError``."""
    found = tuple(descriptors)
    _check_count(len(found), name, "memory descriptor", form)
    check_descriptors(found, name)
    return PlatformMap(found, None, tuple(nodes), name, form)


def e820_map(entries: Iterable[BootE820Entry], name: str, form: str, nodes: Iterable[NodeRange] = ()) -> PlatformMap:
    """The map of a source that has e820 entries only. An entry that ends beyond 2^52 is a ``FormatError``."""
    found = tuple(entries)
    _check_count(len(found), name, "e820 entry", form)
    for number, entry in enumerate(found):
        if entry.addr + entry.size > PHYSICAL_ADDRESS_END:
            raise FormatError(
                f"{name}: entry {number}", at=entry.addr, found=f"an end at {entry.addr + entry.size:#x}",
                expected="an end up to 2^52", source=form,
            )  # fmt: skip
    return PlatformMap(tuple(efi_descriptors(found)), found, tuple(nodes), name, form)


def _check_count(count: int, name: str, what: str, form: str) -> None:
    if count == 0:
        raise FormatError(name, found=f"no {what}", expected="at least one", source=form)
    if count > MAX_ENTRIES:
        raise FormatError(name, found=count, expected=f"at most {MAX_ENTRIES} descriptors", source=form)


def mark_unaccepted(descriptors: Iterable[MemoryDescriptor], start: int) -> tuple[MemoryDescriptor, ...]:
    """The map with all conventional memory at and above ``start`` unaccepted; attributes stay.

    A range that reaches over ``start``, a multiple of 4 KiB, becomes two.
    """
    if start % PAGE_SIZE:
        raise ValueError(f"mark_unaccepted({start:#x}): expected whole pages")
    return tuple(piece for d in descriptors for piece in _marked(d, start))


def _marked(d: MemoryDescriptor, start: int) -> Iterator[MemoryDescriptor]:
    if d.type != EfiMemoryType.EfiConventionalMemory or d.end <= start:
        yield d
        return
    if d.start < start:
        yield MemoryDescriptor.of_range(d.type, d.start, start, d.attribute)
    unaccepted = EfiMemoryType.EfiUnacceptedMemoryType
    yield MemoryDescriptor.of_range(unaccepted, max(d.start, start), d.end, d.attribute)
