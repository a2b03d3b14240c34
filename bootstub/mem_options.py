"""What the command line says about memory, as the decompressor's KASLR understands it.

Source: arch/x86/boot/compressed/kaslr.c, handle_mem_options(), mem_avoid_memmap() and parse_gb_huge_pages().
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bootstub.cmdline import arguments, simple_strtoull
from bootstub.slots import MemVector
from guest.units import PUD_SIZE, memparse

MAX_MEMMAP_REGIONS = 4


@dataclass(slots=True)
class MemOptions:
    """What the command line asks of KASLR.

    ``mem_limit``: no kernel ends above it. ``avoid``: the regions of ``memmap=``, four at most; with more of them,
    ``memmap_too_large``. ``gb_huge_pages`` of 1 GiB are left alone. ``warnings`` are the decompressor's words.
    """

    mem_limit: int
    avoid: list[MemVector] = field(default_factory=list)
    memmap_too_large: bool = False
    gb_huge_pages: int = 0
    warnings: list[str] = field(default_factory=list)
    _gbpage_sz: bool = False

    @classmethod
    def parse(cls, line: bytes, mem_limit: int) -> MemOptions:
        """The options in a command line. A size of 0 in ``mem=`` ends the reading."""
        options = cls(mem_limit)
        for name, value in arguments(line):
            match name:
                case "memmap":
                    options._memmap(value)
                case "hugepagesz" | "hugepages":
                    options._gb_huge_pages(name, value or "")
                case "mem" if value != "nopentium":
                    size, _ = memparse(value or "")
                    if not size:
                        break
                    options.mem_limit = min(options.mem_limit, size)
        return options

    def _memmap(self, value: str | None) -> None:
        """``memmap=`` with regions that are no RAM, or a limit; a limit is also what begins at address 0."""
        parts = [] if value is None or len(self.avoid) >= MAX_MEMMAP_REGIONS else value.split(",")
        while parts and len(self.avoid) < MAX_MEMMAP_REGIONS:
            region = _parse_memmap(parts.pop(0))
            if region is None:
                return
            if region.start:
                self.avoid.append(region)
            elif region.size:
                self.mem_limit = min(self.mem_limit, region.size)
        if parts:
            self.memmap_too_large = True

    def _gb_huge_pages(self, name: str, value: str) -> None:
        """``hugepages=`` counts behind ``hugepagesz=1G``."""
        if name == "hugepages":
            if self._gbpage_sz:
                self.gb_huge_pages = simple_strtoull(value)
            return
        is_gb = memparse(value)[0] == PUD_SIZE
        if is_gb and self._gbpage_sz:
            self.warnings.append("Repeatedly set hugeTLB page size of 1G!")
        self._gbpage_sz = is_gb


def _parse_memmap(text: str) -> MemVector | None:
    """One region; None if there is none to read. ``size@start`` is usable memory, which is nothing to avoid."""
    size, rest = memparse(text)
    if text.startswith("exactmap") or rest == text:
        return None
    if rest[:1] in ("#", "$", "!"):
        return MemVector(memparse(rest[1:])[0], size)
    return MemVector(0, 0 if rest[:1] == "@" else size)
