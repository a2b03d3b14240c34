"""The report on a guest that died in real code, for every verb that runs one."""

from __future__ import annotations

import argparse
from contextlib import suppress

from guest.errors import BootError, FormatError
from tools.files import read_text
from tools.pipeline import Boot


def add_symbols_option(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the option ``--system-map``."""
    parser.add_argument("--system-map", metavar="FILE", help="symbols for the report on real code that died")


def postmortem(boot: Boot, death: BootError, system_map: str | None) -> list[str]:
    """How the processor stands where the guest died, with symbols of System.map or of the kernel itself.

    Empty if no real code ran.
    """
    if boot.real_code is None:
        return []
    from bootstub.bzimage import parse_bzimage
    from bootstub.kernel_layout import START_KERNEL_MAP
    from bootstub.payload import decompress
    from cpu.postmortem import report
    from cpu.symbols import Symbols, parse_system_map, read_kallsyms

    symbols = Symbols((), "", ())
    if system_map is not None:
        symbols = parse_system_map(read_text(system_map))
    else:
        kernel = boot.config.kernel
        with suppress(FormatError):  # a payload that only the kernel's own code can unpack
            symbols = read_kallsyms(decompress(parse_bzimage(kernel).payload(kernel))) or symbols
    if boot.real_code.unpacked_for is not None:
        _, virtual = boot.real_code.unpacked_for
        symbols = symbols.placed(START_KERNEL_MAP + virtual)
    return report(boot.real_code.vcpu, boot.trace, symbols, death)
