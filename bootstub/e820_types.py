"""Types of e820 entries and the words that dmesg has for them.

Sources: arch/x86/include/asm/e820/types.h; arch/x86/kernel/e820.c, e820_print_type().
"""

from __future__ import annotations

E820_TYPE_RAM = 1
E820_TYPE_RESERVED = 2
E820_TYPE_ACPI = 3
E820_TYPE_NVS = 4
E820_TYPE_UNUSABLE = 5
E820_TYPE_PMEM = 7
E820_TYPE_PRAM = 12
E820_TYPE_RESERVED_KERN = 128
"""RAM that the kernel keeps for itself; never from firmware, but kexec hands it on."""
E820_TYPE_SOFT_RESERVED = 0xEFFFFFFF

_WORDS = {
    E820_TYPE_RAM: "usable",
    E820_TYPE_RESERVED: "reserved",
    E820_TYPE_ACPI: "ACPI data",
    E820_TYPE_NVS: "ACPI NVS",
    E820_TYPE_UNUSABLE: "unusable",
    E820_TYPE_PMEM: "persistent (type 7)",
    E820_TYPE_PRAM: "persistent (type 12)",
    E820_TYPE_RESERVED_KERN: "usable",
    E820_TYPE_SOFT_RESERVED: "soft reserved",
}

_TYPES = {word: e820_type for e820_type, word in reversed(_WORDS.items())}
_MAX_TYPE = 0xFFFFFFFF


def type_word(e820_type: int) -> str:
    """What dmesg prints for ``e820_type``: ``usable``, ``ACPI data``, ``type 20``."""
    return _WORDS.get(e820_type, f"type {e820_type}")


def type_of_word(word: str) -> int | None:
    """The type that :func:`type_word` prints as ``word``; None if there is none. ``usable`` is RAM."""
    if word in _TYPES:
        return _TYPES[word]
    number = word.removeprefix("type ")
    known = number != word and number.isascii() and number.isdecimal() and len(number) <= len(str(_MAX_TYPE))
    return int(number) if known and int(number) <= _MAX_TYPE else None
