"""--variable and --offer: what the firmware has and offers, and what each stub makes of it."""

from __future__ import annotations

import argparse
from uuid import UUID

import pytest

from bootstub.protocol import MAINLINE, V9
from bootstub.sample_kernel import sample_bzimage
from firmware.variables import Variable
from guest.errors import FormatError
from guest.trace import ServiceCall
from tools.config import add_options, boot_config
from tools.pipeline import Boot, BootConfig
from tools.report import summarize
from tools.verdict import unaccepted_by_module, verdict_lines

GLOBAL = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
OTHER = "0000000a-0000-4000-8000-000000000001"
NV, BS, RT = 1, 2, 4
UNKNOWN, DISABLED, ENABLED = 1, 2, 3
SECURE_BOOT = 0x1EC
"""Offset in boot_params (Documentation/arch/x86/zero-page.rst)."""


def configured(*words) -> BootConfig:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return boot_config(parser.parse_args([str(word) for word in words]))


def booted(*words, until: str = "efi-stub") -> Boot:
    """A boot with these options."""
    boot = Boot(configured(*words))
    boot.run(until)
    return boot


# --variable


@pytest.mark.parametrize(
    "text, expected",
    [
        ("SecureBoot=01", Variable("SecureBoot", GLOBAL, BS | RT, b"\1")),
        ("Name=00 ff", Variable("Name", GLOBAL, NV | BS | RT, b"\0\xff")),
        (f"My-Name-{OTHER}=0a", Variable("My-Name", UUID(OTHER), NV | BS | RT, b"\x0a")),
        (f"SecureBoot-{OTHER}:bs=0a", Variable("SecureBoot", UUID(OTHER), BS, b"\x0a")),
        ("Lang:nv,bs=text:en=US", Variable("Lang", GLOBAL, NV | BS, b"en=US")),
        ("Lang=utf16:en", Variable("Lang", GLOBAL, NV | BS | RT, b"e\0n\0\0\0")),
    ],
)
def test_a_variable(text, expected):
    """Name, vendor, attributes and bytes, with what is known of the name where it is not said."""
    assert configured("--variable", text).variables == (expected,)


def test_a_variable_from_a_file(file):
    """@FILE is the bytes of a file."""
    (variable,) = configured("--variable", f"db=@{file('db', b'bytes')}").variables
    assert variable.data == b"bytes"


