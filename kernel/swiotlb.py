"""Bounce buffers for devices that cannot reach all memory; in a confidential guest, memory shared with the host.

Sources: arch/x86/mm/mem_encrypt.c, mem_encrypt_setup_arch(); arch/x86/kernel/pci-dma.c; kernel/dma/swiotlb.c (6.3).
"""

from __future__ import annotations

from guest.units import PAGE_SIZE, PFN_DOWN, SZ_1G, SZ_1M, SZ_4G, SZ_64M, round_down, round_up
from kernel.kernel import Kernel
from kernel.memblock import SMP_CACHE_BYTES

IO_TLB_DEFAULT_SIZE = SZ_64M
IO_TLB_SIZE = 2048
IO_TLB_SEGSIZE, IO_TLB_MIN_SLABS = 128, SZ_1M // IO_TLB_SIZE
_SLOT_SIZE, _AREA_SIZE = 24, 16
"""struct io_tlb_slot and io_tlb_area."""


def mem_encrypt_setup_arch(kernel: Kernel) -> None:
    """Size the buffers: 6 % of memory, 64 MiB at least, 1 GiB at most."""
    wanted = kernel.memblock.phys_mem_size() * 6 // 100
    kernel.swiotlb_size = round_down(min(max(wanted, IO_TLB_DEFAULT_SIZE), SZ_1G), IO_TLB_SIZE)
    size = kernel.swiotlb_size // SZ_1M
    kernel.machine.print(f"software IO TLB: SWIOTLB bounce buffer size adjusted to {size}MB")


def swiotlb_init(kernel: Kernel, cpus: int = 1) -> None:
    """Allocate the buffers, a power of two of them, from memory below 4 GiB. Without room there are fewer, or none.

    A guest that is not confidential and can have no memory above 4 GiB needs none. ``cpus`` share the slots' areas.
    """
    if not kernel.confidential and kernel.max_possible_pfn <= PFN_DOWN(SZ_4G):
        return
    who, wanted = "swiotlb_init_remap", kernel.swiotlb_size or IO_TLB_DEFAULT_SIZE
    size = 1 << (wanted - 1).bit_length()
    areas = 1 << (cpus - 1).bit_length()
    kernel.machine.print(f"software IO TLB: area num {areas}.")
    if size != wanted:
        kernel.machine.print(f"software IO TLB: SWIOTLB bounce buffer size roundup to {size // SZ_1M}MB")
    start = _alloc(kernel, size, who)
    while not start and size // IO_TLB_SIZE > IO_TLB_MIN_SLABS:
        size = round_up(size // 2, IO_TLB_SEGSIZE * IO_TLB_SIZE)
        start = _alloc(kernel, size, who)
    if not start:
        return
    slots = size // IO_TLB_SIZE
    kernel.memblock_alloc(round_up(slots * _SLOT_SIZE, PAGE_SIZE), PAGE_SIZE, who)
    kernel.memblock_alloc(areas * _AREA_SIZE, SMP_CACHE_BYTES, who)
    kernel.machine.print(f"software IO TLB: mapped [mem {start:#018x}-{start + size:#018x}] ({size // SZ_1M}MB)")


def _alloc(kernel: Kernel, size: int, who: str) -> int:
    start = kernel.memblock.alloc_try_nid(size, PAGE_SIZE, 0, SZ_4G - 1, who=who)
    if not start:
        kernel.machine.print(f"software IO TLB: Failed to allocate {size} bytes for tlb structure")
    return start
