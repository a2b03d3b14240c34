"""``unaccepted map``: what it shows, the forms it writes, and comparisons with real firmware."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bootstub.boot_params import BOOT_PARAMS, BootE820Entry
from bootstub.sample_kernel import sample_bzimage
from firmware.memory_descriptor import MemoryDescriptor
from firmware.srat import NodeRange
from guest.records import RecordCopy
from tools.maps.bar import bar_lines, cells
from tools.maps.compare import compare
from tools.maps.kinds import CONVENTIONAL, HOLE, KINDS, Span, spans, totals
from tools.maps.notes import notes
from tools.maps.platform_map import PlatformMap, e820_map, efi_map
from tools.maps.reasons import REASONS
from tools.maps.source import parse_bytes, read_map
from tools.maps.write import WRITERS
from tools.pipeline import Boot, BootConfig

SAMPLES = Path(__file__).parent.parent / "samples"
MAPS = SAMPLES / "maps"
NUMA = MAPS / "efi-q35-4G-numa2-k6.12.dmesg.gz"
WORST_CASE = MAPS / "worst-case-4-pib.toml"
CAPTURED = [
    json.loads(line)
    for line in gzip.decompress((SAMPLES / "boot_params" / "captures.jsonl.gz").read_bytes()).splitlines()
]
GIB = 1 << 30
CONV, UNACC, RESERVED, BOOT_DATA, LOADER, MMIO = 7, 15, 0, 4, 2, 11


def efi(*rows: tuple[int, int, int]) -> PlatformMap:
    return efi_map([MemoryDescriptor.of_range(*row, 0xF) for row in rows], "m", "test")


def test_what_is_shown(command):
    """The map as dmesg prints it, a bar with its scale and legend, sums, nodes and notes."""
    answer = command("map", WORST_CASE)
    assert (answer.status, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert lines[3].startswith("efi: mem03: [Unaccepted  |")
    assert lines[5] == "CCC...CCCCCCCC........UUUUUUUU...............wwwwwwwwwww................UUUUUUUU"
    assert lines[6] == "0x0   0x100000        0x100000000            0x4000000000000"
    assert lines[7] == ". hole  w hot-plug window  C conventional  U unaccepted"
    assert lines[8] == "(not to scale: widths grow with the logarithm of the size)"
    assert "unaccepted            2       12582912 KiB" in lines
    assert "node 1: [mem 0x0004000000000000-0x000400ffffffffff] 1073741824 KiB, hot-plug" in lines
    assert lines[-1].startswith("note: RAM ends at 0x10000000000000, a multiple of 16 MiB")


def test_a_table_of_e820_is_shown_as_such(command):
    """A source that has e820 entries only is shown as the kernel's sorted table."""
    answer = command("map", MAPS / "bios-q35-4G-numa2-k6.12.firmware-memmap.json.gz")
    assert answer.out.startswith("BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff] usable\n")
    assert "note: e820 entry [0x0, 0x9fc00) is not of whole pages" in answer.out


