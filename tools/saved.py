"""What ``boot --save DIR`` writes for other verbs to read, and the reading of it.

``facts.json`` holds fields and ranges with their authors. The first line of ``journal.jsonl`` says where boot_params
lay and when they were copied; each other line is one write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bootstub.boot_params import check_size
from guest.errors import FormatError
from guest.ranges import TOP
from guest.write_journal import Write
from tools.facts import BOOT_PARAMS_FILE, FACTS_FILE, JOURNAL_FILE, BootJournal, Fact, Facts, Span, facts_json
from tools.files import read_file
from tools.output import json_text

_SOURCE = "unaccepted boot --help, --save"
_HEX = re.compile(r"0x[0-9a-f]{1,17}")
_MAX_EVENT = 1 << 40


def write_saved(facts: Facts, directory: Path) -> None:
    """Write facts and journal. The page of boot_params is the caller's."""
    (directory / FACTS_FILE).write_text(json_text(facts_json(facts), "pretty") + "\n")
    if facts.journal is None:
        return
    journal = facts.journal
    with (directory / JOURNAL_FILE).open("w") as file:
        header = {"schema": 1, "boot_params": f"{journal.gpa:#x}", "event": journal.event}
        for line in (header, *map(_write_json, journal.writes)):
            file.write(json_text(line, "short") + "\n")


def _write_json(write: Write) -> dict[str, Any]:
    return write._asdict() | {"start": f"{write.start:#x}", "end": f"{write.end:#x}"}


def read_saved(directory: Path) -> Facts:
    """The facts in a directory; what a boot did not reach is missing. Raises ``FormatError`` and ``OSError``."""
    path = directory / FACTS_FILE
    value = _parse(str(path), read_file(str(path)))
    _check(isinstance(value, dict) and value.get("schema") == 1, path, "something else", "facts of schema 1")
    fields = {
        section: {name: _fact(path, fact) for name, fact in _dict(path, values).items()}
        for section, values in _dict(path, value.get("fields")).items()
    }
    ranges = {
        section: [_span(path, span) for span in _list(path, spans)]
        for section, spans in _dict(path, value.get("ranges")).items()
    }
    page = directory / BOOT_PARAMS_FILE
    data = read_file(str(page)) if page.exists() else None
    if data is not None:
        check_size(data)
    return Facts(str(directory), data, read_journal(directory / JOURNAL_FILE), fields, ranges)


def read_journal(path: Path) -> BootJournal | None:
    """The journal in a file; None if there is no such file."""
    if not path.exists():
        return None
    lines = read_file(str(path)).splitlines()
    header = _parse(f"{path}, line 1", lines[0] if lines else b"")
    _check(isinstance(header, dict) and header.get("schema") == 1, f"{path}, line 1", "something else", "schema 1")
    gpa, event = _address(path, header.get("boot_params")), _event(path, header.get("event"))
    return BootJournal(tuple(_writes(path, lines)), gpa, event)


def _writes(path: Path, lines: list[bytes]) -> Iterator[Write]:
    for number, line in enumerate(lines[1:], 2):
        where = f"{path}, line {number}"
        value = _dict(where, _parse(where, line))
        stage, author = _text(where, value.get("stage")), _text(where, value.get("author"))
        start, end = _bounds(where, value)
        yield Write(_event(where, value.get("event")), stage, author, start, end)


def _span(where: object, value: Any) -> Span:
    return Span(*_bounds(where, _dict(where, value)), _fact(where, value))


def _bounds(where: object, value: dict[str, Any]) -> tuple[int, int]:
    start, end = _address(where, value.get("start")), _address(where, value.get("end"))
    _check(start <= end, where, f"[{start:#x}, {end:#x})", "start <= end")
    return start, end


def _fact(where: object, value: Any) -> Fact:
    return Fact(*(_text(where, _dict(where, value).get(name)) for name in Fact._fields))


def _text(where: object, value: Any) -> str:
    _check(isinstance(value, str), where, repr(value)[:80], "text")
    return str(value)


def _address(where: object, value: Any) -> int:
    good = isinstance(value, str) and _HEX.fullmatch(value) is not None and int(value, 16) <= TOP
    _check(good, where, repr(value)[:80], "an address up to 2^64 in hexadecimal")
    return int(value, 16)


def _event(where: object, value: Any) -> int:
    _check(type(value) is int and 0 <= value < _MAX_EVENT, where, repr(value)[:80], "the number of an event")
    return int(value)


def _dict(where: object, value: Any) -> dict[str, Any]:
    _check(isinstance(value, dict), where, repr(value)[:80], "an object")
    return dict(value)


def _list(where: object, value: Any) -> list[Any]:
    _check(isinstance(value, list), where, repr(value)[:80], "a list")
    return list(value)


def _parse(where: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(where, found=str(error), expected="JSON", source=_SOURCE) from error


def _check(good: bool, where: object, found: str, expected: str) -> None:
    if not good:
        raise FormatError(str(where), found=found, expected=expected, source=_SOURCE)
