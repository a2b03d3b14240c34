"""Secure EPT: the state of every entry, leaf or table, of a TD's private memory, exact to 4 KiB, kept as ranges.

Leaves and tables are two layers. A leaf is where its level says; above it stand tables, one at every level up to the
root. A table can stand over nothing: a 2 MiB entry still points to a table after its last child was removed.
Source: Intel TDX Module 1.5, Secure EPT entry states; sept_manager.h, sept_state_lookup.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

from guest.ranges import TOP, RangeMap, RangeSet
from guest.units import PAGE_SIZE, PMD_SIZE, PUD_SIZE, round_down, round_up

LEVEL_4K, LEVEL_2M, LEVEL_1G, LEVEL_512G, LEVEL_256T = range(5)
LEVEL_SIZE = (PAGE_SIZE, PMD_SIZE, PUD_SIZE, PUD_SIZE << 9, PUD_SIZE << 18)
"""Bytes that an entry of each level covers."""
PIECES = PMD_SIZE // PAGE_SIZE
"""4 KiB pieces of a 2 MiB page, which an accept zeroes one after the other."""


class SeptState(Enum):
    """State of a Secure EPT entry: the module's own encoding, and the code that TDH.MEM.SEPT.RD shows."""

    FREE = 0x0E, 0
    """No page: the host has not backed this address."""
    NL_MAPPED = 0x00, 132
    """Points to a table of the next level."""
    NL_BLOCKED = 0x08, 129
    """Points to a table, but the whole range is blocked."""
    MAPPED = 0x60, 4
    """Accepted, or added while the TD was built: the guest can use it."""
    BLOCKED = 0x68, 1
    """Was MAPPED; the host blocked it (TDH.MEM.RANGE.BLOCK)."""
    BLOCKEDW = 0x64, 8
    """Was MAPPED; only reads are left."""
    PENDING = 0x70, 2
    """TDH.MEM.PAGE.AUG was done, the guest has not accepted."""
    PENDING_BLOCKED = 0x78, 3
    """Was PENDING; the host blocked it."""

    def __init__(self, encoding: int, public: int) -> None:
        self.encoding, self.public = encoding, public


TABLE_STATES = frozenset({SeptState.NL_MAPPED, SeptState.NL_BLOCKED})
BLOCKED_STATES = frozenset({SeptState.NL_BLOCKED, SeptState.BLOCKED, SeptState.PENDING_BLOCKED})
ACCESSIBLE_STATES = frozenset({SeptState.MAPPED, SeptState.BLOCKEDW})
"""Leaves that the guest can read, and so has accepted."""


class SeptEntry(NamedTuple):
    """An entry: its state and the level that it stands at.

    ``epoch`` is the TD epoch in which it was blocked (BEPOCH of its page). ``progress`` counts the 4 KiB pieces that
    an interrupted accept of a 2 MiB page has zeroed, 0 to 511.
    """

    state: SeptState
    level: int
    epoch: int = 0
    progress: int = 0

    @property
    def is_leaf(self) -> bool:
        """Bit 7 of the entry: it maps a page, whether the guest can use it or not."""
        return self.state is not SeptState.FREE and self.state not in TABLE_STATES


FREE = SeptEntry(SeptState.FREE, LEVEL_4K)
PENDING_AT = tuple(SeptEntry(SeptState.PENDING, level) for level in range(LEVEL_1G + 1))
MAPPED_AT = tuple(SeptEntry(SeptState.MAPPED, level) for level in range(LEVEL_1G + 1))
"""Entries of each level, as one object each: :meth:`SecureEpt.accept_next` looks for these."""
_FREE_AT = tuple(SeptEntry(SeptState.FREE, level) for level in range(len(LEVEL_SIZE)))


