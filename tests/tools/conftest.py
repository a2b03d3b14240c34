"""Running the command line inside the test process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.cli import main


@dataclass(frozen=True)
class Answer:
    """What a command left: exit status and both outputs."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """``command(*words)`` runs ``unaccepted`` with those words."""

    def run(*words: str | Path) -> Answer:
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = int(end.code or 0)
        return Answer(status, *capsys.readouterr())

    return run


@pytest.fixture
def refused(command: Callable[..., Answer]) -> Callable[..., str]:
    """``refused(*words)``: the error text of a command that must be refused in one line, with nothing printed."""

    def run(*words: str | Path) -> str:
        answer = command(*words)
        assert (answer.status, answer.out) == (1, "")
        assert answer.err.startswith("unaccepted: error: ")
        assert answer.err.count("\n") == 1
        assert answer.err.endswith("\n")
        return answer.err.removeprefix("unaccepted: error: ").rstrip("\n")

    return run


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, bytes | str], Path]:
    """``file(name, contents)`` writes a file and returns its path."""

    def write(name: str, contents: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
        return path

    return write
