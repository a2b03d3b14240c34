"""The largest maps: what `make bench` measures goes through, and with which tables."""

from __future__ import annotations

import re
from pathlib import Path

from bootstub.boot_params import BOOT_PARAMS, e820_table_of, parse_e820_table
from bootstub.sample_kernel import sample_bzimage
from bootstub.setup_data import SetupDataType, walk_setup_data
from guest.records import RecordCopy
from tools.bench import fragments
from tools.maps.source import boot_descriptors, parse_text, read_map
from tools.pipeline import Boot, BootConfig
from tools.verdict import verdict_lines

WORST_CASE = Path(__file__).parent.parent / "samples" / "maps" / "worst-case-4-pib.toml"


def test_four_pib_with_a_hole_in_the_middle():
    """The bitmap of the cover letter's worst case has 256 MiB, and a bit for its guard; it is true to the end."""
    boot = Boot(BootConfig(sample_bzimage(), efi_map=boot_descriptors(read_map(str(WORST_CASE))), script=()))
    boot.run()
    notes = [str(r.event.as_dict().get("text", "")) for r in boot.trace.records]
    (size,) = [int(m[1], 16) for note in notes if (m := re.search(r"bitmap at 0x[0-9a-f]+, (0x[0-9a-f]+) bytes", note))]
    assert size == (256 << 20) + 1
    *holes, line = verdict_lines(boot)
    assert all(hole.startswith("known hole guard-bit: ") for hole in holes)
    assert line.startswith("bitmap and Secure EPT agree: ")


def test_four_hundred_descriptors():
    """boot_params hold 128 e820 entries, a node of setup_data the others, in the order of the map; the boot goes on."""
    descriptors = boot_descriptors(parse_text(fragments(400), "map.json"))
    assert len(descriptors) == 400
    boot = Boot(BootConfig(sample_bzimage(), efi_map=descriptors, script=()))
    boot.run("efi-stub")
    assert boot.boot_params is not None
    entries = e820_table_of(boot.boot_params)
    assert len(entries) == 128
    nodes = walk_setup_data(boot.physical.read, RecordCopy(boot.boot_params, BOOT_PARAMS)["hdr.setup_data"])
    (extension,) = [node for node in nodes if node.type == SetupDataType.SETUP_E820_EXT]
    entries += parse_e820_table(boot.physical.read(extension.data_gpa, extension.len))
    high = [(entry.addr, entry.addr + entry.size, entry.type) for entry in entries if entry.addr >= 1 << 32]
    wanted = [(d.start, d.end, 1 if d.type == 15 else 2) for d in descriptors if d.start >= 1 << 32]
    assert high == wanted
    boot.run()
    *holes, line = verdict_lines(boot)
    assert all(hole.startswith("known hole guard-bit: ") for hole in holes)
    assert line.startswith("bitmap and Secure EPT agree: ")