@pytest.mark.parametrize(("no_color", "blocks"), [(None, True), ("", True), ("1", False)])
def test_colour_only_on_a_terminal(command, monkeypatch, no_color, blocks):
    """Blocks of colour on a terminal, letters with NO_COLOR set to anything but nothing."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    if no_color is None:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", no_color)
    out = command("map", WORST_CASE).out
    assert ("\x1b[33m\N{FULL BLOCK}" in out) == blocks


def test_json(command):
    """Facts for programs: addresses as text, sizes as numbers, the same notes."""
    data = json.loads(command("map", WORST_CASE, "--json").out)
    assert data["schema"] == 1
    assert data["totals"]["unaccepted"] == {"ranges": 2, "bytes": 12 * GIB}
    assert data["descriptors"][2] == {
        "start": "0x100000000", "end": "0x200000000", "bytes": 4 * GIB, "type": 15, "text": "Unaccepted",
        "attribute": "0x0", "attribute_text": "",
    }  # fmt: skip
    assert data["spans"][-1] == {"start": "0xffffe00000000", "end": "0x10000000000000", "bytes": 8 * GIB,
                                 "kind": "unaccepted"}  # fmt: skip
    assert len(data["notes"]) == 1


@pytest.mark.parametrize("form", [form for form in WRITERS if form != "raw"])
def test_every_form_is_a_source(command, file, form):
    """What --to writes can be read again, and written once more it is the same text."""
    first = command("map", NUMA, "--to", form)
    assert first.status == 0
    again = command("map", file("map", first.out), "--to", form)
    assert (again.status, again.out, again.err) == (0, first.out, "")


def test_raw_descriptors_go_out_and_come_in(tmp_path):
    """--to raw writes the very bytes that GetMemoryMap() gave a captured guest, out of the lines of its log."""
    words = [sys.executable, "-m", "tools.cli", "map", NUMA, "--to", "raw"]
    done = subprocess.run(words, capture_output=True, check=True)
    assert done.stdout == gzip.decompress((MAPS / "efi-q35-4G-numa2-k6.12.efi-memmap.bin.gz").read_bytes())
    assert done.stderr == b""


def test_memmap_parameters(command, file):
    """Each e820 type has its sign; sizes are as short as they can be."""
    rows = [(0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (1 << 20, 1 << 30, 3), (4 * GIB, 1 << 40, 12), (1 << 45, 0x1234, 4)]
    entries = [{"start": start, "size": size, "type": kind} for start, size, kind in rows]
    answer = command("map", file("map", json.dumps({"e820": entries})), "--to", "memmap-args")
    assert answer.out == (
        "memmap=exactmap memmap=639K@0x0 memmap=1K$0x9fc00 memmap=1G#0x100000 memmap=1T!0x100000000 "
        "memmap=0x1234%0x200000000000+4\n"
    )


def test_options_that_a_source_needs(command, refused, file):
    """--stride for descriptors of an odd size, --unaccepted-from for maps of machines that are no TD."""
    raw = gzip.decompress((MAPS / "efi-q35-4G-numa2-k6.12.efi-memmap.bin.gz").read_bytes())
    wide = b"".join(raw[at : at + 48] + bytes(8) for at in range(0, len(raw), 48))
    answer = command("map", file("map", wide), "--stride", "56", "--unaccepted-from", "4G")
    assert "Unaccepted  |   |  |  |  |  |  |  |  |  |  |   |WB|WT|WC|UC] range=[0x0000000100000000" in answer.out
    assert "136" not in refused("map", file("map", wide), "--stride", "49")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["map", "none"], "none: No such file or directory"),
        (["map", "td:4X"], "--memory: found '4X'"),
        (["map", "td:4G,pc,max-ram-below-4g=4G"], "--machine: found 'pc,max-ram-below-4g=4G'"),
        (["map", "td:4G,isapc"], "--machine: found 'isapc', expected q35 or pc"),
        (["map", "td:32M"], "RAM below 4 GiB"),
        (["map", "td:1G", "--stride", "x"], "--stride: found 'x'"),
        (["map", "td:1G", "--unaccepted-from", "5"], "--unaccepted-from: found '5', expected an address of"),
        (["map", "td:1G", "--unaccepted-from", "0x10000000000000"], "expected an address of whole pages below 2^52"),
        (["map", "td:1G", "--plot", "map.pdf"], "--plot: found 'map.pdf', expected a name that ends in .svg or .png"),
        (["map", "none", "--boot-params", "0x1000"], "none: No such file or directory"),
        (["boot", "--unaccepted-from", "4G"], "--unaccepted-from: found no --efi-map"),
        (["boot", "--boot-params", "4096"], "--boot-params: found no --efi-map"),
        (["map", "a\0b"], "found a NUL character"),
        (["map", "a\0b", "--boot-params", "0x1000"], "found a NUL character"),
        (["map", "td:1G", "--boot-params", "none"], "none: No such file or directory"),
        (["boot", "--machine", "q35,accel=tcg"], "--machine: found 'q35,accel=tcg'"),
        (["boot", "--machine", "q35,"], "--machine: found 'q35,'"),
        (["boot", "--machine", "pc", "--efi-map", "td:1G"], "--machine: found with --efi-map"),
    ],
)  # fmt: skip
def test_refusals(refused, words, text):
    """One line that names the option or the file, what was found and what was expected."""
    assert text in refused(*words)


@pytest.mark.parametrize("words", [["map"], ["map", "td:1G", "--compare", "td:1G", "td:2G"],
                                   ["map", "--compare", "td:1G", "td:2G", "--to", "e820"]])  # fmt: skip
def test_wrong_usage(command, words):
    """Exit status 2."""
    assert command(*words).status == 2


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(command, tmp_path, suffix):
    """A picture of either kind; one map gives one file, to the byte."""
    paths = [tmp_path / f"{number}.{suffix}" for number in (1, 2)]
    for path in paths:
        answer = command("map", NUMA, "--plot", path)
        assert (answer.status, answer.out, answer.err) == (0, "", "")
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert suffix == "png" or b"0x100000000" in first or b"<use" in first


def test_plot_without_matplotlib(refused, monkeypatch):
    """Without the extra, one line says what to install; everything else works without it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'unaccepted[plot]'" in refused("map", NUMA, "--plot", "x.svg")


