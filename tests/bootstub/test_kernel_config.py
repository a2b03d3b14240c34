"""Kernel configurations: their lines, where a kernel has its own, and whether it knows unaccepted memory."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.kernel_config import Support, find_ikconfig, parse_config, unaccepted_memory_support
from bootstub.sample_kernel import build_vmlinux
from guest.errors import FormatError

TEXT = """#
# Automatically generated file; DO NOT EDIT.
#
CONFIG_CC_VERSION_TEXT="gcc-12 (Debian 12.2.0-14) 12.2.0"
CONFIG_UNACCEPTED_MEMORY=y
# CONFIG_NUMA is not set
CONFIG_PHYSICAL_START=0x1000000
CONFIG_EMPTY=
CONFIG_BAD=\x1b[2J
CONFIG_TIMER=m
"""


def test_lines():
    """Values are as they stand there, options that are not set are n, and what a terminal should not see is none."""
    assert parse_config(TEXT, "text") == {
        "CC_VERSION_TEXT": '"gcc-12 (Debian 12.2.0-14) 12.2.0"',
        "UNACCEPTED_MEMORY": "y",
        "NUMA": "n",
        "PHYSICAL_START": "0x1000000",
        "EMPTY": "",
        "TIMER": "m",
    }


@pytest.mark.parametrize("text", ["", "#\n", "UNACCEPTED_MEMORY=y\n", "\ufffd" * 100])
def test_no_configuration(text):
    """A text without any option is refused by the name that it has."""
    with pytest.raises(FormatError, match=r"^config: found no option, expected lines such as CONFIG_"):
        parse_config(text, "config")


@given(st.text(st.characters(codec="utf-8"), max_size=2000), st.binary(max_size=100), st.binary(max_size=100))
def test_ikconfig_is_found(text, before, behind):
    """What kernel/configs.c puts between its marks comes out again, wherever it lies."""
    packed = b"IKCFG_ST" + zlib.compress(text.encode(), wbits=31) + b"IKCFG_ED"
    assert find_ikconfig(before.replace(b"I", b"") + packed + behind) == text


def test_ikconfig_of_a_kernel():
    """The sample kernel carries the configuration that it is built with, and none otherwise."""
    assert find_ikconfig(build_vmlinux(config=TEXT)) == TEXT
    assert find_ikconfig(build_vmlinux()) is None


PACKED = zlib.compress(TEXT.encode() * 100, wbits=31)
BROKEN = {
    "cut": PACKED[:-20],
    "damaged": PACKED[:20] + b"\xff" * 8 + PACKED[28:],
    "other checksum": PACKED[:-8] + bytes(8),
    "bomb": zlib.compress(bytes(64 << 20), wbits=31),
}


@pytest.mark.parametrize("packed", BROKEN.values(), ids=BROKEN)
def test_broken_ikconfig(packed):
    """A configuration inside that does not unpack, or not within 4 MiB, is refused where it lies."""
    with pytest.raises(FormatError) as caught:
        find_ikconfig(b"12345678IKCFG_ST" + packed)
    assert (caught.value.what, caught.value.at) == ("IKCONFIG", 16)


BANNER = b"Linux version 6.1.0 (gcc)\0"
SUPPORT = [
    (b"", {"UNACCEPTED_MEMORY": "y"}, Support(True, "CONFIG_UNACCEPTED_MEMORY is y")),
    (b"\0nr_unaccepted\0", {"UNACCEPTED_MEMORY": "n"}, Support(False, "CONFIG_UNACCEPTED_MEMORY is not set")),
    (b"\0nr_unaccepted\0", {"NUMA": "y"}, Support(False, "CONFIG_UNACCEPTED_MEMORY is not set")),
    (BANNER + b"\0nr_unaccepted\0", None, Support(True, "it has nr_unaccepted")),
    (BANNER + b"\0nr_free_pages\0nr_unaccepted_more\0", None, Support(False, "it has no nr_unaccepted")),
    (b"some other kernel", None, Support(None, "it is no Linux that tells")),
]


@pytest.mark.parametrize(("vmlinux", "config", "support"), SUPPORT)
def test_support(vmlinux, config, support):
    """The configuration decides; without one, the name in /proc/vmstat does, in a kernel that is Linux at all."""
    assert unaccepted_memory_support(vmlinux, config) == support
