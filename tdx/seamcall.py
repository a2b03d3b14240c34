"""SEAMCALL: what the host may ask of the TDX module to change a TD's Secure EPT (TDH.* leaves).

Register form, as the host's instruction has it: RAX = leaf, RCX = GPA | level. Out: RAX = completion status; where
the status is about an entry, RCX = the entry, RDX = its level (2:0) and public state (15:8). TDH.MEM.PAGE.ADD takes
the page's contents from host memory at R9. TDR and addresses of table pages (RDX, R8) are not looked at.

    leaf                  entry before                     entry after
    TDH.MEM.PAGE.ADD      FREE, TD not finalised           MAPPED, 4 KiB
    TDH.MEM.SEPT.ADD      FREE                             NL_MAPPED
    TDH.MEM.PAGE.AUG      FREE, TD finalised               PENDING, 4 KiB or 2 MiB
    TDH.MEM.RANGE.BLOCK   NL_MAPPED, MAPPED, PENDING       NL_BLOCKED, BLOCKED, PENDING_BLOCKED
    TDH.MEM.RANGE.UNBLOCK *_BLOCKED, tracked               the state before
    TDH.MEM.PAGE.REMOVE   BLOCKED, PENDING_BLOCKED         FREE
    TDH.MEM.SEPT.REMOVE   NL_BLOCKED, nothing below        FREE
    TDH.MEM.PAGE.DEMOTE   2 MiB or 1 GiB leaf, blocked     NL_MAPPED with 512 leaves, not blocked
    TDH.MEM.PAGE.PROMOTE  NL_BLOCKED with 512 equal leaves leaf, not blocked

Source: Intel TDX Module 1.5, SEAMCALL leaf functions; src/vmm_dispatcher/api_calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from guest.clock import CostTable, VirtualClock
from guest.memory import PhysicalMemory
from guest.registers import Registers
from guest.trace import Trace
from guest.units import PAGE_SIZE
from tdx.events import SeamCall
from tdx.measurement import CHUNK_SIZE, Measurement
from tdx.sept import (
    BLOCKED_STATES,
    LEVEL_1G,
    LEVEL_2M,
    LEVEL_4K,
    LEVEL_256T,
    LEVEL_SIZE,
    MAPPED_AT,
    PENDING_AT,
    TABLE_STATES,
    SecureEpt,
    SeptEntry,
    SeptState,
)
from tdx.status import (
    TDX_EPT_ENTRY_NOT_FREE,
    TDX_EPT_ENTRY_STATE_INCORRECT,
    TDX_EPT_INVALID_PROMOTE_CONDITIONS,
    TDX_EPT_WALK_FAILED,
    TDX_GPA_RANGE_ALREADY_BLOCKED,
    TDX_GPA_RANGE_NOT_BLOCKED,
    TDX_OP_STATE_INCORRECT,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_PREVIOUS_TLB_EPOCH_BUSY,
    TDX_SUCCESS,
    TDX_TLB_TRACKING_NOT_DONE,
    OperandId,
)

RCX = OperandId.RCX


class SeamLeaf(IntEnum):
    """SEAMCALL leaf, RAX."""

    TDH_MEM_PAGE_ADD = 2
    TDH_MEM_SEPT_ADD = 3
    TDH_MEM_PAGE_AUG = 6
    TDH_MEM_RANGE_BLOCK = 7
    TDH_MEM_PAGE_DEMOTE = 15
    TDH_MR_EXTEND = 16
    TDH_MR_FINALIZE = 17
    TDH_MEM_PAGE_PROMOTE = 23
    TDH_MEM_SEPT_RD = 25
    TDH_MEM_PAGE_REMOVE = 29
    TDH_MEM_SEPT_REMOVE = 30
    TDH_MEM_TRACK = 38
    TDH_MEM_RANGE_UNBLOCK = 39

    @property
    def spec_name(self) -> str:
        """As the specification writes it: ``TDH.MEM.PAGE.AUG``."""
        return self.name.replace("_", ".")


class SeamResult(NamedTuple):
    """Outcome of a run of calls: how many succeeded, the last status, and the entry that it is about, if any."""

    done: int
    status: int
    entry: SeptEntry | None = None


_S = SeptState
_LEAVES = frozenset({_S.MAPPED, _S.BLOCKED, _S.PENDING, _S.PENDING_BLOCKED})
_BLOCK = {
    _S.NL_MAPPED: _S.NL_BLOCKED, _S.MAPPED: _S.BLOCKED, _S.BLOCKEDW: _S.BLOCKED, _S.PENDING: _S.PENDING_BLOCKED
}  # fmt: skip
_UNBLOCK = {_S.NL_BLOCKED: _S.NL_MAPPED, _S.BLOCKED: _S.MAPPED, _S.PENDING_BLOCKED: _S.PENDING}


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a call on an entry asks for: level of the entry, state, and whether the TD can run already.

    ``tracked``: of a TD that can run, the entry must be blocked, and no processor may still have a translation;
    ``untracked`` is what the status points at if one may.
    """

    levels: range
    states: frozenset[SeptState]
    runnable: bool | None = None
    tracked: bool = False
    untracked: OperandId = OperandId.RCX


