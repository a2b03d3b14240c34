"""Reading the user's files."""

from __future__ import annotations

from pathlib import Path

from guest.errors import FormatError
from guest.units import SZ_1G

_MAX_FILE = SZ_1G
_SOURCE = "unaccepted --help"


def file_path(path: str) -> Path:
    """The path, if it can be one."""
    if "\0" in path:
        raise FormatError(repr(path), found="a NUL character", expected="the name of a file", source=_SOURCE)
    return Path(path)


def read_file(path: str) -> bytes:
    """The bytes of a file, up to 1 GiB. ``OSError`` as it comes; a larger file is a ``FormatError``."""
    size = file_path(path).stat().st_size
    if size <= _MAX_FILE:
        with Path(path).open("rb") as file:  # a device has no size of its own
            data = file.read(_MAX_FILE + 1)
        if len(data) <= _MAX_FILE:
            return data
        size = len(data)
    raise FormatError(path, found=f"{size} bytes", expected=f"at most {_MAX_FILE}", source=_SOURCE)


def read_text(path: str) -> str:
    """The text of a file, as UTF-8; bytes that are none become replacement characters."""
    return read_file(path).decode("utf-8", errors="replace")
