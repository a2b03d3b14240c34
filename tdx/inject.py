"""What the host does to a guest by the rules of faults.py. Without rules none of this is there.

The module asks before each run of accepts, the host before each TDG.VP.VMCALL and after each TD exit. Where a rule
meets a call inside a run, the run is cut before and behind that call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from math import log
from random import Random

from guest.ranges import RangeSet
from guest.registers import Registers
from guest.trace import Trace
from guest.units import PAGE_SIZE, U64_MAX, round_down
from tdx.events import FaultInjected
from tdx.faults import KINDS, Place, Rule
from tdx.leaves import SubFunction, VmCallStatus
from tdx.page_accept import PageAccept
from tdx.seamcall import SeamLeaf
from tdx.sept import LEVEL_4K, LEVEL_SIZE, PIECES, SeptState
from tdx.status import OPERAND_ID_RCX, TDX_OPERAND_BUSY, TDX_SUCCESS
from tdx.td_exit import EptViolation
from tdx.vmm import Host

_VCPU = 0
_RESULTS = ("r11", "r12", "r13", "r14", "r15", "rdx", "rbx", "rsi", "rdi", "r8", "r9")
_ATTACKS = frozenset({"replay", "remove", "block", "block-unblock"})

Accept = Callable[[int, int], tuple[int, int]]
"""``accept(rcx, count)``: pages accepted, and the last status."""


class _Armed:
    """A rule with its memory: how often it can still happen, and which calls its generator has chosen."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.left = rule.times
        self._random = Random(rule.seed)
        self._chosen = [0]

    def ahead(self, first: int, number: int, count: int) -> int | None:
        """How many of the calls ``number`` to ``number + count - 1`` come before one that the rule may meet.

        ``first`` is the number from which on the rule may meet calls at all.
        """
        asked = max(number, first)
        meets = asked if self.rule.p is None else self._choose(asked, number)
        return meets - number if meets < number + count else None

    def _choose(self, asked: int, number: int) -> int:
        """The first call from ``asked`` on that the generator chooses; what lies before ``number`` is forgotten."""
        p, chosen = self.rule.p or 1.0, self._chosen
        while chosen[-1] < asked:
            gap = 1 if p == 1 else 1 + int(log(1 - self._random.random()) / log(1 - p))
            chosen.append(chosen[-1] + gap)
        del chosen[: bisect_left(chosen, number)]
        return chosen[bisect_left(chosen, asked)]