_ANY_LEVEL, _TABLES, _LARGE = range(LEVEL_256T + 1), range(LEVEL_2M, LEVEL_256T + 1), range(LEVEL_2M, LEVEL_1G + 1)
_FREE = frozenset({_S.FREE})
_RULES = {
    SeamLeaf.TDH_MEM_PAGE_ADD: _Rule(range(1), _FREE, runnable=False),
    SeamLeaf.TDH_MEM_SEPT_ADD: _Rule(_TABLES, _FREE),
    SeamLeaf.TDH_MEM_PAGE_AUG: _Rule(range(LEVEL_2M + 1), _FREE, runnable=True),
    SeamLeaf.TDH_MEM_RANGE_BLOCK: _Rule(_ANY_LEVEL, frozenset(_BLOCK)),
    SeamLeaf.TDH_MEM_RANGE_UNBLOCK: _Rule(_ANY_LEVEL, BLOCKED_STATES, tracked=True, untracked=OperandId.SEPT_TREE),
    SeamLeaf.TDH_MEM_PAGE_REMOVE: _Rule(range(LEVEL_1G + 1), _LEAVES, tracked=True),
    SeamLeaf.TDH_MEM_SEPT_REMOVE: _Rule(_TABLES, TABLE_STATES, tracked=True),
    SeamLeaf.TDH_MEM_PAGE_DEMOTE: _Rule(_LARGE, _LEAVES, tracked=True),
    SeamLeaf.TDH_MEM_PAGE_PROMOTE: _Rule(_LARGE, TABLE_STATES, tracked=True),
    SeamLeaf.TDH_MEM_SEPT_RD: _Rule(_ANY_LEVEL, frozenset(_S)),
}


class TlbTracking:
    """TD epochs: whether a processor may still have a translation from before an entry was blocked."""

    def __init__(self) -> None:
        self.epoch = 1
        self._inside: dict[int, int] = {}

    def enter(self, vcpu: int) -> None:
        """A VCPU enters the TD, with nothing in its TLB that is older than this epoch."""
        self._inside[vcpu] = self.epoch

    def leave(self, vcpu: int) -> None:
        """A VCPU left the TD."""
        self._inside.pop(vcpu, None)

    def track(self) -> bool:
        """Begin a new epoch. False while a VCPU is inside that entered before this one began."""
        if self._is_inside(self.epoch - 1):
            return False
        self.epoch += 1
        return True

    def is_tracked(self, blocked_in: int) -> bool:
        """Whether no VCPU is inside that entered in the epoch ``blocked_in`` or before."""
        return blocked_in < self.epoch and not self._is_inside(blocked_in)

    def _is_inside(self, epoch: int) -> bool:
        return any(entered <= epoch for entered in self._inside.values())


