"""What the kernel puts into the trace beside its log."""

from __future__ import annotations

from dataclasses import dataclass

from guest.trace import Event

STRUCT_PAGE_SIZE = 64
VMEMMAP_BASE = 0xFFFFEA0000000000
"""Virtual address of the struct page of page frame 0, with four levels of page tables and without KASLR."""


@dataclass(frozen=True, slots=True)
class FileRead(Event):
    """A read of a file in /proc: its whole text."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class FileWrite(Event):
    """A write to a file in /sys; ``result`` is the number of characters taken or a negative errno."""

    path: str
    text: str
    result: int


@dataclass(frozen=True, slots=True)
class MemoryRead(Event):
    """A reader went through ``ranges`` ranges: bytes that it touched, and bytes that it gave zeros for."""

    reader: str
    ranges: int
    touched: int
    zeros: int


@dataclass(frozen=True, slots=True)
class CommandResult(Event):
    """What the kernel answered to a command: 0 or a negative errno, and why if it says so."""

    command: str
    result: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MemoryAdded(Event):
    """The host added RAM and the kernel took it over; ``accepted`` if its driver accepted it before."""

    start: int
    end: int
    accepted: bool


@dataclass(frozen=True, slots=True)
class ParallelAllocation(Event):
    """``cpus`` allocated side by side: blocks in all, as of :class:`Allocation`, and how long that took."""

    cpus: str
    order: int
    count: int
    wanted: int
    accepted_pages: int
    ns: int


@dataclass(frozen=True, slots=True)
class Allocation(Event):
    """``count`` allocations of 2^order pages succeeded out of ``wanted``; ``accepted_pages`` became accepted."""

    order: int
    count: int
    wanted: int
    accepted_pages: int


@dataclass(frozen=True, slots=True)
class MmPageAllocExtfrag(Event):
    """A request took pages of another migrate type: ``mm_page_alloc_extfrag`` (include/trace/events/kmem.h)."""

    pfn: int
    alloc_order: int
    fallback_order: int
    pageblock_order: int
    alloc_migratetype: int
    fallback_migratetype: int
    fragmenting: bool
    change_ownership: bool

    @property
    def text(self) -> str:
        """The line of the trace buffer; ``page`` is the address of the struct page in the kernel's memory map."""
        return (
            f"page={VMEMMAP_BASE + self.pfn * STRUCT_PAGE_SIZE:016x} pfn={self.pfn:#x} alloc_order={self.alloc_order} "
            f"fallback_order={self.fallback_order} pageblock_order={self.pageblock_order} "
            f"alloc_migratetype={self.alloc_migratetype} fallback_migratetype={self.fallback_migratetype} "
            f"fragmenting={self.fragmenting:d} change_ownership={self.change_ownership:d}"
        )


@dataclass(frozen=True, slots=True)
class OutOfMemory(Event):
    """A request that reclaim could not help: who was killed for it, empty if there was nobody (``out_of_memory``).

    ``unaccepted_pages`` waited then in the zones that it may use.
    """

    gfp: int
    order: int
    victim: str
    unaccepted_pages: int


@dataclass(frozen=True, slots=True)
class EndlessReclaim(Event):
    """kswapd or a request reclaimed for so many rounds that it would go on for ever, beside unaccepted memory."""

    who: str
    rounds: int
    reclaimed: int
    unaccepted_pages: int


@dataclass(frozen=True, slots=True)
class Taken(Event):
    """The page cache or a process (``who``) took ``pages`` of the ``wanted`` ones; ``killed`` on its way."""

    who: str
    pages: int
    wanted: int
    accepted_pages: int
    killed: bool
