"""Strings of 16-bit characters, as UEFI has them (UEFI 2.10, section 2.3.1)."""

from __future__ import annotations

from guest.machine import CallerMemory

MAX_LENGTH = 4096
"""Characters of one string; the specification has no limit, a string that does not end has."""


def read_char16(memory: CallerMemory, address: int) -> str:
    """The null-terminated string at ``address``; one that does not end is cut."""
    return _read(memory, address, MAX_LENGTH)[0].decode("utf-16-le", errors="replace")


def find_char16(memory: CallerMemory, address: int, size: int = 2 * MAX_LENGTH) -> str | None:
    """The null-terminated string at ``address``; None if it does not end within ``size`` bytes.

    Half a surrogate pair stays what it is, so that no two strings are taken for one.
    """
    data, ended = _read(memory, address, min(size // 2, MAX_LENGTH))
    return data.decode("utf-16-le", errors="surrogatepass") if ended else None


def char16_bytes(text: str) -> bytes:
    """``text`` as it stands in memory, with its end."""
    return (text + "\0").encode("utf-16-le", errors="surrogatepass")


def _read(memory: CallerMemory, address: int, length: int) -> tuple[bytes, bool]:
    """The characters up to the null, ``length`` at most, and whether there was one."""
    units: list[bytes] = []
    for number in range(length):
        unit = memory.read(address + 2 * number, 2)
        if unit == b"\0\0":
            return b"".join(units), True
        units.append(unit)
    return b"".join(units), False
