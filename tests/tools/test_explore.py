"""``unaccepted explore``: places, pairs, verdicts, resuming; a broken guest is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bootstub.sample_kernel import sample_bzimage
from firmware.efi_types import EfiMemoryType
from firmware.memory_descriptor import MemoryDescriptor
from guest.registers import Registers
from guest.trace import Record
from guest.units import SZ_1G, SZ_1M, SZ_4G
from tdx.events import TdCall, TdVmCall
from tdx.faults import KINDS
from tdx.guest import accept_pages
from tools.explore import explore, pairs
from tools.pipeline import STAGES, Boot, BootConfig
from tools.trial import DATA_CHANGED, contents, try_fault

CONVENTIONAL, UNACCEPTED = EfiMemoryType.EfiConventionalMemory, EfiMemoryType.EfiUnacceptedMemoryType
SMALL = BootConfig(
    sample_bzimage(),
    efi_map=(
        MemoryDescriptor.of_range(CONVENTIONAL, 0x1000, 0xA0000, 0xF),
        MemoryDescriptor.of_range(CONVENTIONAL, SZ_1M, SZ_1G // 4, 0xF),
        MemoryDescriptor.of_range(UNACCEPTED, SZ_4G + SZ_1M, SZ_4G + 33 * SZ_1M, 0xF),
    ),
    script=(),
)
"""A guest of 256 MiB and a little more, with 32 MiB unaccepted and a head off the 2 MiB border."""


def test_pairs_of_a_trace():
    """Each accept event gives its first, second, middle and last call, each TDVMCALL itself, with what fits it."""
    events = [
        TdCall("TDG.MEM.PAGE.ACCEPT", 0x1000, 0, 511),
        TdVmCall("Instruction.HLT", 0, 0, 0),
        TdVmCall("MapGPA", 0, 0, 0),
        TdCall("TDG.VP.INFO", 0, 0, 1),
        TdCall("TDG.MEM.PAGE.ACCEPT", 0x200001, 0, 1),
    ]
    records = [Record(n, "x", 0, event) for n, event in enumerate(events)]
    rules = list(pairs(records, every=False))
    busy = [rule for rule in rules if rule.startswith("busy@")]
    assert busy == ["busy@accept=1", "busy@accept=2", "busy@accept=256", "busy@accept=511", "busy@accept=512"]
    assert [r for r in rules if r.startswith("interrupt@")] == ["interrupt@accept=512"]
    assert [r for r in rules if r.startswith("mapgpa-stuck@")] == ["mapgpa-stuck@tdvmcall=2"]
    assert [r for r in rules if r.startswith("status@")] == ["status@tdvmcall=1", "status@tdvmcall=2"]
    assert len([r for r in pairs(records, every=True) if r.startswith("busy@")]) == 512
    assert len(rules) == len(set(rules))


def test_v9_has_no_unexplained_violation():
    """Every single fault on a small guest: it goes on, or it stops."""
    trials = explore(SMALL, jobs=2)
    assert trials[0].rule == ""
    assert {trial.outcome for trial in trials} == {"went on", "stopped"}
    assert len(trials) > 100
    stopped = next(trial for trial in trials if trial.kind == "mapgpa-refuse")
    assert stopped.outcome == "stopped"
    assert "Accepting memory failed: 0x" in stopped.text


@pytest.mark.parametrize("profile", ["ovmf", "td-shim"])
def test_lies_about_memory_are_explained(profile):
    """Untrue HOB lists come first; what either firmware does of them is known."""
    trials = explore(BootConfig(SMALL.kernel, profile=profile, script=()), limit=10)
    assert {trial.kind for trial in trials[1:]} == {kind for kind in KINDS if kind.startswith("hob-")}
    assert {trial.outcome for trial in trials} == {"went on", "explained"}
    assert all(trial.findings and trial.reasons for trial in trials if trial.outcome == "explained")


def forgetful(boot: Boot) -> None:
    """A decompressor that puts the kernel's first words above 4 GiB, and accepts nothing before."""
    STAGES["decompress"](boot)
    boot.machine.memory.write(SZ_4G + 8 * SZ_1M, b"kernel")


def trusting(boot: Boot) -> None:
    """A kernel that accepts all of its memory again, whatever was accepted: a refusal is no concern of its."""
    STAGES["mm-init"](boot)
    for gpa in range(SZ_4G + SZ_1M, SZ_4G + 33 * SZ_1M, 4096):
        accept_pages(boot.machine, gpa, gpa + 4096, (0,))


