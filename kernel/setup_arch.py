"""Stage ``setup-arch``: from boot_params to a memblock that knows all memory.

Source: arch/x86/kernel/setup.c, setup_arch() (6.3), in its order; arch/x86/kernel/e820.c; v9 09/14.
"""

from __future__ import annotations

from bootstub.boot_params import e820_table_of, parse_e820_table
from bootstub.e820_types import (
    E820_TYPE_RAM,
    E820_TYPE_RESERVED,
    E820_TYPE_RESERVED_KERN,
    E820_TYPE_SOFT_RESERVED,
)
from bootstub.setup_data import SetupData, SetupDataType, walk_setup_data
from firmware.efi_types import EfiMemoryType
from guest.machine import Machine
from guest.ranges import Range
from guest.units import (
    BITS_PER_BYTE,
    DIV_ROUND_UP,
    PAGE_SHIFT,
    PAGE_SIZE,
    PFN_DOWN,
    PMD_SIZE,
    SZ_1G,
    SZ_1M,
    SZ_4G,
    SZ_64K,
    round_up,
)
from kernel.build import KernelBuild
from kernel.e820 import memory_setup
from kernel.efi import efi_init, efi_memblock_x86_reserve_range, efi_reserve_boot_services
from kernel.kernel import MAX_ARCH_PFN, Kernel
from kernel.swiotlb import mem_encrypt_setup_arch

BIOS_START_MAX = 0x9F000
"""Where the BIOS region starts if the BIOS data area does not say (arch/x86/kernel/ebda.c)."""
ISA_START_ADDRESS, ISA_END_ADDRESS = 0xA0000, SZ_1M
REAL_MODE_SIZE = 7 * PAGE_SIZE
"""real_mode_blob of a 6.x kernel, seen in memblock=debug logs."""


def setup_arch(machine: Machine, build: KernelBuild | None = None) -> Kernel:
    """Enter the kernel and run setup_arch() up to the direct map; RSI = boot_params."""
    kernel = Kernel.enter(machine, build)
    machine.print(f"Command line: {kernel.command_line}")
    setup_data = list(walk_setup_data(machine.memory.read, kernel.params["hdr.setup_data"]))
    _early_reserve_memory(kernel, setup_data)
    _e820_memory_setup(kernel, setup_data)
    for note in kernel.early.notes:
        machine.print(note)
    efi_memblock_x86_reserve_range(kernel)
    _reserve_loaded_image(kernel)
    _e820_reserve_setup_data(kernel, setup_data)
    efi_init(kernel)
    _e820_add_kernel_range(kernel)
    _trim_bios_range(kernel)
    _find_last_pfns(kernel)
    kernel.memblock.current_limit = ISA_END_ADDRESS
    _e820_memblock_setup(kernel)
    kernel.boot_services = efi_reserve_boot_services(kernel)
    mem_encrypt_setup_arch(kernel)
    _reserve_real_mode(kernel)
    _init_mem_mapping(kernel)
    if kernel.ramdisk.size:
        machine.print(f"RAMDISK: [mem {kernel.ramdisk.start:#010x}-{kernel.ramdisk.end - 1:#010x}]")
    return kernel


def _early_reserve_memory(kernel: Kernel, setup_data: list[SetupData]) -> None:
    """What must not be handed out, before any memory is known."""
    reserve = kernel.memblock.reserve
    reserve(kernel.image.start, kernel.image.size)
    reserve(0, SZ_64K)
    if kernel.ramdisk.size:
        reserve(kernel.ramdisk.start, round_up(kernel.ramdisk.end, PAGE_SIZE) - kernel.ramdisk.start)
    for node in setup_data:
        reserve(node.gpa, node.end - node.gpa)
    reserve(BIOS_START_MAX, SZ_1M - BIOS_START_MAX)


def _reserve_loaded_image(kernel: Kernel) -> None:
    """The stub of a newer kernel says no init_size. The image then is what it allocated to unpack the kernel into."""
    start = kernel.image.start
    if kernel.image.size:
        return
    for d in kernel.efi_memmap:
        if d.type == EfiMemoryType.EfiLoaderCode and d.start <= start < d.end:
            kernel.image = Range(start, d.end)
            kernel.memblock.reserve(start, kernel.image.size)


def _e820_memory_setup(kernel: Kernel, setup_data: list[SetupData]) -> None:
    """The firmware's table, and its extension in setup_data."""
    machine, params = kernel.machine, kernel.params
    entries = e820_table_of(params.data)
    who, kernel.e820 = memory_setup(entries, params["alt_mem_k"], params["screen_info.ext_mem_k"])
    machine.print("BIOS-provided physical RAM map:")
    for line in kernel.e820.print_lines(who):
        machine.print(line)
    for node in setup_data:
        if node.type != SetupDataType.SETUP_E820_EXT:
            continue
        kernel.e820.append_table(parse_e820_table(machine.memory.read(node.data_gpa, node.len)))
        kernel.e820.update_table()
        machine.print("extended physical RAM map:")
        for line in kernel.e820.print_lines("extended"):
            machine.print(line)


