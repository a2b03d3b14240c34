"""The verbs on real code: ``step`` inside it, where ``boot`` stops, what it saves, how a death is reported."""

from __future__ import annotations

import json
import re

import pytest

from bootstub.bzimage import parse_bzimage
from bootstub.payload import decompress
from cpu.run import _tick_interval
from cpu.symbols import read_kallsyms
from guest.errors import MemoryFault
from tools.pipeline import REAL_KERNEL_CMDLINE, RUNS, Boot, BootConfig
from tools.postmortem import postmortem

MEMORY = 6 << 30
KERNEL_MAP = 0xFFFF_FFFF_8000_0000


@pytest.fixture
def stepped(command, file, debian_kernel):
    """``stepped(run, script, *words)``: status and output lines of ``step`` with real code."""

    def run(depth: str, script: str, *words: str) -> tuple[int, list[str]]:
        options = ("--kernel", debian_kernel, "--run", depth, "--memory", "6G", "--commands", file("commands", script))
        answer = command("step", *options, *words)
        assert answer.err == ""
        return answer.status, answer.out.splitlines()

    return run


@pytest.mark.parametrize("run", RUNS)
def test_step_lists_the_stages_of_the_run(stepped, run):
    """`stages` has the stages that this depth has."""
    assert stepped(run, "stages\n")[1][1:] == [f"      {name}" for name in RUNS[run]]


def registers(line: str) -> dict[str, int]:
    """The values of a line of `regs`."""
    return {name: int(value, 16) for name, value in (word.split("=") for word in line.split())}


def test_step_stops_inside_the_real_kernel(stepped):
    """A break stops the vCPU with its own registers at the instruction that did it; it goes on, and back repeats it."""
    once = "break Print:Zone ranges\nbreak TdCall:ACCEPT RCX=0x1ffe\nstep\nstep\nstep\nstep\nregs\nmem 0x1000000 16\n"
    status, lines = stepped("kernel", f"{once}step\nregs\nback\nstep\nregs\nstep\nregs\n")
    assert status == 0
    stops = [number for number, line in enumerate(lines) if line.startswith("stopped at ")]
    assert [lines[at].split(": ", 1)[1].split("]")[-1].strip() for at in stops[:2]] == [
        "TdCall TDG.MEM.PAGE.ACCEPT RCX=0x1ffe00001 x1: TDX_SUCCESS", "Zone ranges:"
    ]  # fmt: skip
    accept, zones = registers(lines[stops[0] + 1]), registers(lines[stops[1] + 1])
    assert (accept["rax"], accept["rcx"]) == (6, 0x1FFE00001)
    assert zones["rip"] != accept["rip"] > KERNEL_MAP
    assert zones["rax"] & 0xFF == ord("\n")
    assert "back before stage kernel" in lines
    assert [lines[at : at + 2] for at in stops[:2]] == [lines[at : at + 2] for at in stops[2:]]


def test_step_stops_in_the_real_stub(stepped):
    """Inside the stub too, at a boot service; and the stub then hands over to our stages."""
    status, lines = stepped("stub", "break ServiceCall:ExitBootServices\ncontinue\nregs\ncontinue\n")
    at = next(number for number, line in enumerate(lines) if line.startswith("stopped at "))
    assert " efi-stub " in lines[at]
    assert "rip" in registers(lines[at + 1])
    assert status == 0
    assert any(line.startswith("stage runtime done") for line in lines)


def test_step_until_and_timeout(stepped):
    """--until ends the kernel's stage or a `continue`; --timeout ends the guest, with a report."""
    status, lines = stepped("kernel", "continue\nevents 2\n", "--until", "BIOS-e820")
    assert (status, any(line.startswith("stage kernel done") for line in lines)) == (0, True)
    assert "Note stopped at 'BIOS-e820'" in lines[-2]
    status, lines = stepped("kernel", "continue\nstages\n", "--until", "firmware")
    assert lines[-4:] == ["done  host", "done  firmware", "      efi-stub", "      kernel"]
    status, lines = stepped("kernel", "continue\n", "--timeout", "1")
    assert status == 1
    assert any(line.startswith("RIP: ") for line in lines)
    assert "Call Trace:" in lines
    assert lines[-1].startswith("the guest died: ")
    assert lines[-1].endswith("(--timeout)")


