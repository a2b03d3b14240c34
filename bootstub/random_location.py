"""Where the decompressor's own KASLR puts the kernel: anywhere in memory that is free, or can be accepted.

Source: arch/x86/boot/compressed/kaslr.c, choose_random_location().
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bootstub.acpi import EL32, EL64, immovable_mem
from bootstub.boot_params import BOOT_PARAMS_SIZE, e820_table_of
from bootstub.cmdline import find_option_bool
from bootstub.decompressor_image import DecompressorImage
from bootstub.e820_types import E820_TYPE_RAM
from bootstub.events import DecompressorChoice
from bootstub.kaslr import boot_seed, kaslr_get_random_long
from bootstub.kernel_layout import KERNEL_IMAGE_SIZE, LOAD_PHYSICAL_ADDR
from bootstub.mem_options import MemOptions
from bootstub.setup_data import SetupDataType, read_indirect, walk_setup_data
from bootstub.setup_header import LoadFlags
from bootstub.slots import MemVector, Slots
from firmware.efi_types import EfiMemoryAttribute, EfiMemoryType
from firmware.memory_descriptor import unpack_map
from guest.errors import FormatError
from guest.machine import Machine
from guest.memory import GuestMemory
from guest.records import GuestRecord
from guest.units import PAGE_SHIFT, SZ_16M, U64_MAX, round_down, round_up

_MINIMUM_AT_MOST = 512 << 20
_MAX_MEMMAP_SIZE = SZ_16M
_LEVELS_MAXMEM = {4: 1 << 46, 5: 1 << 52}
"""MAXMEM by levels of page tables."""


@dataclass(frozen=True, slots=True)
class Located:
    """Physical and virtual address for a kernel; the latter counts from the start of the kernel's mapping."""

    output: int
    virtual: int


