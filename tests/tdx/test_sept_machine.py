"""Secure EPT under random work of host and guest, against a slow model with one value for each page."""

from __future__ import annotations

from itertools import groupby

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from guest.errors import MemoryFault
from guest.registers import Registers
from guest.units import PAGE_SIZE
from tdx.backing import Backing
from tdx.seamcall import SeamLeaf
from tests.tdx.conftest import build_td
from tests.tdx.sept_model import BLOCKS, PAGES, Dead, Model

END = BLOCKS * PAGES * PAGE_SIZE
CALLS = {
    leaf.spec_name.removeprefix("TDH.MEM."): leaf
    for leaf in SeamLeaf
    if leaf.spec_name.startswith("TDH.MEM.") and leaf not in (SeamLeaf.TDH_MEM_TRACK, SeamLeaf.TDH_MEM_SEPT_RD)
}
blocks = st.integers(0, BLOCKS - 1)
offsets = st.sampled_from([0, 0, 0, 1, 2, 256, 511])
levels = st.sampled_from([0, 0, 1, 1, 1, 2])
counts = st.sampled_from([1, 1, 1, 2, 3, PAGES])
large_calls = st.sampled_from(["RANGE.BLOCK", "RANGE.UNBLOCK", "PAGE.DEMOTE", "PAGE.PROMOTE", "PAGE.AUG", "SEPT.ADD"])


