"""The stub since 6.6: it unpacks the kernel itself, while boot services run, and jumps to the kernel's entry point.

The kernel goes into memory that the firmware handed out, which is never unaccepted.
Source: drivers/firmware/efi/libstub/x86-stub.c (6.12), efi_pe_entry(), efi_stub_entry() and efi_decompress_kernel().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from bootstub.boot_params import BOOT_PARAMS_SIZE
from bootstub.bzimage import parse_bzimage
from bootstub.efi_call import EfiError
from bootstub.events import KernelPlaced, StubChoice
from bootstub.kaslr import boot_seed, build_string, conventional_slots, kaslr_get_random_long
from bootstub.kernel_layout import CONFIG_PHYSICAL_ALIGN, KERNEL_IMAGE_SIZE, LOAD_PHYSICAL_ADDR
from bootstub.random_seed import install_random_seed, random_bytes
from bootstub.relocations import load_kernel
from bootstub.setup_header import EFI_STUB_LOADER, LoadFlags, XLoadFlags
from bootstub.slots import slot_address
from bootstub.stub import Stub
from bootstub.unpack import Unpacked, unpack
from firmware import efi_types
from firmware.efi_types import EfiMemoryType, EfiStatus

T = TypeVar("T")

_INITRD_ADDR_MAX = 0x7FFF_FFFF
_SEED_SIZE = 8


def mainline_stub(stub: Stub) -> None:
    """Run the stub. It leaves the kernel's entry point in RIP and boot_params in RSI; or the image exits."""
    try:
        entry = _run(stub)
    except EfiError as error:
        stub.efi.error("efi_stub_entry() failed!")
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
    length = stub.convert_command_line()
    efi.locate_protocol(efi_types.EFI_MEMORY_ATTRIBUTE_PROTOCOL_GUID)
    efi.free_pool(efi.allocate_pool(length + 1))  # the copy that the options are read from
    efi.loglevel = stub.options.loglevel
    if stub.options.mem_encrypt:
        params["hdr.xloadflags"] |= XLoadFlags.XLF_MEM_ENCRYPTION
    entry = _reported(stub, "Failed to decompress kernel", lambda: _unpack_kernel(stub))
    stub.load_initrd()
    params["secure_boot"] = stub.secure_boot()
    stub.enable_reset_attack_mitigation()
    install_random_seed(efi)
    stub.find_measurement()
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
        stub.efi.error(message)
        raise


def _allow_unaccepted_memory(stub: Stub) -> None:
    """setup_unaccepted_memory(): tell the firmware that the kernel accepts memory itself, if it asks to be told."""
    protocol = stub.efi.locate_protocol(efi_types.OVMF_SEV_MEMORY_ACCEPTANCE_PROTOCOL_GUID)
    if protocol is not None and stub.efi.call(stub.memory.read_uint(protocol, 8), protocol) != EfiStatus.EFI_SUCCESS:
        stub.efi.error("Memory acceptance protocol failed")


class _Draw(NamedTuple):
    """A random number ``drawn`` from ``hash``, and what the firmware's generator has ``given``, to be mixed with it."""

    given: int
    hash: int
    drawn: int


def _unpack_kernel(stub: Stub) -> int:
    """efi_decompress_kernel(): choose a place, allocate it, unpack; returns the kernel's entry point."""
    image = stub.memory.read(stub.image["ImageBase"], stub.image["ImageSize"])
    unpacked = unpack(parse_bzimage(image).payload(image))
    draw, lowest = None, True
    if not stub.options.nokaslr:
        draw = _draw(stub, image)
        stub.params["hdr.loadflags"] |= LoadFlags.KASLR_FLAG
        lowest = _memory_map_overridden(stub)
    output, virtual = _allocate(stub, unpacked, draw, lowest)
    load_kernel(stub.memory, unpacked.vmlinux, unpacked.kernel, output, virtual)
    stub.machine.trace.add(KernelPlaced(output, virtual, len(unpacked.kernel.segments)))
    return output + unpacked.kernel.entry - LOAD_PHYSICAL_ADDR


def _draw(stub: Stub, image: bytes) -> _Draw:
    """efi_get_seed(): 64 bits, of which one half is for the physical place and one for the virtual."""
    given = random_bytes(stub.efi, _SEED_SIZE) or bytes(_SEED_SIZE)
    seed = boot_seed(build_string(image), stub.memory.read(stub.params.gpa, BOOT_PARAMS_SIZE))
    return _Draw(int.from_bytes(given, "little"), seed, kaslr_get_random_long(stub.machine, seed))


def _memory_map_overridden(stub: Stub) -> bool:
    """Whether the first place that fits is to be taken: a user's own map is not known here."""
    override = stub.options.memmap_override
    if override is not None:
        stub.efi.info(f"{override}= detected on the kernel command line - disabling physical KASLR")
    return override is not None


def _allocate(stub: Stub, unpacked: Unpacked, draw: _Draw | None, lowest: bool) -> tuple[int, int]:
    """efi_random_alloc(): memory for the kernel, physical and virtual address. Raises ``EfiError``."""
    efi, size = stub.efi, unpacked.needed_size
    memmap = efi.get_memory_map(stub.protocol.efi_mmap_nr_slack_slots)
    descriptors, soft_reserve = efi.descriptors(memmap), stub.options.soft_reserve
    areas = conventional_slots(descriptors, size, CONFIG_PHYSICAL_ALIGN, LOAD_PHYSICAL_ADDR, soft_reserve)
    if draw is None:
        place, virtual = slot_address(areas, CONFIG_PHYSICAL_ALIGN, 0), LOAD_PHYSICAL_ADDR
    else:
        room = KERNEL_IMAGE_SIZE - LOAD_PHYSICAL_ADDR - unpacked.total_size
        choice = StubChoice(areas, CONFIG_PHYSICAL_ALIGN, size, draw.hash, room, draw.given, lowest)
        stub.machine.trace.add(choice)
        place, virtual = choice.place(lambda: draw.drawn)
    done = place is not None and efi.allocate_pages_at(place, size, EfiMemoryType.EfiLoaderCode)
    efi.free_pool(memmap.pool)
    if place is None or not done:
        raise EfiError(EfiStatus.EFI_OUT_OF_RESOURCES)
    return place, virtual