@dataclass(frozen=True, slots=True)
class RandomLocation:
    """A choice to be made by the decompressor ``image``, for the kernel of ``size`` bytes that would go to ``output``.

    ``line`` is the command line, ``levels`` those of the page tables; without ``unaccepted`` the decompressor was built
    for a kernel that knows no such memory.
    """

    machine: Machine
    params: GuestRecord
    image: DecompressorImage
    line: bytes
    levels: int
    unaccepted: bool

    def choose(self, output: int, size: int) -> Located:
        """Draw a place; what the decompressor has to say is put out."""
        if find_option_bool(self.line, b"nokaslr"):
            self.machine.print("KASLR disabled: 'nokaslr' on cmdline.")
            return Located(output, LOAD_PHYSICAL_ADDR)
        self.params["hdr.loadflags"] |= LoadFlags.KASLR_FLAG
        options = MemOptions.parse(self.line, _LEVELS_MAXMEM[self.levels])
        for warning in options.warnings:
            self.machine.print(warning)
        slots = self._slots(output, size, options)
        choice = self._choice(slots, size)
        self.machine.trace.add(choice)
        physical, virtual = choice.place(lambda: kaslr_get_random_long(self.machine, choice.hash))
        if physical is None:
            if slots is not None:
                self.machine.print("Invalid physical address chosen!")
            self.machine.print("Physical KASLR disabled: no suitable memory region!")
            return Located(output, virtual)
        return Located(physical, virtual)

    def _choice(self, slots: Slots | None, size: int) -> DecompressorChoice:
        memory, align = self.machine.memory, self.params["hdr.kernel_alignment"]
        seed = boot_seed(self.image.build_string(memory), memory.read(self.params.gpa, BOOT_PARAMS_SIZE))
        virtual_slots = 1 + (KERNEL_IMAGE_SIZE - LOAD_PHYSICAL_ADDR - size) // align
        return DecompressorChoice(tuple(slots.areas) if slots else (), align, size, seed, virtual_slots)

    def _slots(self, output: int, size: int, options: MemOptions) -> Slots | None:
        """find_random_phys_addr(): all places; None where the real code does not even look for any."""
        align = self.params["hdr.kernel_alignment"]
        minimum = round_up(min(output, _MINIMUM_AT_MOST), align)
        avoid = [*self._fixed_avoid(output), *options.avoid, *self._setup_data_avoid()]
        immovable = immovable_mem(self.machine.memory, self.params, self.line)
        if minimum + size > options.mem_limit or options.memmap_too_large:
            return None
        slots = Slots(size, align, minimum, options.mem_limit, avoid, options.gb_huge_pages, immovable)
        for region in self._free_regions():
            if slots.process(region):
                break
        return slots

    def _fixed_avoid(self, output: int) -> Iterator[MemVector]:
        """mem_avoid_init(): the decompressor and where it works, initrd, command line, boot_params."""
        params = self.params
        yield MemVector(self.image.input_data, output + params["hdr.init_size"] - self.image.input_data)
        start, size = (params[f"ext_ramdisk_{n}"] << 32 | params[f"hdr.ramdisk_{n}"] for n in ("image", "size"))
        yield MemVector(start, size)
        line_at = params["ext_cmd_line_ptr"] << 32 | params["hdr.cmd_line_ptr"]
        yield MemVector(line_at, len(self.line) + 1) if line_at else MemVector(0, 0)
        yield MemVector(params.gpa, BOOT_PARAMS_SIZE)

    def _setup_data_avoid(self) -> Iterator[MemVector]:
        """Every node of the list, and what nodes point to."""
        read = self.machine.memory.read
        for node in walk_setup_data(read, self.params["hdr.setup_data"]):
            yield MemVector(node.gpa, node.end - node.gpa)
            indirect = read_indirect(read, node)
            if indirect is not None and indirect.type != SetupDataType.SETUP_INDIRECT:
                yield MemVector(indirect.addr, indirect.len)

    def _free_regions(self) -> Iterator[MemVector]:
        """Free memory in the order of EFI's map; of the e820 table, if an EFI did not start the loader."""
        if self.params["efi_info.efi_loader_signature"] in (EL32, EL64):
            yield from _efi_regions(self.machine.memory, self.params, self.unaccepted)
            return
        table = self.machine.memory.read(self.params.gpa, BOOT_PARAMS_SIZE)
        for entry in e820_table_of(table):
            if entry.type == E820_TYPE_RAM:
                yield MemVector(entry.addr, entry.size)


def _efi_regions(memory: GuestMemory, params: GuestRecord, unaccepted: bool) -> Iterator[MemVector]:
    """process_efi_entries(): conventional and unaccepted memory that is not for a special purpose.

    If any memory is more reliable, only such counts. Boot services memory is left to buggy firmware.
    """
    free = {EfiMemoryType.EfiConventionalMemory} | ({EfiMemoryType.EfiUnacceptedMemoryType} if unaccepted else set())
    at = params["efi_info.efi_memmap_hi"] << 32 | params["efi_info.efi_memmap"]
    stride, size = params["efi_info.efi_memdesc_size"], params["efi_info.efi_memmap_size"]
    if size > _MAX_MEMMAP_SIZE or not stride:
        raise FormatError(
            "boot_params.efi_info", at=params.gpa, found=f"{size} bytes of memory map, {stride} a descriptor",
            expected=f"at most {_MAX_MEMMAP_SIZE}, at least 40", source="arch/x86/boot/compressed/kaslr.c",
        )  # fmt: skip
    descriptors = unpack_map(memory.read(at, round_down(size, stride)), stride, at=at)
    reliable = EfiMemoryAttribute.EFI_MEMORY_MORE_RELIABLE
    wanted = reliable if any(d.attribute & reliable for d in descriptors) else 0
    for d in descriptors:
        if d.type in free and not d.attribute & EfiMemoryAttribute.EFI_MEMORY_SP and d.attribute & wanted == wanted:
            yield MemVector(d.start, d.pages << PAGE_SHIFT & U64_MAX)
