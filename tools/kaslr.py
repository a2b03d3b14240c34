"""Letting KASLR choose what it once chose.

The kernel mixes the TSC with a hash of its build string and of all of boot_params, of which a record may not have
every byte. Its choice is then given to it: the TSC is set so that the wanted number comes out of the mixing.
Sources: arch/x86/lib/kaslr.c, kaslr_get_random_long(); arch/x86/boot/compressed/kaslr.c, get_boot_seed(),
process_efi_entries(), find_random_phys_addr(), find_random_virt_addr().
"""

from __future__ import annotations

import struct

from bootstub.bzimage import parse_bzimage
from bootstub.efi_stub import LOAD_PHYSICAL_ADDR
from firmware.efi_types import EfiMemoryAttribute, EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.registers import MASK64
from guest.units import DIV_ROUND_UP, round_up

_MIX = 0x5D60_08CB_F384_8DD3
_ROTATION = 7
_FREE = (EfiMemoryType.EfiConventionalMemory, EfiMemoryType.EfiUnacceptedMemoryType)


def boot_seed(image: bytes, boot_params: bytes) -> int:
    """The hash that the decompressor of ``image`` starts from."""
    bzimage = parse_bzimage(image)
    release = (bzimage.kernel_version or "").partition(" ")[0].encode()
    start = image.index(release, bzimage.protected_mode_offset)
    build = image[start : image.index(b"\0", start) + 1]
    return _rotate_xor(_rotate_xor(0, build), boot_params)


def tsc_for(seed: int, wanted: int) -> int:
    """The TSC for which kaslr_get_random_long() returns ``wanted``, a number far below 2^64.

    The kernel adds the two halves of a product of 128 bits, which is a multiplication modulo 2^64 - 1, but for the
    carry that gets lost.
    """
    for carry in (1, 0):
        mixed = (wanted + carry) * pow(_MIX, -1, MASK64) % MASK64
        low, high = mixed * _MIX & MASK64, mixed * _MIX >> 64
        if low + high & MASK64 == wanted:
            return seed ^ mixed
    raise ValueError(f"no TSC for the random number {wanted:#x}")


def physical_slot(descriptors: list[MemoryDescriptor], size: int, align: int, output: int) -> int:
    """Number of the slot at ``output`` among the places for a kernel of ``size`` bytes, in the order of the map.

    Where the map has memory that is more reliable, only that counts. Memory for a special purpose never does.
    """
    mirrored = [d for d in descriptors if d.attribute & EfiMemoryAttribute.EFI_MEMORY_MORE_RELIABLE]
    below = 0
    for d in mirrored or descriptors:
        start, last = max(round_up(d.start, align), LOAD_PHYSICAL_ADDR), d.end - size
        if d.type in _FREE and not d.attribute & EfiMemoryAttribute.EFI_MEMORY_SP and start <= last:
            below += min((last - start) // align + 1, DIV_ROUND_UP(max(output - start, 0), align))
    return below


def virtual_slot(align: int, virtual: int) -> int:
    """Number of the slot at the virtual address ``virtual``, counted from where kernel text begins."""
    return (virtual - LOAD_PHYSICAL_ADDR) // align


def _rotate_xor(value: int, data: bytes) -> int:
    """Fold the whole 64-bit words of ``data`` into ``value``."""
    for (word,) in struct.iter_unpack("<Q", data[: len(data) // 8 * 8]):
        value = ((value << 64 - _ROTATION | value >> _ROTATION) & MASK64) ^ word
    return value
