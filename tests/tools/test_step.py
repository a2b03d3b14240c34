"""``unaccepted step``: commands from a file, breaks, going back, and wrong commands."""

from __future__ import annotations

import io
import sys

import pytest

from guest.errors import FormatError
from tools.pipeline import STAGE_NAMES
from tools.step import event_names, parse_breakpoint


@pytest.fixture
def stepped(command, file):
    """``stepped(script, *words)``: output lines of a run that ended well."""

    def run(script: str, *words: str) -> list[str]:
        answer = command("step", "--commands", file("commands", script), *words)
        assert (answer.status, answer.err) == (0, "")
        return answer.out.splitlines()

    return run


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("fly\n", "command: found 'fly'"),
        ("!ls\n", "command: found '!ls'"),
        ("step step\nwarp 9\n", "command: found 'warp 9'"),
        ("break Earthquake\n", "break: found 'Earthquake', expected AcceptInterrupted, "),
        ("break :text\n", "break: found ''"),
        ("mem\n", "mem: found ''"),
        ("mem x\n", "mem: found 'x'"),
        ("mem 0x1000 0x10001\n", "mem: found '0x1000 0x10001'"),
        ("mem -1\n", "mem: found '-1'"),
        ("mem 0x1000 -5\n", "mem: found '0x1000 -5'"),
        ("mem 0x10000000000000\n", "mem: found"),
        ("mem " + "9" * 5000 + "\n", "mem: found"),
        ("events ten\n", "events: found 'ten'"),
        ("events -1\n", "events: found '-1'"),
        ("events " + "9" * 5000 + "\n", "events: found"),
        ("\0\n", "command: found"),
    ],
    ids=lambda value: value[:30],
)
def test_wrong_command_in_a_file(command, file, script, text):
    """It ends the run with one error line that names the command."""
    answer = command("step", "--commands", file("commands", script))
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert answer.err.startswith(f"unaccepted: error: {text}")


def test_wrong_break_on_the_command_line(refused):
    """An event that no boot has is refused with the names of those that there are."""
    text = refused("step", "--break", "Earthquake")
    assert all(name in text for name in event_names())


def test_wrong_file(refused, tmp_path):
    """A command file that cannot be read is refused; so is an empty name."""
    assert refused("step", "--commands", tmp_path / "none").endswith("No such file or directory")
    assert refused("step", "--commands", "").endswith("Is a directory")


def test_breakpoint():
    """EVENT or EVENT:TEXT; the text may have colons of its own."""
    assert parse_breakpoint("Print:a:b").text == "a:b"
    assert parse_breakpoint("TdCall").event == "TdCall"
    with pytest.raises(FormatError):
        parse_breakpoint("tdcall")


def test_all_stages(stepped):
    """One step is one stage, in the order of the table; after the last the boot is over."""
    lines = stepped("step\n" * 8 + "stages\n")
    assert lines[0] == "next stage: host"
    done = [line.split()[1] for line in lines if line.startswith("stage ")]
    assert tuple(done) == STAGE_NAMES
    assert "the boot is over" in lines
    assert lines[-7:] == [f"done  {name}" for name in STAGE_NAMES]


def test_comments_and_empty_lines(stepped):
    """They do nothing, and a file without a command is a run without a stage."""
    assert stepped("# nothing\n\n   \n") == ["next stage: host"]


def test_break_at_an_event(stepped):
    """The boot stops right after the event, inside the stage, and goes on from there."""
    lines = stepped("break ServiceCall:ExitBootServices\ncontinue\nevents 1\nstep\nstages\n")
    stopped = [line for line in lines if line.startswith("stopped at ")]
    assert len(stopped) == 1
    assert " efi-stub " in stopped[0]
    assert lines[lines.index(stopped[0]) + 1] == stopped[0].removeprefix("stopped at ")
    assert [line for line in lines if line.startswith("stage ")][-1].startswith("stage efi-stub done")
    assert "      decompress" in lines


def test_going_back_is_the_same_boot_again(stepped):
    """After `back`, inside a stage or behind it, the same steps print the same lines."""
    lines = stepped("step\nstep\nstep\nback\nstep\n")
    once = lines.index("back before stage efi-stub")
    again = [at for at, line in enumerate(lines) if line.startswith("stage efi-stub done")]
    assert again[0] < once < again[1]
    assert lines[again[0] : once] == lines[again[1] :]
    inside = stepped("break Print:Zone ranges\ncontinue\nback\nstages\nback\nstages\n")
    assert "back before stage mm-init" in inside
    assert "back before stage setup-arch" in inside


def test_back_at_the_start(stepped):
    """There is nothing before the first stage."""
    assert stepped("back\n")[-1] == "back: this is the start"


def test_memory_and_registers(stepped):
    """`mem` shows bytes at an address whether accepted or not; `regs` what is not zero."""
    lines = stepped("step\nregs\nmem 0x809000 16\nmem 0x1000000000 16\n")
    assert "rcx=0x809000  r8=0x809000" in lines
    assert lines[-2].startswith("00809000: 0100 3800 0000 0000 0900 0000")  # handoff HOB: type 1, 56 bytes, version 9
    assert lines[-1] == "1000000000: " + "0000 " * 8 + " " + "." * 16


def test_guest_that_dies(command, file):
    """Its last words are shown, no step goes on from there, `back` does, and the exit status is 1."""
    path = file("commands", "step\nstep\nstep\nback\nstages\nstep\n")
    answer = command("step", "--memory", "48M", "--commands", path)
    assert (answer.status, answer.err) == (1, "")
    lines = answer.out.splitlines()
    assert lines.count("the guest died: firmware: LoadImage: no room for 0x88c000 bytes") == 2
    assert "the guest is dead; `back` brings it to life" in lines
    assert lines[lines.index("back before stage firmware") + 1] == "done  host"


def test_commands_from_standard_input(command, monkeypatch):
    """Without a terminal standard input is read to its end, without a prompt."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("step\nregs"))
    answer = command("step")
    assert (answer.status, answer.err) == (0, "")
    assert "(unaccepted)" not in answer.out
    assert "rcx=0x809000" in answer.out


def test_mistake_at_a_terminal_is_forgiven(command, monkeypatch):
    """At the prompt a wrong command is said and the next one runs."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    words = iter(["fly", "mem x", "step", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(words))
    answer = command("step")
    assert (answer.status, answer.err) == (0, "")
    assert "error: command: found 'fly', expected one that `help` lists" in answer.out
    assert "stage host done" in answer.out


def test_help(stepped):
    """`help` lists every command, `help COMMAND` explains it."""
    lines = stepped("help\nhelp break\n")
    assert "Commands (help COMMAND):" in lines
    assert any("break EVENT[:TEXT]" in line for line in lines)
