"""What v9 does under each fault, in its own words; and what the sanitizer says at stage borders."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from bootstub.sample_kernel import sample_bzimage
from guest.bitmap import GuestBitmap
from guest.errors import BootError, GuestPanic, MemoryFault, Violation
from guest.units import PMD_SIZE, SZ_4G
from tdx.events import FaultInjected, TdCall
from tdx.faults import KINDS, parse_rule
from tdx.sanitizer import AcceptanceRule
from tools.pipeline import STAGES, Boot, BootConfig
from tools.verdict import finding_lines, verdict_lines

KERNEL = sample_bzimage()
TOP = "0x17fe00000-0x180000000"
"""The highest 2 MiB of a 4 GiB guest, where the kernel accepts first."""


def hostile(*rules: str, **how: object) -> tuple[Boot, BootError | None]:
    """A boot under those faults, and what ended it."""
    boot = Boot(BootConfig(KERNEL, faults=tuple(map(parse_rule, rules)), **how))
    try:
        boot.run()
    except BootError as error:
        return boot, error
    return boot, None


STOPS = {
    "busy@stage=firmware": (GuestPanic, "firmware: Accept memory failed: 0x0 - 0x800000", 2),
    "busy@stage=setup-arch": (GuestPanic, f"setup-arch: Accepting memory failed: {TOP}", 513),
    "withhold@stage=firmware": (MemoryFault, "accept of 2097152 bytes at 0x0 .*the host does not resolve it", 1),
    "withhold@stage=mm-init": (MemoryFault, "mm-init: accept of 2097152 bytes", 1),
    "replay@stage=setup-arch": (MemoryFault, "setup-arch: write of .* touched page 0x17ffff000: found PENDING", 1),
    "remove@stage=setup-arch": (MemoryFault, "setup-arch: write of .* touched page 0x17ffff000: found FREE", 1),
    "block@stage=setup-arch": (MemoryFault, "0x17ffff000: found BLOCKED.*the host does not resolve it", 1),
    "mapgpa-refuse@mapgpa=1": (GuestPanic, f"setup-arch: Accepting memory failed: {TOP}", 1),
    "mapgpa-retry@mapgpa=1": (GuestPanic, f"setup-arch: Accepting memory failed: {TOP}", 1),
    "mapgpa-stuck@stage=runtime": (GuestPanic, "runtime: Accepting memory failed: 0x", 1),
    "status@tdvmcall=2": (GuestPanic, "mm-init: Accepting memory failed: 0x", 1),
    "hob-stale@gpa=0-4G": (MemoryFault, "firmware: write of 704 bytes at .* found FREE", 0),
    "hob-accepted": (GuestPanic, "firmware: Accept memory failed: 0x800000 - 0x806000", 0),
    "hob-overlap@gpa=0-4G": (GuestPanic, "firmware: Accept memory failed: 0x400000 - 0x800000", 0),
    "hob-more@gpa=0-4G": (MemoryFault, "firmware: accept of 2097152 bytes at 0x80000000 .* no RAM", 0),
    "hob-more@gpa=4G-8G": (MemoryFault, "setup-arch: accept of 2097152 bytes at 0x1bfe00000 .* no RAM", 0),
}
"""Rule; how the boot ends, in which words, and after how many accepts that the rule must meet to make it so."""


@pytest.mark.parametrize("rule", STOPS)
def test_faults_that_stop_the_guest(rule):
    """The guest stops with the kernel's or the firmware's own words, or the TDX module ends it."""
    kind, text, times = STOPS[rule]
    boot, death = hostile(f"{rule},n={times}" if times > 1 else rule)
    assert type(death) is kind
    assert re.search(text, str(death))
    if times:
        assert {e.event.kind for e in boot.trace.records if isinstance(e.event, FaultInjected)} == {rule.split("@")[0]}


@pytest.mark.parametrize(
    ("rule", "findings", "lost_kib"),
    [
        ("busy@stage=firmware,n=1", 0, 0),
        ("busy@stage=setup-arch", 0, 0),
        ("size-mismatch@stage=mm-init,n=3", 0, 0),
        ("interrupt@stage=firmware,n=9", 0, 0),
        ("interrupt-block@stage=runtime,n=9", 0, 0),
        ("block-unblock@p=0.05,seed=3", 0, 0),
        ("mapgpa-partial@p=1", 0, 0),
        ("registers@p=1", 0, 0),
        ("hob-overlap@gpa=4G-8G", 0, 0),
        ("hob-less@gpa=4G-8G", 0, 1 << 20),
        ("hob-stale@gpa=4G-8G", 0, 2 << 20),
    ],
)
def test_faults_that_the_guest_gets_over(rule, findings, lost_kib):
    """The guest goes on: with smaller pages, with what registers it does not look at, or with less memory."""
    boot, death = hostile(rule)
    assert death is None
    assert len(finding_lines(boot)) == findings
    lost = [line for line in verdict_lines(boot) if line.startswith("lost: ")]
    assert lost == ([f"lost: {lost_kib} KiB of unaccepted memory are not in the kernel's e820 table"] * bool(lost_kib))


def test_every_kind_of_fault_is_tried_here():
    """There is no fault whose effect on v9 is not told above."""
    told = set(STOPS) | {"size-mismatch", "interrupt", "interrupt-block", "block-unblock", "mapgpa-partial"}
    told |= {"registers", "hob-less"}
    assert {rule.split("@")[0] for rule in told} == set(KINDS)


def test_a_refused_large_page_is_accepted_in_small_ones():
    """After one BUSY the kernel goes on with 512 accepts of 4 KiB, and every page is accepted once."""
    boot, _ = hostile("busy@stage=setup-arch")
    accepts = [r.event for r in boot.trace.records if r.stage == "setup-arch" and isinstance(r.event, TdCall)]
    assert [(e.rcx & 7, e.count) for e in accepts if "ACCEPT" in e.leaf][-2:] == [(1, 1), (0, 512)]


def test_replay_needs_two_lies():
    """Removed memory is accepted again only if the HOB list names it twice; then nothing but the sanitizer tells."""
    rules = "hob-overlap@gpa=0-4M", "replay@gpa=4M-8M,n=2"
    boot, death = hostile(*rules)
    assert death is None
    lines = finding_lines(boot)
    assert "firmware: event #" in lines[0]
    assert "replay attack: page accepted twice at [0x400000, 0x800000)" in lines[0]
    boot, death = hostile(*rules, sanitize="error")
    assert isinstance(death, Violation)
    assert death.rule == AcceptanceRule.REPLAY


def broken(stage: str, extra: Callable[[Boot], None], **how: object) -> Boot:
    """A boot with a stage that does ``extra`` at its end."""
    boot = Boot(BootConfig(KERNEL, script=(), **how))

    def run(boot: Boot) -> None:
        STAGES[stage](boot)
        extra(boot)

    boot.stages = boot.stages | {stage: run}
    return boot


def bitmap_of(boot: Boot) -> GuestBitmap:
    assert boot.boot_params is not None
    at = int.from_bytes(boot.boot_params[0x78:0x80], "little")
    return GuestBitmap(boot.machine.memory, at)


@pytest.mark.parametrize(
    ("change", "rule", "bit"),
    [
        (lambda bits: bits.clear(2100, 2101), AcceptanceRule.BIT_CLEAR, 2100),
        (lambda bits: bits.set(3, 4), AcceptanceRule.BIT_SET, 3),
    ],
    ids=["clear", "set"],
)
def test_bitmap_and_memory_disagree(change, rule, bit):
    """A bit that is not true is found at the border of the stage that left it so, with its address."""
    boot = broken("efi-stub", lambda boot: change(bitmap_of(boot)), sanitize="error")
    with pytest.raises(Violation) as caught:
        boot.run()
    assert (caught.value.rule, caught.value.stage) == (rule, "efi-stub")
    assert f"[{bit * PMD_SIZE:#x}, {(bit + 1) * PMD_SIZE:#x})" in str(caught.value)


def test_an_access_without_an_accept():
    """A decompressor that writes above 4 GiB and has accepted nothing dies, and the sanitizer names the access."""
    boot = broken("decompress", lambda boot: boot.machine.memory.clear(SZ_4G, SZ_4G + 64))
    with pytest.raises(MemoryFault):
        boot.run()
    assert [line.split(" at ")[0].split(": ")[-1] for line in finding_lines(boot)] == [AcceptanceRule.ACCESS]


def test_off_and_warn():
    """Without a sanitizer nothing is found; with warnings the boot goes on and finds it at each border."""
    off = broken("efi-stub", lambda boot: bitmap_of(boot).set(3, 4), sanitize="off")
    off.run()
    assert finding_lines(off) == []
    warned = broken("efi-stub", lambda boot: bitmap_of(boot).set(3, 4))
    warned.run("mm-init")
    assert [line.split()[1] for line in finding_lines(warned)] == [
        "efi-stub:",
        "decompress:",
        "setup-arch:",
        "mm-init:",
    ]


@pytest.mark.parametrize("memory", [SZ_4G, 64 << 30, 4097 << 20, 67000 << 20, 3 << 30])
@pytest.mark.parametrize("host", [{}, {"host_level": 0}, {"host_ahead": True}], ids=["2M", "4K", "ahead"])
def test_a_sound_boot_has_no_finding(memory, host):
    """The default boot passes the strict sanitizer, in every size and on every host."""
    if memory > 8 << 30 and host.get("host_level") == 0:
        host = host | {"script": ()}
    boot = Boot(BootConfig(KERNEL, memory, sanitize="error", **host))
    boot.run()
    assert finding_lines(boot) == []
