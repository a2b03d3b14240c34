"""The language of a script for stage ``runtime``: one command a line, as a list of checked commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any

from guest.errors import FormatError
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, memparse
from kernel.free_area import MAX_ORDER

HELP = """\
A script has one command a line; # starts a comment.

alloc ORDER [COUNT]          allocate COUNT blocks (default 1) of 2^ORDER pages, and write to them
  alloc order N x COUNT gfp FLAGS node N as NAME    the same in words; FLAGS as GFP_KERNEL (default
                             GFP_HIGHUSER_MOVABLE), first from that node (default: the CPU's own)
free ORDER [COUNT]           free the blocks of that order without a name, the last ones first
free NAME [x COUNT]          free the blocks of that name, all without COUNT
on cpu[s] LIST alloc ...     each CPU of LIST (0-3,7) does it, all at the same time
on cpu[s] LIST free ...
cache SIZE [in-use]          read SIZE of files into the page cache; in-use: from now on a page of it that is reclaimed
                             is read again at once, as those of programs that run
run NAME SIZE                a process of that name takes SIZE of memory; the OOM killer may kill it
exit NAME                    it ends
kswapd [NODE]                wake kswapd of a node: it reclaims until a zone is above its high watermark
on cpu[s] LIST cache ...     from the memory of that CPU's node
on cpu[s] LIST run ...
initcalls                    the first initcalls; what stands above this line runs before them, while all watermarks
                             are 0 (without such a line they come before everything)
sleep TIME                   let virtual time pass: 10ms, 2s, 500us
cat PATH                     print a file of /proc or /sys
echo TEXT > PATH             write to a file of /proc/sys or /sys
read zeropad NAME            load_unaligned_zeropad() in the last byte of each block of that name
read kcore [START SIZE]      /proc/kcore: all System RAM, or that part of it
read vmcore [START SIZE]     /proc/vmcore of a crash kernel, the same
read devmem START SIZE       /dev/mem
hotadd START SIZE [accept]   the host adds RAM, the kernel brings it online; accept: a driver accepts it first
kexec -l                     load a second kernel: does this kernel refuse?

Files to read: FILES
Files to write: WRITABLE
"""

MAX_COUNT = 1 << 20
DEFAULT_GFP = "GFP_HIGHUSER_MOVABLE"
"""What a page fault of user space asks with."""
MAX_CPUS = 4096
_MAX_SLEEP_NS = 10**15
_NUMBER = re.compile(r"[0-9]{1,7}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")
_TIME = re.compile(r"([0-9]{1,15})(ns|us|ms|s)")
_NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_CPU_LIST = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*")
_WORD = re.compile(r"\S+")
_ALLOC_WORDS = {"order": "order", "x": "count", "gfp": "text", "node": "node", "as": "name"}
_ON_CPUS = ("alloc", "free", "cache", "run")
_READERS = ("zeropad", "kcore", "vmcore", "devmem")


@dataclass(frozen=True, slots=True)
class Command:
    """One line of a script: its verb and operands, checked.

    ``text`` is what ``echo`` writes, the GFP flags of an allocation, the kind of a reader or ``in-use``; ``name`` is
    that of blocks or of a process. ``start`` and ``size`` are bytes, ``ns`` nanoseconds. ``cpus`` is empty without
    ``on``.
    """

    verb: str
    path: str = ""
    text: str = ""
    order: int = 0
    count: int = 1
    name: str = ""
    node: int | None = None
    cpus: tuple[int, ...] = ()
    start: int = 0
    size: int = 0
    ns: int = 0


class ScriptSyntax:
    """Reads lines; ``readable`` and ``writable`` say which paths a command may name."""

    def __init__(
        self, readable: Callable[[str], bool], writable: Callable[[str], bool], gfp_names: Container[str]
    ) -> None:
        self._readable, self._writable, self._gfp_names = readable, writable, gfp_names
        self._verbs: dict[str, Callable[[list[str]], Command | None]] = {
            "alloc": self._alloc,
            "free": _free,
            "on": self._on,
            "cache": _cache,
            "run": _run,
            "exit": lambda words: Command("exit", name=words[0]) if len(words) == 1 and _is_name(words[0]) else None,
            "kswapd": _kswapd,
            "initcalls": lambda words: None if words else Command("initcalls"),
            "sleep": _sleep,
            "cat": self._cat,
            "echo": self._echo,
            "read": _read,
            "hotadd": _hotadd,
            "kexec": lambda words: Command("kexec") if words == ["-l"] else None,
        }

    def knows(self, line: str) -> bool:
        """True if the line begins with the verb of a command."""
        return line.split()[:1] != [] and line.split()[0] in self._verbs

    def parse(self, text: str, name: str = "script") -> list[Command]:
        """The commands of a script. A line that is none is a ``FormatError`` that names it."""
        commands = (self.parse_line(line, f"{name}, line {n}") for n, line in enumerate(text.splitlines(), 1))
        return [command for command in commands if command is not None]

    def parse_line(self, line: str, where: str) -> Command | None:
        """The command of a line; None if it has only a comment."""
        words = line.split("#")[0].split()
        if not words:
            return None
        read = self._verbs.get(words[0])
        command = read(words[1:]) if read is not None else None
        if command is None:
            expected = f"{', '.join(self._verbs)} with their operands" if read is None else f"operands of {words[0]}"
            raise FormatError(
                where, found=repr(line.strip()[:80]), expected=expected, source="unaccepted boot --script help"
            )
        return command

    def _alloc(self, words: list[str]) -> Command | None:
        """``ORDER [COUNT]``, then options by name."""
        fields = _options(_positional(words), _ALLOC_WORDS)
        if fields is None or "order" not in fields:
            return None
        fields = {"text": DEFAULT_GFP} | fields
        return _checked(Command("alloc", **fields)) if fields["text"] in self._gfp_names else None

    def _on(self, words: list[str]) -> Command | None:
        if len(words) < 3 or words[0] not in ("cpu", "cpus") or words[2] not in _ON_CPUS:
            return None
        cpus = parse_cpu_list(words[1])
        command = self._verbs[words[2]](words[3:])
        return replace(command, cpus=cpus) if command is not None and cpus else None

    def _cat(self, words: list[str]) -> Command | None:
        return Command("cat", path=words[0]) if len(words) == 1 and self._readable(words[0]) else None

    def _echo(self, words: list[str]) -> Command | None:
        if words[-2:-1] != [">"] or not self._writable(words[-1]):
            return None
        return Command("echo", path=words[-1], text=" ".join(words[:-2]))


def _free(words: list[str]) -> Command | None:
    """``ORDER [COUNT]`` or ``NAME [x COUNT]``; without a count, all blocks of a name, one without."""
    if words and words[0] not in ("order", "x") and _NAME.fullmatch(words[0]):
        words = ["as", *words]
    fields = _options(_positional(words), {"order": "order", "x": "count", "as": "name"})
    if fields is None or ("order" in fields) == ("name" in fields):
        return None
    return _checked(Command("free", **({"count": MAX_COUNT} if "name" in fields else {}) | fields))


def _checked(command: Command) -> Command | None:
    return command if command.order <= MAX_ORDER and command.count <= MAX_COUNT else None


def _positional(words: list[str]) -> list[str]:
    """The words with names before the leading numbers: order, then count."""
    named = []
    for name in ("order", "x"):
        if not words or not _NUMBER.fullmatch(words[0]):
            break
        named += [name, words[0]]
        words = words[1:]
    return named + words


def _options(words: list[str], fields: dict[str, str]) -> dict[str, Any] | None:
    """``name value`` pairs as fields, each once; None if they are not that."""
    forms = {"order": _NUMBER, "count": _NUMBER, "node": _NUMBER, "text": _WORD, "name": _NAME}
    found: dict[str, Any] = {}
    for name, value in zip(words[::2], words[1::2], strict=False):
        field = fields.get(name)
        if field is None or field in found or not forms[field].fullmatch(value):
            return None
        found[field] = int(value) if forms[field] is _NUMBER else value
    return None if len(words) % 2 else found


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The numbers of ``0-3,7``, ascending; empty if the text is no such list."""
    if not _CPU_LIST.fullmatch(text):
        return ()
    cpus: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        if int(high or low) >= MAX_CPUS or int(low) > int(high or low):
            return ()
        cpus.update(range(int(low), int(high or low) + 1))
    return tuple(sorted(cpus))


def _cache(words: list[str]) -> Command | None:
    if words[1:] not in ([], ["in-use"]):
        return None
    return _sized(Command("cache", text=" ".join(words[1:])), words[:1])


def _run(words: list[str]) -> Command | None:
    return _sized(Command("run", name=words[0]), words[1:]) if words and _is_name(words[0]) else None


def _kswapd(words: list[str]) -> Command | None:
    if len(words) > 1 or not all(map(_NUMBER.fullmatch, words)):
        return None
    return Command("kswapd", node=int(words[0]) if words else 0)


def _sized(command: Command, words: list[str]) -> Command | None:
    """``command`` with a number of pages that is given as bytes."""
    size, rest = memparse(words[0]) if len(words) == 1 else (0, "")
    if rest or not size or size % PAGE_SIZE or size // PAGE_SIZE > MAX_COUNT:
        return None
    return replace(command, count=size // PAGE_SIZE)


def _sleep(words: list[str]) -> Command | None:
    match = _TIME.fullmatch(words[0]) if len(words) == 1 else None
    if match is None:
        return None
    ns = int(match[1]) * _NS[match[2]]
    return Command("sleep", ns=ns) if ns <= _MAX_SLEEP_NS else None


def _read(words: list[str]) -> Command | None:
    kind, *operands = words or [""]
    if kind not in _READERS:
        return None
    if kind == "zeropad":
        return Command("read", text=kind, name=operands[0]) if len(operands) == 1 and _is_name(operands[0]) else None
    if not operands and kind != "devmem":
        return Command("read", text=kind, size=PHYSICAL_ADDRESS_END)
    return _ranged(Command("read", text=kind), operands, 1)


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def _hotadd(words: list[str]) -> Command | None:
    if words[2:] not in ([], ["accept"]):
        return None
    return _ranged(Command("hotadd", text=" ".join(words[2:])), words[:2], PAGE_SIZE)


def _ranged(command: Command, words: list[str], unit: int) -> Command | None:
    """``command`` with the range of ``START SIZE``: multiples of ``unit`` inside the address space."""
    if len(words) != 2:
        return None
    (start, rest), (size, more) = map(memparse, words)
    if rest or more or not size or start + size > PHYSICAL_ADDRESS_END or start % unit or size % unit:
        return None
    return replace(command, start=start, size=size)