def _e820_reserve_setup_data(kernel: Kernel, setup_data: list[SetupData]) -> None:
    """Mark setup_data as RAM that the kernel keeps (e820__reserve_setup_data())."""
    if not setup_data:
        return
    for node in setup_data:
        kernel.machine.print(f"e820: update [mem {node.gpa:#010x}-{node.end - 1:#010x}] usable ==> usable")
        kernel.e820.range_update(node.gpa, node.end - node.gpa, E820_TYPE_RAM, E820_TYPE_RESERVED_KERN)
    kernel.e820.update_table()
    kernel.machine.print("extended physical RAM map:")
    for line in kernel.e820.print_lines("reserve setup_data"):
        kernel.machine.print(line)


def _e820_add_kernel_range(kernel: Kernel) -> None:
    """The kernel's image is RAM, whatever the table says."""
    start, end = kernel.image
    if kernel.e820.mapped_all(start, end, E820_TYPE_RAM):
        return
    kernel.machine.print(".text .data .bss are not marked as E820_TYPE_RAM!")
    kernel.e820.range_remove(start, end - start)
    kernel.e820.range_add(start, end - start, E820_TYPE_RAM)


def _trim_bios_range(kernel: Kernel) -> None:
    """Page 0 is reserved, and the ISA range is no RAM."""
    kernel.machine.print(f"e820: update [mem {0:#010x}-{PAGE_SIZE - 1:#010x}] usable ==> reserved")
    kernel.e820.range_update(0, PAGE_SIZE, E820_TYPE_RAM, E820_TYPE_RESERVED)
    kernel.machine.print(f"e820: remove [mem {ISA_START_ADDRESS:#010x}-{ISA_END_ADDRESS - 1:#010x}] usable")
    kernel.e820.range_remove(ISA_START_ADDRESS, ISA_END_ADDRESS - ISA_START_ADDRESS, E820_TYPE_RAM)
    kernel.e820.update_table()


def _find_last_pfns(kernel: Kernel) -> None:
    """max_pfn, and the end of RAM below 4 GiB."""
    kernel.max_pfn = kernel.e820.end_of_ram_pfn(MAX_ARCH_PFN)
    last_pfns = [kernel.max_pfn]
    if kernel.max_pfn > PFN_DOWN(SZ_4G):
        last_pfns.append(kernel.e820.end_of_low_ram_pfn())
    for last_pfn in last_pfns:
        kernel.machine.print(f"last_pfn = {last_pfn:#x} max_arch_pfn = {MAX_ARCH_PFN:#x}")


def _e820_memblock_setup(kernel: Kernel) -> None:
    """e820 becomes memblock, whose arrays may grow now; v9 reserves the bitmap first, since the table is final here.

    The reservation is sized by the end of RAM, not by what the stub allocated: the bit of the guard behind the
    last RAM may lie outside it.
    """
    memblock = kernel.memblock
    memblock.allow_resize()
    bitmap = kernel.params["unaccepted_memory"]
    if bitmap:
        memblock.reserve(bitmap, DIV_ROUND_UP(kernel.max_pfn << PAGE_SHIFT, PMD_SIZE * BITS_PER_BYTE))
    for entry in kernel.e820:
        if entry.type == E820_TYPE_SOFT_RESERVED:
            memblock.reserve(entry.addr, entry.size)
        if entry.type in (E820_TYPE_RAM, E820_TYPE_RESERVED_KERN):
            memblock.add(entry.addr, entry.size)
    memblock.trim_memory(PAGE_SIZE)


def _reserve_real_mode(kernel: Kernel) -> None:
    """Find room for the trampoline below 1 MiB, then keep all of it (reserve_real_mode())."""
    kernel.memblock_alloc(REAL_MODE_SIZE, PAGE_SIZE, 0, SZ_1M)
    kernel.memblock.reserve(0, SZ_1M)


def _init_mem_mapping(kernel: Kernel) -> None:
    """Direct map, from the top downwards: a probe of 2 MiB at the top of RAM, then the page tables.

    The probe is given back at once, and yet its memory was accepted. One page of page table is counted for each
    GiB of RAM above 4 GiB; the tables of low memory lie in the kernel's image.
    Source: arch/x86/mm/init.c, memory_map_top_down(), alloc_low_pages().
    """
    memblock, end = kernel.memblock, kernel.max_pfn << PAGE_SHIFT
    probe = memblock.phys_alloc_range(PMD_SIZE, PMD_SIZE, ISA_END_ADDRESS, end)
    if probe:
        memblock.phys_free(probe, PMD_SIZE)
    memblock.current_limit = end
    gibs = {
        gib
        for region in memblock.memory.regions
        for gib in range(max(region.base, SZ_4G) // SZ_1G, DIV_ROUND_UP(region.end, SZ_1G))
    }
    if gibs:
        kernel.memblock_alloc(len(gibs) * PAGE_SIZE, PAGE_SIZE, 0, end)
