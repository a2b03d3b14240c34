"""Relocations of the kernel: what the decompressor changes when KASLR gives it another virtual address.

Behind the ELF file lie three lists of 32-bit words: places with 64-bit addresses, places with 32-bit distances to
per-CPU data, which shrink as the kernel moves up, and places with 32-bit addresses. A zero stands before each list,
so that the decompressor can read them backwards. A kernel may come without the second list. Each word is the lower
half of the place's virtual address.
Sources: arch/x86/boot/compressed/misc.c, handle_relocations(); arch/x86/tools/relocs.c, emit_relocs().
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from bootstub.kernel_layout import LOAD_PHYSICAL_ADDR, START_KERNEL_MAP
from bootstub.vmlinux import Vmlinux, place_segments
from guest.errors import FormatError
from guest.memory import GuestMemory
from guest.units import SZ_1M, U32_MAX, U64_MAX

_SOURCE = "arch/x86/boot/compressed/misc.c, handle_relocations()"
_WORD = 4
_TABLE_LIMIT = 16 * SZ_1M
"""More than sixteen times the table of a distribution's kernel. Bounds the work that a hostile payload can ask for."""


@dataclass(frozen=True, slots=True)
class Relocations:
    """Physical addresses, for a kernel that is not moved, of what holds an address.

    ``words64`` and ``words32`` grow by the distance that the kernel moves, ``inverse32`` shrink by it.
    """

    words64: Sequence[int]
    inverse32: Sequence[int]
    words32: Sequence[int]


def read_relocations(vmlinux: bytes, kernel: Vmlinux) -> Relocations:
    """The lists behind the ELF file ``kernel`` in ``vmlinux``, the decompressed payload.

    ``at`` of a ``FormatError`` is an offset in ``vmlinux``.
    """
    start, size = kernel.elf_end, len(vmlinux) - kernel.elf_end
    if size % _WORD or not 0 < size <= _TABLE_LIMIT:
        raise _error("table", start, f"{size} bytes", f"whole words, up to {_TABLE_LIMIT} bytes")
    words = struct.unpack_from(f"<{size // _WORD}I", vmlinux, start)
    zeros = [number for number, word in enumerate(words) if word == 0]
    if words[0] or len(zeros) not in (2, 3):
        found = f"{words[0]:#x}, and {len(zeros)} zeros in all"
        raise _error("table", start, found, "a zero before each of two or three lists")
    ends = [*zeros[1:], len(words)]
    lists = [_places(words[zero + 1 : end], start + _WORD * (zero + 1)) for zero, end in zip(zeros, ends, strict=True)]
    return Relocations(lists[0], lists[1] if len(lists) == 3 else (), lists[-1])


def relocate(image: bytearray, base: int, relocations: Relocations, delta: int) -> None:
    """Change ``image`` into that of a kernel ``delta`` bytes further up in virtual memory.

    ``image`` holds the kernel's segments, where they lie in memory; its first byte has the physical address ``base``
    if the kernel is not moved. ``FormatError`` if a place is not all inside; then nothing is changed.
    """
    changes = (
        ("32-bit relocation", relocations.words32, struct.Struct("<I"), delta, U32_MAX),
        ("inverse 32-bit relocation", relocations.inverse32, struct.Struct("<I"), -delta, U32_MAX),
        ("64-bit relocation", relocations.words64, struct.Struct("<Q"), delta, U64_MAX),
    )
    for what, places, form, _, _ in changes:
        _check_places(what, places, base, base + len(image) - form.size)
    for _, places, form, distance, mask in changes:
        unpack, pack = form.unpack_from, form.pack_into
        for place in places:
            at = place - base
            pack(image, at, unpack(image, at)[0] + distance & mask)


def load_kernel(memory: GuestMemory, vmlinux: bytes, kernel: Vmlinux, output: int, virtual: int) -> None:
    """Put the file ``vmlinux`` to ``output``, its segments into place, and relocate them if the kernel moves.

    ``virtual`` is where the kernel will be mapped, counted from the start of its mapping.
    """
    memory.write(output, vmlinux)
    place_segments(memory, kernel, output)
    if virtual == LOAD_PHYSICAL_ADDR:
        return
    end = max(segment.p_paddr + segment.p_filesz for segment in kernel.segments)  # bss follows
    image = bytearray(memory.read(output, end - LOAD_PHYSICAL_ADDR))
    relocate(image, LOAD_PHYSICAL_ADDR, read_relocations(vmlinux, kernel), virtual - LOAD_PHYSICAL_ADDR)
    memory.write(output, bytes(image))


def _places(words: Sequence[int], at: int) -> Sequence[int]:
    """Physical addresses for the lower halves of virtual ones, all of which lie in the kernel's mapping."""
    low = START_KERNEL_MAP & U32_MAX
    if words and min(words) < low:
        number = next(number for number, word in enumerate(words) if word < low)
        found, expected = f"{words[number]:#x}", f"an address from {START_KERNEL_MAP:#x} on"
        raise _error("entry", at + _WORD * number, found, expected)
    return [word - low for word in words]


def _check_places(what: str, places: Sequence[int], first: int, last: int) -> None:
    for place in (min(places), max(places)) if places else ():
        if not first <= place <= last:
            raise FormatError(
                f"{what} outside of kernel!", at=place, found=f"{place:#x}",
                expected=f"an address from {first:#x} to {last:#x}", source=_SOURCE,
            )  # fmt: skip


def _error(what: str, at: int, found: str, expected: str) -> FormatError:
    return FormatError(f"relocation {what}", at=at, found=found, expected=expected, source=_SOURCE)
