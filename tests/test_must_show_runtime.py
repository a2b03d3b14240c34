"""What the kernel at run time promises as a whole: memory of 64 GiB adds up, to the page."""

from __future__ import annotations

import pytest

from bootstub.protocol import MAINLINE, V9
from bootstub.sample_kernel import sample_bzimage
from guest.ranges import RangeSet
from guest.units import PAGE_SHIFT, PAGE_SIZE, PFN_PHYS, PMD_SIZE, SZ_1G, SZ_4M
from kernel.events import FileRead, FileWrite
from kernel.runtime import parse_script
from tools.pipeline import Boot, BootConfig

ACCEPT = "/sys/kernel/mm/page_alloc/accept_memory"
RAM = 64 * SZ_1G


def booted(script: str = "cat /proc/meminfo\n", cmdline: str = "", **config: object) -> Boot:
    commands = tuple(parse_script(script))
    boot = Boot(BootConfig(sample_bzimage(), memory=RAM, script=commands, cmdline=cmdline, **config))  # type: ignore[arg-type]
    boot.run()
    return boot


def unaccepted_kb(boot: Boot) -> list[int]:
    reads = [r.event.text for r in boot.trace.records if isinstance(r.event, FileRead)]
    return [int(line.split()[1]) for text in reads for line in text.splitlines() if line.startswith("Unaccepted:")]


def waiting(boot: Boot) -> RangeSet:
    """Memory on the lists of unaccepted blocks."""
    assert boot.kernel is not None and boot.kernel.allocator is not None
    return RangeSet(
        (PFN_PHYS(start), PFN_PHYS(end))
        for zone in boot.kernel.allocator.zones
        for start, end in zone.unaccepted_pages.runs()
    )


def accepted_ram(boot: Boot) -> RangeSet:
    """RAM that the TDX module has as accepted; its pages of the firmware's image are no RAM."""
    mapped = boot.sept.mapped()
    return RangeSet(part for start, end in boot.host.ram for part in mapped.within(start, end))


@pytest.mark.parametrize("protocol", [V9, MAINLINE], ids=lambda protocol: protocol.name)
@pytest.mark.parametrize("script", ["cat /proc/meminfo\n", "alloc 9 2000\nalloc 0 5\ncat /proc/meminfo\n"])
def test_unaccepted_and_accepted_are_all_of_ram(protocol: object, script: str) -> None:
    """Unaccepted: and what the module calls accepted make up RAM, but for the guards: each 2 MiB of a waiting block."""
    boot = booted(script, protocol=protocol)
    listed, accepted = waiting(boot), accepted_ram(boot)
    (kb,) = unaccepted_kb(boot)
    assert kb == listed.total() >> 10
    guards = RangeSet(part for start, end in listed for part in accepted.within(start, end))
    assert listed.total() + accepted.total() - guards.total() == boot.host.ram.total() == RAM
    assert all(boot.host.ram.covers(start, end) for start, end in listed)
    assert guards.total() <= PMD_SIZE * len(list(listed))
    for start, end in guards:
        assert end - start == PMD_SIZE
        assert start - PAGE_SIZE in accepted
    assert kb > 50 << 20


def test_eager_leaves_nothing_unaccepted() -> None:
    """accept_memory=eager: the counter is 0 and the module has all RAM as accepted."""
    boot = booted(cmdline="accept_memory=eager")
    assert unaccepted_kb(boot) == [0]
    assert accepted_ram(boot) == boot.host.ram


@pytest.mark.parametrize(
    ("text", "result", "accepted_kb"),
    [
        ("1", 2, SZ_4M >> 10),
        ("4096K", 6, SZ_4M >> 10),
        ("1G", 3, SZ_1G >> 10),
        ("all", 4, None),
        ("garbage", -22, 0),
        ("0", -22, 0),
    ],
)
def test_accept_memory(text: str, result: int, accepted_kb: int | None) -> None:
    """The handle takes what v9 takes, rounds up to blocks of 4 MiB, and refuses the rest with -EINVAL."""
    boot = booted(f"cat /proc/meminfo\necho {text} > {ACCEPT}\ncat /proc/meminfo\n")
    before, after = unaccepted_kb(boot)
    assert [r.event.result for r in boot.trace.records if isinstance(r.event, FileWrite)] == [result]
    assert before - after == (before if accepted_kb is None else accepted_kb)
    assert after << 10 >> PAGE_SHIFT == sum(zone.nr_unaccepted for zone in boot.kernel.allocator.zones)  # type: ignore[union-attr]
