"""``unaccepted dump tdvf``: metadata that was read by hand from Debian's images, their MRTD, td-shim's older form."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from firmware.guid_table import read_guid_table
from firmware.tdvf import SectionType, parse_tdvf, read_tdvf
from guest.errors import FormatError

SAMPLES = json.loads((Path(__file__).parent.parent / "samples" / "ovmf" / "metadata.json").read_text())["files"]
TDVF, ASEV, TABLE = 0x1FF7C0, 0x1FFAD4, 0x1FFF58
"""Where Debian's OVMF.fd has them."""
SHIM = 0x100
"""Where the images of td-shim's kind have the descriptor."""
SHIM_ROWS = [
    (0x1000, 0x7000, 0xFFFF_9000, 0x7000, 0, 1),
    (0, 0, 0x80_9000, 0x2000, 2, 0),
    (0, 0, 0x100_0000, 0x10_0000, 4, 2),
    (0, 0, 0x200_0000, 0x1000, 5, 0),
    (0, 0, 0x201_0000, 0x1000, 6, 0),
    (0x200, 0x40, 0, 0, 7, 0),
]


def ovmf(name: str) -> bytearray:
    """An image that has the metadata of one of Debian's where that has it, and zeros elsewhere."""
    sample = SAMPLES[name]
    image = bytearray(sample["size"])
    table = bytes.fromhex(sample["table_hex"])
    image[sample["table_offset"] : sample["table_offset"] + len(table)] = table
    for entry in sample["entries"]:
        metadata = entry.get("metadata", {})
        at = metadata.get("file_offset", 0)
        if metadata.get("signature") == "TDVF":
            raw = bytes.fromhex(metadata["raw"])
            image[at - 16 : at - 16 + len(raw)] = raw
        elif metadata:
            rows = [
                struct.pack("<III", int(s["base"], 16), int(s["size"], 16), s["type"]) for s in metadata["sections"]
            ]
            image[at : at + metadata["length"]] = struct.pack("<4sIII", b"ASEV", 76, 1, len(rows)) + b"".join(rows)
    return image


def by_hand(sample: dict) -> tuple[list, list, list]:
    """GUIDed entries, TDX sections and SEV sections as they were read by hand."""
    metadata = {e["metadata"]["signature"]: e["metadata"]["sections"] for e in sample["entries"] if "metadata" in e}
    entries = [(e["guid"], e["file_offset"], e["data"]) for e in sample["entries"]]
    names = ("data_offset", "raw_size", "memory_address", "memory_size", "attributes")
    tdx = [(s["type_name"], *(int(s[name], 16) for name in names)) for s in metadata.get("TDVF", [])]
    return entries, tdx, [(s["type_name"], int(s["base"], 16), int(s["size"], 16)) for s in metadata.get("ASEV", [])]


def by_command(data: dict) -> tuple[list, list, list]:
    """The same from the command's JSON."""
    entries = [(e["guid"], e["offset"], e["data"]) for e in data["guid_table"]["entries"]]
    names = ("type", "data_offset", "raw_size", "address", "memory_size", "attributes")
    tdx = [tuple(s[name] for name in names) for s in (data["tdx"] or {"sections": []})["sections"]]
    return entries, tdx, [(s["type"], s["base"], s["size"]) for s in (data["sev"] or {"sections": []})["sections"]]


@pytest.mark.parametrize("name", ["OVMF.fd", "OVMF_CODE.fd", "OVMF_CODE_4M.fd"])
def test_metadata_is_what_was_read_by_hand(command, file, name):
    """Entries, TDX and SEV sections of Debian's images are those of the sample file."""
    answer = command("dump", "tdvf", file("image", bytes(ovmf(name))), "--json")
    assert (answer.status, answer.err) == (0, "")
    assert by_command(json.loads(answer.out)) == by_hand(SAMPLES[name])


def test_code_without_its_variables(command, refused, file):
    """OVMF_CODE.fd has the metadata and the MRTD of the whole image: variables are not measured. `boot` refuses it."""
    code, whole = (file(name, bytes(ovmf("OVMF.fd")[start:])) for name, start in (("code", 0x20000), ("whole", 0)))
    lines = command("dump", "tdvf", code).out.splitlines()
    assert "data offsets count from 0x20000 bytes of variables that this image leaves out; `boot` needs both" in lines
    assert lines[-1].startswith("MRTD ")
    assert lines[-1] == command("dump", "tdvf", whole).out.splitlines()[-1]
    text = refused("boot", "--firmware", code)
    assert text.startswith("TDVF section 0 DataOffset at 0x1df7d0: found 0x20000 + 0x1e0000")


