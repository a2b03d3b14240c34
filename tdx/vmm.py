"""The untrusted host: it backs guest memory and answers TDG.VP.VMCALL.

Sources: arch/x86/kvm/vmx/tdx.c (6.16); Intel Guest-Host Communication Interface.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from guest.clock import CostTable, VirtualClock
from guest.errors import GuestPanic, MemoryFault
from guest.memory import PhysicalMemory
from guest.ranges import RangeSet
from guest.registers import Registers
from guest.trace import Trace
from guest.units import PAGE_SIZE, PMD_SIZE, SZ_4G
from tdx.events import PageAdd, TdExit, TdVmCall
from tdx.instructions import Instructions, last_words
from tdx.leaves import SubFunction, VmCallStatus
from tdx.sept import LEVEL_2M, LEVEL_4K, LEVEL_SIZE, SecureEpt

_NAMES = {int(function): function.spec_name for function in SubFunction}


@dataclass(slots=True)
class Host:
    """A host with ``ram`` (guest physical ranges that it backs) and a Secure EPT to put pages into.

    ``page_level`` is the largest page that it backs private memory with: 0 = 4 KiB (KVM up to 6.16),
    1 = 2 MiB. Memory is backed on demand, when an access or an accept exits to the host.
    """

    physical: PhysicalMemory
    sept: SecureEpt
    trace: Trace
    clock: VirtualClock
    costs: CostTable
    ram: RangeSet
    page_level: int = LEVEL_2M
    shared_mask: int = 1 << 51
    shared: RangeSet = field(default_factory=RangeSet)
    instructions: Instructions = field(default_factory=Instructions)
    """Its devices are the host's; without any, ports read as all ones."""

    def page_add(self, gpa: int, data: bytes, size: int, what: str) -> None:
        """Add ``size`` bytes at ``gpa`` while the TD is built: ``data``, then zeros (TDH.MEM.PAGE.ADD)."""
        self.sept.page_add(gpa, gpa + size)
        self.physical.write(gpa, data)
        self.trace.add(PageAdd(gpa, gpa + size, what))

    def ept_violation(self, gpa: int, level: int, count: int) -> None:
        """Handle the exits of an accept of ``count`` pages of ``level`` from ``gpa`` on, all FREE.

        Backs them all if the host has such pages and the memory; else backs the one page that faulted with
        4 KiB. An address that is no RAM ends the guest.
        """
        size = LEVEL_SIZE[level]
        backed = self._ram_pages(gpa, size, count) if level <= self.page_level else 0
        if backed == 0:
            if gpa not in self.ram:
                raise MemoryFault(
                    stage=self.trace.stage, gpa=gpa, start=gpa, size=size, kind="accept",
                    state="no RAM", end="EPT violation, TD exit; the host has nothing to map",
                )  # fmt: skip
            level, size, backed = LEVEL_4K, PAGE_SIZE, 1
        self.sept.page_aug(gpa, gpa + backed * size, level)
        self._exits(gpa, level, backed)

    def demote(self, gpa: int) -> None:
        """Handle the exit of a 4 KiB accept inside a 2 MiB page: split the page."""
        start = gpa - gpa % PMD_SIZE
        self.sept.page_demote(start, start + PMD_SIZE)
        self._exits(start, LEVEL_4K, 1)

    def tdvmcall(self, regs: Registers) -> None:
        """Answer TDG.VP.VMCALL. ``regs`` has only what the guest exposed; R10 and R11 are the answer.

        A call that ends the guest raises ``GuestPanic`` with what the guest said.
        """
        r12, r13, standard = regs.r12, regs.r13, regs.r10 == 0
        name = _NAMES[regs.r11] if standard and regs.r11 in _NAMES else f"{regs.r11:#x}"
        end = last_words(regs) if standard else None
        if standard:
            regs.r10 = self._answer(regs)
        else:
            regs.r10, regs.r11 = VmCallStatus.INVALID_OPERAND, 0
        self.clock.advance(self.costs.tdvmcall)
        self.trace.add(TdVmCall(name, r12, r13, int(regs.r10)))
        if end is not None:
            raise GuestPanic(self.trace.stage, end)

    def _answer(self, regs: Registers) -> VmCallStatus:
        """Answer a standard sub-function in ``regs``, and return its status."""
        if regs.r11 == SubFunction.MapGPA:
            status, regs.r11 = self._map_gpa(regs.r12, regs.r13)
            return status
        if regs.r11 == SubFunction.GetTdVmCallInfo:
            regs.r11 = regs.r12 = regs.r13 = regs.r14 = 0
            return VmCallStatus.SUCCESS
        if regs.r11 == SubFunction.ReportFatalError:
            return VmCallStatus.SUCCESS
        status_of_instruction = self.instructions.answer(regs)
        return VmCallStatus.SUBFUNC_UNSUPPORTED if status_of_instruction is None else status_of_instruction

    def _map_gpa(self, gpa: int, size: int) -> tuple[VmCallStatus, int]:
        """MapGPA: status and the GPA at which it failed. It changes the host's view only; it accepts nothing."""
        start, end = gpa & ~self.shared_mask, (gpa & ~self.shared_mask) + size
        if size == 0 or end > self.shared_mask:
            return VmCallStatus.INVALID_OPERAND, gpa
        if gpa % PAGE_SIZE or size % PAGE_SIZE:
            return VmCallStatus.ALIGN_ERROR, gpa
        if gpa & self.shared_mask:
            self.shared.add(start, end)
        else:
            self.shared.remove(start, end)
        return VmCallStatus.SUCCESS, 0

    def _ram_pages(self, gpa: int, size: int, count: int) -> int:
        """How many of the ``count`` pages from ``gpa`` on lie wholly in RAM, without a gap."""
        run = next(self.ram.within(gpa, gpa + count * size), None)
        return run.size // size if run is not None and run.start == gpa else 0

    def _exits(self, gpa: int, level: int, count: int) -> None:
        self.clock.advance(count * self.costs.td_exit_aug)
        self.trace.add(TdExit(gpa, level, count))


