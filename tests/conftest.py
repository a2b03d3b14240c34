"""Golden files: tests/golden/<test module>/<case>.<ext>, rewritten only by --update-golden."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a slow or busy machine is no failure
settings.load_profile("any machine")

ROOT = Path(__file__).parent / "golden"
_seen: set[Path] = set()
_OUTPUT = "golden files seen"


def pytest_addoption(parser: pytest.Parser) -> None:
    """A run that rewrites golden files fails, so that it can never be what CI does."""
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files; the run fails all the same")


class Golden:
    """The golden files of one test."""

    def __init__(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self._update = bool(request.config.getoption("update_golden"))
        self._tmp_path = tmp_path
        case = re.sub(r"[^\w.\-]+", "_", request.node.name)
        self._stem = ROOT / request.path.stem / case

    def check(self, text: str, ext: str = "txt") -> None:
        """Fail unless ``text`` is what the golden file says."""
        __tracebackhide__ = True
        want = self._stem.with_name(f"{self._stem.name}.{ext}")
        _seen.add(want)
        have = want.read_text(encoding="utf-8") if want.exists() else None
        if have == text:
            return
        if self._update:
            want.parent.mkdir(parents=True, exist_ok=True)
            want.write_text(text, encoding="utf-8", newline="\n")
            pytest.fail(f"golden rewritten, review it with git diff: {want}", pytrace=False)
        self._fail(want, have, text)

    def json(self, data: object) -> None:
        """The same for data, written as JSON with sorted keys."""
        __tracebackhide__ = True
        self.check(json.dumps(data, indent=2, sort_keys=True) + "\n", "json")

    def _fail(self, want: Path, have: str | None, text: str) -> None:
        __tracebackhide__ = True
        obtained = self._tmp_path / want.name
        obtained.write_text(text, encoding="utf-8", newline="\n")
        lines = (have or "").splitlines(), text.splitlines()
        diff = "\n".join(difflib.unified_diff(*lines, str(want), str(obtained), lineterm=""))
        what = "no golden file" if have is None else "differs from golden file"
        pytest.fail(f"{what} {want}\n{diff}\n(pytest --update-golden rewrites it)", pytrace=False)


@pytest.fixture
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    """The golden files of the test that asks."""
    return Golden(request, tmp_path)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist has ended: what it has read was read. One that died has nothing to say."""
    _seen.update(map(Path, getattr(node, "workeroutput", {}).get(_OUTPUT, ())))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A full run that passed fails after all if a golden file is left that no test reads."""
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput[_OUTPUT] = [str(path) for path in _seen]
        return
    narrowed = config.getoption("keyword") or config.getoption("markexpr") or config.args_source.name == "ARGS"
    if narrowed or not session.testscollected or exitstatus != 0:
        return
    orphans = sorted(p for p in ROOT.rglob("*") if p.is_file() and p not in _seen)
    if orphans:
        names = ", ".join(str(p.relative_to(ROOT)) for p in orphans)
        config.get_terminal_writer().line(f"golden files that no test reads: {names}", red=True)
        session.exitstatus = 1
