"""``unaccepted dump hob``, its list read again by a parser that knows only the layout, and hostile files."""

from __future__ import annotations

import json
import struct

import pytest

from tools.options import parse_machine
from tools.pipeline import Boot, BootConfig

GIB = 1 << 30
UNACCEPTED, SYSTEM = 7, 0
MEMFD = [
    (UNACCEPTED, 0, 0x80_0000), (SYSTEM, 0x80_0000, 0x80_6000), (UNACCEPTED, 0x80_6000, 0x80_9000),
    (SYSTEM, 0x80_9000, 0x80_B000), (SYSTEM, 0x80_B000, 0x80_D000), (UNACCEPTED, 0x80_D000, 0x81_0000),
    (SYSTEM, 0x81_0000, 0x82_0000),
]  # fmt: skip
"""The first entries of every machine: OVMF's own sections, and what lies between them."""


def resources(data: bytes, gpa: int) -> list[tuple[int, int, int]]:
    """(type, start, end) of each resource descriptor, by the layout alone; all else must be as QEMU writes it."""
    assert struct.unpack_from("<HHIII4Q", data) == (1, 56, 0, 9, 0, 0, 0, 0, 0)
    assert struct.unpack_from("<Q", data, 48) == (gpa + len(data),)
    assert data[-8:] == struct.pack("<HHI", 0xFFFF, 8, 0)
    assert (len(data) - 64) % 48 == 0
    out = []
    for kind, length, zero, owner, type, attribute, start, size in struct.iter_unpack("<HHI16sIIQQ", data[56:-8]):
        assert (kind, length, zero, owner, attribute) == (3, 48, 0, bytes(16), 7)
        out.append((type, start, start + size))
    return out


MACHINES = {
    "td:4G": [*MEMFD, (UNACCEPTED, 0x82_0000, 2 * GIB), (UNACCEPTED, 4 * GIB, 6 * GIB)],
    "td:64G": [*MEMFD, (UNACCEPTED, 0x82_0000, 2 * GIB), (UNACCEPTED, 4 * GIB, 66 * GIB)],
    "td:4G,pc": [*MEMFD, (UNACCEPTED, 0x82_0000, 3 * GIB), (UNACCEPTED, 4 * GIB, 5 * GIB)],
    "td:2G": [*MEMFD, (UNACCEPTED, 0x82_0000, 2 * GIB)],
}


@pytest.mark.parametrize("source", MACHINES)
def test_the_list_of_a_machine(command, file, source):
    """The bytes of the host's list have exactly the machine's memory; the dump of the bytes says the same."""
    lines = command("dump", "hob", source, "--hex").out.splitlines()
    data = bytes.fromhex("".join(line[10:49] for line in lines))
    gpa = int(lines[0][:8], 16)
    assert gpa == 0x80_9000
    assert resources(data, gpa) == MACHINES[source]
    for words in (source, file("list", data)):
        hobs = json.loads(command("dump", "hob", words, "--json").out)["hobs"]
        found = [(h["resource"], int(h["start"], 16), int(h["end"], 16)) for h in hobs if h["type"] == 3]
        assert found == MACHINES[source]


def test_the_list_of_a_map_with_nodes(command, file):
    """A map that was brought along: RAM that its firmware accepted is system memory, the rest of both nodes is not."""
    rows = [("Conventional", 0x100000, 2 * GIB), ("Unaccepted", 4 * GIB, 8 * GIB), ("Unaccepted", 16 * GIB, 20 * GIB)]
    tables = "".join(f'[[descriptors]]\ntype = "{t}"\nstart = {a}\nsize = {b - a}\n' for t, a, b in rows)
    nodes = "".join(f"[[nodes]]\nnode = {n}\nstart = {8 * n * GIB}\nsize = {8 * (n + 1) * GIB}\n" for n in (0, 1))
    from tools.maps.source import boot_descriptors, read_map

    descriptors = boot_descriptors(read_map(str(file("map.toml", tables + nodes))))
    boot = Boot(BootConfig(b"", machine=parse_machine("q35"), efi_map=descriptors))
    boot.run("host")
    gpa = boot.machine.regs.rcx
    end = int.from_bytes(boot.physical.read(gpa + 48, 8), "little")
    assert resources(boot.physical.read(gpa, end - gpa), gpa) == [
        (SYSTEM, 0x10_0000, 0x11_0000), (SYSTEM, 0x11_0000, 2 * GIB), (UNACCEPTED, 4 * GIB, 8 * GIB),
        (UNACCEPTED, 16 * GIB, 20 * GIB),
    ]  # fmt: skip


def test_text_of_a_list(command):
    """A line for each HOB, with its address."""
    lines = command("dump", "hob", "td:2G").out.splitlines()
    assert lines[0] == "0x809000 HANDOFF, 56 bytes: version 9, boot mode 0, list ends at 0x8091c0"
    assert lines[1] == (
        "0x809038 RESOURCE_DESCRIPTOR, 48 bytes: [0x0, 0x800000) MEMORY_UNACCEPTED, attributes 0x7, 8 MiB"
    )
    assert lines[-1] == "0x8091b8 END_OF_HOB_LIST, 8 bytes"


HANDOFF = struct.pack("<HHIII5Q", 1, 56, 0, 9, 0, 0, 0, 0, 0, 0)
END = struct.pack("<HHI", 0xFFFF, 8, 0)


def test_extensions_and_unknown_hobs(command, file):
    """A GUIDed HOB is named if it is td-shim's; other HOBs are shown by type."""
    guid = bytes.fromhex("ea72808f8634474b86a72353b88a8773")
    data = HANDOFF + struct.pack("<HHI", 4, 24, 0) + guid + struct.pack("<HHI", 0x99, 8, 0) + END
    assert command("dump", "hob", file("list", data)).out.splitlines()[1:3] == [
        "0x38 GUID_EXTENSION, 24 bytes: 8f8072ea-3486-4b47-86a7-2353b88a8773 E820 map", "0x50 type 0x99, 8 bytes"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "data, error",
    [
        (b"", "HOB.HobType at 0x0: found 0 bytes, expected 2 bytes"),
        (END, "first HOB at 0x0: found 65535, expected handoff (1)"),
        (HANDOFF, "HOB.HobType at 0x38: found 0 bytes, expected 2 bytes"),
        (HANDOFF + struct.pack("<HHI", 3, 7, 0), "HOB length at 0x3a: found 7, expected 8 or more, by 8"),
        (HANDOFF + struct.pack("<HHI", 3, 8, 0) + END, "resource HOB.Owner at 0x40: found 0 bytes, expected 16 bytes"),
        (struct.pack("<HHI", 1, 8, 0) + END, "handoff HOB.Version at 0x8: found 0 bytes, expected 4 bytes"),
        (HANDOFF + struct.pack("<HHI", 9, 8, 0) * 4096, "HOB list at 0x0: found no end in 4096 HOBs"),
    ],
)
def test_a_hostile_list_is_refused(refused, file, data, error):
    """A file that is no list is refused in one line, with nothing printed."""
    assert refused("dump", "hob", file("list", data)).startswith(error)


def test_a_bad_machine_is_refused(refused):
    """td: takes what --memory and --machine take."""
    assert refused("dump", "hob", "td:lots").startswith("--memory: found 'lots'")
