import pytest

from bootstub.sample_kernel import sample_bzimage
from firmware.efi_types import EfiStatus
from guest.trace import Print
from tools.pipeline import Boot, BootConfig

CON_OUT, OUTPUT_STRING, CLEAR_SCREEN = 64, 8, 48
"""Offsets in EFI_SYSTEM_TABLE (UEFI 2.10, section 4.3) and in the protocol (section 12.4.2)."""
SCRATCH = 0x10_0000


class Console:
    """The console as an image finds it."""

    def __init__(self):
        self.boot = Boot(BootConfig(sample_bzimage()))
        self.boot.run("firmware")
        self.before = self.boot.trace.count
        self.protocol = self.uint(self.boot.machine.regs.rdx + CON_OUT)

    def uint(self, address):
        return self.boot.machine.memory.read_uint(address, 8)

    def put(self, data):
        self.boot.machine.memory.write(SCRATCH, data)
        return self.boot.machine.call(self.uint(self.protocol + OUTPUT_STRING), self.protocol, SCRATCH)

    def lines(self):
        return [r.event.text for r in self.boot.trace.records[self.before :] if isinstance(r.event, Print)]


@pytest.fixture
def console():
    return Console()


def test_lines(console):
    """A line is put out when its end comes, however many calls it takes."""
    assert console.put("EFI stub: ".encode("utf-16-le") + b"\0\0x") == EfiStatus.EFI_SUCCESS
    assert console.lines() == []
    console.put("hello\r\nsecond\n\n\0".encode("utf-16-le"))
    assert console.lines() == ["EFI stub: hello", "second", ""]


def test_hostile_string(console):
    """A string without an end is cut, and half a character is shown as such."""
    assert console.put(b"\x41\x00" * 10000) == EfiStatus.EFI_SUCCESS
    console.put(b"\x00\xd8\x0a\x00\0\0")
    assert console.lines() == ["A" * 4096 + "\N{REPLACEMENT CHARACTER}"]


def test_other_functions(console):
    """What is not built answers EFI_UNSUPPORTED."""
    clear = console.uint(console.protocol + CLEAR_SCREEN)
    assert console.boot.machine.call(clear, console.protocol) == EfiStatus.EFI_UNSUPPORTED