class SecureEpt:
    """The Secure EPT of one TD. ``gpaw`` above 48 has five levels, else it has four.

    ``on_revoke`` are called with each range that the guest may no longer use as it did: whoever remembers
    translations forgets them there.
    """

    def __init__(self, gpaw: int = 52) -> None:
        self.top = LEVEL_256T if gpaw > 48 else LEVEL_512G
        self._leaves: RangeMap[SeptEntry] = RangeMap(FREE)
        self._tables: list[RangeMap[SeptEntry]] = [RangeMap(free) for free in _FREE_AT]
        self._has_blocked_tables = False
        self._locks: set[tuple[int, int]] = set()
        self.on_revoke: list[Callable[[int, int], None]] = []

    def run_at(self, gpa: int) -> tuple[int, int, SeptEntry]:
        """The maximal run ``(start, end, entry)`` of equal leaves around ``gpa``, whatever the tables above say."""
        return self._leaves.run_at(gpa)

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, SeptEntry]]:
        """The runs of equal leaves in ``[start, end)``."""
        return self._leaves.runs(start, end)

    def tables(self, level: int, start: int, end: int) -> Iterator[tuple[int, int, SeptEntry]]:
        """The runs of equal table entries of ``level`` in ``[start, end)``; FREE is where there is no table."""
        return self._tables[level].runs(start, end)

    def mapped(self, start: int = 0, end: int = TOP) -> RangeSet:
        """The addresses of ``[start, end)`` that the guest can read."""
        runs = self._leaves.runs(start, end)
        usable = RangeSet((low, high) for low, high, entry in runs if entry.state in ACCESSIBLE_STATES)
        for tables in self._tables[LEVEL_2M:] if self._has_blocked_tables else ():
            for low, high, table in tables.runs(start, end):
                if table.state is SeptState.NL_BLOCKED:
                    usable.remove(low, high)
        return usable

    def walk(self, gpa: int, level: int) -> tuple[int, int, SeptEntry]:
        """Walk from the root to the entry of ``level`` for ``gpa``: ``(start, end, entry)``.

        The walk ends early, and ``entry.level`` is higher, at a leaf, a blocked table or where there is no table.
        Walks of the same level from any entry in ``[start, end)`` end alike.
        """
        start, end, leaf = self._leaves.run_at(gpa)
        if leaf.level >= level and leaf.state is not SeptState.FREE and not self._has_blocked_tables:
            return start, end, leaf
        low, high = 0, TOP
        for upper in range(self._lowest_table(gpa, level), level - 1, -1):
            table_start, table_end, table = self._tables[upper].run_at(gpa)
            low, high = max(low, table_start), min(high, table_end)
            if table.state is SeptState.FREE:
                break
            if upper == level or table.state is SeptState.NL_BLOCKED:
                return low, high, table
        return max(low, start), min(high, end), leaf if leaf.state is not SeptState.FREE else _FREE_AT[upper]

    def _lowest_table(self, gpa: int, level: int) -> int:
        """A level that a walk to ``level`` can begin at: tables stand above a table, and only blocked ones matter."""
        if self._has_blocked_tables:
            return self.top
        for upper in range(level + 1, self.top):
            if self._tables[upper][gpa].state is not SeptState.FREE:
                return upper
        return self.top

    # Locks: bit 11 of an entry, held by the host from one operation to another

    def lock(self, gpa: int, level: int) -> None:
        """The host holds the entry of ``level`` for ``gpa``: every other operation on it finds it busy."""
        self._locks.add((level, round_down(gpa, LEVEL_SIZE[level])))

    def unlock(self, gpa: int, level: int) -> None:
        """The host lets go of the entry."""
        self._locks.discard((level, round_down(gpa, LEVEL_SIZE[level])))

    @property
    def has_locks(self) -> bool:
        """Whether any entry is locked."""
        return bool(self._locks)

    def unlocked(self, gpa: int, level: int, count: int) -> int:
        """How many of the ``count`` entries of ``level`` from ``gpa`` on come before one that is locked."""
        if self._locks:
            size = LEVEL_SIZE[level]
            ahead = [at for lvl, at in self._locks if lvl == level and gpa <= at < gpa + count * size]
            return (min(ahead) - gpa) // size if ahead else count
        return count

    # Changes. Who makes one has checked that it is allowed: seamcall.py for the host, page_accept.py for the guest

    def put_leaves(self, start: int, end: int, entry: SeptEntry) -> None:
        """Give every leaf of ``[start, end)`` the state and level of ``entry``."""
        self._leaves.assign(start, end, entry if entry.state is not SeptState.FREE else FREE)

    def put_tables(self, start: int, end: int, entry: SeptEntry) -> None:
        """Make the entries of ``entry.level`` in ``[start, end)`` point to tables, or to none if it is FREE."""
        self._has_blocked_tables |= entry.state is SeptState.NL_BLOCKED
        self._tables[entry.level].assign(start, end, entry)

    def accept_next(self, start: int, end: int, level: int) -> bool:
        """PENDING to MAPPED for the page of ``level`` at ``start``, in the one case that is common.

        That is a page behind a MAPPED one, before a PENDING one, where no table is blocked and nothing locked. False,
        and nothing is changed, in any other.
        """
        if self._has_blocked_tables or self._locks:
            return False
        return self._leaves.move_border(start, end, PENDING_AT[level], MAPPED_AT[level])

    def revoke(self, start: int, end: int) -> None:
        """Tell whoever remembers translations."""
        for forget in self.on_revoke:
            forget(start, end)

    # Whole ranges at once, with the tables that they need

    def page_add(self, start: int, end: int) -> None:
        """FREE to MAPPED, 4 KiB pages (TDH.MEM.PAGE.ADD)."""
        self._move(start, end, SeptState.FREE, MAPPED_AT[LEVEL_4K])

    def page_aug(self, start: int, end: int, level: int) -> None:
        """FREE to PENDING, pages of ``level`` (TDH.MEM.PAGE.AUG)."""
        self._move(start, end, SeptState.FREE, PENDING_AT[level])

    def page_accept(self, start: int, end: int, level: int) -> None:
        """PENDING to MAPPED, pages of ``level`` (TDG.MEM.PAGE.ACCEPT)."""
        self._move(start, end, SeptState.PENDING, MAPPED_AT[level])

    def page_blockw(self, start: int, end: int, level: int) -> None:
        """MAPPED to BLOCKEDW, pages of ``level``, as an export of the TD begins (TDH.EXPORT.BLOCKW)."""
        self._move(start, end, SeptState.MAPPED, SeptEntry(SeptState.BLOCKEDW, level))
        self.revoke(start, end)

    def _move(self, start: int, end: int, before: SeptState, after: SeptEntry) -> None:
        for low, high, entry in self._leaves.runs(start, end):
            if entry.state is not before:
                raise ValueError(f"Secure EPT [{low:#x}, {high:#x}): found {entry.state.name}, expected {before.name}")
        self._leaves.assign(start, end, after)
        for level in range(after.level + 1, self.top + 1) if end > start else ():
            size = LEVEL_SIZE[level]
            span = round_down(start, size), round_up(end, size)
            for low, high, table in list(self._tables[level].runs(*span)):
                if table.state is SeptState.FREE:
                    self._tables[level].assign(low, high, SeptEntry(SeptState.NL_MAPPED, level))
