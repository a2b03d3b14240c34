"""Real code that runs for a while: the status line on a terminal, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bootstub.sample_kernel import sample_bzimage
from guest.trace import Print
from tools.pipeline import Boot, BootConfig
from tools.progress import StatusLine, interruptible

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"COLUMNS": "60", "PYTHONUNBUFFERED": "1"}
WIPE = "\r\x1b[K"
LIMIT_SECONDS = 120


def program(verb: str, *words: object) -> list[str]:
    """The command line of a child process."""
    return [sys.executable, "-m", "tools.cli", verb, *map(str, words)]


def wait_for(there: Callable[[], bool], child: subprocess.Popen[bytes]) -> None:
    """Until ``there`` says so."""
    end = time.monotonic() + LIMIT_SECONDS
    while not there():
        assert child.poll() is None, "the child ended before it was interrupted"
        assert time.monotonic() < end, "the child did not come so far"
        time.sleep(0.05)


def interrupted(log: Path, words: list[str], there: Callable[[], bool]) -> tuple[int, str]:
    """Exit status and standard error of a child that prints to ``log`` and got SIGINT once it was ``there``."""
    with log.open("wb") as out:
        child = subprocess.Popen(words, cwd=REPOSITORY, env=ENVIRONMENT, stdout=out, stderr=subprocess.PIPE)
    try:
        wait_for(there, child)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=LIMIT_SECONDS)
    finally:
        child.kill()
    return child.returncode, err.decode()


def on_the_kernel(verb: str, kernel: Path, *words: object) -> list[str]:
    """A child that runs the real kernel."""
    return program(verb, "--kernel", kernel, "--run", "kernel", "--memory", "6G", *words)


def test_ctrl_c_in_real_code(debian_kernel, tmp_path):
    """The table so far, one line on standard error, exit status 130."""
    log = tmp_path / "log"
    status, err = interrupted(log, on_the_kernel("boot", debian_kernel), lambda: "Zone ranges" in log.read_text())
    assert (status, err) == (130, "unaccepted: interrupted\n")
    lines = (tmp_path / "log").read_text().splitlines()
    table = [line.split()[0] for line in lines[lines.index("") :] if line]
    assert table[:7] == ["stage", "host", "firmware", "efi-stub", "kernel", "sum", "accepted"]


def test_ctrl_c_with_json(debian_kernel, tmp_path):
    """Standard output is still one JSON value, with what is there."""
    saved = tmp_path / "saved"

    def there() -> bool:
        """The directory is made just before the boot begins; give that a moment."""
        if not saved.exists():
            return False
        time.sleep(1.5)
        return True

    words = on_the_kernel("boot", debian_kernel, "--json", "--save", saved)
    status, err = interrupted(tmp_path / "log", words, there)
    assert (status, err) == (130, "unaccepted: interrupted\n")
    answer = json.loads((tmp_path / "log").read_text())
    assert answer["error"] == "interrupted"
    assert answer["stages"][0]["stage"] == "host"
    assert (saved / "trace.jsonl").exists()


def test_ctrl_c_in_step(debian_kernel, tmp_path, file):
    """The debugger ends in the same way, from inside the vCPU."""
    words = on_the_kernel("step", debian_kernel, "--commands", file("commands", "continue\n"))
    log = tmp_path / "log"
    end = interrupted(log, words, lambda: "stage efi-stub done" in log.read_text())
    assert end == (130, "unaccepted: interrupted\n")


def test_ctrl_c_in_our_stages(command, monkeypatch):
    """The same in a boot without real code."""

    def interrupt(boot: Boot, until: str | None = None) -> None:
        boot.step()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Boot, "run", interrupt)
    answer = command("boot")
    assert (answer.status, answer.err) == (130, "unaccepted: interrupted\n")
    assert answer.out.splitlines()[-1].startswith("sum ")


def test_the_signal_waits_for_a_safe_place():
    """While the vCPU runs, the signal is raised by its next tick or the next event, and the old handler comes back."""
    before = signal.getsignal(signal.SIGINT)
    for act in (lambda boot: boot.tick(1), lambda boot: boot.trace.add(Print("line"))):
        boot = Boot(BootConfig(sample_bzimage()))
        boot.real_code = type("Running", (), {"running": True})()
        reached = []
        with pytest.raises(KeyboardInterrupt), interruptible(boot):
            signal.raise_signal(signal.SIGINT)
            reached.append(True)
            act(boot)
        assert reached == [True]
        assert signal.getsignal(signal.SIGINT) is before
        assert boot.trace.watchers == []


def test_the_signal_at_a_prompt():
    """Where somebody waits for it, it does not wait."""
    boot = Boot(BootConfig(sample_bzimage()))
    boot.real_code = type("Running", (), {"running": True})()
    with pytest.raises(KeyboardInterrupt), interruptible(boot, lambda: True):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the signal was not raised")


def test_status_line_on_a_terminal(debian_kernel):
    """One line, cut to the terminal's width, wiped before the kernel's next line and at the end."""
    primary, secondary = pty.openpty()
    words = on_the_kernel("boot", debian_kernel, "--until", "Zone ranges")
    child = subprocess.Popen(words, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=secondary)
    os.close(secondary)
    out = child.communicate(timeout=LIMIT_SECONDS)[0].decode()
    err = os.read(primary, 1 << 16).decode()
    os.close(primary)
    assert child.returncode == 0
    assert "instructions" not in out
    shown = err.split(WIPE)
    assert (shown[0], shown[-1]) == ("", "")
    assert any(" M instructions, " in text for text in shown)
    assert all(len(text) < 60 for text in shown)


def test_status_line_elsewhere(monkeypatch):
    """Nothing at all if standard error is no terminal."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    status = StatusLine()
    status.show(5_000_000)
    status.wipe()
    assert sys.stderr.getvalue() == ""


def test_status_line_has_no_control_characters(monkeypatch):
    """What a guest prints cannot steer the terminal from there."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    boot = Boot(BootConfig(sample_bzimage()))
    status = StatusLine()
    boot.trace.watchers.append(status.on_record)
    boot.machine.print("\x1b[2Jred\a")
    status.show(5_000_000)
    status.wipe()
    assert terminal.getvalue() == f"{WIPE}5 M instructions, 0 s: ?[2Jred?{WIPE}"
