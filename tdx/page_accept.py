"""TDG.MEM.PAGE.ACCEPT: RCX = GPA | level (0 = 4 KiB, 1 = 2 MiB). Out: RAX only.

    the walk ended                entry                         RAX
    above the requested level     MAPPED, BLOCKEDW              ALREADY_ACCEPTED | level reached
                                  any other                     TD exit
    at the requested level        locked                        OPERAND_BUSY | RCX
                                  NL_MAPPED, NL_BLOCKED         PAGE_SIZE_MISMATCH | level
                                  MAPPED, BLOCKEDW              ALREADY_ACCEPTED | level
                                  PENDING                       SUCCESS; the page is zero and MAPPED
                                  FREE, BLOCKED, PENDING_BLOCKED  TD exit

After a TD exit the same instruction runs again and looks again. The accept of a 2 MiB page zeroes 512 pieces and can
be interrupted after each; it goes on from there when the guest comes back to it. The guest sees neither.
Source: Intel TDX Module 1.5, TDG.MEM.PAGE.ACCEPT; src/td_dispatcher/vm_exits/tdg_mem_page_accept.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from guest.clock import CostTable, VirtualClock
from guest.memory import PhysicalMemory
from guest.registers import Registers
from guest.trace import Trace
from guest.units import PAGE_SIZE
from tdx.events import AcceptInterrupted, TdCall
from tdx.leaves import Leaf
from tdx.sept import (
    ACCESSIBLE_STATES,
    LEVEL_2M,
    LEVEL_SIZE,
    MAPPED_AT,
    PIECES,
    TABLE_STATES,
    SecureEpt,
    SeptEntry,
    SeptState,
)
from tdx.status import (
    OPERAND_ID_RCX,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_PAGE_ALREADY_ACCEPTED,
    TDX_PAGE_SIZE_MISMATCH,
    TDX_SUCCESS,
)
from tdx.td_exit import MAX_EXITS, EptViolation, unresolved
from tdx.vmm import Host

if TYPE_CHECKING:
    from tdx.inject import Injector

_INVALID = TDX_OPERAND_INVALID | OPERAND_ID_RCX
_NAME = Leaf.TDG_MEM_PAGE_ACCEPT.spec_name


class Interrupts(Protocol):
    """The interrupts of a guest while it accepts."""

    def pieces_until(self, gpa: int, progress: int) -> int:
        """How many more 4 KiB pieces of the page at ``gpa`` are zeroed before an interrupt is pending, 1 or more."""
        ...

    def taken(self) -> None:
        """The guest takes the interrupt; whatever else happens meanwhile happens here."""
        ...


class PageAccept:
    """The accepting of pages of one TD. Without ``interrupts`` nothing interrupts it."""

    def __init__(
        self, physical: PhysicalMemory, sept: SecureEpt, host: Host, trace: Trace, clock: VirtualClock,
        costs: CostTable, shared_mask: int,
    ) -> None:  # fmt: skip
        self._physical, self._sept, self._host = physical, sept, host
        self._trace, self._clock, self._costs = trace, clock, costs
        self._shared_mask = shared_mask
        self._exits = 0
        self._zero_already = 0
        self.interrupts: Interrupts | None = None
        self.injector: Injector | None = None
        """The faults that meet accepts, if any."""
        pages = (size // PAGE_SIZE for size in LEVEL_SIZE[: LEVEL_2M + 1])
        self._success_ns = [costs.tdcall + count * costs.zero_4k for count in pages]

    def tdcall(self, regs: Registers) -> bool:
        """One TDCALL in the common case, the next page behind those accepted; False, and nothing is done, in others."""
        rcx = regs.rcx
        level = rcx & 0xFFF
        if level > LEVEL_2M or self.interrupts is not None or self.injector is not None:
            return False
        gpa, size = rcx - level, LEVEL_SIZE[level]
        end = gpa + size
        if gpa % size or end > self._shared_mask or not self._sept.accept_next(gpa, end, level):
            return False
        self._physical.clear(gpa, end)
        self._trace.add_later(TdCall, _NAME, rcx, TDX_SUCCESS, 1)
        self._clock.ns += self._success_ns[level]
        regs.rax = TDX_SUCCESS
        return True

    def tdcall_run(self, regs: Registers, step: int, count: int) -> int:
        """TDCALL up to ``count`` times with RCX growing by ``step``, while it succeeds; see ``Platform``."""
        rcx, level = regs.rcx, regs.rcx & 7
        if regs.rax != Leaf.TDG_MEM_PAGE_ACCEPT or (count > 1 and step not in LEVEL_SIZE[level : level + 1]):
            raise ValueError("a run of TDCALLs must be TDG.MEM.PAGE.ACCEPT of neighbouring pages")
        if self.injector is None:
            done, status = self._accept(rcx, count)
        else:
            done, status = self.injector.accept_run(self._accept, rcx, step, count)
        if status != TDX_SUCCESS:
            self._count(rcx + done * step, status, 1)
        regs.rax, regs.rcx = status, rcx + step * (done if status != TDX_SUCCESS else done - 1)
        return done

    def _accept(self, rcx: int, count: int) -> tuple[int, int]:
        """Accept up to ``count`` pages: how many succeeded, and the last status."""
        gpa, level = rcx & ~0xFFF, rcx & 7
        if rcx & 0xFF8 or level > LEVEL_2M or gpa % LEVEL_SIZE[level] or gpa >= self._shared_mask:
            return 0, _INVALID
        size = LEVEL_SIZE[level]
        valid = min(count, (self._shared_mask - gpa) // size)
        done, status, self._exits = 0, TDX_SUCCESS, 0
        try:
            while done < valid and status == TDX_SUCCESS:
                accepted, status = self._accept_some(gpa + done * size, level, valid - done)
                done += accepted
        finally:  # what succeeded counts, even if the next page is fatal
            if done:
                self._count(rcx, TDX_SUCCESS, done)
        return done, _INVALID if status == TDX_SUCCESS and done < count else status

    def _accept_some(self, gpa: int, level: int, count: int) -> tuple[int, int]:
        """Accept what is alike from ``gpa`` on. (0, TDX_SUCCESS) means: the instruction runs again."""
        _, end, entry = self._sept.walk(gpa, level)
        alike = min(count, (end - gpa) // LEVEL_SIZE[level])
        if entry.level == level:
            alike = self._sept.unlocked(gpa, level, alike)
            if alike == 0:
                return 0, TDX_OPERAND_BUSY | OPERAND_ID_RCX
            if entry.state is SeptState.PENDING:
                return self._zero(gpa, alike, entry), TDX_SUCCESS
            if entry.state in TABLE_STATES:
                return 0, TDX_PAGE_SIZE_MISMATCH | level
        if entry.state in ACCESSIBLE_STATES:
            return 0, TDX_PAGE_ALREADY_ACCEPTED | entry.level
        self._exits += 1
        if self._exits > MAX_EXITS:
            raise unresolved(self._trace.stage, gpa, LEVEL_SIZE[level], "accept", entry.state.name)
        self._host.ept_violation(EptViolation(gpa, "accept", entry, level), alike)
        return 0, TDX_SUCCESS

    def _zero(self, gpa: int, count: int, entry: SeptEntry) -> int:
        """Zero ``count`` PENDING pages from ``gpa`` on and make them MAPPED; returns how many were finished."""
        if entry.level == LEVEL_2M and (entry.progress or self.interrupts is not None):
            if self._is_interrupted(gpa, entry):
                return 0
            count = 1
        end = gpa + count * LEVEL_SIZE[entry.level]
        self._physical.clear(gpa + entry.progress * PAGE_SIZE, end)
        self._sept.put_leaves(gpa, end, MAPPED_AT[entry.level])
        self._zero_already += entry.progress
        self._exits = 0
        return count

    def _is_interrupted(self, gpa: int, entry: SeptEntry) -> bool:
        """Zero the pieces of one 2 MiB page up to the next interrupt. False: none comes before the last piece."""
        if self.interrupts is None:
            return False
        progress = entry.progress + max(1, self.interrupts.pieces_until(gpa, entry.progress))
        if progress >= PIECES:
            return False
        self._physical.clear(gpa + entry.progress * PAGE_SIZE, gpa + progress * PAGE_SIZE)
        self._sept.put_leaves(gpa, gpa + LEVEL_SIZE[LEVEL_2M], entry._replace(progress=progress))
        self._trace.add(AcceptInterrupted(gpa, progress))
        self._clock.advance(self._costs.tdcall + (progress - entry.progress) * self._costs.zero_4k)
        self.interrupts.taken()
        return True

    def _count(self, rcx: int, status: int, count: int) -> None:
        """Put ``count`` accepts with one status, the first of them of ``rcx``, into trace and time."""
        pages = 0
        if status == TDX_SUCCESS:
            pages = count * LEVEL_SIZE[rcx & 7] // PAGE_SIZE - self._zero_already
            self._zero_already = 0
        self._trace.add_later(TdCall, _NAME, rcx, status, count)
        self._clock.advance(count * self._costs.tdcall + pages * self._costs.zero_4k)
