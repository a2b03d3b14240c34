"""The command line: one line on standard error for wrong input, exit status 1; wrong usage is exit status 2."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bootstub.sample_kernel import sample_bzimage
from tests.bootstub.conftest import patch_kernel
from tools.cli import VERBS, main

STRUCTURES = ("boot-params", "tdvf", "hob", "acpi", "kernel")
NEEDED = {"judge": ("--kernel", "unread"), "conform": ("unread",)}
"""Arguments that a verb cannot do without."""
REPOSITORY = Path(__file__).parents[2]
PAYLOAD = 0x1000 + 0x2C0


WRONG_KERNELS = {
    "empty": (b"", "setup_header"),
    "one byte": (b"M", "setup_header"),
    "header cut": (sample_bzimage()[:0x250], "setup_header"),
    "code cut": (sample_bzimage()[:0x1400], "syssize"),
    "random": (random.Random(1).randbytes(20_000), "boot_flag"),
    "zeros": (bytes(20_000), "boot_flag"),
    "ELF": (b"\x7fELF" + bytes(20_000), "e_ident"),
    "zImage": (patch_kernel((0x211, "B", 0)), "loadflags"),
    "32 bits": (patch_kernel((0x236, "H", 0)), "xloadflags"),
    "payload outside": (patch_kernel((0x248, "I", 0x7FFF_0000)), "payload_offset"),
    "payload too long": (patch_kernel((0x24C, "I", 0x7FFF_0000)), "payload_length"),
    "no payload": (patch_kernel((0x24C, "I", 0)), "payload_length"),
    "alignment": (patch_kernel((0x230, "I", 3)), "kernel_alignment"),
    "init_size": (patch_kernel((0x260, "I", 0)), "init_size"),
    "handover": (patch_kernel((0x264, "I", 0xFFFF_FFFF)), "handover_offset"),
}


@pytest.mark.parametrize("name", WRONG_KERNELS)
def test_kernel_that_is_none(refused, file, tmp_path, name):
    """It is refused by the field that cannot be right, before the boot; --save writes nothing."""
    data, field = WRONG_KERNELS[name]
    assert field in refused("boot", "--kernel", file("kernel", data), "--save", tmp_path / "save")
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("option", ["--kernel", "--initrd", "--firmware", "--efi-map", "--script", "--config"])
def test_file_that_cannot_be_read(refused, tmp_path, option):
    """A missing file and a path through a file are named with the system's words."""
    assert refused("boot", option, tmp_path / "none") == f"{tmp_path}/none: No such file or directory"
    (tmp_path / "file").write_bytes(b"")
    assert refused("boot", option, tmp_path / "file" / "x") == f"{tmp_path}/file/x: Not a directory"


@pytest.mark.parametrize(
    ("option", "text"),
    [(option, "Is a directory") for option in ("--kernel", "--initrd", "--firmware", "--script", "--config")]
    + [("--efi-map", "found 0, expected 1 to 65536 directories with start, end and type")],
)
def test_directory_that_is_no_file(refused, tmp_path, option, text):
    """A directory is refused; a memory map may be one, but not an empty one."""
    assert text in refused("boot", option, tmp_path)


@pytest.mark.parametrize("memory", ["5x", "4097", "0", "-1", "10000T", "", "9" * 5000], ids=lambda text: text[:8])
def test_memory_that_is_none(refused, tmp_path, memory):
    """A size that no guest can have is refused before anything runs."""
    text = refused("boot", f"--memory={memory}", "--save", tmp_path / "save")
    assert text.startswith(f"--memory: found {memory!r}"[:500])
    assert ", expected whole 4 KiB pages" in text
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--protocol", "v8"], "--protocol: found 'v8', expected v9"),
        (["--host-backing", "never"], "--host-backing: found 'never', expected demand or ahead"),
        (["--host-page-size", "1G"], "--host-page-size: found '1G', expected 4K or 2M or mixed"),
        (["--cmdline", "a\udcff"], r"--cmdline: found 'a\udcff', expected UTF-8"),
    ],
)
def test_option_with_a_value_that_it_does_not_have(refused, words, text):
    """The error names the option, the value and what it may be."""
    assert refused("boot", *words).startswith(text)


