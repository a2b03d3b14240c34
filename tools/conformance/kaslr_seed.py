"""Letting KASLR choose what it once chose.

The kernel mixes the TSC with a hash of its build string and of all of boot_params, of which a record may not have
every byte. Its choice is then given to it: the TSC is set so that the wanted number comes out of the mixing.
Sources: arch/x86/lib/kaslr.c, kaslr_get_random_long(); arch/x86/boot/compressed/kaslr.c, get_boot_seed(),
process_efi_entries(), find_random_phys_addr(), find_random_virt_addr().
"""

from __future__ import annotations

from bootstub.kaslr import MIX_CONSTANT
from bootstub.kernel_layout import LOAD_PHYSICAL_ADDR
from firmware.efi_types import EfiMemoryAttribute, EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.units import DIV_ROUND_UP, U64_MAX, round_up

_FREE = (EfiMemoryType.EfiConventionalMemory, EfiMemoryType.EfiUnacceptedMemoryType)


def tsc_for(seed: int, wanted: int) -> int:
    """The TSC for which kaslr_get_random_long() returns ``wanted``, a number far below 2^64.

    The kernel adds the two halves of a product of 128 bits, which is a multiplication modulo 2^64 - 1, but for the
    carry that gets lost.
    """
    for carry in (1, 0):
        mixed = (wanted + carry) * pow(MIX_CONSTANT, -1, U64_MAX) % U64_MAX
        low, high = mixed * MIX_CONSTANT & U64_MAX, mixed * MIX_CONSTANT >> 64
        if low + high & U64_MAX == wanted:
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
