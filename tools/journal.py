"""Finished trials in a file of JSON lines, so that an exploration that was broken off goes on where it was.

The first line names the boot by a digest of its configuration. A last line without an end was torn by whatever broke
the run off, and is dropped.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from guest.errors import FormatError
from tools.pipeline import BootConfig
from tools.trial import OUTCOMES, Trial

_SOURCE = "unaccepted explore --help, --resume"
_TEXTS = ("rule", "kind", "outcome", "stage", "text")
_LISTS = ("reasons", "findings")
_NAMES = {f.name for f in fields(Trial)}


class Journal:
    """The journal at ``path`` of a boot; it is closed with ``stack``. A file of another boot is a ``FormatError``."""

    def __init__(self, path: Path, config: BootConfig, stack: ExitStack) -> None:
        self.trials: dict[str, Trial] = {}
        header = {"schema": 1, "config": sha256(repr(config).encode()).hexdigest()}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if lines and _parse(path, 1, lines[0]) != header:
            raise FormatError(f"{path}, line 1", found="another boot's", expected=json.dumps(header), source=_SOURCE)
        for number, line in enumerate(lines[1:], 2):
            trial = _trial(path, number, _parse(path, number, line))
            self.trials[trial.rule] = trial
        self._file = stack.enter_context(path.open("r+b" if path.exists() else "w+b"))
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not lines:
            self._put(header)

    def add(self, trial: Trial) -> None:
        """Append a finished trial."""
        self._put(trial.as_dict())

    def _put(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        self._file.flush()


def _parse(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}, line {number}", found=str(error), expected="JSON", source=_SOURCE) from error


def _trial(path: Path, number: int, value: Any) -> Trial:
    """The trial of one line, checked."""
    good = isinstance(value, dict) and set(value) == _NAMES
    good = good and all(isinstance(value[name], str) for name in _TEXTS) and value["outcome"] in OUTCOMES
    good = good and all(isinstance(value[n], list) and all(isinstance(i, str) for i in value[n]) for n in _LISTS)
    if not good:
        expected = f"a trial with {', '.join(sorted(_NAMES))}"
        raise FormatError(f"{path}, line {number}", found="something else", expected=expected, source=_SOURCE)
    return Trial(**value | {name: tuple(value[name]) for name in _LISTS})
