"""The kernel command line: splitting (lib/cmdline.c, next_arg) and the early parameters of interest.

Names compare as in the kernel: a dash is an underscore. Of a parameter that is given twice the last one counts, but
``mem=`` and ``memmap=`` add up. Those of huge pages are read later (``kernel/hstate.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from guest.units import memparse, simple_strtoull
from kernel.memmap_param import MapEdit, parse_mem, parse_memmap

_SPACES = frozenset(" \t\n\v\f\r\xa0")
_TRUE, _FALSE = ("y", "t", "1", "on"), ("n", "f", "0", "of")


@dataclass(frozen=True, slots=True)
class CoreMemory:
    """``kernelcore=`` or ``movablecore=``: so many bytes, or so many per cent of all memory."""

    size: int = 0
    percent: int = 0


@dataclass(slots=True)
class EarlyParams:
    """What the command line says; sizes are bytes.

    ``values`` has every parameter by name, also those that nobody knows, None where it has no value. ``notes`` are
    the kernel's words about what it refused. ``map_edits`` is what happens to e820, in order, and ``user_map`` says
    that some of it was asked for.
    """

    values: dict[str, str | None] = field(default_factory=dict)
    lazy_accept: bool = True
    """``accept_memory=lazy`` (default) or ``eager`` (v9 02/14)."""
    nokaslr: bool = False
    fake_unaccepted_start: int | None = None
    """``fake_unaccepted_start=``: an address (v9 03/14)."""
    notes: tuple[str, ...] = ()
    map_edits: list[MapEdit] = field(default_factory=list)
    user_map: bool = False
    memblock_debug: bool = False
    log_buf_len: int = 0
    """``log_buf_len=``, not rounded; 0 is the size that the kernel was built with."""
    numa_off: bool = False
    movable_node: bool = False
    mirrored_kernelcore: bool = False
    kernelcore: CoreMemory = CoreMemory()
    movablecore: CoreMemory = CoreMemory()
    shuffle: bool = False
    """``page_alloc.shuffle=``: kept, but free lists are not shuffled."""


def parse_early_param(command_line: str) -> EarlyParams:
    """Read ``command_line``. A refused value changes nothing; text behind ``--`` is for init."""
    params = EarlyParams()
    for name, value in parse_args(command_line):
        params.values[name] = value
        handler = _HANDLERS.get(name)
        if handler is not None and not handler(params, value):
            params.notes += (f"Malformed early option '{name}'",)
    return params


def _accept_memory(params: EarlyParams, value: str | None) -> bool:
    if value not in ("lazy", "eager"):
        return False
    params.lazy_accept = value == "lazy"
    return True


def _nokaslr(params: EarlyParams, value: str | None) -> bool:
    params.nokaslr = params.nokaslr or value is None
    return True


def _fake_unaccepted_start(params: EarlyParams, value: str | None) -> bool:
    """An address; text behind it turns the feature off."""
    if value is None:
        return False
    address, rest = memparse(value)
    params.fake_unaccepted_start = None if rest else address
    return not rest


def _mem(params: EarlyParams, value: str | None) -> bool:
    edit = parse_mem(value)
    params.user_map = params.user_map or value not in (None, "nopentium")
    if edit is None:
        return False
    params.map_edits.append(edit)
    return True


def _memmap(params: EarlyParams, value: str | None) -> bool:
    edits = parse_memmap(value or "")
    params.map_edits += edits
    params.user_map = params.user_map or bool(edits) or (value or "")[:1].isdecimal()
    return True


def _memblock(params: EarlyParams, value: str | None) -> bool:
    params.memblock_debug = params.memblock_debug or "debug" in (value or "")
    return True


def _log_buf_len(params: EarlyParams, value: str | None) -> bool:
    params.log_buf_len = memparse(value or "")[0]
    return value is not None


def _numa(params: EarlyParams, value: str | None) -> bool:
    params.numa_off = params.numa_off or (value or "").startswith("off")
    return value is not None


def _movable_node(params: EarlyParams, value: str | None) -> bool:
    params.movable_node = True
    return True


def _kernelcore(params: EarlyParams, value: str | None) -> bool:
    if value == "mirror":
        params.mirrored_kernelcore = True
    elif value is not None:
        params.kernelcore = _core_memory(value)
    return value is not None


def _movablecore(params: EarlyParams, value: str | None) -> bool:
    params.movablecore = _core_memory(value or "")
    return value is not None


def _core_memory(value: str) -> CoreMemory:
    """A size, or a number with a per cent sign behind it (cmdline_parse_core())."""
    number, rest = simple_strtoull(value)
    return CoreMemory(percent=number) if rest.startswith("%") else CoreMemory(memparse(value)[0])


def _shuffle(params: EarlyParams, value: str | None) -> bool:
    text = (value if value is not None else "y").lower()
    if not text.startswith((*_TRUE, *_FALSE)):
        return False
    params.shuffle = text.startswith(_TRUE)
    return True


_HANDLERS: dict[str, Callable[[EarlyParams, str | None], bool]] = {
    "accept_memory": _accept_memory,
    "nokaslr": _nokaslr,
    "fake_unaccepted_start": _fake_unaccepted_start,
    "mem": _mem,
    "memmap": _memmap,
    "memblock": _memblock,
    "log_buf_len": _log_buf_len,
    "numa": _numa,
    "movable_node": _movable_node,
    "kernelcore": _kernelcore,
    "movablecore": _movablecore,
    "page_alloc.shuffle": _shuffle,
}
"""What a parameter does; False where the kernel says that it is malformed."""


def parse_args(command_line: str) -> Iterator[tuple[str, str | None]]:
    """Name and value of each parameter up to ``--``, in order."""
    for word in _words(command_line):
        name, value = _next_arg(word)
        if value is None and name == "--":
            return
        yield name.replace("-", "_"), value


def _words(text: str) -> Iterator[str]:
    """The text cut at white space outside double quotes."""
    word, quoted = "", False
    for character in text:
        if character in _SPACES and not quoted:
            if word:
                yield word
            word = ""
            continue
        quoted ^= character == '"'
        word += character
    if word:
        yield word


def _next_arg(word: str) -> tuple[str, str | None]:
    """Name and value of one word; quotes around the word or around the value are dropped."""
    if word.startswith('"'):
        word = word[1:].removesuffix('"')
    name, equals, value = word.partition("=")
    if not equals or not name:
        return word, None
    if value.startswith('"'):
        value = value[1:].removesuffix('"')
    return name, value