def test_debian_ovmf(command, exact_debian_ovmf):
    """The artefact itself has the sample's metadata, and the MRTD that `boot --measure` prints for it."""
    data = json.loads(command("dump", "tdvf", exact_debian_ovmf, "--json").out)
    assert by_command(data) == by_hand(SAMPLES["OVMF.fd"])
    words = ("--firmware", exact_debian_ovmf, "--until", "host", "--measure", "--json")
    assert json.loads(command("boot", *words).out)["MRTD"] == data["mrtd"]
    assert f"MRTD {data['mrtd']}" in command("dump", "tdvf", exact_debian_ovmf).out.splitlines()


def test_an_image_without_tdx_metadata_says_so(command, refused, file):
    """Debian's OVMF_CODE_4M.fd has a table without an entry for TDX: it is shown; `boot` refuses such an image."""
    path = file("4m.fd", bytes(ovmf("OVMF_CODE_4M.fd")))
    lines = command("dump", "tdvf", path).out.splitlines()
    assert lines[1] == "0x37bf84 GUIDed table, 92 bytes, 3 entries"
    assert lines[-1] == "no TDX metadata: no TD can be built from this image"
    assert "found no TDX metadata entry" in refused("boot", "--firmware", path)


def test_hex_and_text(command, file):
    """--hex prints the descriptors and the table at their offsets; text names every section."""
    path = file("image", bytes(ovmf("OVMF.fd")))
    lines = command("dump", "tdvf", path, "--hex").out.splitlines()
    assert [line[:8] for line in lines] == [
        f"{at + n:08x}" for at, size in ((TDVF, 208), (ASEV, 76), (TABLE, 136)) for n in range(0, size, 16)
    ]
    text = command("dump", "tdvf", path).out
    assert "  BFV                 0x20000   0x1e0000   0xffe20000    0x1e0000  MR.EXTEND\n" in text
    assert "  SNP_SECRETS         0x80d000     0x1000\n" in text


BROKEN = [
    # offset, what is stored there, the error up to its source
    (0x1FFFD0, "<H", 0, "firmware image at 0x1fffd0: found no metadata, expected the GUIDed table's footer"),
    (0x1FFFCE, "<H", 17, "GUIDed table length at 0x1fffce: found 17, expected 18 to 2097120"),
    (0x1FFFBC, "<H", 200, "GUIDed table entry length at 0x1fffbc: found 200, expected an entry inside the table"),
    (0x1FFFBC, "<H", 23, "GUIDed table entry length at"),
    (TABLE, "<I", 15, "TDX metadata offset at 0x1fff58: found 0xf bytes before the end, expected a place inside"),
    (0x1FFF6E, "<I", 0x200001, "SEV metadata offset at 0x1fff6e: found 0x200001 bytes before the end"),
    (TDVF, "<I", 0, "TDVF descriptor Signature at 0x1ff7c0: found b'\\x00\\x00\\x00\\x00', expected b'TDVF'"),
    (TDVF + 4, "<I", 200, "TDVF descriptor Length at 0x1ff7c4: found 200, expected 208"),
    (TDVF + 8, "<I", 2, "TDVF descriptor Version at 0x1ff7c8: found 2, expected 1"),
    (TDVF + 12, "<I", 7, "TDVF descriptor Length at 0x1ff7c4: found 208, expected 240"),
    (TDVF + 16, "<I", 0x20001, "TDVF section 0 DataOffset at 0x1ff7d0: found 0x20001 + 0x1e0000"),
    (TDVF + 20, "<I", 0x1E0001, "TDVF section 0 MemoryDataSize at 0x1ff7e0: found 0x1e0000, expected at least"),
    (TDVF + 20, "<I", 0, "TDVF section 0 RawDataSize at 0x1ff7d4: found 0x0, expected data"),
    (TDVF + 24, "<Q", 0xFFE20800, "TDVF section 0 MemoryAddress at 0x1ff7d8: found 0xffe20800 + 0x1e0000"),
    (TDVF + 32, "<Q", 0x1E0800, "TDVF section 0 MemoryAddress at 0x1ff7d8: found 0xffe20000 + 0x1e0800"),
    (TDVF + 40, "<I", 9, "TDVF section 0 Type at 0x1ff7e8: found 9, expected 0 to 8"),
    (TDVF + 16 + 3 * 32 + 24, "<I", 2, "TDVF sections of type TD_HOB at 0x1ff7c0: found 2, expected 1"),
    (ASEV, "<I", 0, "SEV descriptor Signature at 0x1ffad4: found b'\\x00\\x00\\x00\\x00', expected b'ASEV'"),
    (ASEV + 4, "<I", 77, "SEV descriptor Length at 0x1ffad8: found 77, expected 76"),
    (ASEV + 8, "<I", 0, "SEV descriptor Version at 0x1ffadc: found 0, expected 1"),
    (ASEV + 12, "<I", 4, "SEV descriptor Length at 0x1ffad8: found 76, expected 64"),
]


