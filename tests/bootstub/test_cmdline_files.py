"""initrd= on the command line: files from the device that the kernel came from."""

from __future__ import annotations

import struct

import pytest

from bootstub.cmdline_files import file_names
from bootstub.protocol import MAINLINE, V9
from guest.errors import GuestPanic
from guest.trace import Print, ServiceCall

INITRD = b"070701 not really a cpio archive\n" * 70_000  # three pieces of 1 MiB, not whole pages


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("quiet", []),
        ("initrd=", []),  # nothing behind it, not even an end
        ("initrd=\0", [""]),
        ("initrd=a b initrd=c\0", ["a", "c"]),
        ("x-initrd=//\\a/b\nrest", ["a/b"]),
        ('initrd="a b"', ['"a']),
        ("initrd=initrd=x initrd=y", ["initrd=x", "y"]),
        ("initrd=" + "n" * 255 + "initrd=x", ["n" * 255, "x"]),
    ],
)
def test_names(line, names):
    """A name begins wherever the option stands, and ends at a blank, a line end or NUL, or after 255 characters."""
    assert list(file_names(line.encode("utf-16-le"), "initrd=")) == names


def loaded(boot) -> bytes:
    """What boot_params says the initrd is; the configuration table must say the same."""
    at, size = struct.unpack_from("<II", boot.boot_params, 0x218)
    calls = [r.event for r in boot.trace.records if isinstance(r.event, ServiceCall)]
    assert "LoadFile" not in [call.service for call in calls]
    if size:
        tables = [call.args[1] for call in calls if call.service == "InstallConfigurationTable"]
        assert struct.pack("<QQ", at, size) in [boot.physical.read(table, 16) for table in tables]
    return boot.physical.read(at, size)


def prints(boot) -> list[str]:
    return [r.event.text for r in boot.trace.records if isinstance(r.event, Print)]


@pytest.mark.parametrize("protocol", [V9, MAINLINE], ids=lambda protocol: protocol.name)
def test_an_initrd_by_name(new_boot, protocol):
    """With ``initrd=initrd`` the file is loaded below 2 GiB, and the kernel is told where; twice, twice as much."""
    boot = new_boot(
        "efi-stub", protocol=protocol, initrd=INITRD, offers=("initrd-file",), cmdline="nokaslr initrd=/initrd"
    )
    assert loaded(boot) == INITRD
    assert "EFI stub: Loaded initrd from command line option" in prints(boot)
    twice = new_boot(
        "efi-stub", protocol=protocol, initrd=INITRD, offers=("initrd-file",),
        cmdline="nokaslr efi=nochunk initrd=initrd initrd=initrd",
    )  # fmt: skip
    assert loaded(twice) == INITRD * 2


def test_noinitrd_and_no_name(new_boot):
    """Without the option, or with ``noinitrd``, nobody asks for the file."""
    for line in ("nokaslr", "nokaslr noinitrd initrd=initrd"):
        assert loaded(new_boot("efi-stub", initrd=INITRD, offers=("initrd-file",), cmdline=line)) == b""


def test_no_file_system(new_boot):
    """On a device without files the stub says so and boots without an initrd."""
    boot = new_boot("efi-stub", cmdline="nokaslr initrd=initrd")
    assert loaded(boot) == b""
    assert "EFI stub: ERROR: Failed to handle fs_proto" in prints(boot)


def test_a_file_that_is_not_there(new_boot):
    """A name that does not exist ends the boot, as on a real machine."""
    with pytest.raises(GuestPanic, match="Exit with EFI_NOT_FOUND"):
        new_boot("efi-stub", offers=("initrd-file",), cmdline="nokaslr initrd=none", protocol=MAINLINE)
