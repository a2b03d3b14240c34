"""Scripts of stage runtime by the command line: help, mistakes, CPUs, knobs, and typing them in the debugger."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def output(command, file):
    """``output(script, *words)``: output lines of ``boot --script`` that ended well."""

    def run(script, *words):
        answer = command("boot", "--script", file("script", script), *words)
        assert (answer.status, answer.err) == (0, "")
        return answer.out.splitlines()

    return run


@pytest.mark.parametrize("verb", ["boot", "step"])
def test_help(command, verb):
    """`--script help` lists commands and files, and boots nothing."""
    answer = command(verb, "--script", "help")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith("A script has one command a line")
    assert "  /sys/kernel/mm/page_alloc/accept_memory\n" in answer.out
    assert "BIOS-e820" not in answer.out


def test_unknown_command(refused, file):
    """One line of error with the file's name and the line's number."""
    script = file("script", "cat /proc/meminfo\n\nfly me to the moon\n")
    text = refused("boot", "--script", script)
    assert text.startswith(f"{script}, line 3: found 'fly me to the moon', expected alloc, free, on, cache, run, ")


def test_wrong_operands(refused, file):
    """The same where the verb is known."""
    text = refused("boot", "--script", file("script", "alloc order nine\n"))
    assert ", line 1: found 'alloc order nine', expected operands of alloc" in text


def test_a_cpu_that_is_not_there(command, file):
    """It is found out when the command runs: one line, exit 1."""
    answer = command("boot", "--script", file("script", "on cpus 0-4 alloc 0\n"), "--cpus", "4")
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert "on cpu 4: found no such CPU online, expected some of 0-3" in answer.err


def test_what_commands_print(output):
    """Each command leaves one line in the log, beside what a file says."""
    lines = output(
        "alloc order 9 x 4 as a\nread zeropad a\nread devmem 1M 4096\nread kcore 0 1M\nkexec -l\nhotadd 8G 128M\n"
        "hotadd 8G 128M\ncat /sys/kernel/mm/page_alloc/accept_memory\ncat /proc/sys/vm/watermark_scale_factor\n"
        "echo x > /proc/sys/vm/min_free_kbytes\n"
    )
    first = next(number for number, line in enumerate(lines) if line.startswith("# alloc"))
    assert lines[first].startswith("# alloc order 9: 4 of 4 blocks, ")
    assert lines[first + 1 : first + 11] == [
        "# read zeropad: 4 blocks, 0 bytes padded with zeros",
        "# read devmem: -1 EPERM",
        "# read kcore: 636 KiB touched, zeros for 0 B",
        "# kexec -l: -1 EPERM: Disable kexec: not yet supported on systems with unaccepted memory",
        "# hotadd [mem 0x0000000200000000-0x0000000207ffffff]: online",
        "# hotadd 0x200000000 0x8000000: -17 EEXIST",
        "# cat /sys/kernel/mm/page_alloc/accept_memory: -13 EACCES",
        "# cat /proc/sys/vm/watermark_scale_factor",
        "10",
        "# echo x > /proc/sys/vm/min_free_kbytes: -22",
    ]


def test_table_of_cpus(output):
    """With several CPUs a table says what each waited for; with one there is none."""
    script = "on cpus 0-3 alloc order 9 x 16 as a\non cpus 1,3 free a\n"
    lines = output(script, "--cpus", "4")
    assert any(line.startswith("# on cpus 0-3 alloc order 9: 64 of 64 blocks, ") for line in lines)
    header = next(number for number, line in enumerate(lines) if line.startswith("cpu "))
    assert " ".join(lines[header].split()) == "cpu accepts waits waited longest wait interrupts off busy soft lockups"
    assert [line.split()[0] for line in lines[header + 1 : header + 6]] == ["0", "1", "2", "3", "all"]
    assert not any(line.startswith("cpu ") for line in output("", "--cpus", "1"))
    many = output("on cpus 0-39 alloc 0\n", "--cpus", "40")
    assert sum(line.startswith("all 40 ") for line in many) == 1


def test_cpus_in_json(command, file):
    """JSON has each CPU with its times in nanoseconds."""
    script = file("script", "on cpus 0-7 alloc order 9 x 8\n")
    cpus = json.loads(command("boot", "--script", script, "--cpus", "8", "--json").out)["cpus"]
    assert [cpu["cpu"] for cpu in cpus] == list(range(8))
    assert all(cpu["accepts"] > 0 for cpu in cpus)
    assert sum(cpu["waited_ns"] for cpu in cpus) > max(cpu["longest_wait_ns"] for cpu in cpus) > 0
    assert max(cpu["irqs_off_ns"] for cpu in cpus) >= max(cpu["longest_wait_ns"] for cpu in cpus)


def test_seed_decides_the_order(command, file):
    """The same seed, the same boot; another one, another order."""
    script = file("script", "on cpus 0-7 alloc order 9 x 8\n")
    outs = [
        command("boot", "--script", script, "--cpus", "8", "--seed", seed, "--json").out for seed in ("1", "1", "2")
    ]
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize(("knob", "status"), [("zeropad-guard=on", 0), ("zeropad-guard=off", 1)])
@pytest.mark.parametrize("protocol", ["v9", "mainline"])
def test_zeropad_guard(command, file, knob, status, protocol):
    """The guard switched off, a read past a block's end kills the guest; on, it does not."""
    script = file(
        "script",
        "echo 128 > /proc/sys/vm/min_free_kbytes\necho 1 > /proc/sys/vm/watermark_scale_factor\n"
        + "alloc order 0 x 64\nalloc order 10 as a\nread zeropad a\n" * 40,
    )
    answer = command("boot", "--script", script, "--knob", knob, "--protocol", protocol)
    assert answer.status == status
    assert ("read of 8 bytes at" in answer.err and "the guest died [EPT violation" in answer.err) == bool(status)