@pytest.mark.parametrize("at, form, value, error", BROKEN)
def test_a_broken_image_is_refused_in_one_line(refused, file, at, form, value, error):
    """Each field that is falsified gives one line with its offset and the rule."""
    image = ovmf("OVMF.fd")
    struct.pack_into(form, image, at, value)
    assert refused("dump", "tdvf", file("image", bytes(image))).startswith(error)


def test_a_known_entry_with_other_data_is_refused(refused, file):
    """A SEV-ES reset block of eight bytes is none."""
    image = bytearray(0x1000)
    block = bytes(8) + struct.pack("<H", 26) + bytes.fromhex("de71f7007e1acb4f890e68c77e2fb44e")
    table = block + struct.pack("<H", 44) + bytes.fromhex("de82b596b21ff745baeaa366c55a082d")
    image[-0x20 - len(table) : -0x20] = table
    text = refused("dump", "tdvf", file("image", bytes(image)))
    assert text.startswith("GUIDed table entry 'SEV-ES reset block' at 0xfb4: found 8 bytes of data, expected 4 bytes")


@pytest.fixture(params=["from the start", "from the end", "by the table"])
def shim(request) -> bytes:
    """An image of td-shim's kind, with sections of all its types; its descriptor is found in one of three ways."""
    image = bytearray(0x8000)
    struct.pack_into("<4sIII", image, SHIM, b"TDVF", 16 + 32 * len(SHIM_ROWS), 1, len(SHIM_ROWS))
    for number, row in enumerate(SHIM_ROWS):
        struct.pack_into("<IIQQII", image, SHIM + 16 + 32 * number, *row)
    from_end = len(image) - SHIM
    struct.pack_into("<I", image, len(image) - 0x20, SHIM if request.param == "from the start" else from_end)
    if request.param == "by the table":
        entry = struct.pack("<IH", from_end, 22) + bytes.fromhex("35657ae44a989847865e4685a7bf8ec2")
        table = entry + struct.pack("<H", 40) + bytes.fromhex("de82b596b21ff745baeaa366c55a082d")
        image[-0x20 - len(table) : -0x1C] = table + bytes(4)
    return bytes(image)


def test_sections_of_td_shim(command, refused, file, shim):
    """All section types are shown, and that QEMU refuses them; `boot` refuses the image at the first of them."""
    tdvf = read_tdvf(shim)
    rows = [(s.data_offset, s.raw_size, s.address, s.memory_size, s.type, s.attributes) for s in tdvf.sections]
    assert rows == SHIM_ROWS
    assert [s.type for s in tdvf.sections if not s.is_added] == [SectionType.PermMem, SectionType.TD_INFO]
    path = file("shim", shim)
    lines = command("dump", "tdvf", path).out.splitlines()
    assert "QEMU refuses sections of type PermMem, Payload, PayloadParam, TD_INFO" in lines
    assert refused("boot", "--firmware", path).startswith("TDVF section 2 Type at 0x168: found 4, expected BFV 0, ")


def test_memory_that_is_accepted_later_is_not_measured(shim):
    """PermMem does not change MRTD, as the host adds none of its pages."""
    other = bytearray(shim)
    struct.pack_into("<Q", other, SHIM + 16 + 2 * 32 + 8, 0x300_0000)
    assert read_tdvf(bytes(other)).mrtd() == read_tdvf(shim).mrtd()
    struct.pack_into("<Q", other, SHIM + 16 + 3 * 32 + 8, 0x400_0000)
    assert read_tdvf(bytes(other)).mrtd() != read_tdvf(shim).mrtd()


def test_a_measured_hob_list_leaves_mrtd_open(command, file, shim):
    """With MR.EXTEND on TD_HOB, MRTD depends on the machine, and the dump says so."""
    image = bytearray(shim)
    image[SHIM + 16 + 32 + 28] = 1
    lines = command("dump", "tdvf", file("shim", bytes(image))).out.splitlines()
    assert lines[-1] == "MRTD depends on the host's HOB list, which is measured"


def test_the_older_offset_needs_a_descriptor():
    """An offset 0x20 from the end that leads to no signature is none: the image has no metadata."""
    image = bytearray(0x1000)
    struct.pack_into("<I", image, 0xFE0, 0x100)
    assert read_guid_table(bytes(image)) is None
    with pytest.raises(FormatError, match="no table footer"):
        parse_tdvf(bytes(image))