@dataclass(frozen=True, slots=True)
class MachineType:
    """QEMU's machine types, as far as memory goes: ``q35`` or ``pc``, and ``max-ram-below-4g`` in bytes."""

    name: str = "q35"
    max_ram_below_4g: int | None = None

    def ram(self, memory: int) -> RangeSet:
        """Guest physical RAM of the machine with ``memory`` bytes; what does not lie low starts at 4 GiB."""
        low = _LOW_RAM[self.name](memory, self.max_ram_below_4g)
        if memory < low:
            return RangeSet([(0, memory)])
        return RangeSet([(0, low), (SZ_4G, SZ_4G + memory - low)])


def q35_ram(memory: int) -> RangeSet:
    """Guest physical RAM of a q35 machine with ``memory`` bytes and no further option."""
    return MachineType().ram(memory)


def _q35_low_ram(memory: int, limit: int | None) -> int:
    """2816 MiB, where configuration space begins; 2 GiB if that is not enough (hw/i386/pc_q35.c, pc_q35_init())."""
    low = 0x8000_0000 if memory >= 0xB000_0000 else 0xB000_0000
    return min(low, SZ_4G if limit is None else limit)


def _pc_low_ram(memory: int, limit: int | None) -> int:
    """3.5 GiB; a whole number of GiB, 3 at most, if that is not enough (hw/i386/pc_piix.c, pc_init1())."""
    low = 0xE000_0000 if limit is None else limit
    return min(low, 0xC000_0000) if memory >= low else low


_LOW_RAM = {"q35": _q35_low_ram, "pc": _pc_low_ram}
MACHINE_NAMES = tuple(_LOW_RAM)
