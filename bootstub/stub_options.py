"""What the stub understands of the command line.

Source: drivers/firmware/efi/libstub/efi-stub-helper.c, efi_parse_options(); lib/cmdline.c, next_arg().
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_ARGUMENT = re.compile(r'(?:[^\s"]|"[^"]*(?:"|$))+')
_OVERRIDES = ("mem", "memmap", "hugepages")


@dataclass(frozen=True, slots=True)
class StubOptions:
    """``soft_reserve``: memory for a special purpose is set aside (CONFIG_EFI_SOFT_RESERVE, unless it is told not to).

    ``memmap_override``: the option after which the stub leaves the kernel's physical place alone, None without.
    """

    nokaslr: bool = False
    quiet: bool = False
    noinitrd: bool = False
    soft_reserve: bool = True
    memmap_override: str | None = None


def parse_options(line: str) -> StubOptions:
    """The options in a command line; those that the stub does not know are for the kernel."""
    arguments = list(_arguments(line))
    names = {name for name, value in arguments if value is None}
    efi = {word for name, value in arguments if name == "efi" and value is not None for word in value.split(",")}
    overrides = [name for name, value in arguments if name in _OVERRIDES and value is not None]
    return StubOptions(
        nokaslr="nokaslr" in names,
        quiet="quiet" in names,
        noinitrd="noinitrd" in names,
        soft_reserve="nosoftreserve" not in efi,
        memmap_override=overrides[-1] if overrides else None,
    )


def _arguments(line: str) -> Iterator[tuple[str, str | None]]:
    """Name and value of each argument; quotes around either are taken away, blanks inside them kept."""
    for argument in _ARGUMENT.findall(line):
        name, has_value, value = argument.replace('"', "").partition("=")
        yield name, value if has_value else None
