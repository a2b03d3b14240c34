"""Sources of memory maps: each kind is recognised, gives the same map again, and refuses what is none."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstub.boot_params import BOOT_PARAMS, BootE820Entry, build_e820_table
from bootstub.sample_kernel import sample_bzimage
from bootstub.setup_data import SETUP_DATA
from firmware.memory_descriptor import MemoryDescriptor, pack_map
from firmware.srat import NodeRange
from guest.errors import FormatError
from guest.records import field_extents
from tests.refusals import value_or_refusal
from tools.maps.dmesg import E820_LINES, EFI_LINES
from tools.maps.platform_map import PlatformMap, e820_map, efi_map, mark_unaccepted
from tools.maps.source import SourceOptions, boot_descriptors, parse_bytes, parse_text, read_map
from tools.maps.td import td_texts
from tools.maps.write import WRITERS, kernel_table
from tools.pipeline import Boot, BootConfig

SAMPLES = Path(__file__).parent.parent / "samples"
MAPS = SAMPLES / "maps"
NUMA = "efi-q35-4G-numa2-k6.12"
BIOS = "bios-q35-4G-numa2-k6.12"
FRAG = "efirom-q35-2G-frag-nomb-k6.1"
NODES = (
    NodeRange(0, 0, 0xA0000), NodeRange(0, 1 << 20, 1 << 31), NodeRange(1, 1 << 32, 3 << 31),
)  # fmt: skip
CAPTURED = [
    json.loads(line)
    for line in gzip.decompress((SAMPLES / "boot_params" / "captures.jsonl.gz").read_bytes()).splitlines()
]


def sample(name: str) -> PlatformMap:
    return read_map(str(MAPS / f"{name}.gz"))


def test_corpus():
    """The samples are the files that their note names."""
    note = (MAPS / "ORIGIN.md").read_text()
    files = sorted(MAPS.glob("*.gz"))
    assert len(files) == 6
    for path in files:
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" in note


def test_one_boot_in_three_forms():
    """Log and raw descriptors of one boot are one map; the log also has the NUMA nodes and the same e820 table."""
    log, raw = sample(f"{NUMA}.dmesg"), sample(f"{NUMA}.efi-memmap.bin")
    assert (log.form, len(log.descriptors)) == (EFI_LINES, 136)
    assert log.descriptors == raw.descriptors
    assert log.nodes == NODES
    lines = gzip.decompress((MAPS / f"{NUMA}.dmesg.gz").read_bytes()).decode().splitlines()
    table = [line[line.index("BIOS") :] for line in lines if "BIOS-e820" in line]
    assert WRITERS["e820"](raw).splitlines() == table


def test_a_log_with_e820_lines_only():
    """The table, the nodes and /sys/firmware/memmap of a BIOS boot agree; EFI types are the reverse of the stub's."""
    log, tree = sample(f"{BIOS}.dmesg"), sample(f"{BIOS}.firmware-memmap.json")
    assert (log.form, len(log.entries()), log.nodes) == (E820_LINES, 10, NODES)
    assert kernel_table(log) == kernel_table(tree)
    assert log.descriptors[:3] == (
        MemoryDescriptor(7, 0, 0x9F, 0xF), MemoryDescriptor(0, 0x9F000, 1, 0), MemoryDescriptor(0, 0xF0000, 16, 0),
    )  # fmt: skip


def test_a_log_with_more_than_128_entries():
    """The kernel prints 128 entries first and all of them later; all count."""
    log, tree = sample(f"{FRAG}.dmesg"), sample(f"{FRAG}.firmware-memmap.json")
    assert len(kernel_table(log)) == 316
    assert kernel_table(log) == kernel_table(tree)


