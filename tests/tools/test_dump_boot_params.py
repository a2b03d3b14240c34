"""The dump of boot_params: real pages, decoded fields, golden text, hostile bytes."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guest.errors import BootError, FormatError
from tools.dump_boot_params import Row, dmesg_lines, rows, text_lines, to_json

if TYPE_CHECKING:
    from conftest import Golden

SAMPLES = Path(__file__).parent.parent / "samples" / "boot_params" / "captures.jsonl.gz"


def boots() -> dict[str, dict[str, Any]]:
    """The captured boots by name."""
    with gzip.open(SAMPLES, "rt") as lines:
        return {boot["name"]: boot for boot in map(json.loads, lines)}


BOOTS = boots()
LOG_START_LOST = {"efirom-q35-2G-frag-k6.1", "efirom-q35-2G-frag-k6.12"}


def page(name: str) -> bytes:
    """boot_params of a captured boot."""
    return bytes.fromhex(BOOTS[name]["boot_params"])


def patched(at: int, data: bytes) -> bytes:
    """A captured page with other bytes at ``at``."""
    out = bytearray(page("efigrub-q35-2G-k6.12"))
    out[at : at + len(data)] = data
    return bytes(out)


def by_name(found: list[Row]) -> dict[str, Row]:
    """The rows by field name; names are unique."""
    out = {row.name: row for row in found}
    assert len(out) == len(found)
    return out


def test_corpus() -> None:
    """The sample has every kind of boot, and the log of all but two."""
    kinds = {name.split("-")[0] for name in BOOTS}
    assert kinds == {"bios", "efi", "efi32", "efibios", "efigrub", "efirom", "kdumpfile", "pvh"}
    assert {name for name, boot in BOOTS.items() if boot["bios_e820"] is None} == LOG_START_LOST
    assert len(BOOTS) == 48


@pytest.mark.parametrize("name", sorted(set(BOOTS) - LOG_START_LOST))
def test_dmesg_lines_of_real_boots(name: str) -> None:
    """The lines are those of the real kernel's log."""
    assert dmesg_lines(page(name)) == BOOTS[name]["bios_e820"]


@pytest.mark.parametrize("name", sorted(LOG_START_LOST))
def test_dmesg_lines_of_a_full_table(name: str) -> None:
    """128 sorted entries are 128 lines, from the first to the last entry."""
    lines = dmesg_lines(page(name))
    assert len(lines) == 128
    assert lines[0] == "BIOS-e820: [mem 0x0000000000000000-0x000000000009ffff] usable"
    assert lines[-1] == "BIOS-e820: [mem 0x0000000020079000-0x0000000020079fff] usable"


@pytest.mark.parametrize("name", sorted(BOOTS))
def test_rows_cover_the_page(name: str) -> None:
    """The rows follow one another without a gap, hold the page's own bytes, and text and JSON show them all."""
    data = page(name)
    found = rows(data)
    at = 0
    for row in found:
        value = row.value if isinstance(row.value, bytes) else row.value.to_bytes(row.size, "little")
        assert (row.offset, value) == (at, data[at : at + row.size])
        at += row.size
    assert at == 4096
    headings = {row.struct for row in found} - {""}
    assert len(text_lines(found)) == len(found) + len(headings)
    fields = json.loads(json.dumps(to_json(data)))["fields"]
    assert list(fields) == [row.name for row in found]


def test_golden_text(golden: Golden) -> None:
    """The whole text of a boot through GRUB, which fills in more of the page than others do."""
    golden.check("\n".join(text_lines(rows(page("efigrub-q35-2G-k6.12")))) + "\n")


def test_decoded_fields() -> None:
    """Values with a meaning are told in words."""
    found = by_name(rows(page("efigrub-q35-2G-k6.12")))
    text = {name: row.text for name, row in found.items()}
    assert text["hdr.header"] == "'HdrS'"
    assert text["hdr.version"] == "2.15"
    assert text["hdr.type_of_loader"] == "GRUB"
    assert text["hdr.loadflags"] == "LOADED_HIGH | CAN_USE_HEAP"
    assert text["efi_info.efi_loader_signature"] == "'EL64'"
    assert text["secure_boot"] == "disabled"
    assert text["unaccepted_memory"] == "no bitmap"
    assert text["hdr.min_alignment"] == "2 MiB"
    assert found["hdr.version"] == Row(0x206, 2, "hdr.version", 0x20F, "2.15")


