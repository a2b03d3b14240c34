"""The stub up to 6.5: boot_params from the image, relocation, initrd, ExitBootServices(); then the decompressor.

Source: drivers/firmware/efi/libstub/x86-stub.c (6.3), efi_pe_entry() and efi_main(); relocate.c.
"""

from __future__ import annotations

from bootstub.boot_params import BOOT_PARAMS
from bootstub.efi_call import EfiError
from bootstub.kernel_layout import LOAD_PHYSICAL_ADDR, SECTOR, STARTUP_64_OFFSET
from bootstub.random_seed import install_random_seed
from bootstub.setup_header import BOOT_FLAG, EFI_STUB_LOADER, HEADER_MAGIC, SETUP_HEADER, SETUP_HEADER_OFFSET
from bootstub.stub import Stub
from firmware.efi_types import EfiMemoryAttribute, EfiMemoryType, EfiStatus
from guest.errors import FormatError
from guest.records import field_extents
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, round_up

_MAX_PHYSICAL = 1 << 46


def classic_stub(stub: Stub) -> None:
    """Run the stub. It leaves startup_64 of the decompressor in RIP, boot_params in RSI.

    RDX has the distance from the start of the image's memory to startup_32: the variable ``image_offset`` that stub
    and decompressor share.
    """
    params, regs = stub.params, stub.machine.regs
    _copy_setup_header(stub)
    stub.convert_command_line()
    startup_32, image_offset = _relocate(stub)
    params["hdr.code32_start"] = startup_32 & 0xFFFF_FFFF
    stub.efi.loglevel = stub.options.loglevel
    stub.load_initrd()
    params["secure_boot"] = stub.secure_boot()
    stub.enable_reset_attack_mitigation()
    install_random_seed(stub.efi)
    stub.find_measurement()
    stub.exit_boot()
    regs.rsi, regs.rip, regs.rdx = params.gpa, startup_32 + STARTUP_64_OFFSET, image_offset


def _copy_setup_header(stub: Stub) -> None:
    """The image's setup header, from ``jump`` to where that jumps, and what the stub fills in itself.

    Initrd and setup_data of the image's own header are dropped: they were meant for another boot loader.
    """
    params, base = stub.params, stub.image["ImageBase"]
    offset, _ = field_extents(BOOT_PARAMS)["hdr.jump"]
    jump_distance = stub.memory.read_uint(base + offset + 1, 1)
    size = min(SETUP_HEADER_OFFSET + SETUP_HEADER.sizeof() - offset, 2 + jump_distance)
    stub.memory.write(params.gpa + offset, stub.memory.read(base + offset, size))
    if params["hdr.header"] != HEADER_MAGIC:
        raise FormatError(
            "setup_header.header", at=base + 0x202, found=f"{params['hdr.header']:#x}",
            expected="HdrS", source="Documentation/arch/x86/boot.rst",
        )  # fmt: skip
    params["hdr.root_flags"] = 1
    params["hdr.vid_mode"] = 0xFFFF
    params["hdr.boot_flag"] = BOOT_FLAG
    params["hdr.type_of_loader"] = EFI_STUB_LOADER
    for name in ("ramdisk_image", "ramdisk_size", "setup_data"):
        params[f"hdr.{name}"] = 0


def _relocate(stub: Stub) -> tuple[int, int]:
    """Address of startup_32 and its distance from the memory that the kernel can be unpacked into.

    The image is moved, as the kernel does, if it lies below LOAD_PHYSICAL_ADDR or ends above 64 TiB. It is moved also
    if its memory is smaller than ``init_size``: newer kernels declare only the size of their file, since they are
    unpacked elsewhere.
    """
    params, memory = stub.params, stub.memory
    base, size = stub.image["ImageBase"], stub.image["ImageSize"]
    setup_size = (memory.read_uint(base + SETUP_HEADER_OFFSET, 1) + 1) * SECTOR
    if setup_size > size:
        raise FormatError(
            "setup_header.setup_sects", at=base + SETUP_HEADER_OFFSET, found=f"{setup_size} bytes of setup",
            expected=f"at most the image, {size} bytes", source="Documentation/arch/x86/boot.rst",
        )  # fmt: skip
    init_size = params["hdr.init_size"]
    if base >= LOAD_PHYSICAL_ADDR and base + size <= _MAX_PHYSICAL and size >= init_size:
        return base + setup_size, setup_size
    startup_32 = base + setup_size
    target = _efi_relocate_kernel(stub, init_size)
    memory.write(target, memory.read(startup_32, min(size - setup_size, init_size)))
    stub.machine.note(f"kernel image moved from {startup_32:#x} to {target:#x}, {init_size:#x} bytes")
    return target, 0


def _efi_relocate_kernel(stub: Stub, init_size: int) -> int:
    """Memory for the kernel: at its preferred address, else the lowest that is free above it."""
    efi, params = stub.efi, stub.params
    preferred, align = params["hdr.pref_address"], params["hdr.kernel_alignment"]
    if efi.allocate_pages_at(preferred, init_size):
        return preferred
    memmap = efi.get_memory_map(stub.protocol.efi_mmap_nr_slack_slots)
    descriptors = efi.descriptors(memmap)
    efi.free_pool(memmap.pool)
    for d in sorted(descriptors, key=lambda d: d.start):
        start = round_up(max(d.start, LOAD_PHYSICAL_ADDR), max(align, PAGE_SIZE))
        soft_reserved = stub.options.soft_reserve and d.attribute & EfiMemoryAttribute.EFI_MEMORY_SP
        if d.type != EfiMemoryType.EfiConventionalMemory or soft_reserved:
            continue
        if start + init_size > min(d.end, PHYSICAL_ADDRESS_END):
            continue
        if efi.allocate_pages_at(start, init_size):
            return start
    raise EfiError(EfiStatus.EFI_NOT_FOUND)
