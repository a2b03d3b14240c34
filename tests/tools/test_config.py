"""Options of a boot, from the command line and from TOML."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guest.errors import FormatError
from tests.refusals import value_or_refusal
from tools.config import add_options, boot_config
from tools.options import parse_memory
from tools.pipeline import BootConfig


def configured(*words: str) -> BootConfig:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return boot_config(parser.parse_args(list(words)))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("20K", 20480),
        ("512m", 512 << 20),
        ("4G", 4 << 30),
        ("0x100000000", 4 << 30),
        ("1024T", 1 << 50),
    ],
)
def test_memory(text, size):
    """Whole pages up to 1 PiB, with the kernel's suffixes."""
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "G", "5x", "4097", "0", "-1", "10000T", "1025T", "4G4", "4 G", "16E", "0x", "08", "1e9", "9" * 5000],
    ids=lambda value: value[:10],
)
def test_memory_that_is_none(text):
    """Anything else is refused by the option's name."""
    with pytest.raises(FormatError) as caught:
        parse_memory(text)
    assert caught.value.what == "--memory"


def test_file_gives_defaults_and_the_command_line_wins(file):
    """Every option may stand in the file, by its name; what is on the command line counts."""
    script = file("script", "alloc 0 1\n")
    initrd = file("initrd", b"initrd")
    toml = file(
        "boot.toml",
        f"""
        memory = "8G"
        cmdline = "quiet ñ"
        host-page-size = "4K"
        host-backing = "ahead"
        protocol = "v9"
        script = "{script}"
        initrd = "{initrd}"
    """,
    )
    config = configured("--config", str(toml), "--memory", "5G")
    assert (config.memory, config.cmdline, config.host_level, config.host_ahead) == (5 << 30, "quiet ñ", 0, True)
    assert (config.protocol.name, config.initrd, len(config.script)) == ("v9", b"initrd", 1)


@pytest.mark.parametrize(
    ("text", "what", "found"),
    [
        ('memroy = "4G"', "", "key 'memroy'"),
        ("memory = 4", ", memory", "int"),
        ("memory = 0x" + "f" * 6000, ", memory", "int"),
        ("cmdline = [1, 2]", ", cmdline", "list"),
        ("cmdline = 1979-05-27", ", cmdline", "date"),
        ("[memory]\nsize = 1", ", memory", "dict"),
        ("memory = ", "", None),
        ("memory = '4G'\nmemory = '4G'", "", None),
        ("memory = " + "9" * 5000, "", None),
        ("memory = " + "[" * 5000, "", None),
        ("\0", "", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_file_that_is_refused(file, text, what, found):
    """An unknown key, a value that is no string, and what is no TOML are refused with the file's name."""
    toml = file("boot.toml", text)
    with pytest.raises(FormatError) as caught:
        configured("--config", str(toml))
    assert caught.value.what == f"{toml}{what}"
    assert found is None or caught.value.found == found


def test_file_names_with_nul(file):
    """A NUL can come from TOML only; it is no file's name."""
    toml = file("boot.toml", r'kernel = "a\u0000b"')
    with pytest.raises(FormatError, match="a NUL character"):
        configured("--config", str(toml))


def test_command_line_that_is_no_text():
    """Bytes of the shell's that are no UTF-8 are refused before the boot."""
    with pytest.raises(FormatError, match="--cmdline"):
        configured("--cmdline", "quiet \udcff")


def test_memory_and_map_exclude_each_other(file):
    """One of the two describes the guest's memory, wherever they stand."""
    toml = file("boot.toml", 'memory = "4G"')
    with pytest.raises(FormatError, match="with --efi-map"):
        configured("--config", str(toml), "--efi-map", "unread")


@given(st.text(max_size=80) | st.text("[]{}=\"'.,#\n abc0123456789-:TZ+_x", max_size=80))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_toml(tmp_path: Path, text):
    """Any text is a configuration or refused; files that it names may be missing."""
    toml = tmp_path / "random.toml"
    toml.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(OSError), value_or_refusal():
        configured("--config", str(toml))


def test_faults_from_everywhere(file):
    """Faults of the command line come together with those of a script; in TOML they are an array."""
    script = file("faults", "# the host\nbusy@accept=3  # once\n\nreplay@gpa=4G-5G\n")
    config = configured("--fault", "hob-less", "--fault", "block", "--fault-script", str(script))
    assert list(map(str, config.faults)) == ["hob-less", "block", "busy@accept=3", "replay@gpa=4G-5G"]
    toml = file("boot.toml", 'fault = ["busy@accept=3", "block"]\nsanitize = "error"\n')
    config = configured("--config", str(toml))
    assert list(map(str, config.faults)) == ["busy@accept=3", "block"]
    assert config.sanitize == "error"
    assert list(map(str, configured("--config", str(toml), "--fault", "remove").faults)) == ["remove"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--fault", "bussy"), "kind 'bussy'"),
        (("--fault", "busy@stage=grub"), "stage=grub"),
        (("--fault-script", "FILE"), "kind 'no rule'"),
        (("--sanitize", "maybe"), "'maybe'"),
        (("--config", "TOML"), "str"),
    ],
)
def test_faults_that_are_none(file, words, found):
    """A rule, a stage, a mode or a type that is none is refused in one line."""
    names = {"FILE": file("faults", "no rule\n"), "TOML": file("boot.toml", 'fault = "busy"')}
    with pytest.raises(FormatError) as caught:
        configured(*(str(names.get(word, word)) for word in words))
    assert caught.value.found == found


def test_too_many_faults(file):
    """A script of more than 1024 faults is refused."""
    with pytest.raises(FormatError, match="1025 faults"):
        configured("--fault-script", str(file("faults", "busy\n" * 1025)))


@pytest.mark.parametrize(
    "text", ["-1", "", "1.5", "seven", "18446744073709551616", "\u0663", "9" * 5000], ids=lambda t: t[:8]
)
def test_seed_that_is_none(text):
    """A seed is a number of 64 bits."""
    with pytest.raises(FormatError) as caught:
        configured(f"--seed={text}")
    assert (caught.value.what, caught.value.expected) == ("--seed", "a number from 0 to 18446744073709551615")


def test_seed():
    """The seed of real code; 0 if nothing is said."""
    assert (configured("--seed", "18446744073709551615").seed, configured().seed) == ((1 << 64) - 1, 0)
