"""The untrusted host: it backs guest memory and answers TDG.VP.VMCALL.

Sources: arch/x86/kvm/vmx/tdx.c (6.16); Intel Guest-Host Communication Interface.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from guest.clock import CostTable, VirtualClock
from guest.errors import GuestPanic, MemoryFault
from guest.memory import PhysicalMemory
from guest.ranges import Range, RangeSet
from guest.registers import Registers
from guest.trace import Trace
from guest.units import DIV_ROUND_UP, PAGE_SIZE, PMD_SIZE, round_down, round_up
from tdx.backing import Backing
from tdx.events import PageAdd, TdExit, TdVmCall
from tdx.instructions import Instructions, last_words
from tdx.seamcall import SeamCalls, SeamLeaf
from tdx.sept import LEVEL_2M, LEVEL_4K, LEVEL_SIZE, SecureEpt, SeptState
from tdx.status import TDX_SUCCESS, status_name
from tdx.td_exit import EptViolation
from tdx.vmcall import VmCallPolicy, answer, sub_function_name

if TYPE_CHECKING:
    from tdx.inject import Injector

_VCPU = 0
"""The one processor that runs the TD."""


@dataclass(slots=True)
class Host:
    """A host with ``ram`` (guest physical ranges that it backs); it changes Secure EPT by SEAMCALLs alone.

    ``backing`` says with which pages and when; a number is the level of its pages. ``demote`` and ``unblock`` say
    whether it answers an exit by splitting a large page and by giving back what it blocked: if not, the guest faults
    again. ``suppress_ve``: shared memory that is not mapped exits to the host; if not, it raises #VE in the guest.
    """

    physical: PhysicalMemory
    sept: SecureEpt
    trace: Trace
    clock: VirtualClock
    costs: CostTable
    ram: RangeSet
    backing: Backing | int = LEVEL_2M
    shared_mask: int = 1 << 51
    shared: RangeSet = field(default_factory=RangeSet)
    """What the guest made shared (MapGPA), by addresses without the shared bit."""
    instructions: Instructions = field(default_factory=Instructions)
    """Its devices are the host's; without any, ports read as all ones."""
    vmcalls: VmCallPolicy = field(default_factory=VmCallPolicy)
    demote: bool = True
    unblock: bool = True
    suppress_ve: bool = False
    seam: SeamCalls = field(init=False)
    shared_mapped: RangeSet = field(default_factory=RangeSet)
    """What of ``shared`` the host has in its shared EPT."""
    injector: Injector | None = None
    """The faults that meet TDG.VP.VMCALLs and TD exits, if any."""

    def __post_init__(self) -> None:
        self.seam = SeamCalls(self.physical, self.sept, self.trace, self.clock, self.costs, self.shared_mask)
        if isinstance(self.backing, int):
            self.backing = Backing(self.backing)

    def page_add(self, gpa: int, data: bytes, size: int, what: str, extend: bool = False) -> None:
        """Add ``size`` bytes at ``gpa`` while the TD is built: ``data``, then zeros (TDH.MEM.PAGE.ADD).

        ``extend``: the contents too are measured into MRTD (TDH.MR.EXTEND).
        """
        self.add_tables(gpa, gpa + size, LEVEL_4K)
        done, status, _ = self.seam.run(SeamLeaf.TDH_MEM_PAGE_ADD, gpa, size // PAGE_SIZE)
        if status != TDX_SUCCESS:
            raise ValueError(f"TDH.MEM.PAGE.ADD at {gpa + done * PAGE_SIZE:#x}: {status_name(status)}")
        self.physical.write(gpa, data)
        self.physical.clear(gpa + len(data), gpa + size)
        self.seam.measure(gpa, gpa + size, data if extend else None)
        self.trace.add(PageAdd(gpa, gpa + size, what))

    def add_tables(self, start: int, end: int, level: int, top: int | None = None) -> None:
        """Add the tables that pages of ``level`` in ``[start, end)`` need and do not have (TDH.MEM.SEPT.ADD).

        ``top`` is the level of the uppermost one that may be missing; without it, that of the root's.
        """
        for upper in range(self.sept.top if top is None else top, level, -1):
            size = LEVEL_SIZE[upper]
            span = round_down(start, size), round_up(end, size)
            for low, high, table in list(self.sept.tables(upper, *span)):
                if table.state is SeptState.FREE:
                    self.seam.run(SeamLeaf.TDH_MEM_SEPT_ADD, low | upper, (high - low) // size)

    def finalize(self) -> None:
        """The TD is built (TDH.MR.FINALIZE): back its RAM if that is to be done ahead, and let it run."""
        self.seam.mr_finalize()
        if self._backing.ahead:
            for part in self.ram:
                for start, end, entry in list(self.sept.runs(part.start, part.end)):
                    if entry.state is SeptState.FREE:
                        self._back_ahead(start, end)
        self.seam.tracking.enter(_VCPU)

    def ept_violation(self, exit: EptViolation, count: int = 1) -> None:
        """Answer a TD exit, and those of the ``count - 1`` pages behind it that an accept is to have, all FREE.

        If nothing changes, the guest's instruction faults again. An address that is no RAM ends the guest.
        """
        self.seam.tracking.leave(_VCPU)
        if self.injector is not None and self.injector.keeps(exit):
            self._exits(round_down(exit.gpa, PAGE_SIZE), LEVEL_4K, 1)
        elif exit.entry.state is SeptState.FREE:
            self._back(exit, count)
        elif exit.entry.state is SeptState.PENDING:
            self._demote(exit)
        else:
            self._unblock(exit)
        self.seam.tracking.enter(_VCPU)

    def map_shared(self, start: int, end: int) -> Range | None:
        """The run around ``[start, end)`` that shared EPT maps; what is shared there is mapped after TD exits.

        None if some of it is not shared.
        """
        span = round_down(start, PMD_SIZE), round_up(end, PMD_SIZE)
        run = next((part for part in self.shared.within(*span) if part.start <= start and end <= part.end), None)
        if run is not None and not self.shared_mapped.covers(*run):
            for gap in list(self.shared_mapped.gaps(*run)):
                blocks = DIV_ROUND_UP(gap.end, PMD_SIZE) - gap.start // PMD_SIZE
                self._exits(gap.start | self.shared_mask, LEVEL_2M, blocks)
            self.shared_mapped.add(*run)
        return run

    @property
    def _backing(self) -> Backing:
        assert isinstance(self.backing, Backing)
        return self.backing

    def _back(self, exit: EptViolation, count: int) -> None:
        """Add the pages that an accept asked for, if the host has such pages and the memory; else one small page."""
        gpa, level, size = round_down(exit.gpa, PAGE_SIZE), exit.level, LEVEL_SIZE[exit.level]
        host_level, end = self._backing.level_at(gpa)
        backed = 0
        if level <= host_level:
            backed = self._ram_pages(gpa, size, min(count, (end - gpa) // size) if level else count)
        if backed == 0:
            if gpa not in self.ram:
                raise MemoryFault(
                    stage=self.trace.stage, gpa=gpa, start=gpa, size=size, kind=exit.kind,
                    state="no RAM", end="EPT violation, TD exit; the host has nothing to map",
                )  # fmt: skip
            level, size, backed = LEVEL_4K, PAGE_SIZE, 1
        if self.sept.has_locks:  # any of the calls may fail: one page at a time
            backed = 1
        self._exits(gpa, level, backed)
        self.add_tables(gpa, gpa + backed * size, level, exit.entry.level)
        self.seam.run(SeamLeaf.TDH_MEM_PAGE_AUG, gpa | level, backed)

    def _back_ahead(self, start: int, end: int) -> None:
        """Back ``[start, end)``, all FREE, with pages as large as they may be."""
        while start < end:
            level, stop = self._backing.level_at(start)
            stop = min(stop, end)
            if level and (start % PMD_SIZE or stop - start < PMD_SIZE):
                level, stop = LEVEL_4K, min(stop, round_up(start + 1, PMD_SIZE))
            stop = round_down(stop, LEVEL_SIZE[level])
            self.add_tables(start, stop, level)
            self.seam.run(SeamLeaf.TDH_MEM_PAGE_AUG, start | level, (stop - start) // LEVEL_SIZE[level])
            start = stop

    def _demote(self, exit: EptViolation) -> None:
        """A 4 KiB accept in a 2 MiB page: split the page, if that is the policy."""
        level = exit.entry.level
        start = round_down(exit.gpa, LEVEL_SIZE[level])
        self._exits(start, level - 1, 1)
        if self.demote:
            self.seam.run(SeamLeaf.TDH_MEM_RANGE_BLOCK, start | level)
            self.seam.mem_track()
            self.seam.run(SeamLeaf.TDH_MEM_PAGE_DEMOTE, start | level)

    def _unblock(self, exit: EptViolation) -> None:
        """A touch of what the host blocked: give it back, if that is the policy."""
        state, level = exit.entry.state, exit.entry.level
        start = round_down(exit.gpa, LEVEL_SIZE[level])
        self._exits(start, level, 1)
        if not self.unblock:
            return
        if state is SeptState.BLOCKEDW:
            self.seam.run(SeamLeaf.TDH_MEM_RANGE_BLOCK, start | level)
        if state is SeptState.BLOCKEDW or not self.seam.tracking.is_tracked(exit.entry.epoch):
            self.seam.mem_track()
        self.seam.run(SeamLeaf.TDH_MEM_RANGE_UNBLOCK, start | level)

    def tdvmcall(self, regs: Registers) -> None:
        """Answer TDG.VP.VMCALL. ``regs`` has only what the guest exposed; R10 and R11 are the answer.

        A call that ends the guest raises ``GuestPanic`` with what the guest said.
        """
        r12, r13, standard = regs.r12, regs.r13, regs.r10 == 0
        name = sub_function_name(regs)
        end = last_words(regs) if standard else None
        if self.injector is None:
            regs.r10 = answer(self, regs)
        else:
            regs.r10 = self.injector.vmcall(partial(answer, self), regs)
        self.clock.advance(self.costs.tdvmcall)
        self.trace.add(TdVmCall(name, r12, r13, int(regs.r10)))
        if end is not None:
            raise GuestPanic(self.trace.stage, end)

    def _ram_pages(self, gpa: int, size: int, count: int) -> int:
        """How many of the ``count`` pages from ``gpa`` on lie wholly in RAM, without a gap."""
        return min(count, (self.ram.end_at(gpa) - gpa) // size)

    def _exits(self, gpa: int, level: int, count: int) -> None:
        self.clock.advance(count * self.costs.td_exit)
        self.trace.add_later(TdExit, gpa, level, count)
