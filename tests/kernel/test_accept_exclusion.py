"""CPUs that accept memory side by side: nobody accepts a unit twice, unless a test takes the protection out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstub.protocol import MAINLINE, V9
from guest.clock import VirtualClock
from guest.errors import GuestPanic
from guest.ranges import RangeSet
from guest.units import PMD_SIZE, SZ_1G
from kernel.accept_exclusion import BitmapSpinlock, NoExclusion, RangesInFlight
from kernel.build import KernelBuild
from kernel.cpus import Cpus
from kernel.runtime import parse_script
from kernel.unaccepted_memory import UnacceptedMemory
from tdx.sanitizer import AcceptanceRule
from tools.verdict import finding_lines, verdict_lines

UNITS = 64
KINDS = {
    "v9": lambda cpus: BitmapSpinlock(cpus, queued=False),
    "v9 queued": lambda cpus: BitmapSpinlock(cpus, queued=True),
    "mainline": RangesInFlight,
}


class Guest:
    """Some CPUs over a bitmap of unaccepted units; an accept takes a nanosecond a unit."""

    def __init__(self, bitmap, count, seed, exclusion):
        self.clock = VirtualClock()
        self.cpus = Cpus(count, self.clock, seed, GuestPanic)
        self.bitmap, self.accepted, self.twice = bitmap, RangeSet(), 0
        bitmap.set(0, UNITS)
        self.memory = UnacceptedMemory(bitmap, self._accept)
        self.memory.exclusion = exclusion(self.cpus)

    def _accept(self, start, end):
        self.twice += self.accepted.overlaps(start, end)
        self.accepted.add(start, end)
        self.clock.advance((end - start) // PMD_SIZE)

    def run(self, requests, look=True):
        """Each CPU accepts the unit ranges of its list, and must find each accepted when it is done."""

        def job(cpu):
            for first, last in requests[cpu.number]:
                self.cpus.cond_resched()
                self.memory.accept_memory(first * PMD_SIZE, last * PMD_SIZE)
                assert not look or not self.bitmap.any(first, min(last + 1, UNITS))
                assert self.accepted.covers(first * PMD_SIZE, last * PMD_SIZE)

        self.cpus.run((cpu, job) for cpu in self.cpus.all)


ranges = st.tuples(st.integers(0, UNITS - 2), st.integers(1, 8)).map(lambda r: (r[0], min(r[0] + r[1], UNITS - 1)))
requests = st.lists(st.lists(ranges, max_size=5), min_size=2, max_size=5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_unit_is_accepted_twice(kind, new_bitmap):
    """Whatever the CPUs ask for and whoever goes first: every unit once, and it is accepted when the call returns."""

    @given(requests, st.integers(0, 1000))
    @settings(max_examples=60)
    def check(wanted, seed):
        guest = Guest(new_bitmap(), len(wanted), seed, KINDS[kind])
        guest.run(wanted)
        assert guest.twice == 0
        union = RangeSet((first * PMD_SIZE, (last + 1) * PMD_SIZE) for rs in wanted for first, last in rs)
        assert guest.accepted == union
        assert sum(cpu.times.accepts for cpu in guest.cpus.all) == sum(map(len, wanted))

    check()


def test_without_exclusion_the_guard_is_accepted_twice(new_bitmap):
    """Neighbouring blocks share the first unit of the upper one: it is the lower one's guard."""
    guest = Guest(new_bitmap(), 2, 0, NoExclusion)
    guest.run([[(0, 2)], [(2, 4)]], look=False)
    assert guest.twice == 1
    assert guest.accepted == RangeSet([(0, 5 * PMD_SIZE)])


def test_v9_waits_for_others_memory(new_bitmap):
    """Under v9's lock a CPU waits for accepts that have nothing to do with its own; with interrupts off."""
    guest = Guest(new_bitmap(), 4, 0, KINDS["v9 queued"])
    guest.run([[(16 * n, 16 * n + 7)] for n in range(4)])
    times = [cpu.times for cpu in guest.cpus.all]
    assert guest.clock.ns == 4 * 8
    assert sorted(t.waited_ns for t in times) == [0, 8, 16, 24]
    assert sorted(t.irqs_off_ns for t in times) == [8, 16, 24, 32]


def test_mainline_does_not_wait_for_others_memory(new_bitmap):
    """Ranges that do not overlap are accepted side by side, neighbours too; those that do wait."""
    apart = Guest(new_bitmap(), 4, 0, KINDS["mainline"])
    apart.run([[(8 * n, 8 * n + 7)] for n in range(4)])  # with their guards: [0, 8), [8, 16), ...
    assert apart.clock.ns == 8
    assert all(cpu.times.waits == 0 for cpu in apart.cpus.all)
    together = Guest(new_bitmap(), 2, 0, KINDS["mainline"])
    together.run([[(0, 8)], [(8, 15)]])  # the guard of the first is the second's
    assert sum(cpu.times.waits for cpu in together.cpus.all) == 1
    assert together.clock.ns == 16