@pytest.mark.parametrize(
    ("option", "contents", "text"),
    [
        ("--firmware", random.Random(2).randbytes(4 << 20), "firmware image GUIDed table"),
        ("--firmware", b"", "firmware image GUIDed table"),
        ("--efi-map", b"", "no memory descriptor"),
        ("--efi-map", b"\xff\xfe\x00[{]", "no memory descriptor"),
        ("--efi-map", b'[{"type": 7, "start": 0}]', "descriptor 0, pages"),
        ("--efi-map", b"[" * 10_000, "no JSON"),
        ("--efi-map", b"efi: mem00: [broken\x1b[31m", "line 1"),
        ("--script", b"cat /proc/meminfo\nalloc ten\n", "line 2"),
        ("--script", b"\x00", "line 1"),
        ("--config", b"colour = 'red'", "key 'colour'"),
        ("--config", b"memory = 4", "expected a string"),
        ("--config", b"memory = '4G", "expected TOML"),
        ("--config", b"memory = '" + b"9" * 100_000 + b"'", "99... (100002 characters), expected"),
        ("--config", b"k" * 100_000 + b" = 'red'", "kk... (100006 characters)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_file_with_wrong_contents(refused, file, tmp_path, option, contents, text):
    """It is refused with the place in the file; nothing unprintable reaches the terminal, and no endless line."""
    message = refused("boot", option, file("input", contents), "--save", tmp_path / "save")
    assert text in message
    assert message.isprintable()
    assert len(message) < 1500
    assert not (tmp_path / "save").exists()


def test_unknown_compression(command, file):
    """A bad payload is found out when it is unpacked, where the decompressor has moved itself: the log ends there."""
    kernel = file("kernel", patch_kernel((PAYLOAD, "I", 0x4F5A4C4D)))
    answer = command("boot", "--kernel", kernel)
    assert answer.status == 1
    assert answer.err.startswith("unaccepted: error: payload magic at 0x16564c0: found 4d4c5a4f")
    assert answer.err.count("\n") == 1
    assert "Booting the kernel" not in answer.out
    assert json.loads(command("boot", "--kernel", kernel, "--json").out)["error"] in answer.err


@pytest.mark.parametrize("memory", ["4K", "1M", "8M", "16M", "47M", "48M"])
def test_guest_that_is_too_small(command, memory):
    """A guest without room says what did not fit, and no line of /proc is printed for it."""
    answer = command("boot", "--memory", memory)
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert answer.err.startswith("unaccepted: error: ")
    assert "/proc" not in answer.out


def test_save_into_something_else(refused, file):
    """--save needs a directory: a file in its place is refused before the boot."""
    path = file("taken", "mine")
    assert refused("boot", "--save", path) == f"{path}: File exists"
    assert path.read_text() == "mine"


def test_saved_boot_of_a_guest_that_died_early(command, tmp_path):
    """What the boot did not reach is not written."""
    assert command("boot", "--memory", "16M", "--save", tmp_path).status == 1
    assert {path.name for path in tmp_path.iterdir()} == {"facts.json", "journal.jsonl", "trace.jsonl"}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["boot", "--until", "nonsense"],
        ["boot", "--memory"],
        ["boot", "--wings"],
        ["boot", "extra"],
        ["boot", "--json=loud"],
        ["dump"],
        ["dump", "hobs", "x"],
        ["dump", "boot-params"],
        ["dump", "boot-params", "x", "--live"],
        ["dump", "boot-params", "x", "--hex", "--dmesg"],
        ["conform"],
        ["conform", "x", "--differences", "many"],
        ["step", "--break"],
    ],
    ids=" ".join,
)
def test_wrong_usage(command, words):
    """Exit status 2, usage and one error line on standard error, nothing on standard output."""
    answer = command(*words)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("usage: unaccepted")
    assert "error: " in answer.err.splitlines()[-1]


@pytest.mark.parametrize(
    "words", [[], *([verb] for verb in VERBS), *(["dump", structure] for structure in STRUCTURES)], ids=" ".join
)
def test_help(command, words):
    """Help is an answer: exit status 0, on standard output; behind the usage a sentence says what is done."""
    answer = command(*words, "--help")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith(" ".join(["usage: unaccepted", *words]))
    assert answer.out.split("\n\n")[1].rstrip()[-1] in ".?"


def test_help_tells_the_exit_status(command):
    """Every status that the command can end with is in its help."""
    text = " ".join(command("--help").out.partition("Exit status: ")[2].split())
    assert [part.split()[0] for part in text.split("; ")] == ["0", "1", "2", "130"]


@pytest.mark.parametrize(
    "words",
    [
        "explore --limit", "explore --jobs", "kaslr --seeds", "conform --limit", "conform --jobs", "judge --maps",
        "judge --jobs",
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "\u0663", "9" * 5000], ids=lambda number: ascii(number)[:10])
def test_number_that_is_none(command, words, number):
    """How many, counted from 1: anything else is wrong usage, told in words of the same kind by every verb."""
    verb, option = words.split()
    answer = command(verb, f"{option}={number}", *NEEDED.get(verb, ()))
    assert (answer.status, answer.out) == (2, "")
    expected = f"unaccepted {verb}: error: argument {option}: found {number[:80]!r}, expected a number from 1 "
    assert answer.err.splitlines()[-1].startswith(expected)


@pytest.mark.parametrize("verb", ["explore", "conform", "judge"])
def test_no_verb_starts_thousands_of_processes(command, verb):
    """--jobs has an end."""
    answer = command(verb, "--jobs", "1025", *NEEDED.get(verb, ()))
    assert answer.status == 2
    assert answer.err.endswith("argument --jobs: found '1025', expected a number from 1 to 1024\n")


def test_version(command):
    """The version names the kernel rules."""
    assert command("--version").out.endswith(", kernel rules: v9, mainline\n")


def test_as_a_program(file):
    """The same in a process of its own, with bytes in its arguments that are no UTF-8."""
    words = [sys.executable, "-m", "tools.cli", "boot", "--kernel", os.fsencode(file("k", "")), "--cmdline", b"\xff"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"unaccepted: error: ")
    assert done.stderr.count(b"\n") == 1


def test_reader_that_leaves():
    """A pipe that is closed early ends the command without a word."""
    words = f"{sys.executable} -m tools.cli boot | head -c 10 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], cwd=REPOSITORY, capture_output=True, check=False)
    assert done.stderr == b""
    assert done.stdout in (b"0\n", b"1\n")  # 0 if everything fitted into the pipe before it was closed


def test_main_takes_its_words_from_the_process(monkeypatch, capsys):
    """Without an argument the words are those of the process."""
    monkeypatch.setattr(sys, "argv", ["unaccepted", "boot", "--until", "host"])
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("sum ")


def test_measurements_are_printed_and_are_in_the_json(command):
    """--measure gives MRTD and RTMR0 to RTMR3, 48 bytes each; without it JSON has none of them."""
    names = ["MRTD", "RTMR0", "RTMR1", "RTMR2", "RTMR3"]
    words = ("boot", "--until", "host", "--json")
    data = json.loads(command(*words, "--measure").out)
    assert all(len(bytes.fromhex(data[name])) == 48 for name in names)
    assert not set(names) & set(json.loads(command(*words).out))
    text = command("boot", "--until", "host", "--measure").out.splitlines()
    assert text[-5:] == [f"{name} {data[name]}" for name in names]
