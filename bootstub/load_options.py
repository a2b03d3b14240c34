"""Load options: the command line as a boot manager hands it over, in UTF-16.

Source: drivers/firmware/efi/libstub/efi-stub-helper.c, efi_convert_cmdline(), efi_apply_loadoptions_quirk() and
efi_load_option_unpack(); UEFI 2.10, sections 3.1.3 and 9.1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

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


def command_line(options: bytes) -> tuple[bytes, bool]:
    """The line in UTF-8, up to a NUL or a line end, and whether it was cut.

    A line of 2048 bytes or more is cut at its last white space outside quotes, at its start if there is none. Half a
    surrogate pair becomes U+FFFD; in the last place it is left out if it is a first half.
    """
    line, last_space, quoted = bytearray(), 0, False
    for character in _characters(options):
        if character in (b"\0", b"\n"):
            break
        if character == b'"':
            quoted = not quoted
        elif not quoted and character in b" \t\v\f\r":
            last_space = len(line)
        line += character
        if len(line) >= COMMAND_LINE_SIZE:
            return bytes(line[:last_space]), True
    return bytes(line), False


def _characters(options: bytes) -> Iterator[bytes]:
    """The characters in UTF-8, as long as somebody wants them."""
    units = struct.unpack_from(f"<{len(options) // 2}H", options)
    at = 0
    while at < len(units):
        unit = units[at]
        at += 1
        if unit & 0xF800 != 0xD800:
            yield chr(unit).encode()
            continue
        if unit & 0xFC00 == 0xD800:
            if at == len(units):
                return
            if units[at] & 0xFC00 == 0xDC00:
                yield chr(0x10000 + (unit & 0x3FF) * 0x400 + (units[at] & 0x3FF)).encode()
                at += 1
                continue
        yield _REPLACEMENT