class Injector:
    """The rules at work. It puts itself under ``page_accept`` and ``host``."""

    def __init__(self, rules: Iterable[Rule], page_accept: PageAccept, host: Host, trace: Trace) -> None:
        self._rules = [_Armed(rule) for rule in rules if rule.place is not Place.HOB]
        self._page_accept, self._host, self._trace = page_accept, host, trace
        self._accepts = self._vmcalls = self._mapgpas = 0
        self._kept = RangeSet()
        page_accept.injector = host.injector = self

    def accept_run(self, accept: Accept, rcx: int, step: int, count: int) -> tuple[int, int]:
        """``accept(rcx, count)``, cut where a rule meets a call."""
        done, status = 0, TDX_SUCCESS
        while done < count and status == TDX_SUCCESS:
            at = rcx + done * step
            clear, armed = self._next_accept(at, count - done)
            if armed is not None and clear == 0:
                armed.left -= 1
                accepted, status = self._faulty_accept(armed.rule, accept, at)
            else:
                accepted, status = accept(at, clear)
            self._accepts += accepted + (status != TDX_SUCCESS)
            done += accepted
        return done, status

    def vmcall(self, answer: Callable[[Registers], int], regs: Registers) -> int:
        """``answer(regs)``, what goes into R10, unless a rule meets the call."""
        is_map = regs.r10 == 0 and regs.r11 == SubFunction.MapGPA
        self._vmcalls += 1
        self._mapgpas += is_map
        for armed in self._rules:
            if self._meets_vmcall(armed, regs, is_map):
                armed.left -= 1
                self._trace.add(FaultInjected(armed.rule.kind, regs.r12 if is_map else regs.r11))
                return self._faulty_vmcall(armed.rule, answer, regs)
        return answer(regs)

    def keeps(self, exit: EptViolation) -> bool:
        """Whether the host leaves the exit as it is: the guest is to fault again."""
        return exit.gpa in self._kept

    def _next_accept(self, rcx: int, count: int) -> tuple[int, _Armed | None]:
        """Calls before the first that a rule meets, and that rule; all ``count`` of them, and none."""
        nearest, found = count, None
        for armed in self._rules:
            ahead = self._accept_ahead(armed, rcx, nearest)
            if ahead is not None and (found is None or ahead < nearest):
                nearest, found = ahead, armed
        return nearest, found

    def _accept_ahead(self, armed: _Armed, rcx: int, count: int) -> int | None:
        """Calls of this run before the first that the rule meets; None if it meets none of them."""
        rule, gpa, level = armed.rule, rcx & ~0xFFF, rcx & 7
        if rule.place is not Place.ACCEPT or level not in KINDS[rule.kind].levels or not self._may(armed):
            return None
        number, size, skip = self._accepts + 1, LEVEL_SIZE[level], 0
        if rule.gpa is not None:
            skip = max(0, (rule.gpa.start - gpa) // size)
            count = min(count, -(-(rule.gpa.end - gpa) // size))
        if skip >= count:
            return None
        return armed.ahead(max(number + skip, rule.accept or 0), number, count)

    def _may(self, armed: _Armed) -> bool:
        return armed.left > 0 and armed.rule.stage in (None, self._trace.stage)

    def _meets_vmcall(self, armed: _Armed, regs: Registers, is_map: bool) -> bool:
        rule = armed.rule
        if rule.place is Place.ACCEPT or (rule.place is Place.MAPGPA and not is_map) or not self._may(armed):
            return False
        if rule.mapgpa is not None and not (is_map and self._mapgpas >= rule.mapgpa):
            return False
        if rule.gpa is not None:
            start = regs.r12 & ~self._host.shared_mask
            if not start < rule.gpa.end or not rule.gpa.start < start + regs.r13:
                return False
        return armed.ahead(rule.tdvmcall or 0, self._vmcalls, 1) == 0

    def _faulty_accept(self, rule: Rule, accept: Accept, rcx: int) -> tuple[int, int]:
        """One accept as the rule has it."""
        gpa, size = rcx & ~0xFFF, LEVEL_SIZE[rcx & 7]
        self._trace.add(FaultInjected(rule.kind, gpa))
        if rule.kind == "busy":
            return 0, TDX_OPERAND_BUSY | OPERAND_ID_RCX
        if rule.kind == "size-mismatch":
            entry = self._host.sept.walk(gpa, LEVEL_4K)[2]
            if entry.state in (SeptState.FREE, SeptState.PENDING):
                self._host.ept_violation(EptViolation(gpa, "accept", entry, LEVEL_4K))
        if rule.kind == "withhold":
            self._kept.add(gpa, gpa + size)
        if rule.kind in ("interrupt", "interrupt-block"):
            self._page_accept.interrupts = _Interrupt(self._host, rcx, rule)
        accepted, status = accept(rcx, 1)
        self._page_accept.interrupts = None
        if rule.kind in _ATTACKS and status == TDX_SUCCESS:
            self._take_away(rule.kind, rcx)
        return accepted, status

    def _take_away(self, kind: str, rcx: int) -> None:
        """Take the page of an accept from the guest, in the order that the module asks for."""
        seam, gpa = self._host.seam, rcx & ~0xFFF
        seam.run(SeamLeaf.TDH_MEM_RANGE_BLOCK, rcx)
        if kind == "block":
            self._kept.add(gpa, gpa + LEVEL_SIZE[rcx & 7])
        if kind in ("remove", "replay"):
            seam.tracking.leave(_VCPU)
            seam.mem_track()
            seam.run(SeamLeaf.TDH_MEM_PAGE_REMOVE, rcx)
            if kind == "replay":
                seam.run(SeamLeaf.TDH_MEM_PAGE_AUG, rcx)
            seam.tracking.enter(_VCPU)

    def _faulty_vmcall(self, rule: Rule, answer: Callable[[Registers], int], regs: Registers) -> int:
        """One TDG.VP.VMCALL as the rule has it."""
        start, size = regs.r12, regs.r13
        half = round_down(size // 2, PAGE_SIZE)
        match rule.kind:
            case "mapgpa-refuse" | "mapgpa-stuck":
                regs.r11 = start
                return VmCallStatus.RETRY if rule.kind == "mapgpa-stuck" else VmCallStatus.INVALID_OPERAND
            case "mapgpa-retry" | "mapgpa-partial":
                regs.r13 = half
                answer(regs)
                regs.r13 = size
                regs.r11 = start + half if rule.kind == "mapgpa-retry" else 0
                return VmCallStatus.RETRY if rule.kind == "mapgpa-retry" else VmCallStatus.SUCCESS
            case "registers":
                status = answer(regs)
                random = Random(self._vmcalls ^ rule.seed)
                for name in _RESULTS:
                    setattr(regs, name, random.getrandbits(64) & U64_MAX)
                return status
        answer(regs)
        return rule.argument


class _Interrupt:
    """One interrupt in the accept of one page, and what the host does meanwhile."""

    def __init__(self, host: Host, rcx: int, rule: Rule) -> None:
        self._host, self._rcx, self._rule = host, rcx, rule
        self._left = 1

    def pieces_until(self, gpa: int, progress: int) -> int:
        return self._rule.argument if self._left else PIECES

    def taken(self) -> None:
        self._left = 0
        if self._rule.kind == "interrupt-block":
            seam = self._host.seam
            seam.run(SeamLeaf.TDH_MEM_RANGE_BLOCK, self._rcx)
            seam.tracking.leave(_VCPU)
            seam.mem_track()
            seam.run(SeamLeaf.TDH_MEM_RANGE_UNBLOCK, self._rcx)
            seam.tracking.enter(_VCPU)
