"""Variables of the firmware, as they are written on the command line and in a TOML file."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from firmware.efi_types import EFI_GLOBAL_VARIABLE_GUID
from firmware.variables import (
    DEFAULT_ATTRIBUTES,
    KNOWN,
    MAX_VARIABLE_SIZE,
    VARIABLE_STORE_SIZE,
    Variable,
    VariableAttribute,
)
from guest.errors import FormatError
from tools.files import read_file

_GUID_LENGTH = 36
_ATTRIBUTES = {
    "nv": VariableAttribute.EFI_VARIABLE_NON_VOLATILE,
    "bs": VariableAttribute.EFI_VARIABLE_BOOTSERVICE_ACCESS,
    "rt": VariableAttribute.EFI_VARIABLE_RUNTIME_ACCESS,
}
_SOURCE = "UEFI 2.10, section 8.2"


def parse_variables(texts: Iterable[str]) -> tuple[Variable, ...]:
    """The variables, each named once, that a store has room for. Raises ``FormatError`` and ``OSError``."""
    variables = tuple(parse_variable(text) for text in texts)
    names = [(each.vendor, each.name) for each in variables]
    for each in variables:
        if names.count((each.vendor, each.name)) > 1:
            raise _refuse(each.name, "given twice", "once")
    size = sum(each.size for each in variables)
    if size > VARIABLE_STORE_SIZE:
        raise _refuse("all", f"{size} bytes", f"at most {VARIABLE_STORE_SIZE}")
    return variables


def parse_variable(text: str) -> Variable:
    """``NAME[-GUID][:ATTRIBUTES]=VALUE``; see ``unaccepted boot --help``."""
    left, equals, value = text.partition("=")
    name, colon, attributes = left.partition(":")
    if not equals:
        raise _refuse(text, "no =", "NAME[-GUID][:ATTRIBUTES]=VALUE")
    vendor: UUID | None = None
    if name[-_GUID_LENGTH - 1 : -_GUID_LENGTH] == "-":
        vendor, name = _guid(name, name[-_GUID_LENGTH:]), name[: -_GUID_LENGTH - 1]
    if not name or any("\ud800" <= character <= "\udfff" or character == "\0" for character in name):
        raise _refuse(text, "no name", "the name of a variable")
    known_vendor, known_attributes = KNOWN.get(name, (EFI_GLOBAL_VARIABLE_GUID, DEFAULT_ATTRIBUTES))
    wanted = _attributes(name, attributes) if colon else int(known_attributes)
    variable = Variable(name, vendor or known_vendor, wanted, _value(name, value))
    if not variable.data or variable.size > MAX_VARIABLE_SIZE:
        found, expected = f"{len(variable.data)} bytes", f"1 byte or more, with the name at most {MAX_VARIABLE_SIZE}"
        raise _refuse(name, found, expected)
    return variable


def _guid(name: str, text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise _refuse(name, text, "a GUID behind the last 36 characters' hyphen") from None


def _attributes(name: str, text: str) -> int:
    names = text.split(",")
    if not set(names) <= set(_ATTRIBUTES) or "bs" not in names:
        raise _refuse(name, f":{text}", "bs, and perhaps nv and rt, with commas between")
    return sum({int(_ATTRIBUTES[each]) for each in names})


def _value(name: str, text: str) -> bytes:
    """Hexadecimal bytes, ``text:``, ``utf16:``, which has an end of its own, or ``@`` and the name of a file."""
    kind, colon, rest = text.partition(":")
    try:
        if text.startswith("@"):
            return read_file(text[1:])
        if colon and kind == "text":
            return rest.encode()
        if colon and kind == "utf16":
            return (rest + "\0").encode("utf-16-le")
        return bytes.fromhex(text)
    except ValueError:
        expected = "hexadecimal bytes, text:TEXT, utf16:TEXT or @FILE"
        raise _refuse(name, repr(text[:40]), expected) from None


def _refuse(name: str, found: str, expected: str) -> FormatError:
    return FormatError(f"--variable {name[:60]!r}", found=found[:80], expected=expected, source=_SOURCE)