@pytest.mark.parametrize("captured", CAPTURED, ids=lambda captured: captured["name"])
def test_boot_params_of_real_boots(captured):
    """A boot_params page alone gives the e820 table that its kernel printed; a guest boots with it."""
    platform = parse_bytes(bytes.fromhex(captured["boot_params"]), "page")
    assert platform.form == "boot_params"
    if captured["bios_e820"] and captured["e820_ext"] is None:
        assert WRITERS["e820"](platform).splitlines() == captured["bios_e820"]
    boot = Boot(BootConfig(sample_bzimage(), efi_map=boot_descriptors(platform), script=()))
    boot.run("setup-arch")
    ram = [d.end for d in platform.descriptors if d.type == 7 and d.attribute == 0xF]
    assert boot.kernel.max_pfn == max(ram) >> 12


def test_a_tree_of_directories(tmp_path):
    """A copy of /sys/firmware/memmap, read in the order of its numbers."""
    rows = [("0x0", "0x9ffff", "System RAM"), ("0x100000", "0x1fffff", "ACPI Tables"), ("0x0", "0xfff", "Reserved")]
    for number, values in zip((2, 10, 1), rows, strict=True):
        (tmp_path / str(number)).mkdir()
        for key, value in zip(("start", "end", "type"), values, strict=True):
            (tmp_path / str(number) / key).write_text(value + "\n")
    assert read_map(str(tmp_path)).e820 == (
        BootE820Entry(0, 0x1000, 2), BootE820Entry(0, 0xA0000, 1), BootE820Entry(0x100000, 0x100000, 3),
    )  # fmt: skip


DESCRIPTORS = (
    MemoryDescriptor(7, 0, 0xA0, 0xF),
    MemoryDescriptor(4, 0x100000, 0x700, 0xF),
    MemoryDescriptor(15, 1 << 40, 1 << 20, 0),
    MemoryDescriptor(7, 1 << 32, 1 << 18, 0x4000F),
    MemoryDescriptor(7, 5 << 30, 1 << 18, 0x1000F),
    MemoryDescriptor(14, 6 << 30, 1 << 18, 0x800F),
    MemoryDescriptor(11, (1 << 52) - 0x200000, 0x200, 1 << 63 | 1),
    MemoryDescriptor(0, 7 << 30, 1, 1 << 52 | 2),
)
ENTRIES = (
    BootE820Entry(0, 0x9FC00, 1), BootE820Entry(0x9FC00, 0x400, 2), BootE820Entry(0x100000, 0x700000, 1),
    BootE820Entry(0x800000, 0x6000, 4), BootE820Entry(0x900000, 0x3000, 3), BootE820Entry(1 << 32, 1 << 30, 7),
    BootE820Entry(6 << 30, 1 << 30, 12), BootE820Entry(1 << 40, 1 << 30, 0xEFFFFFFF), BootE820Entry(1 << 41, 4096, 20),
)  # fmt: skip
WINDOWS = (*NODES, NodeRange(1, 1 << 45, 1 << 46, hotplug=True))
EFI = efi_map(DESCRIPTORS, "m", "test", WINDOWS)
E820 = e820_map(ENTRIES, "m", "test", WINDOWS)


@pytest.mark.parametrize("form", ["json", "toml", "dmesg"])
@pytest.mark.parametrize("platform", [EFI, E820], ids=["efi", "e820"])
def test_forms_that_carry_everything(platform, form):
    """Written and read again, the map is the same: descriptors in their order or e820 entries, and nodes."""
    assert parse_text(WRITERS[form](platform), "m") == platform


def test_forms_that_carry_a_part():
    """EFI lines carry the descriptors; e820 lines and memmap= parameters the table that a kernel has."""
    assert parse_text(WRITERS["efi"](EFI), "m").descriptors == DESCRIPTORS
    for form in ("e820", "memmap-args"):
        for platform in (EFI, E820):
            assert parse_text(WRITERS[form](platform), "m").e820 == tuple(kernel_table(platform))
    shown = parse_text(WRITERS["firmware-memmap"](E820), "m").e820
    assert shown == tuple(replace(e, type=2) if e.type == 20 else e for e in kernel_table(E820))


