"""Load options: the command line as a boot manager hands it over, in UTF-16.

Source: drivers/firmware/efi/libstub/efi-stub-helper.c, efi_convert_cmdline(), efi_apply_loadoptions_quirk() and
efi_load_option_unpack(); UEFI 2.10, sections 3.1.3 and 9.1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from bootstub.cmdline import COMMAND_LINE_SIZE

_EFI_LOAD_OPTION = struct.Struct("<IH")
_BOOT_ATTRIBUTES = 0x1F09
"""EFI_LOAD_OPTION_BOOT_MASK: ACTIVE, HIDDEN and CATEGORY."""
_NODE = struct.Struct("<BBH")
_END_TYPES, _END_ENTIRE = (0x7F, 0xFF), 0xFF
_REPLACEMENT = "\ufffd".encode()


def optional_data(options: bytes) -> bytes | None:
    """The optional data of ``options`` if they are a whole EFI_LOAD_OPTION, as some firmware passes it, else None."""
    if len(options) < _EFI_LOAD_OPTION.size:
        return None
    attributes, path_length = _EFI_LOAD_OPTION.unpack_from(options)
    if attributes & ~_BOOT_ATTRIBUTES:
        return None
    path = _behind_description(options)
    end = None if path is None else _behind_path(options, path)
    return options[end:] if path is not None and end is not None and end - path == path_length else None


def _behind_description(options: bytes) -> int | None:
    for at in range(_EFI_LOAD_OPTION.size, len(options) - 1, 2):
        if options[at : at + 2] == b"\0\0":
            return at + 2
    return None


def _behind_path(options: bytes, at: int) -> int | None:
    """Offset behind the device path at ``at``; None if it does not end within ``options``."""
    while len(options) - at >= _NODE.size:
        kind, sub_type, length = _NODE.unpack_from(options, at)
        if not _NODE.size <= length <= len(options) - at:
            return None
        at += length
        if kind in _END_TYPES and sub_type == _END_ENTIRE:
            return at
    return None


class CommandLine(NamedTuple):
    """A line in UTF-8, what it was ``counted`` to be, in bytes, and whether it was ``cut``."""

    text: bytes
    counted: int
    cut: bool


def command_line(options: bytes) -> CommandLine:
    """The line in ``options``, up to a NUL or a line end.

    A line of 2048 bytes or more is cut at its last white space outside quotes, at its start if there is none. Half a
    surrogate pair becomes U+FFFD; a first half in the last place is left out, though it was counted, unless it is the
    last of all.
    """
    line, last_space, quoted, cut = bytearray(), 0, False, False
    first_halves: set[int] = set()
    for character, first_half in _characters(options):
        if character in (b"\0", b"\n"):
            break
        if character == b'"':
            quoted = not quoted
        elif not quoted and character in b" \t\v\f\r":
            last_space = len(line)
        line += character
        if first_half:
            first_halves.add(len(line))
        if cut := len(line) >= COMMAND_LINE_SIZE:
            break
    counted = last_space if cut else len(line)
    end = counted - len(_REPLACEMENT) if counted in first_halves else counted
    return CommandLine(bytes(line[:end]), counted, cut)


def _characters(options: bytes) -> Iterator[tuple[bytes, bool]]:
    """The characters in UTF-8, as long as somebody wants them; true with one that is half a pair, the first half."""
    units = struct.unpack_from(f"<{len(options) // 2}H", options)
    at = 0
    while at < len(units):
        unit = units[at]
        at += 1
        first_half = unit & 0xFC00 == 0xD800
        if first_half and at == len(units):
            return
        if first_half and units[at] & 0xFC00 == 0xDC00:
            yield chr(0x10000 + (unit & 0x3FF) * 0x400 + (units[at] & 0x3FF)).encode(), False
            at += 1
        elif unit & 0xF800 == 0xD800:
            yield _REPLACEMENT, first_half
        else:
            yield chr(unit).encode(), False