def test_timeout_is_exact(command, debian_kernel):
    """The guest ends within a block of the number given, in time and with the report on standard error."""
    answer = command("boot", "--kernel", debian_kernel, "--run", "kernel", "--memory", "6G", "--timeout", "5")
    assert answer.status == 1
    stopped = re.search(r"stopped after (\d+) instructions \(--timeout\)", answer.err.splitlines()[-1])
    assert stopped is not None
    assert 5_000_000 <= int(stopped[1]) < 5_000_100
    assert answer.err.startswith("RIP: 0010:")
    assert [_tick_interval(count) for count in (None, 1, 5_000_000, 20_000_000)] == [1 << 24, 1, 5_000_000, 10_000_000]


@pytest.mark.parametrize("run", ["stub", "decompressor"])
def test_until_text_needs_the_real_kernel(command, debian_kernel, run):
    """Where our stages print the log, --until takes a stage only."""
    answer = command("boot", "--kernel", debian_kernel, "--run", run, "--until", "Zone ranges")
    assert (answer.status, answer.out) == (2, "")
    assert "'Zone ranges' is no stage" in answer.err


def test_until_and_save(command, debian_kernel, tmp_path):
    """`accept` stops at the kernel's first accept; --save writes files that `dump` reads, mainline's bitmap too."""
    options = ("--kernel", debian_kernel, "--run", "kernel", "--memory", "6G")
    answer = command("boot", *options, "--until", "accept", "--save", tmp_path)
    assert (answer.status, answer.err) == (0, "")
    events = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    kernel = [event for event in events if event["stage"] == "kernel"]
    accepts = [event for event in kernel if event.get("leaf") == "TDG.MEM.PAGE.ACCEPT"]
    assert len(accepts) == 1
    assert [event["event"] for event in kernel[-3:]] == ["TdCall", "Note", "StageEnd"]
    assert command("dump", "boot-params", tmp_path / "boot_params.bin").status == 0
    e820 = command("dump", "boot-params", tmp_path / "boot_params.bin", "--dmesg").out
    assert (tmp_path / "e820.txt").read_text() == e820
    assert [line for line in answer.out.splitlines() if "BIOS-e820: " in line] == [
        f"[    0.000000] {line}" for line in e820.splitlines()
    ]
    assert (tmp_path / "bitmap.bin").read_bytes() == bytes([0xFF] * 256)  # cleared after the accept
    stage = command("boot", *options, "--until", "efi-stub")
    assert stage.status == 0
    assert "\nkernel" not in stage.out


def test_report_of_a_fault_is_readable_in_one_go(exact_debian_kernel):
    """The first line has address, page state, RIP and symbol; the rest are registers, callers, twenty events."""
    boot = Boot(BootConfig(exact_debian_kernel.read_bytes(), MEMORY, cmdline=REAL_KERNEL_CMDLINE, run="kernel"))
    boot.run("efi-stub")
    symbols = read_kallsyms(decompress(parse_bzimage(boot.config.kernel).payload(boot.config.kernel)))
    assert symbols is not None
    accept = (symbols.address("tdx_accept_memory") or 0) - KERNEL_MAP
    jump = boot.physical.read(accept, 32).index(b"\x48\x39\xf7\x73") + 3  # cmp rdi, rsi; jae done
    boot.physical.write(accept + jump, b"\xeb")
    with pytest.raises(MemoryFault) as death:
        boot.run()
    lines = postmortem(boot, death.value, None)
    first = lines[0]
    assert first.startswith(f"BUG: {death.value.kind} of ")
    assert f" at {death.value.gpa:#x} by RIP 0xffffffff" in first
    assert first.endswith("): page is FREE (not accepted)")
    assert "+0x" in first
    assert lines[lines.index("Call Trace:") + 1].startswith(" ? ")
    last = next(number for number, line in enumerate(lines) if line.startswith("Last events"))
    assert len(lines) - last - 1 == 20
