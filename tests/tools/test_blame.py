"""Who wrote a field of boot_params: ``dump boot-params --blame`` and ``who`` of ``step``."""

from __future__ import annotations

import json

import pytest

from bootstub.protocol import PROTOCOLS
from bootstub.sample_kernel import sample_bzimage
from tools.pipeline import Boot, BootConfig

FIELDS = {
    "unaccepted_memory": "bootstub.unaccepted_memory.BitmapOfStub.allocate",
    "efi_info.efi_memmap_size": "bootstub.exit_boot.ExitBoot._record_memmap",
    "alt_mem_k": "bootstub.exit_boot.ExitBoot.run",
    "e820_entries": "bootstub.exit_boot.ExitBoot._store",
    "e820_table[0]": "bootstub.exit_boot.ExitBoot._store",
    "secure_boot": "bootstub.classic_stub.classic_stub",
    "hdr.header": "bootstub.classic_stub._copy_setup_header",
    "hdr.cmd_line_ptr": "bootstub.stub.Stub.convert_command_line",
    "screen_info.lfb_base": "bootstub.stub.Stub.__init__",
    "sentinel": "bootstub.stub.Stub.__init__",
}


@pytest.fixture
def blamed(command):
    """``blamed(source)``: the author of each field."""

    def run(source: object) -> dict[str, str]:
        answer = command("dump", "boot-params", source, "--blame", "--json")
        assert (answer.status, answer.err) == (0, "")
        return {name: field["author"] for name, field in json.loads(answer.out)["fields"].items()}

    return run


def test_author_of_each_field(blamed):
    """Each field of a boot has an author, which is the function that a reader finds in the sources."""
    found = blamed("td:4G")
    assert all(found.values())
    assert {name: found[name].split()[1] for name in FIELDS} == FIELDS
    assert {author.split()[0] for author in found.values()} == {"efi-stub"}


def test_saved_and_described_boots(command, blamed, file, tmp_path):
    """A saved boot and a TOML file give the same answer as the boot itself."""
    command("boot", "--save", tmp_path / "saved")
    config = file("boot.toml", 'memory = "4G"\n')
    assert blamed(tmp_path / "saved") == blamed(config) == blamed("td:4G")


def test_event(blamed):
    """The number is that of the event that came next: the calls of ExitBootServices part the fields."""
    boot = Boot(BootConfig(sample_bzimage()))
    boot.run("efi-stub")
    (exit_at,) = (r.number for r in boot.trace.records if getattr(r.event, "service", "") == "ExitBootServices")
    numbers = {name: int(author.split("#")[1]) for name, author in blamed("td:4G").items()}
    assert numbers["efi_info.efi_memmap"] == exit_at
    assert numbers["alt_mem_k"] > exit_at > numbers["unaccepted_memory"] > numbers["sentinel"]


def test_text(command):
    """The author stands behind the value; without --blame the same source is shown as ever."""
    answer = command("dump", "boot-params", "td:4G", "--blame")
    (line,) = [line for line in answer.out.splitlines() if line.startswith("0x078 unaccepted_memory")]
    assert "bitmap, 1 bit = 2 MiB" in line
    assert line.split("  ")[-1].strip().startswith("efi-stub bootstub.unaccepted_memory.BitmapOfStub.allocate #")
    plain = command("dump", "boot-params", "td:4G").out.splitlines()
    assert len(plain) == len(answer.out.splitlines())
    assert "bootstub" not in "".join(plain)


def test_no_journal(refused, command, file):
    """A page alone has no authors; --blame goes with text and JSON only."""
    path = file("page", bytes(4096))
    assert "--blame: found no journal" in refused("dump", "boot-params", path, "--blame")
    assert command("dump", "boot-params", path, "--blame", "--hex").status == 2
    assert command("dump", "boot-params", path).status == 0


def test_boot_that_does_not_get_there(refused):
    """A guest that dies before its stub is done has no boot_params, and the error says how it died."""
    assert "expected a boot that came through stage efi-stub" in refused("dump", "boot-params", "td:16M", "--blame")


def test_journal_costs_nothing_of_the_boot():
    """With the journal a boot does the same, and every range that a stage wrote is in it."""
    for protocol in PROTOCOLS.values():
        plain, kept = (Boot(BootConfig(sample_bzimage(), protocol=protocol)) for _ in range(2))
        journal = kept.keep_journal()
        assert kept.keep_journal() is journal
        plain.run()
        kept.run()
        assert plain.journal is None
        assert plain.trace.records == kept.trace.records
        assert all(any(w.start <= s and e <= w.end for w in journal.writes) for _, s, e in kept.machine.memory.writes)


def test_real_code(blamed, file, debian_kernel):
    """Of a real stub's fields the author is the address of the instruction; bytes of ours keep our names."""
    config = file("real.toml", f'kernel = "{debian_kernel}"\nrun = "stub"\n')
    found = blamed(config)
    places = {name: int(found[name].split(" at ")[1].split()[0], 16) for name in (*FIELDS, "efi_info.efi_memmap")}
    places.pop("unaccepted_memory")  # that of the cleared page
    assert all(found[name].startswith("efi-stub real code at 0x") for name in found)
    assert len({places[name] for name in ("efi_info.efi_memmap", "efi_info.efi_memmap_size", "e820_entries")}) == 3
    assert max(places.values()) - min(places.values()) < 1 << 20


@pytest.fixture
def asked(command, file):
    """``asked(question, stages)``: the answer of ``who`` after so many stages."""

    def run(question: str, stages: int) -> list[str]:
        answer = command("step", "--commands", file("commands", "step\n" * stages + f"who {question}\n"))
        return (answer.out + answer.err).splitlines()

    return run


def test_who(asked):
    """The last writer of a byte, what it wrote with it, and the event that came next."""
    *_, line, event = asked("boot_params+0x78", 3)
    assert "efi-stub bootstub.unaccepted_memory.BitmapOfStub.allocate #" in line
    number = line.split("#")[1].split(",")[0]
    assert event.strip().startswith(f"then #{number} efi-stub")
    assert "unaccepted memory bitmap at" in event
    assert asked("boot_params.unaccepted_memory", 3)[-2:] == [line, event]


def test_who_of_other_memory(asked):
    """Pages that the host added, that the module zeroed, and that nobody touched."""
    assert "host tdx.vmm.Host.page_add #" in asked("0x800000", 1)[-2]
    assert "firmware tdx.page_accept.PageAccept._zero #" in asked("0x3000000", 2)[-2]
    assert asked("0x17fe00000", 3)[-1].endswith("nobody wrote it")


@pytest.mark.parametrize("question", ["", "nowhere", "boot_params+0x78", "boot_params.hdr", "-1", "0x10000000000000"])
def test_who_of_nothing(asked, question):
    """An address that is none is refused, and boot_params before there are any."""
    assert asked(question, 1)[-1].startswith("unaccepted: error: who: found ")
