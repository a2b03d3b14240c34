"""The stub since 6.6: it unpacks the kernel itself, while boot services run, and jumps to the kernel's entry point.

The kernel goes into memory that the firmware handed out, which is never unaccepted.
Source: drivers/firmware/efi/libstub/x86-stub.c (6.12), efi_pe_entry(), efi_stub_entry() and efi_decompress_kernel().
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from bootstub.bzimage import parse_bzimage
from bootstub.efi_call import EfiError
from bootstub.events import KernelPlaced
from bootstub.kaslr import boot_seed, kaslr_get_random_long, random_slot
from bootstub.kernel_layout import CONFIG_PHYSICAL_ALIGN, KERNEL_IMAGE_SIZE, LOAD_PHYSICAL_ADDR, MIN_KERNEL_ALIGN
from bootstub.payload import decompress
from bootstub.random_seed import install_random_seed, random_bytes
from bootstub.relocations import load_kernel
from bootstub.setup_header import EFI_STUB_LOADER, LoadFlags
from bootstub.stub import Stub
from bootstub.vmlinux import Vmlinux, kernel_total_size, load_segments
from firmware import efi_types
from firmware.efi_types import EfiMemoryType, EfiStatus
from guest.units import round_down, round_up

T = TypeVar("T")

_INITRD_ADDR_MAX = 0x7FFF_FFFF
_SEED_SIZE = 8
_MASK32 = 0xFFFF_FFFF


def mainline_stub(stub: Stub) -> None:
    """Run the stub. It leaves the kernel's entry point in RIP and boot_params in RSI; or the image exits."""
    try:
        entry = _run(stub)
    except EfiError as error:
        stub.efi.print_error("efi_stub_entry() failed!")
        stub.efi.boot("Exit", stub.handle, error.status, 0, 0)
        raise
    stub.machine.regs.rsi, stub.machine.regs.rip = stub.params.gpa, entry


def _run(stub: Stub) -> int:
    """efi_pe_entry() and efi_stub_entry(); returns the kernel's entry point."""
    efi, params = stub.efi, stub.params
    params["hdr.root_flags"] = 1
    params["hdr.vid_mode"] = 0xFFFF
    params["hdr.type_of_loader"] = EFI_STUB_LOADER
    params["hdr.initrd_addr_max"] = _INITRD_ADDR_MAX
    if stub.image["LoadOptionsSize"]:
        _find_measurement(stub)
    length = stub.convert_command_line()
    efi.locate_protocol(efi_types.EFI_MEMORY_ATTRIBUTE_PROTOCOL_GUID)
    efi.free_pool(efi.allocate_pool(length + 1))  # the copy that the options are read from
    entry = _reported(stub, "Failed to decompress kernel", lambda: _unpack_kernel(stub))
    if not stub.options.noinitrd:
        stub.load_initrd()
    params["secure_boot"] = stub.secure_boot()
    efi.get_variable("MemoryOverwriteRequestControl", efi_types.MEMORY_ONLY_RESET_CONTROL_GUID)
    install_random_seed(efi)
    _find_measurement(stub)
    for guid in (
        efi_types.EFI_GRAPHICS_OUTPUT_PROTOCOL_GUID,
        efi_types.EFI_UGA_PROTOCOL_GUID,
        efi_types.EFI_PCI_IO_PROTOCOL_GUID,
    ):
        efi.locate_handles(guid)
    efi.free_pool(0)  # the list of PCI devices that there was none of
    if stub.protocol.unaccepted_memory:
        _allow_unaccepted_memory(stub)
    _reported(stub, "exit_boot() failed!", stub.exit_boot)
    return entry


def _reported(stub: Stub, message: str, step: Callable[[], T]) -> T:
    """What ``step`` returns; if it fails, the console says so first."""
    try:
        return step()
    except EfiError:
        stub.efi.print_error(message)
        raise


