"""Errors: the class says whose fault, the message says what, where, found, expected, and by which source.

``FormatError``  bytes from outside do not follow their layout or specification;
``MemoryFault``  the guest touched memory that it may not touch, and died of it;
``GuestPanic``   the guest stopped with words of its own;
``Violation``    the guest broke a rule of the acceptance sanitizer, which stops it.

Wrong use of our own functions is a plain ``ValueError``.
"""

from __future__ import annotations

_QUOTED = 500
"""Characters of a part of the input that a message has."""


class BootError(Exception):
    """Base class of everything that ends a boot or refuses an input; never raised itself."""


class FormatError(BootError):
    """Bytes that do not follow their layout or specification.

    ``at`` is the offset or guest physical address of the first byte in question, None where there is no such. The
    message has only the start of ``what`` and ``found`` if they are long.
    """

    def __init__(self, what: str, *, at: int | None = None, found: object, expected: object, source: str) -> None:
        self.what, self.at, self.found, self.expected, self.source = what, at, found, expected, source
        where = _short(what) if at is None else f"{_short(what)} at {at:#x}"
        super().__init__(f"{where}: found {_short(str(found))}, expected {expected} [{source}]")


class MemoryFault(BootError):
    """A guest access that the platform does not complete: the guest is dead.

    ``gpa`` is the first address that could not be accessed, ``size`` the bytes of the whole access from
    ``start``; ``kind`` is ``read`` or ``write``; ``state`` names the page's state; ``end`` says how the guest
    died (``EPT violation, TD exit`` or ``#VE``).
    """

    def __init__(self, *, stage: str, gpa: int, start: int, size: int, kind: str, state: str, end: str) -> None:
        self.stage, self.gpa, self.start, self.size = stage, gpa, start, size
        self.kind, self.state, self.end = kind, state, end
        super().__init__(
            f"{stage}: {kind} of {size} bytes at {start:#x} touched page {gpa & ~0xFFF:#x}: "
            f"found {state}, expected accepted private memory; the guest died [{end}]"
        )


class GuestPanic(BootError):
    """The guest stopped itself; ``text`` is what it printed, without the line end."""

    def __init__(self, stage: str, text: str) -> None:
        self.stage, self.text = stage, text
        super().__init__(f"{stage}: {text}")


class Violation(BootError):
    """The guest broke ``rule``; ``text`` says with which event, where, what was found and expected."""

    def __init__(self, stage: str, rule: str, text: str) -> None:
        self.stage, self.rule, self.text = stage, rule, text
        super().__init__(f"{stage}: {text}")


def _short(text: str) -> str:
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}... ({len(text)} characters)"
