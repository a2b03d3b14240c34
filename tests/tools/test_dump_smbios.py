"""``unaccepted dump smbios``: the firmware's SMBIOS structures, and those of files."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.errors import FormatError
from tools.dump_smbios import of_file, text

END = b"\x7f\x04\x00\xfe\0\0"


def structure(kind: int, fields: bytes, *strings: bytes) -> bytes:
    """A structure with handle 0x1234."""
    texts = b"".join(string + b"\0" for string in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(fields), 0x1234) + fields + texts + b"\0"


def entry_point(table: bytes) -> bytes:
    """An entry point of SMBIOS 3.2 for structures at 0x20 of a dump."""
    point = bytearray(struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, 24, 3, 2, 0, 1, 0, len(table), 0x20))
    point[5] = -sum(point) % 256
    return bytes(point).ljust(0x20, b"\0") + table


def test_the_structures_of_a_td(command, tmp_path):
    """A line for each, with strings and what it says of memory; the dump for dmidecode says the same."""
    path = tmp_path / "dump"
    lines = command("dump", "smbios", "td:64G", "--save", path).out.splitlines()
    assert lines[0].startswith("SMBIOS 3.0, 359 bytes of structures at 0x")
    assert lines[0].endswith(", checksum ok")
    said = [line.partition(" ")[2] for line in lines[1:]]
    assert said[0] == "BIOS Information, handle 0x0000, 24 bytes: 'unaccepted', '0', '01/01/1970'"
    assert said[5:8] == [
        "Memory Device, handle 0x1100, 40 bytes: 64 GiB, 'DIMM 0'",
        "Memory Array Mapped Address, handle 0x1300, 31 bytes: [0x0, 0x80000000) 2 GiB",
        "Memory Array Mapped Address, handle 0x1301, 31 bytes: [0x100000000, 0x1080000000) 62 GiB",
    ]
    assert said[-1] == "End Of Table, handle 0x7f00, 4 bytes"
    again = command("dump", "smbios", path).out.splitlines()
    assert again[0] == "SMBIOS 3.0, 359 bytes of structures at 0x20, checksum ok"
    assert [line.partition(" ")[2] for line in again[1:]] == said
    data = json.loads(command("dump", "smbios", path, "--json").out)
    assert (data["version"], data["size"], len(data["structures"])) == ("3.0", 359, 10)
    assert data["structures"][5]["memory"] == ["64 GiB"]
    dumped = command("dump", "smbios", path, "--hex").out.splitlines()
    assert dumped[0].startswith("00000020: 0018 0000 ")


def test_files_of_other_machines(command, file):
    """Structures alone, as in /sys, or behind an entry point; unknown types, sizes in KiB and above 32 GiB."""
    kib = structure(17, struct.pack("<HHHHH", 0, 0, 64, 64, 0x8040) + bytes(20), b"DIMM")
    tib = structure(17, struct.pack("<8xH14xI", 0x7FFF, 1 << 20))
    far = structure(19, struct.pack("<IIHBQQ", 0xFFFF_FFFF, 0xFFFF_FFFF, 0, 1, 1 << 50, (1 << 51) - 1))
    table = structure(200, b"", b"a", b"\xff") + kib + tib + far + END
    lines = [
        "type 200, handle 0x1234, 4 bytes: 'a', '\ufffd'",
        "Memory Device, handle 0x1234, 34 bytes: 64 KiB, 'DIMM'",
        "Memory Device, handle 0x1234, 32 bytes: 1 TiB",
        "Memory Array Mapped Address, handle 0x1234, 31 bytes: [0x4000000000000, 0x8000000000000) 1024 TiB",
        "End Of Table, handle 0xfe00, 4 bytes",
    ]
    for data, head in ((table, []), (entry_point(table) + b"behind", ["2, 100 bytes of structures"])):
        said = command("dump", "smbios", file("dmi", data)).out.splitlines()
        assert [line.partition(" ")[2] for line in said[-5:]] == lines
        assert len(said) == 5 + len(head)


@pytest.mark.parametrize(
    "data, error",
    [
        (b"", "SMBIOS structure at 0x0: found length 0 with 0 bytes left, expected 4 or more, strings, and two NULs"),
        (b"\0\3\0\0\0\0", "SMBIOS structure at 0x0: found length 3 with 6 bytes left"),
        (b"\0\4\0\0ab\0", "SMBIOS structure at 0x0: found length 4 with 7 bytes left"),
        (structure(1, b"") + b"\1\xff\0\0\0\0", "SMBIOS structure at 0x6: found length 255 with 6 bytes left"),
        (entry_point(b"\0"), "SMBIOS structure at 0x20: found length 0 with 1 bytes left"),
        (structure(1, b"") * 65537, "SMBIOS structures at 0x60000: found one more, expected at most 65536"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused(refused, file, data, error):
    """One line with the offset."""
    assert refused("dump", "smbios", file("dmi", data)).startswith(error)


def test_what_has_no_smbios_is_refused(refused, file, tmp_path):
    """td-shim makes none; a dump needs an entry point of 64 bits."""
    assert "found no SMBIOS table" in refused("dump", "smbios", "td:1G,profile=td-shim")
    path = file("dmi", structure(1, b"") + END)
    assert refused("dump", "smbios", path, "--save", tmp_path / "x").startswith("--save: found no entry point of")


@given(st.binary(max_size=64) | st.lists(st.binary(max_size=12)).map(b"\0\0".join))
def test_any_bytes_are_structures_or_refused(data):
    """Whatever a file has, with an entry point or without."""
    for each in (data, entry_point(data)):
        try:
            found = of_file(each)
        except FormatError:
            continue
        assert list(text(found))
