"""Names of the kernel's addresses: out of System.map or /proc/kallsyms, or out of the kernel image itself.

A distribution's kernel comes without System.map, but it carries the tables behind /proc/kallsyms. They are found
by what is known of their content, and believed only if they agree with each other. Sources: scripts/kallsyms.c and
kernel/kallsyms.c, of 6.1 and of 6.12, on x86-64 with CONFIG_KALLSYMS_ABSOLUTE_PERCPU.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from guest.errors import FormatError
from guest.units import round_down, round_up

_LINE = re.compile(r"([0-9a-f]{8,16}) ([A-Za-z?]) (\S+)(?:\s+\[\S+\])?")
_KALLSYMS_C = "scripts/kallsyms.c"
_KERNEL_HALF = 1 << 63
_TEXT_TYPES = frozenset("tTwW")

_DIGIT_TOKENS = b"".join(b"%d\0" % digit for digit in range(10))
"""Tokens 0x30 to 0x39: a character that occurs in names stands for itself. Tables of UTF-16 look like this too."""
_FIRST_DIGIT, _TOKENS = ord("0"), 256
_TOKEN_TABLE_LIMIT = 1 << 16
_MAX_TABLES, _MAX_CANDIDATES = 4096, 4
_TOKEN_INDEX = struct.Struct(f"<{_TOKENS}H")
_ALIGNMENT = 8
_SYMBOLS_PER_MARKER = 256
_KSYM_NAME_LEN = 512
_MARKER_STEPS = range(2 * _SYMBOLS_PER_MARKER, _SYMBOLS_PER_MARKER * (_KSYM_NAME_LEN + 2) + 1)
"""Bytes of 256 names."""
_MARKERS_REACH = 1 << 22
_BIG_SYMBOL = 0x80


@dataclass(frozen=True, slots=True)
class Symbols:
    """Symbols by ascending address; ``types`` has nm's letter for each."""

    addresses: tuple[int, ...]
    types: str
    names: tuple[str, ...]

    def name(self, address: int) -> str:
        """``symbol+0x12`` for an address of the kernel, and the bare number for any other."""
        index = self._index(address)
        if index is None:
            return f"{address:#x}"
        return f"{self.names[index]}+{address - self.addresses[index]:#x}"

    def address(self, name: str) -> int | None:
        """Address of the first symbol called ``name``; None if there is no such symbol."""
        return self.addresses[self.names.index(name)] if name in self.names else None

    def placed(self, text: int) -> Symbols:
        """These symbols where KASLR put them: ``_text`` at ``text``. As they are if there is no ``_text``."""
        linked = self.address("_text")
        distance = text - linked if linked is not None else 0
        moved = (address + distance if address >= _KERNEL_HALF else address for address in self.addresses)
        return replace(self, addresses=tuple(moved))

    def is_text(self, address: int) -> bool:
        """Whether ``address`` lies in a function."""
        index = self._index(address)
        return index is not None and self.types[index] in _TEXT_TYPES

    def _index(self, address: int) -> int | None:
        """Number of the symbol at or below ``address``, the first of several at one address."""
        after = bisect_right(self.addresses, address)
        if not after or not _KERNEL_HALF <= self.addresses[after - 1] <= address <= self.addresses[-1]:
            return None
        return bisect_left(self.addresses, self.addresses[after - 1])


def parse_system_map(text: str) -> Symbols:
    """Symbols of a System.map, or of /proc/kallsyms, whose modules may stand in any order."""
    rows = [_row(number, line) for number, line in enumerate(text.splitlines(), start=1)]
    if not rows:
        raise FormatError("System.map", found="no symbols", expected="address, type, name", source=_KALLSYMS_C)
    return _symbols(rows)


