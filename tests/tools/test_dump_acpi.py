"""``unaccepted dump acpi``: the firmware's ACPI tables, read by ACPICA's own disassembler and compiler."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.errors import FormatError
from tools.dump_acpi import read, text

SIGNATURES = ["XSDT", "FACP", "DSDT", "APIC", "WAET"]
NUMA = ["SRAT", "SLIT"]


def table(signature: bytes = b"TEST", body: bytes = b"", size: int | None = None) -> bytes:
    """A table with a right checksum."""
    size = 36 + len(body) if size is None else size
    data = struct.pack("<4sIBB6s8sI4sI", signature, size, 1, 0, b"OEM\0\0\0", b"TABLE", 1, b"TEST", 1) + body
    return data[:9] + bytes([-sum(data) % 256]) + data[10:]


@pytest.mark.parametrize("options", [[], ["--numa", "3,hotplug=8G,dist=21"]])
def test_acpica_reads_and_rebuilds_every_table(command, iasl, tmp_path, options):
    """iasl disassembles each table without a complaint; from its text it compiles the same table again."""
    assert command("dump", "acpi", "td:4G", "--save", tmp_path, *options).status == 0
    names = sorted(path.stem for path in tmp_path.glob("*.dat"))
    assert names == sorted(SIGNATURES + (NUMA if options else []))
    for name in names:
        said = run(iasl, tmp_path, "-d", f"{name}.dat") + (tmp_path / f"{name}.dsl").read_text()
        for word in ("error", "warning", "invalid", "incorrect", "unknown", "remark"):
            assert word not in said.lower(), (name, word)
        assert "0 Errors, 0 Warnings, 0 Remarks" in run(iasl, tmp_path, "-oa", "-p", f"new-{name}", f"{name}.dsl")
        if name != "DSDT":  # its names may be written in more than one way
            assert (tmp_path / f"new-{name}.aml").read_bytes()[36:] == (tmp_path / f"{name}.dat").read_bytes()[36:]
    assert 'EisaId ("PNP0501")' in (tmp_path / "DSDT.dsl").read_text()


def run(iasl: Path, directory: Path, *words: str) -> str:
    """What iasl says, which must succeed."""
    done = subprocess.run([iasl, *words], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_the_tables_of_a_td_as_text_json_and_hex(command, tmp_path):
    """A line for each table, with its ranges of memory under the SRAT; JSON and bytes say the same."""
    words = ["dump", "acpi", "td:4G,q35,cpus=300,numa=1G,3G,hotplug=1G,dist=0-1:31"]
    lines = command(*words).out.splitlines()
    heads = [line.split(" ") for line in lines if not line.startswith(" ")]
    assert [head[1] for head in heads] == SIGNATURES + NUMA
    assert all(line.endswith("checksum ok") for line in lines if not line.startswith(" "))
    assert lines[4] == "    processors: 300, APIC ID 0 to 299"
    assert lines[7:12] == [
        "    node 0: [0x0, 0xa0000) 640 KiB",
        "    node 0: [0x100000, 0x40000000) 1023 MiB",
        "    node 1: [0x40000000, 0x80000000) 1 GiB",
        "    node 1: [0x100000000, 0x180000000) 2 GiB",
        "    node 1: [0x180000000, 0x1c0000000) 1 GiB, hot-plug",
    ]
    assert lines[13:] == ["    node 0: 10 31", "    node 1: 31 10"]
    rows = json.loads(command(*words, "--json").out)
    assert rows[3]["apic_ids"] == list(range(300))
    assert rows[6]["distances"] == [[10, 31], [31, 10]]
    assert [(row["at"], row["signature"]) for row in rows] == [(head[0], head[1]) for head in heads]
    assert rows[5]["memory"][4] == {"node": 1, "start": "0x180000000", "end": "0x1c0000000", "hotplug": 1}
    dumped = command(*words, "--hex").out.splitlines()
    assert dumped[0].startswith(f"{int(heads[0][0], 16):08x}: 5853 4454 ")


def test_a_file_of_tables(command, file):
    """Tables of a file stand one behind the other; a wrong checksum is shown, not refused."""
    path = file("tables", table(b"ABCD", b"xyz") + bytearray(table(b"SRAT"))[:-1] + b"!")
    assert command("dump", "acpi", path).out.splitlines() == [
        "0x0 ABCD revision 1, 39 bytes, OEM, checksum ok",
        "0x27 SRAT revision 1, 36 bytes, OEM, checksum WRONG",
    ]


def test_tables_without_uefi(command):
    """td-shim's tables are found by boot_params, and name all processors."""
    lines = command("dump", "acpi", "td:4G,profile=td-shim,cpus=3").out.splitlines()
    assert [line.split()[1] for line in lines if not line.startswith(" ")] == SIGNATURES
    assert "    processors: 3, APIC ID 0 to 2" in lines


def test_rows_that_do_not_count_or_do_not_fit(command, file):
    """A processor or range that is not enabled, a SLIT shorter than it says, entries without a length: left out."""
    madt = struct.pack("<II", 0, 0) + bytes([0, 8, 7, 7, 0, 0, 0, 0]) + bytes([0, 8, 8, 8, 1, 0, 0, 0]) + b"\0\0"
    srat = bytes(12) + struct.pack("<BBI2xQQ4xI8x", 1, 40, 0, 0, 0, 0) + b"\1"
    slit = (3).to_bytes(8, "little") + bytes(8)
    path = file("tables", table(b"APIC", madt) + table(b"SRAT", srat) + table(b"SLIT", slit))
    lines = command("dump", "acpi", path).out.splitlines()
    assert [line for line in lines if line.startswith(" ")] == ["    processors: 1, APIC ID 8 to 8"]


@pytest.mark.parametrize(
    "data, error",
    [
        (b"", "ACPI table at 0x0: found 0 bytes, expected a header of 36"),
        (table() + b"x", "ACPI table at 0x24: found 1 bytes, expected a header of 36"),
        (
            table(b"ab\n\xff"),
            "ACPI table.Signature at 0x0: found b'ab\\n\\xff', expected four capital letters or digits",
        ),
        (table(size=35), "ACPI table.Length at 0x4: found 35, expected 36 up to 16 MiB, and no more than there is"),
        (table(size=37), "ACPI table.Length at 0x4: found 37, expected 36 up to 16 MiB, and no more than there is"),
        (table() * 257, "ACPI tables at 0x2400: found one more, expected at most 256"),
    ],
)
def test_a_hostile_file_is_refused(refused, file, data, error):
    """One line with the offset."""
    assert refused("dump", "acpi", file("tables", data)) == f"{error} [ACPI 6.4, section 5.2]"


def test_nodes_are_a_machines(refused, file):
    """--numa is for a TD, not for a file."""
    assert refused("dump", "acpi", file("t", table()), "--numa", "2").startswith("--numa: found ")


@given(st.binary(max_size=100))
def test_any_bytes_are_shown_or_refused(tmp_path_factory, data):
    """Whatever the rows of an SRAT are."""
    path = tmp_path_factory.mktemp("acpi") / "table"
    for content in (data, table(b"SRAT", bytes(12) + data)):
        path.write_bytes(content)
        try:
            assert list(text(read(str(path))))
        except FormatError:
            continue
