"""The kernel's own data: what its stages hand on to each other in variables, as the real one does in .data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE, e820_table_of
from bootstub.cmdline import COMMAND_LINE_SIZE
from bootstub.e820_types import E820_TYPE_RAM
from firmware.memory_descriptor import MemoryDescriptor
from guest.bitmap import GuestBitmap
from guest.machine import Machine
from guest.ranges import Range
from guest.records import RecordCopy
from guest.units import PAGE_SHIFT, PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_2M, round_down
from kernel.acpi_tables import AcpiTable
from kernel.build import DEFAULT_BUILD, KernelBuild
from kernel.e820 import E820Table
from kernel.early_param import EarlyParams, parse_early_param
from kernel.memblock import Memblock
from kernel.memblock_type import NUMA_NO_NODE
from kernel.mm_rules import MmRules
from kernel.page_alloc import PageAllocator
from kernel.unaccepted_memory import UnacceptedMemory
from kernel.version import V6_3, V6_12, KernelVersion
from tdx.guest import PlatformAccept, tdx_guest_detected

NOWHERE = Range(0, 0)
PGT_BUF_PAGES = 16
"""Pages of brk for early page tables (arch/x86/mm/init.c, INIT_PGT_BUF_SIZE with CONFIG_RANDOMIZE_MEMORY)."""
MAX_PHYSMEM_BITS, MAX_PHYSMEM_BITS_LA57 = 46, 52
_KASLR_FLAG = 1 << 1
_CPUID_LAST_EXTENDED, _CPUID_FEATURES, _CPUID_EXTENDED, _CPUID_ADDRESS_SIZES = 0x80000000, 7, 0x80000001, 0x80000008
_LA57, _GBPAGES = 1 << 16, 1 << 26


@dataclass(slots=True)
class Kernel:
    """A kernel that was entered at ``entry`` with boot_params ``params``; everything else it finds out.

    ``image`` is the kernel from ``_text`` to ``__bss_stop``, ``brk`` what it reserved behind itself; where the end of
    the image is not known, it is taken to end ``init_size`` behind its start, brk included. ``la57`` says that there
    are five levels of page tables, ``gbpages`` that they can map 1 GiB; ``memory_kaslr`` that the direct map lies at a
    random place. ``mapped`` is what the direct map has.
    """

    machine: Machine
    params: RecordCopy
    command_line: str
    early: EarlyParams
    image: Range
    unaccepted: UnacceptedMemory
    memblock: Memblock
    version: KernelVersion = V6_3
    brk: Range = NOWHERE
    pgt_buf: Range = NOWHERE
    la57: bool = False
    gbpages: bool = False
    memory_kaslr: bool = False
    confidential: bool = False
    e820: E820Table = field(default_factory=E820Table)
    e820_kexec: E820Table = field(default_factory=E820Table)
    e820_firmware: E820Table = field(default_factory=E820Table)
    """The tables that kexec hands on and that /sys/firmware/memmap shows."""
    efi_memmap: list[MemoryDescriptor] = field(default_factory=list)
    boot_services: list[Range] = field(default_factory=list)
    max_pfn: int = 0
    max_possible_pfn: int = 0
    """``max_pfn`` with all memory that may be plugged in later."""
    mapped: list[Range] = field(default_factory=list)
    dmi: bool = False
    """There is an SMBIOS table."""
    acpi_rsdp: int = 0
    """What boot_params or EFI say of where the RSDP is; 0 if nothing."""
    acpi: list[AcpiTable] = field(default_factory=list)
    cpu_nodes: list[int] = field(default_factory=lambda: [0])
    """The node of each processor that ACPI's MADT tells."""
    node_data: dict[int, int] = field(default_factory=dict)
    """Address of each node's pg_data_t."""
    swiotlb_size: int = 0
    hugetlb_gigantic: list[int] = field(default_factory=list)
    """Addresses of the huge pages of 1 GiB that memblock gave."""
    hotplugged: list[Range] = field(default_factory=list)
    """Memory that was added after boot."""
    build: KernelBuild = field(default_factory=KernelBuild)
    allocator: PageAllocator | None = None

    @classmethod
    def enter(
        cls, machine: Machine, version: KernelVersion = V6_3, image_size: int = 0, build: KernelBuild = DEFAULT_BUILD
    ) -> Kernel:
        """x86_64_start_kernel(): RSI = boot_params, RIP in the image; copy what the loader left.

        ``image_size`` is the size from ``_text`` to ``__bss_stop``, if that is known. Else the image is taken to end
        ``init_size`` behind its start; or where its RAM ends, if a decompressor that needs more memory than its kernel
        put that at the end of some.
        Source: arch/x86/kernel/head64.c, copy_bootdata().
        """
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
            image=Range(text, text + image_size if image_size else _end_of_image(params, text)),
            unaccepted=unaccepted,
            memblock=Memblock(accept_memory, clear_memory=memory.clear, panic=machine.panic, version=version.memblock),
            version=version,
            memory_kaslr=bool(params["hdr.loadflags"] & _KASLR_FLAG),
            acpi_rsdp=params["acpi_rsdp_addr"],
            build=build,
        )
        kernel._find_features()
        if image_size:
            kernel.brk = Range(kernel.image.end, kernel.image.end + PGT_BUF_PAGES * PAGE_SIZE)
        kernel.set_image(kernel.image)
        kernel.memblock.movable_node = kernel.early.movable_node
        kernel.memblock.mirrored_kernelcore = kernel.early.mirrored_kernelcore
        return kernel

    def extend_brk(self) -> None:
        """Use one more page of brk, below the early page tables."""
        if self.brk.size:
            self.brk = Range(self.brk.start, self.brk.end + PAGE_SIZE)
            self.set_image(self.image)

    def set_image(self, image: Range) -> None:
        """The kernel lies at ``image``, and early page tables at the end of its brk area."""
        self.image = image
        end = max(image.end, self.brk.end)
        self.pgt_buf = Range(max(end - PGT_BUF_PAGES * PAGE_SIZE, image.start), end)

    def _find_features(self) -> None:
        """What CPUID says. More physical address bits than four levels can map mean that there are five."""
        cpuid = self.machine.platform.cpuid
        self.confidential = tdx_guest_detected(self.machine)
        last = cpuid(_CPUID_LAST_EXTENDED)[0]
        self.gbpages = last >= _CPUID_EXTENDED and bool(cpuid(_CPUID_EXTENDED)[3] & _GBPAGES)
        self.la57 = cpuid(0)[0] >= _CPUID_FEATURES and bool(cpuid(_CPUID_FEATURES)[2] & _LA57)
        bits = cpuid(_CPUID_ADDRESS_SIZES)[0] & 0xFF if last >= _CPUID_ADDRESS_SIZES else 0
        self.la57 = self.la57 or bits > MAX_PHYSMEM_BITS

    @property
    def mm_rules(self) -> MmRules:
        """The rules of the page allocator of this version and build."""
        rules = self.version.mm_rules
        early = rules.accepts_before_watermarks and self.build.early_accept
        return replace(rules, accepts_before_watermarks=early)

    @property
    def max_arch_pfn(self) -> int:
        """First page frame that the page tables cannot reach (MAX_ARCH_PFN)."""
        return 1 << (MAX_PHYSMEM_BITS_LA57 if self.la57 else MAX_PHYSMEM_BITS) - PAGE_SHIFT

    @property
    def mainline(self) -> bool:
        """True if this is a kernel of 6.12; one that found the table of unaccepted memory is."""
        return self.version is V6_12

    @property
    def ramdisk(self) -> Range:
        """The initrd in guest memory; empty if there is none."""
        start = self.params["ext_ramdisk_image"] << 32 | self.params["hdr.ramdisk_image"]
        return Range(start, start + (self.params["ext_ramdisk_size"] << 32 | self.params["hdr.ramdisk_size"]))

    def memblock_alloc(
        self, size: int, align: int, who: str, start: int = 0, end: int = 0, nid: int = NUMA_NO_NODE,
        form: str = "alloc_try_nid",
    ) -> int:  # fmt: skip
        """Allocate boot memory for the function ``who``; without room the kernel panics (memblock_alloc_or_panic())."""
        found = self.memblock.alloc_try_nid(size, align, start, end, nid, who=who, form=form)
        if found == 0:
            raise self.machine.panic(
                f"memblock_{form}: Failed to allocate {size} bytes align={align:#x} nid={nid} "
                f"from={start:#x} max_addr={end:#x}"
            )
        return found


def _end_of_image(params: RecordCopy, text: int) -> int:
    """Where init_size ends, or the RAM that holds ``text`` by the firmware's table, if that is before."""
    ends = [e.addr + e.size for e in e820_table_of(params.data) if e.type == E820_TYPE_RAM and e.addr <= text]
    end_of_ram = next((end for end in ends if text < end), PHYSICAL_ADDRESS_END)
    return min(text + int(params["hdr.init_size"]), end_of_ram)


def _command_line(machine: Machine, at: int) -> str:
    """The command line at ``at``, up to a NUL."""
    if at == 0:
        return ""
    line = machine.memory.read(at, COMMAND_LINE_SIZE)
    return line.split(b"\0")[0].decode("utf-8", errors="replace")
