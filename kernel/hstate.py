"""The pools of huge pages and what the command line asks for: ``hugepages=``, ``hugepagesz=``, ``default_hugepagesz=``.

Source: mm/hugetlb.c, hugepages_setup(), hugepagesz_setup(), default_hugepagesz_setup(), hugetlb_init() (6.12).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from guest.units import PMD_SIZE, SZ_1G, memparse, size_text

PARAMETERS = ("hugepages", "hugepagesz", "default_hugepagesz")
_NUMBER = re.compile(r"\s*([0-9]{1,19})")


@dataclass(slots=True)
class Hstate:
    """The pool of one size (``struct hstate``): what is asked for, and the pages that there are, all of them free.

    ``pages`` are the first page frames of those that came from the page allocator, by node; ``gigantic`` counts those
    that came from memblock, by node and zone type.
    """

    size: int
    max_huge_pages: int = 0
    max_of_node: dict[int, int] = field(default_factory=dict)
    pages: dict[int, list[int]] = field(default_factory=dict)
    gigantic: Counter[int] = field(default_factory=Counter)

    def nr_huge_pages(self, node: int | None = None) -> int:
        """Number of pages, on one node or on all."""
        nodes = {*self.pages, *self.gigantic} if node is None else {node}
        return sum(len(self.pages.get(nid, ())) + self.gigantic[nid] for nid in nodes)

    @property
    def name(self) -> str:
        """The size as string_get_size() prints it."""
        return f"{self.size // SZ_1G}.00 GiB" if self.size >= SZ_1G else f"{self.size >> 20}.00 MiB"


class Hugetlb:
    """All pools, in the order in which they were made. ``gbpages``: the processor has pages of 1 GiB."""

    def __init__(self, gbpages: bool = False, print_line: Callable[[str], None] = lambda line: None) -> None:
        self.hstates: list[Hstate] = []
        self.asked = False
        """The command line says something of huge pages."""
        self._sizes = (PMD_SIZE, SZ_1G) if gbpages else (PMD_SIZE,)
        self._print = print_line
        self._default_size = 0
        self._unnamed = Hstate(0)
        """hugepages= in front of any size: default_hstate_max_huge_pages."""
        self._parsed, self._valid = self._unnamed, True
        self._last: Hstate | None = None

    @property
    def default(self) -> Hstate:
        """The pool that /proc/meminfo shows."""
        return self.hstate(self._default_size or PMD_SIZE) or Hstate(PMD_SIZE)

    def hstate(self, size: int) -> Hstate | None:
        """The pool of pages of that size, if there is one."""
        return next((h for h in self.hstates if h.size == size), None)

    def add(self, size: int) -> None:
        """Make a pool, unless there is one (``hugetlb_add_hstate``)."""
        if self.hstate(size) is None:
            self.hstates.append(Hstate(size))
            self._parsed = self.hstates[-1]

    def parse(
        self, parameters: Iterable[tuple[str, str | None]], nodes: Iterable[int], gigantic: Callable[[Hstate], None]
    ) -> None:
        """Read the parameters in order. ``gigantic`` takes memory for a pool of pages above ``MAX_ORDER`` at once."""
        known = set(nodes)
        for name, value in parameters:
            if name not in PARAMETERS or value is None:
                continue
            self.asked = True
            if name == "hugepages":
                self._hugepages(value, known, gigantic)
            elif name == "hugepagesz":
                self._hugepagesz(value)
            else:
                self._default_hugepagesz(value, gigantic)

    def _hugepages(self, value: str, nodes: set[int], gigantic: Callable[[Hstate], None]) -> None:
        if not self._valid:
            self._valid = True
            return self._warn(f"hugepages={value} does not follow a valid hugepagesz, ignoring")
        pool = self._parsed
        if pool is self._last:
            return self._warn(
                f"hugepages= specified twice without interleaving hugepagesz=, ignoring hugepages={value}"
            )
        wrong = _read_counts(pool, value, nodes)
        if wrong is not None:
            return self._warn(f"Invalid hugepages parameter {wrong}")
        if pool.size > PMD_SIZE:
            gigantic(pool)
        self._last = pool
        return None

    def _hugepagesz(self, value: str) -> None:
        size, self._valid = memparse(value)[0], False
        if size not in self._sizes:
            return self._warn(f"unsupported hugepagesz={value}")
        pool = self.hstate(size)
        if pool is not None and (size != self._default_size or pool.max_huge_pages):
            return self._warn(f"hugepagesz={value} specified twice, ignoring")
        self.add(size)
        self._parsed, self._valid = pool or self._parsed, True
        return None

    def _default_hugepagesz(self, value: str, gigantic: Callable[[Hstate], None]) -> None:
        size, self._valid = memparse(value)[0], False
        if self._default_size:
            return self._warn(f"default_hugepagesz previously specified, ignoring {value}")
        if size not in self._sizes:
            return self._warn(f"unsupported default_hugepagesz={value}")
        self.add(size)
        self._valid, self._default_size = True, size
        if self._unnamed.max_huge_pages:
            self._take_unnamed()
            if size > PMD_SIZE:
                gigantic(self.default)
        return None

    def _take_unnamed(self) -> None:
        """Pages without a size are of the default size."""
        self.default.max_huge_pages, self.default.max_of_node = self._unnamed.max_huge_pages, self._unnamed.max_of_node
        self._unnamed = Hstate(0)

    def complete(self) -> None:
        """What hugetlb_init() does before pages are allocated: pools of all sizes, and the default one's pages."""
        for size in reversed(self._sizes):
            self.add(size)
        unnamed = self._unnamed.max_huge_pages
        if unnamed and self.default.max_huge_pages:
            self._warn(
                f"Ignoring hugepages={self.default.max_huge_pages} associated with {self.default.name} page size"
            )
            self._warn(f"Using hugepages={unnamed} for number of default huge pages")
        if unnamed:
            self._take_unnamed()

    def check_allocated(self, pool: Hstate) -> None:
        """Say it if there are less pages than were asked for, and be content with them."""
        got = pool.nr_huge_pages()
        if got < pool.max_huge_pages:
            asked, pool.max_huge_pages = pool.max_huge_pages, got
            self._warn(f"allocating {asked} of page size {pool.name} failed.  Only allocated {got} hugepages.")

    def report(self) -> None:
        """dmesg: the pools (``report_hugepages``)."""
        for pool in self.hstates:
            self._warn(f"registered {pool.name} page size, pre-allocated {pool.nr_huge_pages()} pages")
            freed = size_text((pool.size >> 12) * 64 - 4096)
            self._warn(f"{freed} vmemmap can be freed for a {pool.name} page")

    def _warn(self, text: str) -> None:
        self._print(f"HugeTLB: {text}")


def _read_counts(pool: Hstate, value: str, nodes: set[int]) -> str | None:
    """``N`` or ``NODE:N[,NODE:N...]`` into the pool; the part that is wrong, if one is. Text behind it is no matter."""
    at, total, of_node = 0, 0, {}
    while at < len(value) or not at:
        match = _NUMBER.match(value, at)
        if match is None:
            return value[at:]
        if value[match.end() : match.end() + 1] != ":":
            if at:
                return value[at:]
            pool.max_huge_pages = int(match[1])
            return None
        count = _NUMBER.match(value, match.end() + 1)
        if int(match[1]) not in nodes or count is None:
            return value[at:]
        of_node[int(match[1])] = int(count[1])
        total += int(count[1])
        at = count.end() + 1
        if value[count.end() : at] != ",":
            break
    pool.max_huge_pages, pool.max_of_node = total, of_node
    return None