def test_maps_do_not_load_matplotlib(command, monkeypatch):
    """Looking at a map works where there is no matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command("map", NUMA).status == 0


def test_spans_cover_the_address_space():
    """From 0 to the end without a gap; where descriptors overlap, the one that is less free is seen."""
    platform = efi((CONV, 0, 4 * GIB), (RESERVED, GIB, 2 * GIB), (UNACC, 8 * GIB, 9 * GIB), (16, 9 * GIB, 10 * GIB))
    found = [(span.start // GIB, span.end // GIB, span.kind.word) for span in spans(platform)]
    assert found == [
        (0, 1, "conventional"), (1, 2, "reserved"), (2, 4, "conventional"), (4, 8, "hole"), (8, 9, "unaccepted"),
        (9, 10, "reserved"),
    ]  # fmt: skip
    assert sum(size for _, _, size in totals(spans(platform))) == 10 * GIB


def test_letters_are_different():
    """Each kind has a letter and a word of its own."""
    assert len({kind.letter for kind in KINDS}) == len({kind.word for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("seed", range(20))
def test_bar_of_any_map(seed):
    """Every cell shows a range, in order; ranges that no cell shows are counted."""
    rng = random.Random(seed)
    at, cut = 0, []
    for number in range(rng.randrange(1, 300)):
        size = 1 << rng.randrange(12, 50)
        cut.append(Span(at, at + size, KINDS[number % len(KINDS)]))
        at += size
    width = rng.choice([10, 80, 120])
    shown = cells(cut, width)
    assert len(shown) == width
    assert [span.start for span in shown] == sorted(span.start for span in shown)
    hidden = len(cut) - len({span.start for span in shown})
    last = bar_lines(cut, width, colour=False)[-1]
    assert (f"{hidden} of {len(cut)} ranges are too narrow" in last) == (hidden > 0)


def test_bar_of_two_ranges():
    """A range of 2^n pages gets n + 1 parts."""
    cut = [Span(0, 1 << 12, CONVENTIONAL), Span(1 << 12, (1 << 12) + (1 << 20), HOLE)]
    assert bar_lines(cut, 10, colour=False)[:2] == ["C.........", "0x0"]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([(CONV, 0, GIB)], []),
        ([(CONV, GIB, 2 * GIB), (CONV, 0, GIB)], ["not sorted by address: 1 of 2"]),
        ([(CONV, 0, 2 * GIB), (RESERVED, GIB, GIB + 4096)], ["overlap: Reserved [0x40000000, 0x40001000) and Conv"]),
        ([(UNACC, 4 * GIB, 5 * GIB - 0x200000), (UNACC, 4 * GIB + 0x200000, 4 * GIB + 0x600000)],
         ["overlap: Unaccepted [0x100200000, 0x100600000) and Unaccepted"]),
        ([(UNACC, 4 * GIB + 4096, 5 * GIB - 4096)],
         ["unaccepted edge off 2 MiB: the stub accepts 4088 KiB of Unac", "hole inside a 2 MiB unit", "hole inside"]),
        ([(UNACC, 4 * GIB, 4 * GIB + 0x300000)], ["unaccepted range below 4 MiB", "hole inside a 2 MiB unit"]),
        ([(UNACC, GIB, 2 * GIB), (CONV, 4 * GIB, 4 * GIB + 4096)], ["unaccepted memory below 4 GiB"]),
        ([(UNACC, 4 * GIB, 5 * GIB)], ["RAM ends at 0x140000000, a multiple of 16 MiB"]),
        ([(CONV, 0, GIB), (99, GIB, 2 * GIB)], ["type 0x63 is none of the specification's"]),
        ([(CONV, n << 21, (n << 21) + 4096) for n in range(129)], ["129 e820 entries: those beyond 128"]),
        ([(99, n << 21, (n << 21) + 4096) for n in range(12)], ["type 0x63"] * 8),
    ],
)  # fmt: skip
def test_notes(rows, found):
    """Each odd thing has a line; of many of one sort only eight."""
    lines = notes(efi(*rows))
    assert len(lines) == len(found)
    for line, text in zip(lines, found, strict=True):
        assert line.startswith(text)


def test_more_notes():
    """Special purpose memory that loses its mark, RAM without a node, and the number of notes left out."""
    special = efi_map([MemoryDescriptor(UNACC, 4 * GIB, 1 << 18, 1 << 18)], "m", "test", [NodeRange(0, 0, 9 << 29)])
    lines = notes(special)
    assert lines[0].startswith("unaccepted memory for a special purpose becomes plain RAM")
    assert lines[-1] == "RAM of no node: [0x120000000, 0x140000000)"
    many = notes(efi(*((99, n << 21, (n << 21) + 4096) for n in range(12))))
    assert many[-1].endswith("(and 4 more of this sort)")


_PATTERN = re.compile(r"^(?:efi|efibios|efigrub)-(q35|pc)-([0-9]+[MG])-(?:below([0-9.]+)G-)?")
REAL_OVMF = {
    captured["name"]: captured for captured in CAPTURED if _PATTERN.match(captured["name"]) and captured["bios_e820"]
}


def our_source(name: str) -> str:
    machine, memory, below = _PATTERN.match(name).groups()
    limit = f",max-ram-below-4g={int(float(below) * 1024)}M" if below else ""
    return f"td:{memory},{machine}{limit}"


@pytest.mark.parametrize("name", REAL_OVMF)
def test_our_firmware_and_real_ovmf(name):
    """RAM, reserved and ACPI memory are the same ranges but for differences with a known reason."""
    theirs = parse_bytes("\n".join(REAL_OVMF[name]["bios_e820"]).encode(), name)
    result = compare(read_map(our_source(name)), theirs)
    assert result.unexplained == []
    reasons = {reason.name for _, reason in result.differences}
    assert {"td-low-memory"} <= reasons <= {"td-low-memory", "mmconfig", "flash", "pools", "grub-type-20"}
    assert ("pools" in reasons) == ("numa2" in name)
    assert ("grub-type-20" in reasons) == name.startswith("efigrub")
    assert ("mmconfig" in reasons) == ("-q35-" in name)
    outside = [d for d, reason in result.differences if reason.name != "td-low-memory"]
    assert all(d.start >= 0x7E00_0000 for d in outside)


def test_comparison_of_efi_maps():
    """Two EFI maps are compared by EFI type, too; free memory that firmware or loader used differs for a reason."""
    result = compare(read_map("td:4G"), read_map(str(NUMA)))
    names = {reason.name for _, reason in result.differences if reason}
    assert names >= {"unaccepted", "boot-services", "image", "td-low-memory", "mmconfig"}
    assert result.unexplained == []


def test_one_map_with_itself(command):
    """No difference, exit status 0."""
    answer = command("map", "--compare", NUMA, NUMA)
    assert answer.status == 0
    assert answer.out.endswith("\n0 differences, 0 unexplained\n")


def test_unexplained_differences(command, file):
    """Exit status 1, each difference with its range, size and both uses; JSON says the same."""
    more = json.dumps({"e820": [{"start": e.addr, "size": e.size, "type": e.type} for e in (
        *read_map("td:1G").entries(), BootE820Entry(1 << 40, 1 << 20, 7))]})  # fmt: skip
    answer = command("map", "--compare", "td:1G", file("more", more))
    assert answer.status == 1
    assert answer.out.splitlines()[-2:] == [
        "0x0000010000000000-0x00000100000fffff 1 MiB: - | persistent (type 7): unexplained",
        "1 differences, 1 unexplained",
    ]
    answer = command("map", "--compare", "td:1G", file("more", more), "--json")
    assert answer.status == 1
    data = json.loads(answer.out)
    assert data["unexplained"] == 1
    assert data["differences"] == [
        {"start": "0x10000000000", "end": "0x10000100000", "bytes": 1 << 20, "a": "-", "b": "persistent (type 7)",
         "reason": None},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ([(CONV, 0, GIB)], [(BOOT_DATA, 0, GIB)], "boot-services"),
        ([(CONV, 0, GIB)], [(LOADER, 0, GIB)], "image"),
        ([(CONV, 0, GIB)], [(UNACC, 0, GIB)], "unaccepted"),
        ([(CONV, 0, GIB)], [(RESERVED, 0, GIB)], None),
        ([(CONV, 0, GIB)], [(9, 0, GIB)], None),
        ([(CONV, 0, GIB)], [(9, 0, 0x1000), (CONV, 0x1000, GIB)], "stub-tables"),
        ([(RESERVED, 0, GIB)], [(6, 0, GIB)], "runtime-types"),
        ([(RESERVED, 0, GIB)], [(MMIO, 0, GIB)], None),
        ([(CONV, 0, GIB), (RESERVED, 0xB000_0000, 0xC000_0000)], [(CONV, 0, GIB)], "mmconfig"),
        ([(CONV, 0, GIB), (RESERVED, 0xB000_0000, 0xB000_1000)], [(CONV, 0, GIB)], None),
        ([(CONV, 0, GIB), (MMIO, 0xFFC0_0000, 4 * GIB)], [(CONV, 0, GIB)], "flash"),
        ([(CONV, 0, GIB - 0x8000), (10, GIB - 0x8000, GIB)], [(CONV, 0, GIB)], "pools"),
        ([(CONV, 0, GIB), (10, GIB, GIB + 0x8000)], [(CONV, 0, GIB)], None),
        ([(CONV, 0, 0x80_0000), (10, 0x80_0000, 0x80_6000), (CONV, 0x80_6000, GIB)], [(CONV, 0, GIB)], "td-low-memory"),
    ],
)  # fmt: skip
def test_reasons(a, b, reason):
    """Each known reason covers its own difference, in either order, and not a like one elsewhere."""
    for one, other in ((a, b), (b, a)):
        ((_, found),) = compare(efi(*one), efi(*other)).differences
        assert (found and found.name) == reason


def test_every_reason_has_a_sentence():
    """Names are unique and each has its text."""
    assert len({reason.name for reason in REASONS}) == len(REASONS)
    assert all(len(reason.text) > len(reason.name) for reason in REASONS)


def test_e820_cannot_tell_unaccepted_memory():
    """Against a table of e820, unaccepted memory is RAM and MMIO is reserved: no difference."""
    ours = efi((CONV, 0, GIB), (MMIO, 2 * GIB, 3 * GIB), (UNACC, 4 * GIB, 5 * GIB))
    rows = [BootE820Entry(0, GIB, 1), BootE820Entry(2 * GIB, GIB, 2), BootE820Entry(4 * GIB, GIB, 1)]
    assert compare(ours, e820_map(rows, "m", "test")).differences == ()


def test_boot_with_the_worst_case(command):
    """RAM at both ends of 4 PiB: the bitmap has 256 MiB, and the books agree in the end."""
    answer = command("boot", "--efi-map", WORST_CASE, "--cmdline", "nokaslr")
    assert (answer.status, answer.err) == (0, "")
    assert "last_pfn = 0x10000000000" in answer.out
    assert answer.out.splitlines()[-1].startswith("bitmap and Secure EPT agree: ")


def test_boot_with_a_real_machine_and_unaccepted_memory(command):
    """A map of a machine that is no TD boots as one: what lies above 4 GiB is marked as unaccepted."""
    answer = command("boot", "--efi-map", NUMA, "--unaccepted-from", "4G", "--json", "short")
    data = json.loads(answer.out)
    (line,) = [line for line in data["log"] if "efi: mem" in line and "Unaccepted" in line]
    assert "range=[0x0000000100000000-0x000000017fffffff] (2048MB)" in line
    assert data["verdict"][-1].startswith("bitmap and Secure EPT agree")


def test_boot_with_what_a_guest_left_in_memory(command, tmp_path):
    """A guest boots with the map that stands in another guest's memory, named by the address of boot_params."""
    first = Boot(BootConfig(sample_bzimage()))
    first.run("efi-stub")
    rsi, params = first.machine.regs.rsi, RecordCopy(first.boot_params, BOOT_PARAMS)
    at, size = params["efi_info.efi_memmap"], params["efi_info.efi_memmap_size"]
    with (tmp_path / "memory").open("wb") as file:
        for gpa, length in ((rsi, 4096), (at, size)):
            file.seek(gpa)
            file.write(first.physical.read(gpa, length))
    answer = command("boot", "--efi-map", tmp_path / "memory", "--boot-params", f"{rsi:#x}")
    assert (answer.status, answer.err) == (0, "")
    assert "[Unaccepted  |   |  |  |  |  |  |  |  |  |  |   |  |  |  |  ] range=[0x0000000100000000-" in answer.out


def test_boot_of_a_pc_machine(command):
    """i440fx keeps 3 GiB below 4 GiB."""
    answer = command("boot", "--memory", "4G", "--machine", "pc", "--until", "setup-arch")
    assert "BIOS-e820: [mem 0x0000000100000000-0x000000013fffffff] usable" in answer.out
    assert "0x00000000e0000000" not in answer.out