@pytest.mark.parametrize(
    "text, found",
    [
        ("SecureBoot", "no ="),
        ("=01", "no name"),
        ("SecureBoot=1", "'1'"),
        ("SecureBoot=", "0 bytes"),
        ("SecureBoot=xx", "'xx'"),
        ("SecureBoot=text:", "0 bytes"),
        ("SecureBoot:nv=01", ":nv"),
        ("SecureBoot:bs,xy=01", ":bs,xy"),
        ("SecureBoot:=01", ":"),
        (f"Name-{OTHER[:-1]}g=01", f"{OTHER[:-1]}g"),
        ("Name=" + "00" * 0x8400, "33792 bytes"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_variable(text, found):
    """Each mistake is refused by its own words."""
    with pytest.raises(FormatError) as refused:
        configured("--variable", text)
    assert refused.value.what.startswith("--variable")
    assert refused.value.found == found


def test_variables_are_given_once_and_fit(refused):
    """The same name twice, and more than a store has room for, are refused in one line."""
    assert "given twice" in refused("boot", "--variable", "A=01", "--variable", "A=02")
    words = [word for n in range(9) for word in ("--variable", f"{n}=" + "00" * 0x8300)]
    assert "at most 262144" in refused("boot", *words)
    assert configured("--variable", "A=01", "--variable", f"A-{OTHER}=02").variables[1].data == b"\2"


def test_variables_and_offers_of_a_toml_file(file):
    """The same texts, an array of variables."""
    toml = file("boot.toml", 'variable = ["SecureBoot=01", "Name=02"]\noffer = "rng,sev-accept"\n')
    config = configured("--config", toml)
    assert [each.name for each in config.variables] == ["SecureBoot", "Name"]
    assert config.offers == ("rng", "sev-accept")


STATES = [
    ((), DISABLED),
    (("SecureBoot=01",), ENABLED),
    (("SecureBoot=00",), DISABLED),
    (("SecureBoot=0101",), UNKNOWN),
    (("SecureBoot=01", "SetupMode=00"), ENABLED),
    (("SecureBoot=01", "SetupMode=01"), DISABLED),
    (("SecureBoot=01", "SetupMode=02"), ENABLED),
    (("SecureBoot=01", "SetupMode=0100"), ENABLED),
    (("SecureBoot=01", "MokSBStateRT=01"), DISABLED),
    (("SecureBoot=01", "MokSBStateRT=00"), ENABLED),
    (("SecureBoot=01", "MokSBStateRT:nv,bs,rt=01"), ENABLED),
    (("SecureBoot=01", "MokSBState=01"), ENABLED),
]


def options(variables) -> list[str]:
    return [word for text in variables for word in ("--variable", text)]


@pytest.mark.parametrize("protocol", ["v9", "mainline"])
@pytest.mark.parametrize("variables, state", STATES)
def test_secure_boot(variables, state, protocol):
    """The state in boot_params follows from SecureBoot, SetupMode and shim's MokSBStateRT."""
    boot = booted("--protocol", protocol, *options(variables))
    assert boot.boot_params[SECURE_BOOT] == state


@pytest.mark.parametrize("variables, state", [STATES[row] for row in (1, 3, 8)])
def test_secure_boot_in_real_code(debian_kernel, variables, state):
    """The stub of a real kernel comes to the same state by the same variables."""
    boot = booted("--kernel", debian_kernel, "--run", "stub", *options(variables))
    assert boot.boot_params[SECURE_BOOT] == state


def test_a_real_kernel_locks_itself_down(command, debian_kernel):
    """6.12 is told by its stub that secure boot is on, and takes the generator's seed."""
    line = "secureboot: Secure boot enabled"
    words = ("--variable", "SecureBoot=01", "--offer", "rng", "--until", line)
    answer = command("boot", "--kernel", debian_kernel, "--run", "kernel", *words)
    assert answer.status == 0
    assert "Kernel is locked down from EFI Secure Boot" in answer.out
    (tables,) = [row for row in answer.out.splitlines() if "efi: ACPI 2.0=" in row]
    assert " RNG=0x" in tables


def test_the_dump_names_the_state(command, tmp_path):
    """``boot --variable SecureBoot=01`` saves boot_params whose dump says enabled."""
    assert command("boot", "--until", "efi-stub", "--variable", "SecureBoot=01", "--save", tmp_path).status == 0
    out = command("dump", "boot-params", tmp_path / "boot_params.bin").out
    (line,) = [line for line in out.splitlines() if " secure_boot " in line]
    assert line.split()[-1] == "enabled"


def test_memory_is_to_be_wiped_if_the_firmware_can():
    """Mainline's stub sets MemoryOverwriteRequestControl if it is there, and does not create it."""
    for words, calls in (((), 0), (("--variable", "MemoryOverwriteRequestControl=00"), 1)):
        boot = booted("--protocol", "mainline", *words)
        events = [record.event for record in boot.trace.records if isinstance(record.event, ServiceCall)]
        found = [event.status for event in events if event.service == "SetVariable"]
        assert found == [0] * calls


# --offer


def accepted(boot: Boot, stage: str) -> int:
    """Bytes that a stage accepted, as the table of ``boot`` has them."""
    return next(row.accepted_bytes for row in summarize(boot.trace.records) if row.stage == stage)


@pytest.mark.parametrize(
    "offers, exits, eager", [("sev-accept", 2, True), ("edkii-accept", 1, False), ("none", 1, False)]
)
def test_v9_does_not_know_the_acceptance_protocol(offers, exits, eager):
    """On firmware that has it, v9 boots eagerly: all memory is accepted at the exit, which takes two calls."""
    boot = Boot(BootConfig(sample_bzimage(), protocol=V9, offers=configured("--offer", offers).offers))
    boot.run()
    statuses = [r.event.status for r in boot.trace.records if getattr(r.event, "service", "") == "ExitBootServices"]
    assert len(statuses) == exits
    assert statuses[-1] == 0
    assert accepted(boot, "efi-stub") == (2 << 30 if eager else 0)
    assert (unaccepted_by_module(boot).total() == 0) is eager
    assert verdict_lines(boot)[-1].startswith("bitmap and Secure EPT agree: ")


def test_mainline_calls_the_acceptance_protocol():
    """It accepts memory itself, also on that firmware."""
    boot = Boot(BootConfig(sample_bzimage(), protocol=MAINLINE, offers=("sev-accept",)))
    boot.run()
    assert accepted(boot, "efi-stub") == 0
    assert unaccepted_by_module(boot).total() > 1 << 30


def test_real_kernels_and_the_acceptance_protocol(debian_kernel, debian_kernel_6_1):
    """6.12 calls it; 6.1 does not know unaccepted memory, and this firmware lets it have all memory."""
    for kernel, eager in ((debian_kernel, False), (debian_kernel_6_1, True)):
        boot = booted("--kernel", kernel, "--run", "stub", "--offer", "sev-accept")
        assert accepted(boot, "efi-stub") == (2 << 30 if eager else 0)
        assert not any("lost" in line for line in verdict_lines(boot))


def test_the_generator_follows_the_seed():
    """With --offer rng the stub installs a seed table, and --seed decides its bytes; without it there is none."""
    seeds = []
    for words in (("--seed", 1), ("--seed", 1), ("--seed", 2)):
        boot = booted("--protocol", "mainline", "--offer", "rng", "--cmdline", "nokaslr", *words)
        calls = [r.event for r in boot.trace.records if getattr(r.event, "service", "") == "GetRNG"]
        assert [call.status for call in calls] == [0]
        seeds.append(boot.physical.read(calls[0].args[3], 32))
    assert seeds[0] == seeds[1] != seeds[2]
    boot = booted("--protocol", "mainline", "--seed", 1)
    assert not [r for r in boot.trace.records if getattr(r.event, "service", "") == "GetRNG"]


def test_an_initrd_that_is_a_file(debian_kernel, file):
    """With --offer initrd-file a real stub, and ours, read the initrd by its name on the command line."""
    path = file("initrd.img", bytes(range(256)) * 5000)
    words = ("--offer", "initrd-file", "--initrd", path, "--cmdline", "nokaslr initrd=initrd", "--protocol", "mainline")
    for more in ((), ("--kernel", debian_kernel, "--run", "stub")):
        boot = booted(*words, *more)
        page = boot.physical.read(boot.machine.regs.rsi, 4096)
        at, size = (int.from_bytes(page[offset : offset + 4], "little") for offset in (0x218, 0x21C))
        assert boot.physical.read(at, size) == path.read_bytes()


def test_offers_that_are_none(refused):
    """An unknown protocol is refused, and those that are known are named."""
    assert "edkii-accept,sev-accept,rng,initrd-file" in refused("boot", "--offer", "rng,tpm")
    assert configured("--offer", "none").offers == ()
    assert configured().offers == ("edkii-accept",)
