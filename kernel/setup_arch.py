"""Stage ``setup-arch``: from boot_params to a memblock that knows all memory.

Source: arch/x86/kernel/setup.c, setup_arch(), in its order, up to where nodes are set up.
"""

from __future__ import annotations

from bootstub.setup_data import SetupData, walk_setup_data
from firmware.efi_types import EfiMemoryType
from guest.machine import Machine
from guest.ranges import Range, RangeSet
from guest.units import PAGE_SIZE, SZ_1M, SZ_64K, round_up
from kernel import e820_setup
from kernel.acpi_tables import find_rsdp, walk_tables
from kernel.build import DEFAULT_BUILD, KernelBuild
from kernel.efi import efi_find_mirror, efi_init, efi_memblock_x86_reserve_range, efi_reserve_boot_services
from kernel.init_mem_mapping import ISA_END_ADDRESS, init_mem_mapping
from kernel.kernel import Kernel
from kernel.log_buf import setup_log_buf
from kernel.swiotlb import mem_encrypt_setup_arch
from kernel.version import V6_3, KernelVersion

BIOS_START_MAX = 0x9F000
"""Where the BIOS region starts if the BIOS data area does not say (arch/x86/kernel/ebda.c)."""
BIOS_SEGMENT = 0xF0000
_DMI_ANCHORS = (b"_SM_", b"_SM3_", b"_DMI_")
REAL_MODE_SIZE = 7 * PAGE_SIZE
"""real_mode_blob of a 6.x kernel, seen in memblock=debug logs."""


def setup_arch(
    machine: Machine, version: KernelVersion = V6_3, image_size: int = 0, build: KernelBuild = DEFAULT_BUILD
) -> Kernel:
    """Enter the kernel and run setup_arch() up to ACPI's tables; RSI = boot_params.

    ``image_size`` is the kernel's size from ``_text`` to ``__bss_stop`` in bytes, if it is known.
    """
    kernel = Kernel.enter(machine, version, image_size, build)
    machine.print(f"Command line: {kernel.command_line}")
    setup_data = list(walk_setup_data(machine.memory.read, kernel.params["hdr.setup_data"]))
    _early_reserve_memory(kernel, setup_data)
    e820_setup.e820_memory_setup(kernel, setup_data)
    _parse_early_param(kernel)
    efi_memblock_x86_reserve_range(kernel)
    _reserve_loaded_image(kernel)
    kernel.memblock.bottom_up = kernel.early.movable_node
    e820_setup.e820_reserve_setup_data(kernel, setup_data)
    e820_setup.e820_finish_early_params(kernel)
    efi_init(kernel)
    e820_setup.e820_add_kernel_range(kernel)
    e820_setup.trim_bios_range(kernel)
    e820_setup.find_last_pfns(kernel)
    if kernel.dmi or _dmi_below_1m(kernel):
        kernel.extend_brk()  # what dmi_setup() remembers
    if kernel.brk.size:
        kernel.memblock.reserve(kernel.brk.start, kernel.brk.size, who="setup_arch")
    kernel.memblock.current_limit = ISA_END_ADDRESS
    e820_setup.e820_memblock_setup(kernel)
    if kernel.confidential:
        mem_encrypt_setup_arch(kernel)
    efi_find_mirror(kernel)
    kernel.boot_services = efi_reserve_boot_services(kernel)
    _reserve_real_mode(kernel)
    init_mem_mapping(kernel)
    setup_log_buf(kernel)
    _reserve_initrd(kernel)
    _acpi_boot_table_init(kernel)
    return kernel


def _parse_early_param(kernel: Kernel) -> None:
    """What early parameters do at once, and what the kernel says of them."""
    if kernel.early.memblock_debug:
        kernel.memblock.debug = kernel.machine.print
    e820_setup.apply_map_edits(kernel)
    for note in kernel.early.notes:
        kernel.machine.print(note)


