"""A slow, obvious Secure EPT: one value for each 4 KiB page and one for each table, one call at a time.

It is written from the specification's tables and knows nothing of ours. All addresses lie in the first 1 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAGES = 512
BLOCKS = 3
BUSY, INVALID, NOT_VALID_STATE, WALK_FAILED = 0x8000_0200 << 32, 0xC000_0100 << 32, 0xC000_0B0D << 32, 0xC000_0B00 << 32
NOT_BLOCKED, ALREADY_BLOCKED, NOT_TRACKED = 0xC000_0B06 << 32, 0x0000_0B07 << 32, 0xC000_0B08 << 32
NOT_FREE, NO_PROMOTE, OP_STATE = 0xC000_0B02 << 32, 0xC000_0B09 << 32, 0xC000_0608 << 32
ALREADY_ACCEPTED, MISMATCH, EPOCH_BUSY = 0x0000_0B0A << 32, 0xC000_0B0B << 32, 0x8000_0201 << 32
BLOCKED_OF = {"MAPPED": "BLOCKED", "PENDING": "PENDING_BLOCKED", "NL_MAPPED": "NL_BLOCKED", "BLOCKEDW": "BLOCKED"}
OPEN_OF = {"BLOCKED": "MAPPED", "PENDING_BLOCKED": "PENDING", "NL_BLOCKED": "NL_MAPPED"}


class Dead(Exception):
    """The guest died."""


@dataclass
class Page:
    """What one 4 KiB page, or one table entry, is."""

    state: str = "FREE"
    level: int = 0
    epoch: int = 0
    progress: int = 0


@dataclass
class Model:
    """``large``: the host has 2 MiB pages. ``demote``, ``unblock``: what it does about exits."""

    large: bool = True
    demote: bool = True
    unblock: bool = True
    runnable: bool = False
    epoch: int = 1
    others: list[int] = field(default_factory=list)
    """Epochs in which other processors entered that are still inside."""
    pages: list[Page] = field(default_factory=lambda: [Page() for _ in range(BLOCKS * PAGES)])
    tables: dict[tuple[int, int], Page] = field(default_factory=dict)
    locks: set[tuple[int, int]] = field(default_factory=set)
    calls: dict[tuple[str, int], int] = field(default_factory=dict)
    exits: int = 0

    # Looking

    def table(self, level: int, page: int) -> Page:
        return self.tables.setdefault((level, page // PAGES if level == 1 else 0), Page(level=level))

    def walk(self, page: int, level: int) -> Page:
        """The entry where a walk to ``level`` ends. Its level says where that is."""
        for upper in range(4, -1, -1):
            if upper == 0:
                break
            table = self.table(upper, page)
            if table.state == "NL_BLOCKED" or (table.state != "FREE" and upper == level):
                return Page(table.state, upper, table.epoch)
            if table.state == "FREE":
                break
        leaf = self.pages[page]
        return Page(leaf.state, leaf.level if leaf.state != "FREE" else upper, leaf.epoch, leaf.progress)

    def tracked(self, epoch: int) -> bool:
        return epoch < self.epoch and not any(entered <= epoch for entered in self.others)

    # Changing

    def put(self, page: int, level: int, state: str, at: int | None = None, epoch: int = 0, progress: int = 0) -> None:
        for number in range(page, page + (1, PAGES)[level]):
            free = state == "FREE"
            self.pages[number] = Page(state, 0 if free else level if at is None else at, epoch, progress)

    def call(self, name: str, page: int, level: int) -> int:
        status = self._call(name, page, level)
        self.calls[name, status] = self.calls.get((name, status), 0) + 1
        return status

    def _call(self, name: str, page: int, level: int) -> int:
        if (name == "PAGE.ADD" and self.runnable) or (name == "PAGE.AUG" and not self.runnable):
            return OP_STATE
        lowest, highest = {
            "PAGE.ADD": (0, 0), "PAGE.AUG": (0, 1), "SEPT.ADD": (1, 4), "SEPT.REMOVE": (1, 4), "PAGE.REMOVE": (0, 2),
            "PAGE.DEMOTE": (1, 2), "PAGE.PROMOTE": (1, 2), "RANGE.BLOCK": (0, 4), "RANGE.UNBLOCK": (0, 4),
        }[name]  # fmt: skip
        if not lowest <= level <= highest or page % PAGES**level:
            return INVALID | 1
        entry = self.walk(page, level)
        if entry.level != level:
            return WALK_FAILED | 1
        if (level, page) in self.locks:
            return BUSY | 1
        return self._on_entry(name, page, level, entry)

    def _on_entry(self, name: str, page: int, level: int, entry: Page) -> int:
        state = entry.state
        allowed = {
            "PAGE.ADD": ["FREE"], "PAGE.AUG": ["FREE"], "SEPT.ADD": ["FREE"], "RANGE.BLOCK": list(BLOCKED_OF),
            "RANGE.UNBLOCK": list(OPEN_OF), "PAGE.REMOVE": ["MAPPED", "BLOCKED", "PENDING", "PENDING_BLOCKED"],
            "PAGE.DEMOTE": ["MAPPED", "BLOCKED", "PENDING", "PENDING_BLOCKED"],
            "SEPT.REMOVE": ["NL_MAPPED", "NL_BLOCKED"], "PAGE.PROMOTE": ["NL_MAPPED", "NL_BLOCKED"],
        }[name]  # fmt: skip
        if state not in allowed:
            return ALREADY_BLOCKED | 1 if name == "RANGE.BLOCK" and state in OPEN_OF else NOT_VALID_STATE | 1
        if self.runnable and name in ("PAGE.REMOVE", "SEPT.REMOVE", "PAGE.DEMOTE", "PAGE.PROMOTE", "RANGE.UNBLOCK"):
            if state not in OPEN_OF:
                return NOT_BLOCKED | 1
            if not self.tracked(entry.epoch):
                return NOT_TRACKED | (146 if name == "RANGE.UNBLOCK" else 1)
        return self._do(name, page, level, state)

    def _do(self, name: str, page: int, level: int, state: str) -> int:
        if name == "PAGE.ADD":
            self.put(page, 0, "MAPPED")
        elif name == "PAGE.AUG":
            self.put(page, level, "PENDING")
        elif name == "SEPT.ADD":
            self.tables[level, page // PAGES if level == 1 else 0] = Page("NL_MAPPED", level)
        elif name in ("RANGE.BLOCK", "RANGE.UNBLOCK"):
            new = (BLOCKED_OF if name == "RANGE.BLOCK" else OPEN_OF)[state]
            epoch = self.epoch if name == "RANGE.BLOCK" else 0
            if state.startswith("NL"):
                self.tables[level, page // PAGES if level == 1 else 0] = Page(new, level, epoch)
            else:
                self.put(page, level, new, epoch=epoch)
        elif name == "PAGE.REMOVE":
            self.put(page, level, "FREE")
        elif name == "PAGE.DEMOTE":
            self.put(page, 1, OPEN_OF.get(state, state), at=0)
            self.tables[1, page // PAGES] = Page("NL_MAPPED", 1)
        elif name == "SEPT.REMOVE":
            return self._remove_table(page, level)
        elif name == "PAGE.PROMOTE":
            return self._promote(page, level)
        return 0

    def _remove_table(self, page: int, level: int) -> int:
        below = self.pages[page : page + PAGES] if level == 1 else self.pages
        tables = [table for (at, _), table in self.tables.items() if at == level - 1 and level > 1]
        if any(child.state != "FREE" for child in [*below, *tables]):
            return NOT_FREE | 1
        self.tables[level, page // PAGES if level == 1 else 0] = Page(level=level)
        return 0

    def _promote(self, page: int, level: int) -> int:
        children = self.pages[page : page + PAGES]
        alike = {child.state for child in children} in ({"MAPPED"}, {"PENDING"})
        if level != 1 or not alike:  # the model has no whole 1 GiB
            return NO_PROMOTE | 1
        self.tables[1, page // PAGES] = Page(level=1)
        self.put(page, 1, children[0].state)
        return 0

    def track(self) -> int:
        status = EPOCH_BUSY | 169 if any(entered < self.epoch for entered in self.others) else 0
        self.epoch += status == 0
        self.calls["TRACK", status] = self.calls.get(("TRACK", status), 0) + 1
        return status

    # The guest

    def accept(self, page: int, level: int) -> int:
        """One TDG.MEM.PAGE.ACCEPT, with all the TD exits on its way."""
        if level > 1 or page % (1, PAGES)[level]:
            return INVALID | 1
        for number in range(17):
            entry = self.walk(page, level)
            if entry.level == level and (level, page) in self.locks:
                return BUSY | 1
            if entry.level == level and entry.state.startswith("NL"):
                return MISMATCH | level
            if entry.state in ("MAPPED", "BLOCKEDW"):
                return ALREADY_ACCEPTED | entry.level
            if entry.level == level and entry.state == "PENDING":
                self.put(page, level, "MAPPED")
                return 0
            if number < 16:
                self.answer(page, level, entry)
        raise Dead

    def answer(self, page: int, level: int, entry: Page) -> None:
        """What the host does about an exit, by the book of KVM."""
        self.exits += 1
        base = page if entry.level == 0 else page // PAGES * PAGES if entry.level == 1 else 0
        if entry.state == "FREE":
            level = level if self.large else 0
            for upper in range(4, level, -1):
                if self.table(upper, page).state == "FREE":
                    self.call("SEPT.ADD", (page // PAGES * PAGES) if upper == 1 else 0, upper)
            self.call("PAGE.AUG", page, level)
        elif entry.state == "PENDING":
            if self.demote:
                self.call("RANGE.BLOCK", base, entry.level)
                self.track()
                self.call("PAGE.DEMOTE", base, entry.level)
        elif self.unblock:
            if entry.state == "BLOCKEDW":
                self.call("RANGE.BLOCK", base, entry.level)
            if entry.state == "BLOCKEDW" or not self.tracked(entry.epoch):
                self.track()
            self.call("RANGE.UNBLOCK", base, entry.level)

    def access(self, page: int, kind: str) -> str | None:
        """One access to one page: None if it went well, else the state that killed the guest."""
        for number in range(18):
            entry = self.walk(page, 0)
            if entry.state == "MAPPED" or (entry.state == "BLOCKEDW" and kind == "read"):
                return None
            if entry.state == "PENDING":
                return "PENDING (not accepted)"
            if number == 16:
                return entry.state
            self.answer(page, 0, entry)
            if entry.state == "FREE":
                return "FREE (not accepted)"
        raise AssertionError("unreachable")