def test_mainline_before_its_fixes(new_bitmap):
    """At first a range that begins where another one ends waited for it; those behind it never did."""
    seeds = [Guest(new_bitmap(), 2, seed, lambda cpus: RangesInFlight(cpus, exact=False)) for seed in range(8)]
    for guest in seeds:
        guest.run([[(8, 15)], [(16, 23)]])
    assert {guest.clock.ns for guest in seeds} == {8, 16}  # whether the lower range goes first is the seed's choice


SCRIPT = "echo 1 > /proc/sys/kernel/watchdog_thresh\non cpus 0-15 alloc order 9 x 8 as a\non cpus 0-15 free a x 4\n"


@pytest.mark.parametrize("protocol", [V9, MAINLINE], ids=lambda protocol: protocol.name)
def test_sixteen_cpus_of_a_whole_guest(new_boot, protocol):
    """A strict sanitizer finds nothing; v9 waits far longer and with interrupts off; the same seed, the same trace."""
    config = {"script": tuple(parse_script(SCRIPT)), "memory": 8 * SZ_1G, "protocol": protocol, "cpus": 16}
    boot, again = (new_boot(None, sanitize="error", seed=5, **config) for _ in range(2))
    assert boot.trace.records == again.trace.records
    assert len(boot.shell.cpus.all) == 16
    assert finding_lines(boot) == []
    times = [cpu.times for cpu in boot.shell.cpus.all]
    waited = sum(t.waited_ns for t in times)
    assert sum(t.accepts for t in times) > 16
    assert (waited > 100_000_000) == (protocol is V9)
    assert (max(t.irqs_off_ns for t in times) > 1_000_000) == (protocol is V9)


@pytest.mark.parametrize("protocol", [V9, MAINLINE], ids=lambda protocol: protocol.name)
def test_double_accept_is_found(new_boot, protocol):
    """Without the lock or the list two CPUs accept the same 2 MiB: the module refuses, the guest stops, and we know."""
    script = tuple(parse_script(SCRIPT))
    boots = []
    with pytest.raises(GuestPanic, match="ccept"):
        boot = new_boot("mm-init", script=script, memory=8 * SZ_1G, protocol=protocol, cpus=16,
                        build=KernelBuild(accept_exclusion=False))  # fmt: skip
        boots.append(boot)
        boot.run()
    found = finding_lines(boots[0])
    assert any(AcceptanceRule.AGAIN.value in line for line in found)


@pytest.mark.parametrize("protocol", [V9, MAINLINE], ids=lambda protocol: protocol.name)
def test_soft_lockups(new_boot, protocol):
    """64 CPUs on 4 KiB pages, and a threshold of one second: v9's watchdog barks, mainline's does not."""
    script = "echo 1 > /proc/sys/kernel/watchdog_thresh\non cpus 0-63 alloc order 9 x 16\n"
    boot = new_boot(
        None, script=tuple(parse_script(script)), memory=16 * SZ_1G, protocol=protocol, cpus=64, host_level=0
    )
    lockups = sum(cpu.times.soft_lockups for cpu in boot.shell.cpus.all)
    assert (lockups > 0) == (protocol is V9)


def random_script(rng, cpus):
    """Allocations and frees on some CPUs, side by side, and acceptance by hand."""
    lines = ["echo 1000 > /proc/sys/vm/min_free_kbytes"]
    for number in range(8):
        low, high = sorted(rng.choices(range(cpus), k=2))
        lines.append(
            f"on cpus {low}-{high} alloc order {rng.choice([0, 3, 9, 10])} x {rng.randrange(1, 40)} as b{number}"
        )
        if rng.random() < 0.5:
            lines.append(f"on cpus {low}-{high} free b{rng.randrange(number + 1)} x {rng.randrange(1, 30)}")
        if rng.random() < 0.3:
            lines.append("echo 32M > /sys/kernel/mm/page_alloc/accept_memory")
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(6))
def test_random_work_of_whole_guests(new_boot, seed):
    """A strict sanitizer finds nothing, no page is given out twice, bitmap and module agree, counters add up."""
    rng = random.Random(seed)
    cpus, protocol = rng.randrange(2, 9), (V9, MAINLINE)[seed % 2]
    script = tuple(parse_script(random_script(rng, cpus)))
    memory = 4 * SZ_1G + rng.randrange(4) * SZ_1G // 2
    boot = new_boot(None, script=script, cpus=cpus, protocol=protocol, memory=memory, sanitize="error", seed=seed)
    assert finding_lines(boot) == []
    assert any(line.startswith("bitmap and Secure EPT agree") for line in verdict_lines(boot))
    given = [(pfn, pfn + (1 << order)) for blocks in boot.shell.blocks.values() for pfn, order in blocks]
    assert RangeSet(given).total() == sum(end - start for start, end in given) > 0
    for zone in boot.kernel.allocator.zones:
        free = sum(end - start for order in range(11) for start, end in zone.free_area.blocks(order))
        assert zone.nr_free_pages == free + zone.nr_unaccepted