def _early_reserve_memory(kernel: Kernel, setup_data: list[SetupData]) -> None:
    """What must not be handed out, before any memory is known."""
    reserve = kernel.memblock.reserve
    reserve(kernel.image.start, kernel.image.size)
    reserve(0, SZ_64K)
    if kernel.ramdisk.size:
        reserve(kernel.ramdisk.start, round_up(kernel.ramdisk.end, PAGE_SIZE) - kernel.ramdisk.start)
    for node in setup_data:
        reserve(node.gpa, node.end - node.gpa)
        for place in e820_setup.indirect_places(kernel, node):
            reserve(place.start, place.size)
    reserve(BIOS_START_MAX, SZ_1M - BIOS_START_MAX)


def _reserve_loaded_image(kernel: Kernel) -> None:
    """The stub of a newer kernel says no init_size. The image then is what it allocated to unpack the kernel into."""
    start = kernel.image.start
    if kernel.image.size:
        return
    for d in kernel.efi_memmap:
        if d.type == EfiMemoryType.EfiLoaderCode and d.start <= start < d.end:
            kernel.set_image(Range(start, d.end))
            kernel.memblock.reserve(start, kernel.image.size)


def _dmi_below_1m(kernel: Kernel) -> bool:
    """Whether a BIOS left an anchor of SMBIOS or DMI in its segment; EFI has a table for it."""
    if kernel.params["efi_info.efi_systab"] or kernel.confidential:
        return False
    data = kernel.machine.memory.read(BIOS_SEGMENT, SZ_1M - BIOS_SEGMENT)
    return any(data.startswith(_DMI_ANCHORS, at) for at in range(0, len(data), 16))


def _reserve_real_mode(kernel: Kernel) -> None:
    """Find room for the trampoline below 1 MiB, then keep all of it (reserve_real_mode())."""
    memblock = kernel.memblock
    found = memblock.phys_alloc_range(REAL_MODE_SIZE, PAGE_SIZE, 0, SZ_1M, who="reserve_real_mode")
    if not found:
        kernel.machine.print("No sub-1M memory is available for the trampoline")
    memblock.reserve(0, SZ_1M, who="setup_arch")


def _reserve_initrd(kernel: Kernel) -> None:
    """Announce the initrd, and move it into memory that the direct map has, if it lies elsewhere."""
    start, size = kernel.ramdisk.start, kernel.ramdisk.size
    if not size:
        return
    memblock, end = kernel.memblock, round_up(start + size, PAGE_SIZE)
    kernel.machine.print(f"RAMDISK: [mem {start:#010x}-{end - 1:#010x}]")
    if RangeSet(kernel.mapped).covers(start, end):
        return
    limit = max(mapped.end for mapped in kernel.mapped)
    found = memblock.phys_alloc_range(round_up(size, PAGE_SIZE), PAGE_SIZE, 0, limit, who="setup_arch")
    if not found:
        raise kernel.machine.panic(f"Cannot find place for new RAMDISK of size {size}")
    new, old = (f"[mem {at:#010x}-{at + size - 1:#010x}]" for at in (found, start))
    kernel.machine.print(f"Allocated new RAMDISK: {new}")
    kernel.machine.memory.write(found, kernel.machine.memory.read(start, size))
    kernel.machine.print(f"Move RAMDISK from {old} to {new}")
    memblock.phys_free(start, end - start, who="setup_arch")


def _acpi_boot_table_init(kernel: Kernel) -> None:
    """Find ACPI's tables and keep their memory."""
    kernel.acpi = list(walk_tables(kernel.machine, find_rsdp(kernel.machine, kernel.acpi_rsdp)))
    for table in kernel.acpi:
        where = f"[mem {table.gpa:#x}-{table.gpa + table.size - 1:#x}]"
        kernel.machine.print(f"ACPI: Reserving {table.signature} table memory at {where}")
        kernel.memblock.reserve(table.gpa, table.size, who="acpi_reserve_initial_tables")
