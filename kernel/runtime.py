"""Stage ``runtime``: allocations, sysfs writes and reads of /proc, as a script says.

A script has one command a line; ``#`` starts a comment:

    alloc ORDER [COUNT]      allocate COUNT blocks of 2^ORDER pages and touch them
    free ORDER [COUNT]       free the blocks of that order that were allocated last
    cat PATH                 /proc/meminfo, vmstat, zoneinfo, buddyinfo or pagetypeinfo;
                             /sys/devices/system/node/nodeN/meminfo
    echo TEXT > PATH         /sys/kernel/mm/page_alloc/accept_memory
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from guest.errors import FormatError
from guest.machine import Machine
from guest.units import PFN_PHYS
from kernel import proc
from kernel.events import Allocation, FileRead, FileWrite
from kernel.free_area import MAX_ORDER
from kernel.gfp import GFP_HIGHUSER_MOVABLE
from kernel.kernel import Kernel
from kernel.mmzone import THP_MIN_PAGES
from kernel.page_alloc import PageAllocator

ACCEPT_MEMORY = "/sys/kernel/mm/page_alloc/accept_memory"
MAX_COUNT = 1 << 20
_NUMBER = re.compile(r"[0-9]{1,7}")

DEFAULT_SCRIPT = f"""\
cat /proc/meminfo
alloc 9 96
alloc 0 256
echo 64M > {ACCEPT_MEMORY}
cat /proc/meminfo
cat /proc/buddyinfo
"""


@dataclass(frozen=True, slots=True)
class Command:
    """One line of a script: its verb and operands, checked."""

    verb: str
    path: str = ""
    text: str = ""
    order: int = 0
    count: int = 1


def parse_script(text: str, name: str = "script") -> list[Command]:
    """The commands of a script. A line that is none is a ``FormatError`` that names it."""
    commands = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        command = _parse_line(words)
        if command is None:
            raise FormatError(
                f"{name}, line {number}", found=repr(line.strip()),
                expected="alloc, free, cat or echo with their operands", source="kernel/runtime.py",
            )  # fmt: skip
        commands.append(command)
    return commands


def runtime(kernel: Kernel, script: list[Command]) -> None:
    """Set the watermarks, as the first initcalls do, then run the script."""
    allocator = kernel.allocator
    if allocator is None:
        raise ValueError("runtime before mm-init")
    managed = sum(zone.managed_pages for zone in allocator.zones)
    allocator.init_per_zone_wmark_min(transparent_hugepage=managed >= THP_MIN_PAGES)
    shell = _Shell(kernel.machine, allocator)
    for command in script:
        shell.verbs[command.verb](command)


class _Shell:
    """What a script's commands do."""

    def __init__(self, machine: Machine, allocator: PageAllocator) -> None:
        self._machine, self._allocator = machine, allocator
        self._blocks: defaultdict[int, list[int]] = defaultdict(list)
        self.verbs: dict[str, Callable[[Command], None]] = {
            "alloc": self._alloc,
            "free": self._free,
            "cat": self._cat,
            "echo": self._echo,
        }

    def _alloc(self, command: Command) -> None:
        unaccepted = self._nr_unaccepted()
        done = 0
        while (
            done < command.count
            and (pfn := self._allocator.alloc_pages(GFP_HIGHUSER_MOVABLE, command.order)) is not None
        ):
            self._blocks[command.order].append(pfn)
            self._machine.memory.clear(PFN_PHYS(pfn), PFN_PHYS(pfn + (1 << command.order)))
            done += 1
        accepted = unaccepted - self._nr_unaccepted()
        self._machine.trace.add(Allocation(command.order, done, command.count, accepted))

    def _free(self, command: Command) -> None:
        blocks = self._blocks[command.order]
        for _ in range(min(command.count, len(blocks))):
            self._allocator.free_pages(blocks.pop(), command.order)

    def _cat(self, command: Command) -> None:
        text = proc.read_file(self._allocator, command.path)
        self._machine.trace.add(FileRead(command.path, text))

    def _echo(self, command: Command) -> None:
        result = self._allocator.accept_memory_sysfs(command.text + "\n")
        self._machine.trace.add(FileWrite(command.path, command.text, result))

    def _nr_unaccepted(self) -> int:
        return sum(zone.nr_unaccepted for zone in self._allocator.zones)


def _parse_line(words: list[str]) -> Command | None:
    """The command of a line's words, or None."""
    verb, *operands = words
    if verb in ("alloc", "free") and 1 <= len(operands) <= 2 and all(map(_NUMBER.fullmatch, operands)):
        order, count = int(operands[0]), int(operands[1]) if len(operands) == 2 else 1
        return Command(verb, order=order, count=count) if order <= MAX_ORDER and count <= MAX_COUNT else None
    if verb == "cat" and len(operands) == 1 and proc.is_file(operands[0]):
        return Command(verb, path=operands[0])
    if verb == "echo" and operands[-2:] == [">", ACCEPT_MEMORY]:
        return Command(verb, path=ACCEPT_MEMORY, text=" ".join(operands[:-2]))
    return None
