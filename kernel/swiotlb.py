"""Bounce buffers of a confidential guest: memory below 4 GiB that will be shared with the host.

Sources: arch/x86/mm/mem_encrypt.c, mem_encrypt_setup_arch(); kernel/dma/swiotlb.c (6.3).
"""

from __future__ import annotations

from guest.units import PAGE_SIZE, PFN_DOWN, SZ_1G, SZ_1M, SZ_4G, SZ_64M, round_down
from kernel.kernel import Kernel
from tdx.guest import tdx_guest_detected

IO_TLB_DEFAULT_SIZE = SZ_64M
IO_TLB_SIZE = 2048


def mem_encrypt_setup_arch(kernel: Kernel) -> None:
    """Size the buffers: 6 % of memory, 64 MiB at least, 1 GiB at most.

    A guest that is no TD has the default, and that only if there is memory above 4 GiB.
    """
    if not tdx_guest_detected(kernel.machine):
        kernel.swiotlb_size = IO_TLB_DEFAULT_SIZE if kernel.max_pfn > PFN_DOWN(SZ_4G) else 0
        return
    wanted = kernel.memblock.phys_mem_size() * 6 // 100
    kernel.swiotlb_size = round_down(min(max(wanted, IO_TLB_DEFAULT_SIZE), SZ_1G), IO_TLB_SIZE)
    size = kernel.swiotlb_size // SZ_1M
    kernel.machine.print(f"software IO TLB: SWIOTLB bounce buffer size adjusted to {size}MB")


def swiotlb_init(kernel: Kernel) -> None:
    """Allocate the buffers, a power of two of them, from memory below 4 GiB. Without room there are none."""
    if kernel.swiotlb_size == 0:
        return
    size = 1 << (kernel.swiotlb_size - 1).bit_length()
    if size != kernel.swiotlb_size:
        kernel.machine.print(f"software IO TLB: SWIOTLB bounce buffer size roundup to {size // SZ_1M}MB")
    start = kernel.memblock.phys_alloc_range(size, PAGE_SIZE, 0, SZ_4G)
    if start == 0:
        kernel.machine.print(f"software IO TLB: Failed to allocate {size} bytes for tlb structure")
        return
    end = start + size
    kernel.machine.memory.clear(start, end)
    kernel.machine.print(f"software IO TLB: mapped [mem {start:#018x}-{end:#018x}] ({size // SZ_1M}MB)")