@pytest.mark.parametrize(
    ("at", "data", "name", "text"),
    [
        (
            0x211,
            b"\xff",
            "hdr.loadflags",
            "LOADED_HIGH | KASLR_FLAG | QUIET_FLAG | KEEP_SEGMENTS | CAN_USE_HEAP | 0x1c",
        ),
        (0x236, b"\x02\x01", "hdr.xloadflags", "XLF_CAN_BE_LOADED_ABOVE_4G | 0x100"),
        (0x236, b"\0\0", "hdr.xloadflags", "none"),
        (0x078, b"\0\0\xa1\x7d", "unaccepted_memory", "bitmap, 1 bit = 2 MiB"),
        (0x1EC, b"\x03", "secure_boot", "enabled"),
        (0x1EC, b"\x09", "secure_boot", "mode 9"),
        (0x1EF, b"\xff", "sentinel", "dirty: the loader did not clear the page"),
        (0x1C0, b"EL32", "efi_info.efi_loader_signature", "'EL32'"),
        (0x1C0, b"\0\0\0\0", "efi_info.efi_loader_signature", "no signature"),
        (0x1C8, b"\0\0\0\0", "efi_info.efi_memmap_size", "no memory map"),
        (0x0C8, b"\x01", "hdr.cmd_line_ptr", "with ext_cmd_line_ptr: 0x000000010008c000"),
        (0x2D0, struct.pack("<QQI", 4096, 0, 20), "e820_table[0]", "[mem 0x0000000000001000, empty] type 20"),
        (0x1E9, b"\x01", "eddbuf[0].params", "74 zero bytes"),
        (0x1EA, b"\xff", "edd_mbr_sig_buffer[15]", ""),
        (0x290, b"\x01", "edd_mbr_sig_buffer[0..15]", "01" + "00" * 31 + "... (64 bytes)"),
        (0x080, b"\x07", "hd0_info", "07" + "00" * 15),
    ],
)
def test_text_of_a_field(at: int, data: bytes, name: str, text: str) -> None:
    """Flags without a name, unknown values and arrays in use are shown, too."""
    assert by_name(rows(patched(at, data)))[name].text == text


def test_json_values() -> None:
    """A 64-bit value stands there as an integer and in hexadecimal; the table keeps its own order."""
    shown: Any = to_json(patched(0x78, b"\0\0\xa1\x7d"))
    field = shown["fields"]["unaccepted_memory"]
    assert (field["offset"], field["size"]) == (0x78, 8)
    assert (field["value"], field["hex"]) == (0x7DA10000, "0x000000007da10000")
    assert shown["fields"]["hd0_info"]["bytes"] == "00" * 16
    assert shown["e820_table"][0] == {
        "addr": {"value": 0, "hex": "0x0000000000000000"},
        "size": {"value": 0xA0000, "hex": "0x00000000000a0000"},
        "type": 1,
        "text": "usable",
    }
    assert shown["dmesg"] == BOOTS["efigrub-q35-2G-k6.12"]["bios_e820"]
    assert "setup_data" not in shown


def test_setup_data_list() -> None:
    """With the guest's memory at hand the list follows, node by node."""
    memory = bytearray(0x4000)
    memory[0x1000:0x1010] = struct.pack("<QII", 0x2000, 1, 40)
    indirect = struct.pack("<IIQQ", 1 << 31 | 2, 0, 0x800, 0x7000_0000)
    memory[0x2000 : 0x2010 + len(indirect)] = struct.pack("<QII", 0, 1 << 31, 24) + indirect
    data = patched(0x250, struct.pack("<Q", 0x1000))

    def read(gpa: int, size: int) -> bytes:
        return bytes(memory[gpa : gpa + size])

    assert text_lines(rows(data, read))[-3:] == [
        "0x1000 setup_data",
        "  0x1000 [0]                      SETUP_E820_EXT, 40 bytes of data at 0x0000000000001010, "
        "next 0x0000000000002000, 2 entries",
        "  0x2000 [1]                      SETUP_INDIRECT, 24 bytes of data at 0x0000000000002010, "
        "next 0x0000000000000000, for SETUP_DTB, 2048 bytes at 0x0000000070000000",
    ]
    nodes: Any = to_json(data, read)["setup_data"]
    assert [(n["address"]["value"], n["text"], n["len"]) for n in nodes] == [
        (0x1000, "SETUP_E820_EXT", 40),
        (0x2000, "SETUP_INDIRECT", 24),
    ]
    assert nodes[1]["indirect"]["addr"]["hex"] == "0x0000000070000000"


def test_made_up_map() -> None:
    """A page without a table is printed as the kernel makes one up, under the name it has for that."""
    empty = bytearray(4096)
    empty[0x1E0:0x1E4] = (1 << 20).to_bytes(4, "little")
    assert dmesg_lines(bytes(empty)) == [
        "BIOS-e801: [mem 0x0000000000000000-0x000000000009efff] usable",
        "BIOS-e801: [mem 0x0000000000100000-0x00000000400fffff] usable",
    ]


@pytest.mark.parametrize("size", [0, 100, 4095, 4097])
def test_wrong_size(size: int) -> None:
    """A file that is not one page is refused by every form of the dump, with both sizes."""
    for dump in (rows, dmesg_lines, to_json):
        with pytest.raises(FormatError, match=f"found {size} bytes, expected 4096 bytes"):
            dump(bytes(size))


def test_random_pages() -> None:
    """Random and bit-flipped pages give a dump or a BootError."""
    rng = random.Random(4)
    real = page("kdumpfile-bios-q35-2G-k6.1")
    dumped = 0
    for number in range(60):
        data = bytearray(rng.randbytes(4096) if number % 2 else real)
        for _ in range(20):
            data[rng.randrange(4096)] ^= 1 << rng.randrange(8)
        with contextlib.suppress(BootError):
            text_lines(rows(bytes(data), lambda gpa, size: rng.randbytes(size)))
        with contextlib.suppress(BootError):
            json.dumps(to_json(bytes(data)))
            dumped += len(dmesg_lines(bytes(data))) > 0
    assert dumped >= 30