class SeamCalls:
    """The TDX module's side towards the host of one TD.

    ``runnable`` is set by TDH.MR.FINALIZE: from then on pages are augmented and not added, calls take time, and what
    is taken from the guest must be blocked and tracked first. ``host_memory`` is memory of the host, by its address.
    """

    def __init__(
        self, physical: PhysicalMemory, sept: SecureEpt, trace: Trace, clock: VirtualClock, costs: CostTable,
        shared_mask: int,
    ) -> None:  # fmt: skip
        self._physical, self._sept, self._trace = physical, sept, trace
        self._clock, self._costs, self._shared_mask = clock, costs, shared_mask
        self.host_memory = PhysicalMemory()
        self.tracking = TlbTracking()
        self.measurement = Measurement()
        self.runnable = False
        self._changes: dict[int, Callable[[int, int, SeptEntry], int]] = {
            SeamLeaf.TDH_MEM_PAGE_ADD: self._page_add,
            SeamLeaf.TDH_MEM_SEPT_ADD: self._sept_add,
            SeamLeaf.TDH_MEM_PAGE_AUG: self._page_aug,
            SeamLeaf.TDH_MEM_RANGE_BLOCK: self._range_block,
            SeamLeaf.TDH_MEM_RANGE_UNBLOCK: self._range_unblock,
            SeamLeaf.TDH_MEM_PAGE_REMOVE: self._remove,
            SeamLeaf.TDH_MEM_SEPT_REMOVE: self._remove,
            SeamLeaf.TDH_MEM_PAGE_DEMOTE: self._page_demote,
            SeamLeaf.TDH_MEM_PAGE_PROMOTE: self._page_promote,
            SeamLeaf.TDH_MEM_SEPT_RD: lambda start, end, entry: TDX_SUCCESS,
        }

    def seamcall(self, regs: Registers) -> None:
        """Execute one SEAMCALL: inputs and outputs in ``regs``, completion status in RAX."""
        leaf, rcx, source = regs.rax, regs.rcx, regs.r9
        regs.rcx = regs.rdx = 0
        if leaf == SeamLeaf.TDH_MEM_TRACK:
            regs.rax = self.mem_track()
        elif leaf == SeamLeaf.TDH_MR_FINALIZE:
            regs.rax = self.mr_finalize()
        elif leaf == SeamLeaf.TDH_MR_EXTEND:
            regs.rax = self.mr_extend(rcx)
        elif leaf not in _RULES:
            regs.rax = TDX_OPERAND_INVALID | OperandId.RAX
            self._count(f"leaf {leaf:#x}", rcx, regs.rax, 1)
        else:
            result = self.run(SeamLeaf(leaf), rcx)
            regs.rax = result.status
            if result.entry is not None:
                entry = result.entry
                regs.rcx, regs.rdx = entry_bits(rcx & ~0xFFF, entry), entry.state.public << 8 | entry.level
            if leaf == SeamLeaf.TDH_MEM_PAGE_ADD and regs.rax == TDX_SUCCESS:
                self._physical.write(rcx & ~0xFFF, self.host_memory.read(source, PAGE_SIZE))
                self.measurement.page_add(rcx & ~0xFFF, (rcx & ~0xFFF) + PAGE_SIZE)

    def run(self, leaf: SeamLeaf, rcx: int, count: int = 1) -> SeamResult:
        """Call ``leaf`` up to ``count`` times with RCX growing by the page size, while it succeeds.

        The result is that of the loop of single calls, at the cost of a range. What a new page holds, and so its
        measurement, is left to the caller.
        """
        done, result = 0, SeamResult(0, TDX_SUCCESS)
        while done < count and result.status == TDX_SUCCESS:
            result = self._some(leaf, rcx + done * LEVEL_SIZE[rcx & 7] if done else rcx, count - done)
            done += result.done
        if done:
            self._count(leaf.spec_name, rcx, TDX_SUCCESS, done)
        if result.status != TDX_SUCCESS:
            self._count(leaf.spec_name, rcx + done * LEVEL_SIZE[rcx & 7] if done else rcx, result.status, 1)
        return SeamResult(done, result.status, result.entry)

    def mem_track(self) -> int:
        """TDH.MEM.TRACK: the next TD epoch begins."""
        busy = TDX_PREVIOUS_TLB_EPOCH_BUSY | OperandId.TD_EPOCH
        status = TDX_SUCCESS if self.tracking.track() else busy
        self._count(SeamLeaf.TDH_MEM_TRACK.spec_name, 0, status, 1)
        return status

    def measure(self, start: int, end: int, data: bytes | None) -> None:
        """Measure pages that ``run`` has just added; with ``data`` each was followed by TDH.MR.EXTEND of all of it."""
        self.measurement.page_add(start, end, data)
        if data is not None:
            self._count(SeamLeaf.TDH_MR_EXTEND.spec_name, start, TDX_SUCCESS, (end - start) // CHUNK_SIZE)

    def mr_extend(self, gpa: int) -> int:
        """TDH.MR.EXTEND: measure the 256 bytes at ``gpa`` of a page that was added."""
        if self.runnable:
            status = TDX_OP_STATE_INCORRECT
        elif gpa % CHUNK_SIZE or gpa >= self._shared_mask:
            status = TDX_OPERAND_INVALID | RCX
        elif self._sept.walk(gpa - gpa % PAGE_SIZE, LEVEL_4K)[2] != SeptEntry(_S.MAPPED, LEVEL_4K):
            status = TDX_EPT_WALK_FAILED | RCX
        else:
            status = TDX_SUCCESS
            self.measurement.mr_extend(gpa, self._physical.read(gpa, CHUNK_SIZE))
        self._count(SeamLeaf.TDH_MR_EXTEND.spec_name, gpa, status, 1)
        return status

    def mr_finalize(self) -> int:
        """TDH.MR.FINALIZE: the TD is built and can run."""
        status = TDX_OP_STATE_INCORRECT if self.runnable else TDX_SUCCESS
        self._count(SeamLeaf.TDH_MR_FINALIZE.spec_name, 0, status, 1)
        self.runnable = True
        return status

    def _count(self, leaf: str, rcx: int, status: int, count: int) -> None:
        self._trace.add_later(SeamCall, leaf, rcx, status, count)
        if self.runnable:
            self._clock.advance(count * self._costs.seamcall)

    def _some(self, leaf: SeamLeaf, rcx: int, count: int) -> SeamResult:
        """Do the calls that are alike, from ``rcx`` on."""
        rule, gpa, level = _RULES[leaf], rcx & ~0xFFF, rcx & 7
        if rule.runnable is not None and rule.runnable is not self.runnable:
            return SeamResult(0, TDX_OP_STATE_INCORRECT)
        if not self._is_valid(rule, rcx):
            return SeamResult(0, TDX_OPERAND_INVALID | RCX)
        size = LEVEL_SIZE[level]
        _, end, entry = self._sept.walk(gpa, level)
        if entry.level != level:
            return SeamResult(0, TDX_EPT_WALK_FAILED | RCX, entry)
        alike = min(count, (min(end, self._shared_mask) - gpa) // size)
        alike = self._sept.unlocked(gpa, level, alike)
        refusal = TDX_OPERAND_BUSY | RCX if alike == 0 else self._refusal(leaf, rule, entry)
        if refusal is not None:
            return SeamResult(0, refusal, entry)
        if leaf in _ONE_BY_ONE:
            alike = 1
        status = self._changes[leaf](gpa, gpa + alike * size, entry)
        if status != TDX_SUCCESS:
            return SeamResult(0, status, entry)
        return SeamResult(alike, TDX_SUCCESS, entry if leaf is SeamLeaf.TDH_MEM_SEPT_RD else None)

    def _is_valid(self, rule: _Rule, rcx: int) -> bool:
        level = rcx & 7
        if rcx & 0xFF8 or level not in rule.levels or level > self._sept.top:
            return False
        return (rcx & ~0xFFF) % LEVEL_SIZE[level] == 0 and rcx < self._shared_mask

    def _refusal(self, leaf: SeamLeaf, rule: _Rule, entry: SeptEntry) -> int | None:
        """Status of a call that the entry's state does not allow."""
        if entry.state not in rule.states:
            if leaf is SeamLeaf.TDH_MEM_RANGE_BLOCK and entry.state in BLOCKED_STATES:
                return TDX_GPA_RANGE_ALREADY_BLOCKED | RCX
            return TDX_EPT_ENTRY_STATE_INCORRECT | RCX
        if rule.tracked and self.runnable:
            if entry.state not in BLOCKED_STATES:
                return TDX_GPA_RANGE_NOT_BLOCKED | RCX
            if not self.tracking.is_tracked(entry.epoch):
                return TDX_TLB_TRACKING_NOT_DONE | rule.untracked
        return None

    # What each call does to the entries of [start, end), all of them like ``entry``

    def _put(self, start: int, end: int, entry: SeptEntry) -> None:
        (self._sept.put_tables if entry.state in TABLE_STATES else self._sept.put_leaves)(start, end, entry)

    def _page_add(self, start: int, end: int, entry: SeptEntry) -> int:
        self._sept.put_leaves(start, end, MAPPED_AT[LEVEL_4K])
        return TDX_SUCCESS

    def _sept_add(self, start: int, end: int, entry: SeptEntry) -> int:
        self._sept.put_tables(start, end, SeptEntry(_S.NL_MAPPED, entry.level))
        return TDX_SUCCESS

    def _page_aug(self, start: int, end: int, entry: SeptEntry) -> int:
        self._sept.put_leaves(start, end, PENDING_AT[entry.level])
        return TDX_SUCCESS

    def _range_block(self, start: int, end: int, entry: SeptEntry) -> int:
        self._put(start, end, SeptEntry(_BLOCK[entry.state], entry.level, self.tracking.epoch))
        self._sept.revoke(start, end)
        return TDX_SUCCESS

    def _range_unblock(self, start: int, end: int, entry: SeptEntry) -> int:
        self._put(start, end, SeptEntry(_UNBLOCK[entry.state], entry.level))
        return TDX_SUCCESS

    def _remove(self, start: int, end: int, entry: SeptEntry) -> int:
        """The page or the table is gone. A table must be empty."""
        free = SeptEntry(_S.FREE, entry.level)
        if entry.state not in TABLE_STATES:
            self._sept.put_leaves(start, end, free)
        elif not self._is_empty(start, end, entry.level):
            return TDX_EPT_ENTRY_NOT_FREE | RCX
        else:
            self._sept.put_tables(start, end, free)
        self._sept.revoke(start, end)
        return TDX_SUCCESS

    def _is_empty(self, start: int, end: int, level: int) -> bool:
        runs = [*self._sept.runs(start, end), *self._sept.tables(level - 1, start, end)]
        return all(child.state is _S.FREE for _, _, child in runs)

    def _page_demote(self, start: int, end: int, entry: SeptEntry) -> int:
        state = _UNBLOCK.get(entry.state, entry.state)
        self._sept.put_leaves(start, end, SeptEntry(state, entry.level - 1))
        self._sept.put_tables(start, end, SeptEntry(_S.NL_MAPPED, entry.level))
        return TDX_SUCCESS

    def _page_promote(self, start: int, end: int, entry: SeptEntry) -> int:
        """All children must be leaves of one state. Host pages are taken to be contiguous."""
        children = list(self._sept.runs(start, end))
        child = children[0][2]
        like = [SeptEntry(state, entry.level - 1) for state in (_S.MAPPED, _S.PENDING)]
        if len(children) > 1 or child not in like:
            return TDX_EPT_INVALID_PROMOTE_CONDITIONS | RCX
        self._sept.put_tables(start, end, SeptEntry(_S.FREE, entry.level))
        self._sept.put_leaves(start, end, SeptEntry(child.state, entry.level))
        return TDX_SUCCESS


_ONE_BY_ONE = frozenset({SeamLeaf.TDH_MEM_SEPT_REMOVE, SeamLeaf.TDH_MEM_PAGE_PROMOTE, SeamLeaf.TDH_MEM_SEPT_RD})
"""Calls whose result hangs on what lies below one entry, or that return one."""

_BIT_LEAF, _BIT_PENDING, _BIT_BLOCKED, _BIT_BLOCKEDW, _BIT_SVE = 1 << 7, 1 << 56, 1 << 55, 1 << 54, 1 << 63
_WRITE_BACK = 6 << 3
_RWX = {_S.MAPPED: 0b111, _S.NL_MAPPED: 0b111, _S.BLOCKEDW: 0b101}
_STATE_BITS = {
    _S.BLOCKED: _BIT_BLOCKED, _S.NL_BLOCKED: _BIT_BLOCKED, _S.BLOCKEDW: _BIT_BLOCKEDW, _S.PENDING: _BIT_PENDING,
    _S.PENDING_BLOCKED: _BIT_PENDING | _BIT_BLOCKED,
}  # fmt: skip


def permissions(state: SeptState) -> int:
    """Bits 2:0 of an entry: R, W, X."""
    return _RWX.get(state, 0)


def entry_bits(gpa: int, entry: SeptEntry) -> int:
    """The 64-bit entry for ``gpa``. Host pages of a leaf are taken to lie at the guest's own addresses.

    2:0 RWX | 5:3 memory type | 7 LEAF | 51:12 HPA, and 20:12 the accept counter | 54 TDBW | 55 TDB | 56 TDP | 63 SVE
    """
    bits = _BIT_SVE | permissions(entry.state) | _STATE_BITS.get(entry.state, 0)
    if entry.is_leaf:
        hpa = gpa - gpa % LEVEL_SIZE[entry.level]
        bits |= _BIT_LEAF | _WRITE_BACK | hpa | entry.progress << 12
    return bits