def _find_measurement(stub: Stub) -> None:
    """Look for somebody who measures: a TPM, or confidential computing's registers. This firmware has neither."""
    stub.efi.locate_protocol(efi_types.EFI_TCG2_PROTOCOL_GUID)
    stub.efi.locate_protocol(efi_types.EFI_CC_MEASUREMENT_PROTOCOL_GUID)


def _allow_unaccepted_memory(stub: Stub) -> None:
    """setup_unaccepted_memory(): tell the firmware that the kernel accepts memory itself, if it asks to be told."""
    protocol = stub.efi.locate_protocol(efi_types.OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL_GUID)
    if protocol is not None and stub.efi.call(stub.memory.read_uint(protocol, 8), protocol) != EfiStatus.EFI_SUCCESS:
        stub.efi.print_error("Memory acceptance protocol failed")


def _unpack_kernel(stub: Stub) -> int:
    """efi_decompress_kernel(): choose a place, allocate it, unpack; returns the kernel's entry point."""
    image = stub.memory.read(stub.image["ImageBase"], stub.image["ImageSize"])
    vmlinux, kernel, total = _unpacked(parse_bzimage(image).payload(image))
    virtual, seed = LOAD_PHYSICAL_ADDR, 0
    if not stub.options.nokaslr:
        physical_seed, virtual_seed = _seeds(stub, image)
        room = KERNEL_IMAGE_SIZE - LOAD_PHYSICAL_ADDR - total
        virtual = round_down(virtual + (room * virtual_seed >> 32), CONFIG_PHYSICAL_ALIGN)
        stub.params["hdr.loadflags"] |= LoadFlags.KASLR_FLAG
        seed = _physical_seed(stub, physical_seed)
    output = _allocate(stub, round_up(max(len(vmlinux), total), MIN_KERNEL_ALIGN), seed)
    load_kernel(stub.memory, vmlinux, kernel, output, virtual)
    stub.machine.trace.add(KernelPlaced(output, virtual, len(kernel.segments)))
    return output + kernel.entry - LOAD_PHYSICAL_ADDR


@lru_cache(maxsize=1)
def _unpacked(payload: bytes) -> tuple[bytes, Vmlinux, int]:
    """The kernel in a payload: its file, its segments, and the memory that it needs in the end."""
    vmlinux = decompress(payload)
    kernel = load_segments(vmlinux)
    return vmlinux, kernel, kernel_total_size(vmlinux, kernel)


def _seeds(stub: Stub, image: bytes) -> tuple[int, int]:
    """efi_get_seed(): 32 bits for the physical place and 32 for the virtual one."""
    given = random_bytes(stub.efi, _SEED_SIZE) or bytes(_SEED_SIZE)
    params = stub.memory.read(stub.params.gpa, 4096)
    seed = int.from_bytes(given, "little") ^ kaslr_get_random_long(stub.machine, boot_seed(image, params))
    return seed & _MASK32, seed >> 32


def _physical_seed(stub: Stub, seed: int) -> int:
    """The seed of the physical place, or 0 for the first place that fits: a user's own map is not known here."""
    override = stub.options.memmap_override
    if override is None:
        return seed
    stub.info(f"{override}= detected on the kernel command line - disabling physical KASLR")
    return 0


def _allocate(stub: Stub, size: int, seed: int) -> int:
    """efi_random_alloc(): memory for the kernel at the place that ``seed`` stands for. Raises ``EfiError``."""
    efi = stub.efi
    memmap = efi.get_memory_map(stub.protocol.efi_mmap_nr_slack_slots)
    place = random_slot(
        efi.descriptors(memmap), size, CONFIG_PHYSICAL_ALIGN, seed, LOAD_PHYSICAL_ADDR, stub.options.soft_reserve
    )
    done = place is not None and efi.allocate_pages_at(place, size, EfiMemoryType.EfiLoaderCode)
    efi.free_pool(memmap.pool)
    if place is None or not done:
        raise EfiError(EfiStatus.EFI_OUT_OF_RESOURCES)
    return place
