"""What the stub understands of the command line.

Source: drivers/firmware/efi/libstub/efi-stub-helper.c, efi_parse_options(), and x86-stub.c, parse_options() (6.12).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from bootstub.cmdline import COMMAND_LINE_SIZE, SPACE, arguments

CONSOLE_LOGLEVEL_QUIET, CONSOLE_LOGLEVEL_DEFAULT, CONSOLE_LOGLEVEL_DEBUG = 4, 7, 10
_OVERRIDES = (b"mem", b"memmap", b"hugepages")


@dataclass(slots=True)
class StubOptions:
    """``nochunk``: files are read in one go, if the last ``efi=`` says so. ``loglevel``: messages of lower levels are
    printed. ``soft_reserve``: memory for a special purpose is set aside (CONFIG_EFI_SOFT_RESERVE, unless the last
    ``efi=`` says no). ``disable_pci_dma``: bridges are to be no bus masters when boot services end. ``mem_encrypt``:
    the kernel is to encrypt memory.

    ``memmap_override``: the option after which the stub leaves the kernel's physical place alone, None without.
    """

    nokaslr: bool = False
    noinitrd: bool = False
    nochunk: bool = False
    loglevel: int = CONSOLE_LOGLEVEL_DEFAULT
    soft_reserve: bool = True
    disable_pci_dma: bool = False
    mem_encrypt: bool = False
    memmap_override: str | None = None

    def take(self, name: str, value: str | None) -> None:
        """One argument. Those without a value may have one all the same; what is not known is for the kernel."""
        words = set() if value is None else set(value.split(","))
        match name:
            case "nokaslr":
                self.nokaslr = True
            case "quiet":
                self.loglevel = CONSOLE_LOGLEVEL_QUIET
            case "noinitrd":
                self.noinitrd = True
            case "mem_encrypt" if words & {"on", "off"}:
                self.mem_encrypt = "on" in words
            case "efi" if value is not None:
                self._efi(words)

    def _efi(self, words: set[str]) -> None:
        self.nochunk = "nochunk" in words
        self.soft_reserve = "nosoftreserve" not in words
        if "disable_early_pci_dma" in words:
            self.disable_pci_dma = True
        if "no_disable_early_pci_dma" in words:
            self.disable_pci_dma = False
        if "debug" in words:
            self.loglevel = CONSOLE_LOGLEVEL_DEBUG


def parse_options(line: bytes) -> StubOptions:
    """The options in a command line, up to ``--``."""
    options = StubOptions(memmap_override=next(_overrides(line), None))
    for name, value in arguments(line[: COMMAND_LINE_SIZE - 1]):
        options.take(name, value)
    return options


def _overrides(line: bytes) -> Iterator[str]:
    """Options that first occur at the line's start or behind white space. Quotes and ``--`` do not matter."""
    for option in _OVERRIDES:
        found = re.search(re.escape(option + b"="), line)
        if found and (found.start() == 0 or line[found.start() - 1] in SPACE):
            yield option.decode()