def test_double_accept(command, file):
    """Without the lock the sanitizer names the double accept, and the guest panics."""
    script = file("script", "on cpus 0-7 alloc order 9 x 8\n")
    answer = command("boot", "--script", script, "--cpus", "8", "--knob", "accept-exclusion=off")
    assert answer.status == 1
    assert "runtime: Accepting memory failed: 0x" in answer.err
    assert "accept of accepted memory at [0x" in answer.out


def test_platform_none(output):
    """A guest that is no TD has nothing to accept; with the fake its page allocator thinks so."""
    lines = output("cat /proc/meminfo\n", "--platform", "none", "--cmdline", "fake_unaccepted_start=1G")
    unaccepted = next(int(line.split()[1]) for line in lines if line.startswith("Unaccepted:"))
    assert unaccepted > 2 << 20
    assert lines[-1] == "no bitmap of unaccepted memory; 0 KiB are unaccepted"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--cpus", "0"], "--cpus: found '0'"),
        (["--cpus", "1025"], "--cpus: found '1025'"),
        (["--cpus", "two"], "--cpus: found 'two'"),
        (["--knob", "zeropad-guard"], "--knob: found 'zeropad-guard'"),
        (["--knob", "zeropad-guard=maybe"], "--knob: found 'zeropad-guard=maybe'"),
        (["--knob", "mainline=on"], "--knob: found 'mainline=on'"),
        (["--platform", "sev"], "--platform: found 'sev'"),
        (["--platform", "none", "--fault", "busy"], "--platform none: found --fault"),
        (["--platform", "none", "--efi-map", "td:4G"], "--platform none: found --efi-map"),
    ],
)
def test_wrong_options(refused, words, text):
    """Each is refused in one line."""
    assert refused("boot", *words).startswith(text)


def test_real_code_has_one_cpu(refused, debian_kernel):
    """Its processor is one, and it is a TD."""
    words = ["boot", "--kernel", debian_kernel, "--run", "kernel"]
    assert refused(*words, "--cpus", "2").startswith("--cpus: found --run kernel")
    assert refused(*words, "--platform", "none").startswith("--platform none: found --run")


def test_typed_in_the_debugger(command, file):
    """Once stage runtime has run, its commands work at the prompt, on the guest as it is."""
    typed = "alloc order 3 x 4 as b\nfree b\nread kcore 0 1M\nkexec -l\nhelp script\nread kcore\nalloc 3\n"
    commands = file("commands", f"continue\n{typed}back\nstages\n")
    answer = command("step", "--script", "/dev/null", "--commands", commands)
    lines = answer.out.splitlines()
    assert any(line.startswith("# alloc order 3: 4 of 4 blocks, ") for line in lines)
    assert "# read kcore: 636 KiB touched, zeros for 0 B" in lines
    assert any(line.startswith("# kexec -l: -1 EPERM: Disable kexec") for line in lines)
    assert "A script has one command a line; # starts a comment." in lines
    assert any(line.startswith("the guest died: runtime: read of 4096 bytes at 0x1") for line in lines)
    assert "the guest is dead; `back` brings it to life" in lines
    assert "back at the end of the last stage" in lines
    assert lines[-1] == "done  runtime"
    assert answer.status == 0  # it lives again


def test_typed_too_early_or_wrong(command, file):
    """Before stage runtime a command says so; a wrong one is refused with what it wants."""
    for script, text in (
        ("alloc 3\n", "command: found 'alloc 3', expected stage runtime to have begun"),
        ("continue\nalloc x\n", "command: found 'alloc x', expected operands of alloc"),
    ):
        answer = command("step", "--commands", file("commands", script))
        assert (answer.status, answer.err.count("\n")) == (1, 1)
        assert text in answer.err


def test_break_inside_parallel_work(command, file):
    """The debugger stops inside the work of several CPUs; leaving from there ends all of them."""
    script = file("script", "on cpus 0-3 alloc order 9 x 4\n")
    commands = file("commands", "break TdCall:ACCEPT\nstep\nstep\nstep\nstep\nstep\nstep\nquit\n")
    answer = command("step", "--script", script, "--cpus", "4", "--commands", commands)
    assert (answer.status, answer.err) == (0, "")


def test_stopped_between_cpus(command, file):
    """While it is stopped there, registers and events can be looked at, and the work goes on to its end."""
    script = file("script", "on cpus 0-3 alloc order 9 x 4\n")
    commands = file("commands", "break ParallelAllocation\ncontinue\nevents 1\nregs\nalloc 3\nstep\nquit\n")
    answer = command("step", "--script", script, "--cpus", "4", "--commands", commands)
    lines = answer.out.splitlines()
    assert any(line.startswith("stopped at ") and "on cpus 0-3 alloc order 9: 16 of 16" in line for line in lines)
    assert "the guest is inside a command" in lines
    assert any(line.startswith("stage runtime done") for line in lines)
