"""Random places for the kernel: where the numbers come from, and how the stub of 6.12 chooses.

Sources: arch/x86/lib/kaslr.c, kaslr_get_random_long(); arch/x86/boot/compressed/kaslr.c, get_boot_seed();
drivers/firmware/efi/libstub/randomalloc.c, efi_random_alloc().
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

from bootstub.bzimage import parse_bzimage
from bootstub.slots import SlotArea
from firmware.efi_types import EfiMemoryAttribute, EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.machine import Machine
from guest.units import U64_MAX, round_down, round_up

MIX_CONSTANT = 0x5D60_08CB_F384_8DD3
_ROTATION = 7
_BUILD_STRING = re.compile(rb"[0-9][^\0 ]* \([^\0@()]+@[^\0()]+\) \([^\0]+\) #[^\0]*\0")
_FEATURES, _RDRAND, _TSC = 1, 1 << 30, 1 << 4


def boot_seed(build: bytes, boot_params: bytes) -> int:
    """The hash that randomness starts from: over the build string, with its NUL, and all of boot_params."""
    return _rotate_xor(_rotate_xor(0, build), boot_params)


def build_string(bzimage: bytes) -> bytes:
    """The text by which one build of a decompressor differs from another, with its NUL: release, by whom, with what.

    It is looked for around the payload; empty if there is none.
    """
    header = parse_bzimage(bzimage)
    payload = header.protected_mode_offset + header.payload_offset
    before = find_build_string(bzimage[header.protected_mode_offset : payload])
    return before or find_build_string(bzimage[payload + header.payload_length :])


def find_build_string(code: bytes) -> bytes:
    """The build string in ``code``, with its NUL; empty if there is none."""
    found = _BUILD_STRING.search(code)
    return found[0] if found else b""


def kaslr_get_random_long(machine: Machine, seed: int) -> int:
    """64 bits out of :func:`boot_seed` and what the processor has: RDRAND, and the TSC.

    The halves of a product of 128 bits are added, so that every bit comes to count.
    """
    _, _, ecx, edx = machine.platform.cpuid(_FEATURES)
    if ecx & _RDRAND:
        seed ^= machine.entropy.rdrand()
    if edx & _TSC:
        seed ^= machine.entropy.rdtsc()
    product = seed * MIX_CONSTANT
    return (product & U64_MAX) + (product >> 64) & U64_MAX


def conventional_slots(
    descriptors: Sequence[MemoryDescriptor], size: int, align: int, minimum: int, soft_reserve: bool
) -> tuple[SlotArea, ...]:
    """The aligned places for ``size`` bytes that efi_random_alloc() counts.

    Places lie in conventional memory from ``minimum`` on, in the order of the map; where some memory is more
    reliable, only that counts. Memory that can be unplugged does not, and with ``soft_reserve`` none for a special
    purpose.
    """
    slots = [(SlotArea(*_slots(d, size, align, minimum, soft_reserve)), d.attribute) for d in descriptors]
    slots = [(area, attribute) for area, attribute in slots if area.num]
    mirrored = [area for area, attribute in slots if attribute & EfiMemoryAttribute.EFI_MEMORY_MORE_RELIABLE]
    return tuple(mirrored or (area for area, _ in slots))


def _slots(d: MemoryDescriptor, size: int, align: int, minimum: int, soft_reserve: bool) -> tuple[int, int]:
    """The first place in a descriptor's range, and how many there are."""
    unfit = EfiMemoryAttribute.EFI_MEMORY_HOT_PLUGGABLE
    if soft_reserve:
        unfit |= EfiMemoryAttribute.EFI_MEMORY_SP
    first, last = round_up(max(d.start, minimum), align), round_down(d.end - size, align)
    if d.type != EfiMemoryType.EfiConventionalMemory or d.attribute & unfit or d.end <= size or first > last:
        return first, 0
    return first, (last - first) // align + 1


def _rotate_xor(value: int, data: bytes) -> int:
    """Fold the whole 64-bit words of ``data`` into ``value``."""
    for (word,) in struct.iter_unpack("<Q", data[: len(data) // 8 * 8]):
        value = ((value << 64 - _ROTATION | value >> _ROTATION) & U64_MAX) ^ word
    return value
