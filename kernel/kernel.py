"""The kernel's own data: what its stages hand on to each other in variables, as the real one does in .data."""

from __future__ import annotations

from dataclasses import dataclass, field

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE
from firmware.memory_descriptor import MemoryDescriptor
from guest.bitmap import GuestBitmap
from guest.machine import Machine
from guest.ranges import Range
from guest.records import RecordCopy
from guest.units import PAGE_SHIFT, PHYSICAL_ADDRESS_BITS, SZ_2M, round_down
from kernel.build import KernelBuild
from kernel.e820 import E820Table
from kernel.early_param import EarlyParams, parse_early_param
from kernel.memblock import MAINLINE_MEMBLOCK, Memblock
from kernel.mm_rules import V9_MM, MmRules
from kernel.page_alloc import PageAllocator
from kernel.unaccepted_memory import UnacceptedMemory
from tdx.guest import PlatformAccept

COMMAND_LINE_SIZE = 2048
MAX_ARCH_PFN = 1 << PHYSICAL_ADDRESS_BITS - PAGE_SHIFT


@dataclass(slots=True)
class Kernel:
    """A kernel that was entered at ``entry`` with boot_params ``params``; everything else it finds out."""

    machine: Machine
    params: RecordCopy
    command_line: str
    early: EarlyParams
    image: Range
    unaccepted: UnacceptedMemory
    memblock: Memblock
    e820: E820Table = field(default_factory=E820Table)
    efi_memmap: list[MemoryDescriptor] = field(default_factory=list)
    boot_services: list[Range] = field(default_factory=list)
    max_pfn: int = 0
    swiotlb_size: int = 0
    acpi_rsdp: int = 0
    hotplugged: list[Range] = field(default_factory=list)
    """Memory that was added after boot."""
    build: KernelBuild = field(default_factory=KernelBuild)
    mm_rules: MmRules = V9_MM
    allocator: PageAllocator | None = None

    @classmethod
    def enter(cls, machine: Machine, build: KernelBuild | None = None) -> Kernel:
        """x86_64_start_kernel(): RSI = boot_params, RIP in the image; copy what the loader left.

        The image is taken to end ``init_size`` behind its start, since its own ``_end`` is the linker's secret.
        Source: arch/x86/kernel/head64.c, copy_bootdata().
        """
        build = build or KernelBuild()
        regs, memory = machine.regs, machine.memory
        params = RecordCopy(memory.read(regs.rsi, BOOT_PARAMS_SIZE), BOOT_PARAMS)
        command_line = _command_line(machine, params["ext_cmd_line_ptr"] << 32 | params["hdr.cmd_line_ptr"])
        text = round_down(regs.rip, SZ_2M)
        bitmap = params["unaccepted_memory"]
        unaccepted = UnacceptedMemory(
            GuestBitmap(memory, bitmap) if bitmap else None, PlatformAccept(machine), guard=build.zeropad_guard
        )

        def accept_memory(start: int, end: int) -> None:
            kernel.unaccepted.accept_memory(start, end)  # mainline finds its bitmap only later

        kernel = cls(
            machine=machine,
            params=params,
            command_line=command_line,
            early=parse_early_param(command_line),
            image=Range(text, text + params["hdr.init_size"]),
            unaccepted=unaccepted,
            memblock=Memblock(accept_memory, clear_memory=memory.clear, panic=machine.panic),
            build=build,
        )
        return kernel

    @property
    def mainline(self) -> bool:
        """True if this is a kernel of 6.12; one that found the table of unaccepted memory is."""
        return self.build.mainline or self.memblock.version is MAINLINE_MEMBLOCK

    @property
    def ramdisk(self) -> Range:
        """The initrd in guest memory; empty if there is none."""
        start = self.params["ext_ramdisk_image"] << 32 | self.params["hdr.ramdisk_image"]
        return Range(start, start + (self.params["ext_ramdisk_size"] << 32 | self.params["hdr.ramdisk_size"]))

    def memblock_alloc(self, size: int, align: int, start: int = 0, end: int = 0) -> int:
        """Allocate and clear boot memory; without room the kernel panics (memblock_alloc_try_nid())."""
        found = self.try_memblock_alloc(size, align, start, end)
        if found == 0:
            raise self.machine.panic(
                f"memblock_alloc_try_nid: Failed to allocate {size} bytes align={align:#x} nid=0 "
                f"from={start:#x} max_addr={end:#x}"
            )
        return found

    def try_memblock_alloc(self, size: int, align: int, start: int = 0, end: int = 0) -> int:
        """Allocate and clear boot memory; 0 if there is no room."""
        found = self.memblock.phys_alloc_range(size, align, start, end)
        if found:
            self.machine.memory.clear(found, found + size)
        return found


def _command_line(machine: Machine, at: int) -> str:
    """The command line at ``at``, up to a NUL."""
    if at == 0:
        return ""
    line = machine.memory.read(at, COMMAND_LINE_SIZE)
    return line.split(b"\0")[0].decode("utf-8", errors="replace")