class SeptMachine(RuleBasedStateMachine):
    """Every step is done on ours and on the model; then both must look the same."""

    @initialize(large=st.booleans(), demote=st.booleans(), unblock=st.booleans(), built=st.booleans())
    def make(self, large: bool, demote: bool, unblock: bool, built: bool) -> None:
        """A TD with a policy of its host; some begin before they are finalised."""
        self.td = build_td(((0, END),), page_level=Backing(int(large)), running=False)
        self.td.host.demote, self.td.host.unblock = demote, unblock
        self.model = Model(large, demote, unblock)
        if built:
            self.finalize()

    @precondition(lambda self: not self.model.runnable)
    @rule()
    def finalize(self) -> None:
        """TDH.MR.FINALIZE."""
        self.td.host.finalize()
        self.model.runnable = True

    def _calls(self, name: str, page: int, level: int, count: int) -> None:
        count = min(count, (BLOCKS * PAGES - page) // PAGES**level) or 1
        done, status, _ = self.td.host.seam.run(CALLS[name], page * PAGE_SIZE | level, count)
        wanted, times = 0, 0
        while times < count:
            wanted = self.model.call(name, page + times * PAGES**level, level)
            if wanted:
                break
            times += 1
        assert (done, hex(status)) == (times, hex(wanted))

    @rule(name=st.sampled_from(sorted(CALLS)), block=blocks, offset=offsets, level=levels, count=counts)
    def any_call(self, name: str, block: int, offset: int, level: int, count: int) -> None:
        """The host makes any call on any entry, also where it makes no sense."""
        self._calls(name, block * PAGES + offset, level, count)

    @rule(name=large_calls, block=blocks)
    def large_call(self, name: str, block: int) -> None:
        """The host makes a call on a 2 MiB entry."""
        self._calls(name, block * PAGES, 1, 1)

    @rule(level=st.integers(2, 4), name=st.sampled_from(["RANGE.BLOCK", "RANGE.UNBLOCK", "SEPT.REMOVE", "SEPT.ADD"]))
    def table_call(self, name: str, level: int) -> None:
        """The host makes a call on a table of a higher level."""
        self._calls(name, 0, level, 1)

    @rule(block=blocks, undo=st.booleans())
    def block_and_track(self, block: int, undo: bool) -> None:
        """What takes a whole 2 MiB entry away from the guest, and gives it back."""
        for name in ("RANGE.BLOCK", None, "RANGE.UNBLOCK" if undo else "PAGE.REMOVE"):
            if name is None:
                self.track()
            else:
                self._calls(name, block * PAGES, 1, 1)

    @rule()
    def track(self) -> None:
        """TDH.MEM.TRACK, from the host while the guest's one processor is outside."""
        tracking = self.td.host.seam.tracking
        tracking.leave(0)
        status = self.td.host.seam.mem_track()
        if self.model.runnable:
            tracking.enter(0)
        assert status == self.model.track()

    @rule()
    def another_vcpu(self) -> None:
        """A second processor enters, or leaves."""
        tracking = self.td.host.seam.tracking
        if self.model.others:
            tracking.leave(1)
            self.model.others.clear()
        else:
            tracking.enter(1)
            self.model.others.append(self.model.epoch)

    @rule(block=blocks, offset=offsets, level=st.integers(0, 1))
    def lock(self, block: int, offset: int, level: int) -> None:
        """The host takes the lock of an entry, or lets go of all locks."""
        page = block * PAGES + offset * (level == 0)
        if self.model.locks:
            for locked_level, locked in self.model.locks:
                self.td.sept.unlock(locked * PAGE_SIZE, locked_level)
            self.model.locks.clear()
        else:
            self.td.sept.lock(page * PAGE_SIZE, level)
            self.model.locks.add((level, page))

    @precondition(lambda self: self.model.runnable)
    @rule(block=blocks, offset=offsets, level=st.sampled_from([0, 1, 1]), count=counts)
    def accept(self, block: int, offset: int, level: int, count: int) -> None:
        """The guest accepts a run of pages."""
        page = block * PAGES + (offset if level == 0 else 0)
        count = min(count, (BLOCKS * PAGES - page) // PAGES**level)
        regs = Registers(rax=6, rcx=page * PAGE_SIZE | level)
        try:
            done: object = (self.td.module.tdcall_run(regs, PAGES**level * PAGE_SIZE, count), regs.rax)
        except MemoryFault as fault:
            assert "16 TD exits" in str(fault)
            done = None
        assert done == self._model_accepts(page, level, count)

    def _model_accepts(self, page: int, level: int, count: int) -> object:
        try:
            for times in range(count):
                status = self.model.accept(page + times * PAGES**level, level)
                if status:
                    return times, status
        except Dead:
            return None
        return count, 0

    @precondition(lambda self: self.model.runnable)
    @rule(block=blocks, offset=offsets, write=st.booleans())
    def access(self, block: int, offset: int, write: bool) -> None:
        """The guest reads or writes a byte."""
        page = block * PAGES + offset
        memory = self.td.machine.memory
        memory.flush()
        found = None
        try:
            memory.write(page * PAGE_SIZE, b"x") if write else memory.read(page * PAGE_SIZE, 1)
        except MemoryFault as fault:
            found = fault.state
        assert found == self.model.access(page, "write" if write else "read")

    @invariant()
    def looks_the_same(self) -> None:
        """State, level and epoch of every page and table; calls and exits by number."""
        if not hasattr(self, "td"):
            return
        want, at = [], 0
        for key, pages in groupby((p.state, p.level, p.epoch) for p in self.model.pages):
            start, at = at, at + sum(1 for _ in pages)
            want.append((start * PAGE_SIZE, at * PAGE_SIZE, *key))
        runs = self.td.sept.runs(0, END)
        assert [(low, high, e.state.name, e.level, e.epoch) for low, high, e in runs] == want
        for level in range(1, 5):
            for page in range(0, BLOCKS * PAGES if level == 1 else 1, PAGES):
                start = page * PAGE_SIZE
                ((_, _, entry),) = self.td.sept.tables(level, start, start + PAGE_SIZE)
                table = self.model.table(level, page)
                assert (entry.state.name, entry.epoch) == (table.state, table.epoch)
        found = {(leaf.removeprefix("TDH.MEM."), status): n for (leaf, status), n in self.td.seamcalls().items()}
        found.pop(("TDH.MR.FINALIZE", 0), None)
        assert found == self.model.calls
        assert self.td.exits().total() == self.model.exits


SeptMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=50, deadline=None)
TestSeptMachine = SeptMachine.TestCase