def _row(number: int, line: str) -> tuple[int, str, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        found = repr(line[:80])
        raise FormatError(
            f"System.map line {number}", found=found, expected="address, type, name", source="nm -n, scripts/mksysmap"
        )
    return int(match[1], 16), match[2], match[3]


def _symbols(rows: Iterable[tuple[int, str, str]]) -> Symbols:
    ordered = sorted(rows, key=lambda row: row[0])
    return Symbols(
        tuple(row[0] for row in ordered), "".join(row[1] for row in ordered), tuple(row[2] for row in ordered)
    )


def read_kallsyms(vmlinux: bytes) -> Symbols | None:
    """The symbols that an unpacked kernel image carries, at their link-time addresses; None if it has none.

    Tables that contradict each other are a ``FormatError``.
    """
    found = _find_tokens(vmlinux)
    if found is None:
        return None
    table_at, tokens, index_end = found
    num_syms_at, entries = _find_names(vmlinux, table_at)
    names = [_expand(vmlinux, at, entry, tokens) for at, entry in entries]
    addresses = _addresses(vmlinux, len(names), num_syms_at, index_end)
    return _symbols((address, name[0], name[1:]) for address, name in zip(addresses, names, strict=True))


def _find_tokens(data: bytes) -> tuple[int, list[bytes], int] | None:
    """kallsyms_token_table and kallsyms_token_index: where the first begins, the tokens, where the second ends.

    The index, which lies behind the table, tells where the table begins, and must fit every token.
    """
    at = -1
    for _ in range(_MAX_TABLES):
        at = data.find(_DIGIT_TOKENS, at + 1)
        if at < 0:
            return None
        rest = data[at : at + _TOKEN_TABLE_LIMIT].split(b"\0", _TOKENS - _FIRST_DIGIT)
        table_end = at + sum(len(token) + 1 for token in rest[:-1])
        index_at = round_up(table_end, _ALIGNMENT)
        if len(rest) <= _TOKENS - _FIRST_DIGIT or index_at + _TOKEN_INDEX.size > len(data):
            continue
        index = _TOKEN_INDEX.unpack_from(data, index_at)
        table_at = at - index[_FIRST_DIGIT]
        tokens = data[max(table_at, 0) : table_end].split(b"\0")[:-1]
        if len(tokens) == _TOKENS and _starts(tokens) == index:
            return table_at, tokens, index_at + _TOKEN_INDEX.size
    return None


def _starts(tokens: list[bytes]) -> tuple[int, ...]:
    starts = [0]
    for token in tokens[:-1]:
        starts.append(starts[-1] + len(token) + 1)
    return tuple(starts)


def _find_names(data: bytes, end: int) -> tuple[int, list[tuple[int, bytes]]]:
    """kallsyms_num_syms and kallsyms_names: where the first lies, and each name's start and token numbers.

    kallsyms_markers lie behind them, and end at ``end`` or, in 6.1, at kallsyms_seqs_of_names before it.
    """
    start = max(end - _MARKERS_REACH, 0)
    words = struct.unpack_from(f"<{(end - start) // 4}I", data, start)
    candidates = (n for n in range(len(words) - 2, -1, -2) if words[n] == 0 and words[n + 1] in _MARKER_STEPS)
    for number in islice(candidates, _MAX_CANDIDATES):
        markers = list(_ascending(words, number))
        found = _names_before(data, start + 4 * number, markers)
        if found is not None:
            return found
    raise _disagree("kallsyms_names", end, "no names", "names and their markers before the tokens")


def _ascending(words: tuple[int, ...], number: int) -> Iterator[int]:
    """The words from ``number`` on that grow as the start of every 256th name does."""
    yield words[number]
    while number + 1 < len(words) and words[number + 1] - words[number] in _MARKER_STEPS:
        number += 1
        yield words[number]


def _names_before(data: bytes, end: int, markers: list[int]) -> tuple[int, list[tuple[int, bytes]]] | None:
    """The number and the names of which every 256th is where ``markers`` say, and the last ends at ``end``.

    How long the last names are is not known: every place is tried whose number leads to the end from the last marker.
    """
    full = _SYMBOLS_PER_MARKER * (len(markers) - 1)
    last = round_down(end - markers[-1], _ALIGNMENT) - _ALIGNMENT
    for at in range(last, max(last - _MARKER_STEPS[-1], -1), -_ALIGNMENT):
        count, padding = struct.unpack_from("<II", data, at)
        if padding or not full < count <= full + _SYMBOLS_PER_MARKER:
            continue
        if _entries(data, at + 8 + markers[-1], end, count - full):
            names = _entries(data, at + 8, end, count)
            if names and [start - at - 8 for start, _ in names[::_SYMBOLS_PER_MARKER]] == markers:
                return at, names
            return None
    return None


def _entries(data: bytes, at: int, end: int, count: int) -> list[tuple[int, bytes]] | None:
    """Start and token numbers of ``count`` names from ``at``; None if they do not end at ``end``."""
    entries = []
    for _ in range(count):
        start, length = at, data[at]
        at += 1
        if length & _BIG_SYMBOL:
            length = length & ~_BIG_SYMBOL | data[at] << 7
            at += 1
        at += length
        if length == 0 or at > end:
            return None
        entries.append((start, data[at - length : at]))
    return entries if round_up(at, _ALIGNMENT) == end else None


def _expand(data: bytes, at: int, entry: bytes, tokens: list[bytes]) -> str:
    """Type letter and name."""
    text = b"".join([tokens[number] for number in entry])
    if not 2 <= len(text) <= _KSYM_NAME_LEN:
        raise _disagree("kallsyms_names", at, f"{len(text)} characters", f"2 to {_KSYM_NAME_LEN}")
    return text.decode("latin-1")


def _addresses(data: bytes, count: int, num_syms_at: int, index_end: int) -> list[int]:
    """kallsyms_offsets and kallsyms_relative_base: before the number of symbols, or since 6.4 behind the tokens."""
    size = round_up(4 * count, _ALIGNMENT)
    for offsets_at, base_at in ((index_end, index_end + size), (num_syms_at - 8 - size, num_syms_at - 8)):
        if offsets_at >= 0 and base_at + 8 <= len(data):
            base = int.from_bytes(data[base_at : base_at + 8], "little")
            addresses = list(_absolute(struct.unpack_from(f"<{count}i", data, offsets_at), base))
            if base >= _KERNEL_HALF and addresses == sorted(addresses):
                return addresses
    raise _disagree("kallsyms_offsets", index_end, "nothing that ascends", f"{count} ascending addresses")


def _absolute(offsets: tuple[int, ...], base: int) -> Iterator[int]:
    """Offsets that are not negative are per-CPU addresses; the others count down from -1 at the base."""
    return (offset if offset >= 0 else base - 1 - offset for offset in offsets)


def _disagree(what: str, at: int, found: str, expected: str) -> FormatError:
    return FormatError(what, at=max(at, 0), found=found, expected=expected, source=_KALLSYMS_C)