@given(
    st.lists(
        st.tuples(st.sampled_from([*range(16), 0x70000001]), st.integers(1, 50), st.integers(0, (1 << 64) - 1)),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_any_map_comes_back(rows):
    """JSON, TOML, EFI lines and raw descriptors of either stride give back any types, sizes and attributes."""
    at, descriptors = 0, []
    for kind, pages, attribute in rows:
        descriptors.append(MemoryDescriptor(kind, at, pages, attribute))
        at += (pages + pages % 3) << 12
    platform = efi_map(descriptors, "m", "test")
    for form in ("json", "toml", "efi"):
        assert parse_text(WRITERS[form](platform), "m").descriptors == platform.descriptors
    for stride in (40, 48, 56):
        assert parse_bytes(pack_map(descriptors, stride), "m", stride).descriptors == platform.descriptors


def test_raw_descriptors_without_a_stride():
    """Strides of 48 and 40 are recognised; 85 descriptors of 48 bytes do not become a boot_params page."""
    rows = [MemoryDescriptor(7, number << 20, 16, 0xF) for number in range(86)]
    for stride in (48, 40):
        assert parse_bytes(pack_map(rows, stride), "m").descriptors == tuple(rows)
    assert parse_bytes(pack_map(rows[:64], 64), "m", 64).descriptors == tuple(rows[:64])


def test_a_description_of_a_machine():
    """Names of types and attributes, sizes with suffixes, holes that are cut out, nodes and hot-plug windows."""
    platform = parse_text(
        """
        # two nodes
        [[descriptors]]
        type = "conventional"
        start = 0
        size = "8G"
        attribute = "WB|EFI_MEMORY_MORE_RELIABLE"
        [[descriptors]]
        type = "EfiPersistentMemory"
        start = "1T"
        pages = 0x100
        attribute = "NV"
        [[descriptors]]
        type = "MMIO"
        start = 0xFFC00000
        size = "4M"
        [[holes]]
        start = 0xA0000
        size = "384K"
        [[holes]]
        start = "2G"
        size = "2G"
        [[nodes]]
        node = 1
        start = "1T"
        size = "1T"
        hotplug = true
        """,
        "m",
    )
    assert platform.descriptors == (
        MemoryDescriptor(7, 0, 0xA0, 0x10008), MemoryDescriptor(7, 1 << 20, 0x7FF00, 0x10008),
        MemoryDescriptor(7, 1 << 32, 1 << 20, 0x10008), MemoryDescriptor(14, 1 << 40, 0x100, 0x8000),
    )  # fmt: skip
    assert platform.nodes == (NodeRange(1, 1 << 40, 1 << 41, hotplug=True),)


def memory_image(path: Path, *pieces: tuple[int, bytes]) -> Path:
    with path.open("wb") as file:
        for at, data in pieces:
            file.seek(at)
            file.write(data)
    return path


def test_guest_memory_of_a_real_boot(tmp_path):
    """The map is found through efi_info; the page is named by address or is a file of its own."""
    captured = next(row for row in CAPTURED if row["name"] == NUMA)
    page = bytes.fromhex(captured["boot_params"])
    raw = gzip.decompress((MAPS / f"{NUMA}.efi-memmap.bin.gz").read_bytes())
    offset, _ = field_extents(BOOT_PARAMS)["efi_info.efi_memmap"]
    at = int.from_bytes(page[offset : offset + 4], "little")
    image = memory_image(tmp_path / "memory", (0x10000, page), (at, raw))
    for boot_params in (0x10000, page):
        found = read_map(str(image), SourceOptions(boot_params=boot_params))
        assert found.descriptors == sample(f"{NUMA}.dmesg").descriptors


def test_guest_memory_of_our_own_boot(tmp_path):
    """What the stub left in a guest's memory is the map that the kernel of that guest read."""
    boot = Boot(BootConfig(sample_bzimage()))
    boot.run("setup-arch")
    rsi = boot.machine.regs.rsi
    params = field_extents(BOOT_PARAMS)
    at = int.from_bytes(boot.boot_params[params["efi_info.efi_memmap"][0] :][:4], "little")
    image = memory_image(
        tmp_path / "memory", (rsi, boot.physical.read(rsi, 4096)), (at, boot.physical.read(at, 0x4000))
    )
    assert list(read_map(str(image), SourceOptions(boot_params=rsi)).descriptors) == boot.kernel.efi_memmap


def test_guest_memory_of_a_bios_boot(tmp_path):
    """Without an EFI map the e820 table counts, with its extension in setup_data."""
    page = bytearray(4096)
    page[0x1E8] = 1
    page[0x2D0 : 0x2D0 + 20] = build_e820_table([BootE820Entry(0, 0xA0000, 1)])
    page[0x250:0x258] = (0x5000).to_bytes(8, "little")
    beyond = build_e820_table([BootE820Entry(1 << 32, 1 << 30, 1)])
    node = SETUP_DATA.build({"next": 0, "type": 1, "len": len(beyond)}) + beyond
    image = memory_image(tmp_path / "memory", (0x1000, bytes(page)), (0x5000, node))
    assert read_map(str(image), SourceOptions(boot_params=0x1000)).e820 == (
        BootE820Entry(0, 0xA0000, 1), BootE820Entry(1 << 32, 1 << 30, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "memmap", "stride", "version", "text"),
    [
        (0x1800, 0x10000, 48, 1, "image of memory at 0x10000: found 0 bytes, expected 6144 bytes"),
        (0x1800, 1 << 63, 48, 1, "found 0 bytes"),
        (0xFFFFFFFF, 0x1000, 48, 1, "at most 16777216"),
        (0x1000, 0x1000, 39, 1, "found 39, expected at least 40"),
        (0x1801, 0x1000, 48, 1, "found 4096 bytes, expected 6145 bytes"),
        (0x1800, 0x1000, 48, 2, "efi_info.efi_memdesc_version: found 2, expected 1"),
    ],
)
def test_guest_memory_that_lies(tmp_path, size, memmap, stride, version, text):
    """A map beyond the image's end, too large, or of a stride that is none is refused with address and reason."""
    page = bytearray(4096)
    values = {"memdesc_size": stride, "memdesc_version": version, "memmap_size": size}
    values |= {"memmap": memmap & 0xFFFFFFFF, "memmap_hi": memmap >> 32}
    for name, value in values.items():
        offset, _ = field_extents(BOOT_PARAMS)[f"efi_info.efi_{name}"]
        page[offset : offset + 4] = value.to_bytes(4, "little")
    image = memory_image(tmp_path / "memory", (0, bytes(page) + bytes(4096)))
    with pytest.raises(FormatError) as caught:
        read_map(str(image), SourceOptions(boot_params=0))
    assert text in str(caught.value)


def test_our_own_firmware():
    """td:4G is the map with which `boot --memory 4G` enters its kernel; pc has no PCIe configuration space."""
    q35, pc = read_map("td:4G"), read_map("td:4G,pc,max-ram-below-4g=3G")
    (unaccepted,) = [d for d in q35.descriptors if d.type == 15]
    assert (unaccepted.start, unaccepted.end) == (1 << 32, 6 << 30)
    (unaccepted,) = [d for d in pc.descriptors if d.type == 15]
    assert (unaccepted.start, unaccepted.end) == (1 << 32, 5 << 30)
    assert [d.start for d in q35.descriptors if d.start >= 1 << 31] == [0xE0000000, 0xFFC00000, 1 << 32]
    assert [d.start for d in pc.descriptors if d.start >= 3 << 30] == [0xFFC00000, 1 << 32]


@pytest.mark.parametrize(
    ("source", "unaccepted"),
    [
        ("td:8G,accept-policy=all", []),
        ("td:8G,accept-policy=size=4G,pc", "--accept-policy: found 'size=4G,pc'"),
        ("td:8G,pc,accept-policy=size=4G", [(5 << 30, 9 << 30)]),
        ("td:4G,profile=td-shim", [(386 << 20, 2 << 30), (4 << 30, 6 << 30)]),
        ("td:4G,profile=td-shim,accept-policy=all", []),
        ("td:4G,platform=none", []),
        ("td:4G,q35,efi-map=td:4G", "--machine: found 'q35,efi-map=td:4G'"),
        ("td:4G,profile=td-shim,offer=rng", "--offer: found with --profile td-shim"),
    ],
)
def test_our_own_firmware_with_options_of_a_boot(source, unaccepted):
    """What of RAM the firmware leaves unaccepted follows its policy and profile; nonsense is refused as by boot."""
    if isinstance(unaccepted, str):
        with pytest.raises(FormatError) as caught:
            read_map(source)
        assert str(caught.value).startswith(unaccepted)
        return
    found = read_map(source)
    ranges = [(d.start & -(2 << 20), d.end) for d in found.descriptors if d.type == 15]
    assert ranges == unaccepted


def test_nodes_and_variables_of_our_own_firmware():
    """A value may have commas: what does not begin with an option's name goes on with the one before."""
    texts = td_texts(
        "td:8G,pc,max-ram-below-4g=3G,numa=3G,5G,hotplug=1G,dist=21,variable=a:nv,bs=0,variable=b=1,cpus=2"
    )
    assert texts == {
        "memory": "8G", "machine": "pc,max-ram-below-4g=3G", "numa": "3G,5G,hotplug=1G,dist=21",
        "variable": ["a:nv,bs=0", "b=1"], "cpus": "2",
    }  # fmt: skip
    nodes = read_map("td:8G,numa=3G,5G,hotplug=1G").nodes
    assert [(n.node, n.end >> 30, n.hotplug) for n in nodes[2:]] == [(0, 5, False), (1, 10, False), (1, 11, True)]


def test_conventional_memory_from_an_address_on():
    """It becomes unaccepted, the range over the address is cut; other types and attributes stay."""
    marked = mark_unaccepted(DESCRIPTORS[:5], (1 << 32) + 0x1000)
    assert marked[:3] == DESCRIPTORS[:3]
    assert marked[3:] == (
        MemoryDescriptor(7, 1 << 32, 1, 0x4000F), MemoryDescriptor(15, (1 << 32) + 0x1000, (1 << 18) - 1, 0x4000F),
        MemoryDescriptor(15, 5 << 30, 1 << 18, 0x1000F),
    )  # fmt: skip
    found = read_map(str(MAPS / f"{NUMA}.dmesg.gz"), SourceOptions(unaccepted_from=1 << 32))
    assert [(d.start, d.end) for d in found.descriptors if d.type == 15] == [(1 << 32, 3 << 31)]


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("BIOS-e820: [mem 0x0-0xfff] usable\nBIOS-e820: [mem 0x1000-0x1fff] good", "m, line 2", None),
        ("BIOS-e820: [mem 0x1000-0xffe] usable", "m, line 1", ": [mem 0x1000-0xffe] usable"),
        ("BIOS-e820: [mem 0x0-0xffffffffffffffff] usable", "m: entry 0", "an end at 0x10000000000000000"),
        ("BIOS-e820: [mem " + "0" * 5000, "m, line 1", None),
        ('[{"start": 0, "end": 4095, "type": "Cheese"}]', "m: entry 0, type", "'Cheese'"),
        ('[{"start": 1, "end": 0, "type": "System RAM"}]', "m: entry 0", "an end at 0x0"),
        ('[{"start": -1, "end": 0, "type": "System RAM"}]', "m: entry 0, start", "-1"),
        ('[{"start": 0, "end": 4095, "type": "System RAM"}, 7]', "m: entry 1", "int"),
        ('[{"start": 0, "end": 4095, "type": ["System RAM"]}]', "m: entry 0, type", "['System RAM']"),
        ("descriptors = 3", "m, line 1", "no list of descriptors"),
        ("[[descriptors]]\ntype = ", "m", None),
        ("[[e820]]\ntype = 'cheese'\nstart = 0\nsize = 1", "m: entry 0, type", "'cheese'"),
        ("[[descriptors]]\ntype = 7\nstart = 0\nsize = 5", "m: descriptor 0, size", "5"),
        ("[[descriptors]]\ntype = 7\nstart = 0\npages = 5\nattribute = 'WB|HOT'", "m: descriptor 0, attribute", None),
        ("[[descriptors]]\ntype=7\nstart=0\npages=1\n[[holes]]\nstart=0\nsize=1", "m", "no memory descriptor"),
        ("[    0.000000] Linux version 6.12\n[    0.000000] no map", "m", "no memory descriptor"),
        ("[[nodes]]\nnode = 65536\nstart = 0\nsize = 1", "m: node 0, node", "65536"),
        ("[[nodes]]\nnode = 1\nstart = 0\nsize = 1\nhotplug = 1", "m: node 0, hotplug", "1"),
        ("holes = 3\n[[descriptors]]", "m: holes", "int"),
        ("memmap=exactmap", "m", "no e820 entry"),
        ("memmap=exactmap memmap=1G", "m, memmap=", "'1G'"),
        ("memmap=exactmap memmap=1G@0x0+1", "m, memmap=", "'1G@0x0+1'"),
        ("memmap=exactmap,1G%0x0", "m, memmap=", "'1G%0x0'"),
        ("memmap=exactmap,4P@0x1000", "m: entry 0", "an end at 0x10000000001000"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_is_no_map(text, where, found):
    """It is refused; the error names line, entry, descriptor or key."""
    with pytest.raises(FormatError) as caught:
        parse_text(text, "m")
    assert caught.value.what == where
    assert found is None or caught.value.found == found


@given(st.binary(max_size=300) | st.binary(min_size=4096, max_size=4096), st.sampled_from([None, 40, 48, 4096]))
def test_random_bytes(data, stride):
    """Any bytes are a map or are refused, with or without the start of a form that is known."""
    for prefix in (b"", b"\x1f\x8b", b"BIOS-e820: [mem 0x0", b"[[e820]]\n", b"memmap=exactmap,"):
        with value_or_refusal():
            parse_bytes(prefix + data, "random", stride)


@given(
    st.dictionaries(
        st.sampled_from(["descriptors", "e820", "holes", "nodes"]),
        st.lists(
            st.dictionaries(
                st.sampled_from(["type", "start", "size", "pages", "attribute", "node", "hotplug", "end"]),
                st.integers() | st.text(max_size=4) | st.sampled_from(["4G", "0x1000", "RAM", "WB|SP", True, None]),
            ),
            max_size=3,
        ),
    )
)  # fmt: skip
def test_random_descriptions(data):
    """Any structure of the right shape is a map that can be written, or is refused."""
    with value_or_refusal():
        platform = parse_text(json.dumps(data), "random")
        for write in WRITERS.values():
            assert write(platform) is not None


def test_a_gzip_file_that_grows_too_large():
    """64 MiB is the most that is unpacked."""
    with pytest.raises(FormatError, match="expected at most 67108864"):
        parse_bytes(gzip.compress(bytes(65 << 20), 1), "bomb")


def test_a_gzip_file_that_is_broken():
    """It is refused with the library's word for it."""
    with pytest.raises(FormatError, match="RFC 1952"):
        parse_bytes(b"\x1f\x8b\x08\0garbage garbage garbage", "broken")
