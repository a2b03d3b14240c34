"""Sizes and page arithmetic. No other file spells such numbers out.

Names as in the kernel: include/linux/sizes.h, limits.h and pfn.h, arch/x86/include/asm/page_types.h.
"""

from __future__ import annotations

import re

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PMD_SHIFT = 21
PMD_SIZE = 1 << PMD_SHIFT
PUD_SHIFT = 30
PUD_SIZE = 1 << PUD_SHIFT

SZ_1K = 1 << 10
SZ_16K = 1 << 14
SZ_64K = 1 << 16
SZ_128K = 1 << 17
SZ_1M = 1 << 20
SZ_2M = 1 << 21
SZ_4M = 1 << 22
SZ_8M = 1 << 23
SZ_16M = 1 << 24
SZ_32M = 1 << 25
SZ_64M = 1 << 26
SZ_128M = 1 << 27
SZ_256M = 1 << 28
SZ_1G = 1 << 30
SZ_2G = 1 << 31
SZ_4G = 1 << 32

BITS_PER_BYTE = 8
U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1

PHYSICAL_ADDRESS_BITS = 52
PHYSICAL_ADDRESS_END = 1 << PHYSICAL_ADDRESS_BITS
"""End of the guest physical address space, exclusive."""


def PFN_DOWN(gpa: int) -> int:
    """Number of the page frame that holds ``gpa``."""
    return gpa >> PAGE_SHIFT


def PFN_UP(gpa: int) -> int:
    """Number of the first page frame that starts at or above ``gpa``."""
    return (gpa + PAGE_SIZE - 1) >> PAGE_SHIFT


def PFN_PHYS(pfn: int) -> int:
    """Guest physical address of page frame ``pfn``."""
    return pfn << PAGE_SHIFT


def round_down(value: int, step: int) -> int:
    """Largest multiple of ``step`` that is not above ``value``."""
    return value // step * step


def round_up(value: int, step: int) -> int:
    """Smallest multiple of ``step`` that is not below ``value``."""
    return -(-value // step) * step


def DIV_ROUND_UP(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)


_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*")


def memparse(text: str) -> tuple[int, str]:
    """Read a number with an optional suffix K, M, G, T, P or E; return it and the text that is left.

    A number is decimal, hexadecimal (``0x``) or octal (leading ``0``), as ``simple_strtoull`` has it: it ends
    where the digits of its base end, and wraps at 64 bits. Text that does not start with a number gives 0 and
    the whole text, so that the caller can refuse it. Source: lib/cmdline.c, memparse().
    """
    number, rest = simple_strtoull(text)
    at = "kmgtpe".find(rest[:1].lower()) if rest and rest != text else -1
    return (number << 10 * (at + 1)) & U64_MAX, rest[1:] if at >= 0 else rest


def simple_strtoull(text: str) -> tuple[int, str]:
    """A number alone, as :func:`memparse` reads it, and the text that is left (lib/vsprintf.c)."""
    match = _NUMBER.match(text)
    if match is None:
        return 0, text
    digits = match[0]
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
    number = 0
    for digit in digits[2:] if base == 16 else digits:  # int() refuses a decimal number of thousands of digits
        number = (number * base + int(digit, base)) & U64_MAX
    return number, text[match.end() :]


def size_text(size: int) -> str:
    """``size`` in bytes with the largest binary unit that divides it, for people: ``4 GiB``, ``12 KiB``."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} B"