def test_a_guest_that_accepts_nothing_is_a_violation():
    """Already its plain boot breaks a rule."""
    trials = explore(SMALL, stages={"decompress": forgetful}, limit=0)
    assert [(trial.rule, trial.outcome, trial.reasons) for trial in trials] == [
        ("", "violation", ("access to unaccepted memory",))
    ]
    assert trials[0].stage == "decompress"


def test_a_guest_that_accepts_again_loses_data_to_a_replay():
    """Under the replay attack the guest that accepts twice is found by name, and its data is gone."""
    _, trial = try_fault(SMALL, {"mm-init": trusting}, "replay@stage=efi-stub", None)
    assert trial.outcome == "violation"
    assert "replay attack: page accepted twice" in trial.reasons


def unmindful(boot: Boot) -> None:
    """A kernel that zeroes what it has written if a register of the host's is not what it was."""
    STAGES["mm-init"](boot)
    regs = Registers(rcx=0xFC00, r11=0x10000)
    boot.machine.platform.tdcall(regs)
    if regs.r11:
        boot.machine.memory.clear(0x100_0000, 0x100_1000)


def test_data_that_changed_is_a_violation():
    """A guest that comes through with other bytes in memory than in the plain boot is found."""
    stages = {"mm-init": unmindful}
    boot, plain = try_fault(SMALL, stages, None, None)
    assert plain.outcome == "went on"
    expected = contents(boot)
    assert sum(size for _, size, _ in expected) > 1 << 16
    number = sum(isinstance(r.event, TdVmCall) for r in boot.trace.records)
    last = f"registers@tdvmcall={number}"
    assert try_fault(SMALL, stages, last, expected)[1].reasons == (DATA_CHANGED,)
    assert try_fault(SMALL, {}, "registers@tdvmcall=1", contents(try_fault(SMALL, {}, None, None)[0]))[1].reasons == ()


@pytest.fixture
def small_map(file) -> Path:
    """A small guest's map as a file."""
    rows = [(CONVENTIONAL, 0x1000, 159), (CONVENTIONAL, SZ_1M, 0xFF00), (UNACCEPTED, SZ_4G, 0x2000)]
    names = ("type", "start", "pages")
    return file("map.json", json.dumps([dict(zip(names, row, strict=True)) for row in rows]))


def test_resume(command, file, tmp_path, small_map):
    """A run that was limited, and torn, goes on where it was; the results are those of one run."""
    journal, out = tmp_path / "trials.jsonl", tmp_path / "all.json"
    words = ("explore", "--efi-map", small_map, "--script", file("script", ""), "--jobs", "1")
    assert command(*words, "--resume", journal, "--limit", "7").status == 0
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])
    assert command(*words, "--resume", journal, "--limit", "4").status == 0
    assert len(journal.read_bytes().splitlines()) == 1 + 6 + 4
    answer = command(*words, "--resume", journal, "--json", out)
    assert answer.status == 0
    assert answer.err == ""
    assert answer.out.splitlines()[0].split() == ["fault", "went", "on", "stopped", "explained", "violation"]
    report = json.loads(out.read_text())
    assert sum(report["outcomes"].values()) == len(report["trials"]) > 50
    again = tmp_path / "again.json"
    command(*words, "--json", again)
    assert json.loads(again.read_text()) == report
    before = journal.read_bytes()
    assert command(*words, "--resume", journal).out == answer.out
    assert journal.read_bytes() == before


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("nonsense\n", "line 1"),
        ('{"schema": 1, "config": "0"}\n', "another boot's"),
        ("HEADER\n[]\n", "line 2: found something else"),
        ('HEADER\n{"rule": "busy@accept=1"}\n', "line 2: found something else"),
        ("HEADER\n" + "[" * 100000 + "\n", "line 2"),
        ("HEADER\n\xff\n", "line 2"),
    ],
    ids=["text", "other", "list", "short", "deep", "bytes"],
)
def test_journals_that_are_none(refused, file, tmp_path, small_map, command, lines, text):
    """A file that is not this boot's journal is refused in one line, and stays as it is."""
    words = ("explore", "--efi-map", small_map, "--limit", "1")
    good = tmp_path / "good.jsonl"
    command(*words, "--resume", good)
    header = good.read_text().splitlines()[0]
    journal = file("bad.jsonl", lines.replace("HEADER", header).encode("latin-1"))
    before = journal.read_bytes()
    assert text in refused(*words, "--resume", journal)
    assert journal.read_bytes() == before


def test_faults_of_ones_own(refused):
    """They are refused: explore has all of them."""
    assert "--fault" in refused("explore", "--fault", "busy")
