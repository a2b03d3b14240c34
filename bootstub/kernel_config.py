"""A kernel's configuration, as far as its memory boot depends on it; and whether it knows unaccepted memory.

A kernel built with CONFIG_IKCONFIG carries its configuration packed by gzip between two marks (kernel/configs.c).
A distribution's kernel rarely does, but puts the file beside the image: /boot/config-VERSION. Of a kernel without
either, its strings tell: CONFIG_UNACCEPTED_MEMORY adds ``nr_unaccepted`` to /proc/vmstat (mm/vmstat.c), under v9 and
in mainline alike.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from guest.errors import FormatError
from guest.units import SZ_1M

UNACCEPTED_MEMORY = "UNACCEPTED_MEMORY"
NOT_SET = "n"

_SOURCE = "kernel/configs.c, IKCFG_ST"
_START = b"IKCFG_ST\x1f\x8b\x08"
_LIMIT = 4 * SZ_1M
"""More than ten times a distribution's configuration."""
_LINE = re.compile(r"^(?:CONFIG_(\w+)=([ -~]*)|# CONFIG_(\w+) is not set)$", re.ASCII | re.MULTILINE)
_VMSTAT_NAME = b"\0nr_unaccepted\0"
_BANNER = b"Linux version "


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a kernel knows unaccepted memory; ``known`` is None if nothing tells. ``reason`` says what told."""

    known: bool | None
    reason: str


def parse_config(text: str, what: str) -> dict[str, str]:
    """The options of a configuration file by name, without ``CONFIG_``; ``n`` for those that are not set.

    Lines that are neither are passed over. ``what`` is the text's name in the ``FormatError`` if all are.
    """
    found = {name or unset: value if name else NOT_SET for name, value, unset in _LINE.findall(text)}
    if not found:
        expected = "lines such as CONFIG_UNACCEPTED_MEMORY=y"
        raise FormatError(what, found="no option", expected=expected, source="Documentation/kbuild/kconfig.rst")
    return found


def find_ikconfig(vmlinux: bytes) -> str | None:
    """The text of the configuration inside a kernel, None if there is none. Damage is a ``FormatError``."""
    at = vmlinux.find(_START)
    if at < 0:
        return None
    at += len(_START) - 3
    stream = zlib.decompressobj(wbits=31)
    try:
        text = stream.decompress(vmlinux[at : at + _LIMIT], _LIMIT)
    except zlib.error as error:
        raise _damaged(at, f"damaged data ({error})") from error
    if not stream.eof:
        raise _damaged(at, "no end")
    return text.decode("utf-8", errors="replace")


def unaccepted_memory_support(vmlinux: bytes, config: Mapping[str, str] | None) -> Support:
    """Whether the kernel in ``vmlinux`` knows unaccepted memory: by ``config``, or by its own strings."""
    if config is not None:
        value = config.get(UNACCEPTED_MEMORY, NOT_SET)
        return Support(value == "y", f"CONFIG_{UNACCEPTED_MEMORY} is {'not set' if value == NOT_SET else value}")
    if _VMSTAT_NAME in vmlinux:
        return Support(True, "it has nr_unaccepted")
    if _BANNER in vmlinux:
        return Support(False, "it has no nr_unaccepted")
    return Support(None, "it is no Linux that tells")


def _damaged(at: int, found: str) -> FormatError:
    return FormatError("IKCONFIG", at=at, found=found, expected=f"gzip, up to {_LIMIT} bytes", source=_SOURCE)
