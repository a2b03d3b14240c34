"""What a boot left, as facts that can be compared, each with who wrote it: from a boot, or from what it saved.

A source is one of: a directory that ``boot --save`` wrote, ``FILE.toml`` with options of a boot, ``td:4G`` or
``td:4G,pc`` for the default boot of such a TD, or a file with a boot_params page, which has no authors.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bootstub.boot_params import BOOT_E820_ENTRY, BOOT_PARAMS, check_size, e820_table_of, parse_e820_table
from bootstub.cmdline import COMMAND_LINE_SIZE
from bootstub.e820_types import type_word
from bootstub.setup_data import SetupDataType, walk_setup_data
from guest.errors import BootError
from guest.ranges import TOP
from guest.records import RecordCopy, field_extents
from guest.units import BITS_PER_BYTE, PMD_SIZE
from guest.write_journal import Write, authors
from tools.config import add_options, boot_config
from tools.dump_boot_params import Row
from tools.files import file_path, read_file
from tools.handover import memory_map_of, peek, unaccepted_table
from tools.maps.td import PREFIX, td_boot
from tools.maps.words import efi_type_name
from tools.render import summary_json
from tools.report import summarize
from tools.verdict import unaccepted_by_bitmap

if TYPE_CHECKING:
    from tools.pipeline import Boot, BootConfig

BOOT_PARAMS_FILE, FACTS_FILE, JOURNAL_FILE = "boot_params.bin", "facts.json", "journal.jsonl"
_SHOWN = 2


class Fact(NamedTuple):
    """A value as text, and who wrote it; an empty author is not known."""

    value: str
    author: str


class Span(NamedTuple):
    """A fact about ``[start, end)``."""

    start: int
    end: int
    fact: Fact


@dataclass(frozen=True, slots=True)
class BootJournal:
    """The writes of a boot; its boot_params lay at ``gpa`` before event ``event``, when they were copied."""

    writes: tuple[Write, ...]
    gpa: int = 0
    event: int = 0

    def author(self, start: int, size: int, up_to: int | None = None) -> str:
        """Who wrote ``size`` bytes at ``start``; the first ones, if they were many."""
        runs = authors(self.writes, start, start + size, up_to)
        return first_of(write.text for _, _, write in runs if write is not None)

    def author_of(self, row: Row) -> str:
        """Who wrote a field of boot_params that the stub left."""
        return self.author(self.gpa + row.offset, row.size, self.event)


@dataclass(frozen=True, slots=True)
class Facts:
    """``fields`` and ``ranges`` by section; ``journal`` is None if nobody kept one."""

    name: str
    boot_params: bytes | None
    journal: BootJournal | None = None
    fields: Mapping[str, Mapping[str, Fact]] = field(default_factory=dict)
    ranges: Mapping[str, Sequence[Span]] = field(default_factory=dict)


def first_of(names: Iterable[str]) -> str:
    """Two different names at most; dots stand for more."""
    known = [name for name in dict.fromkeys(names) if name]
    return "; ".join(known[:_SHOWN]) + ("; ..." if len(known) > _SHOWN else "")


def facts_of(source: str, until: str | None = None) -> Facts:
    """The facts of a source; a boot runs up to and with stage ``until``. Raises ``FormatError`` and ``OSError``."""
    if is_boot(source):
        return booted(source, config_of(source), until)
    if (file_path(source) / FACTS_FILE).exists():
        from tools.saved import read_saved

        return read_saved(Path(source))
    data = read_file(source)
    check_size(data)
    return Facts(source, data, ranges={"e820": list(_e820(data))})


def is_boot(source: str) -> bool:
    """True if a source is a description of a boot, which is to be run."""
    return source.startswith(PREFIX) or source.endswith(".toml")


def config_of(source: str) -> BootConfig:
    """The boot that a source describes. Raises ``FormatError`` and ``OSError``."""
    if source.startswith(PREFIX):
        return td_boot(source).config
    parser = argparse.ArgumentParser()
    add_options(parser)
    return boot_config(parser.parse_args(["--config", source]))


def booted(name: str, config: BootConfig, until: str | None = None) -> Facts:
    """Boot, and take the facts. How a guest died is one of them."""
    from tools.pipeline import Boot

    boot = Boot(config)
    boot.keep_journal()
    end = None
    try:
        boot.run(until)
    except BootError as error:
        end = str(error)
    return take(name, boot, end)


def take(name: str, boot: Boot, end: str | None) -> Facts:
    """The facts of a boot that ``end`` put an end to, if something did."""
    journal = None
    if boot.journal is not None:
        journal = BootJournal(tuple(boot.journal.writes), boot.boot_params_gpa, boot.boot_params_event)
    came_to = end if end is not None else f"stage {boot.done[-1]} done"
    fields = {"boot": {"end": Fact(came_to, "")}, "stages": dict(_stage_fields(boot))}
    if boot.boot_params is None:
        return Facts(name, None, journal, fields)
    known = journal or BootJournal(())
    ranges = {
        "e820": [*_e820(boot.boot_params, known), *_e820_ext(boot, known)],
        "EFI memory map": list(_memory_map(boot, known)),
        "bitmap": list(_bitmap(boot, known)),
    }
    return Facts(name, boot.boot_params, journal, fields | {"command line": _command_line(boot, known)}, ranges)


def _stage_fields(boot: Boot) -> Iterator[tuple[str, Fact]]:
    for stage in summary_json(summarize(boot.trace.records)):
        for name, value in stage.items():
            if isinstance(value, dict):
                yield from ((f"{stage['stage']}.{name}.{key}", Fact(str(count), "")) for key, count in value.items())
            elif name != "stage":
                yield f"{stage['stage']}.{name}", Fact(str(value), "")


def _command_line(boot: Boot, journal: BootJournal) -> dict[str, Fact]:
    assert boot.boot_params is not None
    params = RecordCopy(boot.boot_params, BOOT_PARAMS)
    at = params["ext_cmd_line_ptr"] << 32 | params["hdr.cmd_line_ptr"]
    line = (peek(boot.physical, at, COMMAND_LINE_SIZE) or b"").split(b"\0")[0] if at else b""
    author = journal.author(at, len(line) + 1, boot.boot_params_event)
    return {"text": Fact(line.decode("utf-8", errors="replace"), author)}


def _e820(data: bytes, journal: BootJournal = BootJournal(())) -> Iterator[Span]:  # it is frozen
    start, _ = field_extents(BOOT_PARAMS)["e820_table"]
    yield from _entries(data[start:], len(e820_table_of(data)), journal, journal.gpa + start)


def _e820_ext(boot: Boot, journal: BootJournal) -> Iterator[Span]:
    assert boot.boot_params is not None
    head = RecordCopy(boot.boot_params, BOOT_PARAMS)["hdr.setup_data"]
    for node in walk_setup_data(boot.physical.read, head):
        if node.type == SetupDataType.SETUP_E820_EXT:
            data = boot.physical.read(node.data_gpa, node.len)
            yield from _entries(data, len(data) // BOOT_E820_ENTRY.sizeof(), journal, node.data_gpa)


def _entries(data: bytes, count: int, journal: BootJournal, gpa: int) -> Iterator[Span]:
    size = BOOT_E820_ENTRY.sizeof()
    for number, entry in enumerate(parse_e820_table(data[: count * size])):
        fact = Fact(type_word(entry.type), journal.author(gpa + number * size, size, journal.event or None))
        yield Span(entry.addr, min(entry.addr + entry.size, TOP), fact)


def _memory_map(boot: Boot, journal: BootJournal) -> Iterator[Span]:
    assert boot.boot_params is not None
    params = RecordCopy(boot.boot_params, BOOT_PARAMS)
    at = params["efi_info.efi_memmap_hi"] << 32 | params["efi_info.efi_memmap"]
    stride = params["efi_info.efi_memdesc_size"]
    for number, d in enumerate(memory_map_of(boot)):
        author = journal.author(at + number * stride, stride, boot.boot_params_event)
        if d.end <= TOP:
            yield Span(d.start, d.end, Fact(f"{efi_type_name(d.type)}, attribute {d.attribute:#x}", author))


def _bitmap(boot: Boot, journal: BootJournal) -> Iterator[Span]:
    """RAM by its bits in bitmap or table, as they are at the end; the author is who wrote the bits' bytes last."""
    assert boot.boot_params is not None
    found = unaccepted_table(boot)
    gpa, base, unit, end = RecordCopy(boot.boot_params, BOOT_PARAMS)["unaccepted_memory"], 0, PMD_SIZE, TOP
    if found is not None:
        gpa, base, unit, end = found.bitmap, found.phys_base, found.unit_size, found.described_end
    unaccepted = unaccepted_by_bitmap(boot)
    if unaccepted is None:
        return
    for start, stop in boot.host.ram.within(base, end):
        pieces = [(low, high, "unaccepted") for low, high in unaccepted.within(start, stop)]
        pieces += [(low, high, "accepted") for low, high in unaccepted.gaps(start, stop)]
        for low, high, text in sorted(pieces):
            first, last = ((address - base) // unit // BITS_PER_BYTE for address in (low, high - 1))
            for *ends, write in authors(journal.writes, gpa + first, gpa + last + 1):
                start_of_bits, end_of_bits = (base + (byte - gpa) * BITS_PER_BYTE * unit for byte in ends)
                fact = Fact(text, write.text if write is not None else "")
                yield Span(max(start_of_bits, low), min(end_of_bits, high), fact)


def facts_json(facts: Facts) -> dict[str, Any]:
    """Fields and ranges as JSON values; the rest is in files of its own."""
    ranges = {
        section: [{"start": f"{s.start:#x}", "end": f"{s.end:#x}", **s.fact._asdict()} for s in spans]
        for section, spans in facts.ranges.items()
    }
    fields = {
        section: {name: fact._asdict() for name, fact in values.items()} for section, values in facts.fields.items()
    }
    return {"schema": 1, "fields": fields, "ranges": ranges}
