"""What the commands of stage runtime do to the guest."""

from __future__ import annotations

import errno
import re

import pytest

from bootstub.protocol import MAINLINE, V9
from kernel.build import KernelBuild
from kernel.events import Allocation, CommandResult, EndlessReclaim, FileRead, FileWrite, OutOfMemory, Taken
from kernel.runtime import Shell, parse_script
from tdx.machine_type import MachineType
from tools.numa import Numa, numa_nodes

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
ACCEPT = "/sys/kernel/mm/page_alloc/accept_memory"


@pytest.fixture
def ran(new_boot):
    """``ran(script, **config)``: the boot and the events of its runtime stage."""

    def run(script: str | None, **config: object):
        boot = new_boot(None, script=None if script is None else tuple(parse_script(script)), **config)
        kinds = (Allocation, FileRead, FileWrite)
        return boot, [r.event for r in boot.trace.records if r.stage == "runtime" and isinstance(r.event, kinds)]

    return run


def unaccepted_kb(event: FileRead) -> int:
    return int(re.search(r"^Unaccepted: +(\d+) kB$", event.text, re.MULTILINE)[1])


def test_default_script(ran):
    """The script of a boot that is given none allocates, accepts and looks."""
    _, events = ran(None)
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["FileRead", "Allocation", "Allocation", "FileWrite", "FileRead", "FileRead"]
    assert unaccepted_kb(events[4]) < unaccepted_kb(events[0])
    assert events[3].result == 4


def test_default_script_of_mainline(ran):
    """Mainline has no file to accept memory by hand, so its default script does not write to it."""
    _, events = ran(None, protocol=MAINLINE)
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["FileRead", "Allocation", "Allocation", "FileRead", "FileRead"]


def test_named_blocks(ran):
    """A free by name gives back the blocks of that name, all or the last ones; other blocks stay."""
    _, events = ran(
        "alloc order 5 x 4 as a\nalloc 5 2\ncat /proc/vmstat\nfree a x 1\ncat /proc/vmstat\n"
        "free a\ncat /proc/vmstat\nfree a\nfree nobody\nfree 5 2\ncat /proc/vmstat\n"
    )
    free = [int(event.text.split()[1]) for event in events if isinstance(event, FileRead)]
    assert [pages - free[0] for pages in free] == [0, 32, 128, 192]


def test_sleep(ran):
    """Virtual time passes, and nothing else happens."""
    short, _ = ran("")
    long, events = ran("sleep 3s\nsleep 5ms\n")
    assert events == []
    assert long.clock.ns - short.clock.ns == 3_005_000_000


def test_allocations_are_touched(ran):
    """What is allocated is written by the guest; the memory was accepted before, or the guest would be dead."""
    boot, events = ran("alloc 10 200\n")
    assert (events[0].count, events[0].wanted) == (200, 200)
    assert events[0].accepted_pages > 0
    assert events[0].accepted_pages % 1024 == 0
    started = next(r.number for r in boot.trace.records if r.stage == "runtime")
    written = [(start, end) for number, start, end in boot.machine.memory.writes if number >= started]
    blocks = [piece for piece in written if piece[1] - piece[0] == 4 * MIB]
    assert len(blocks) == 200
    assert all(boot.sept.mapped(*piece).covers(*piece) for piece in blocks)


def test_allocation_beyond_memory(ran):
    """More blocks than there is memory: fewer come back, nothing unaccepted is left in the zones that gave them."""
    boot, events = ran(
        "alloc 10 1048576\nalloc 10\ncat /proc/meminfo\nfree 10 1048576\ncat /proc/meminfo\n", memory=GIB
    )
    total = sum(zone.managed_pages for zone in boot.kernel.allocator.zones)
    assert 0 < events[0].count < total >> 10
    assert (events[1].count, events[1].wanted) == (0, 1)
    free = [int(event.text.splitlines()[1].split()[1]) for event in events[2:]]
    assert free[1] - free[0] == events[0].count * 4096
    assert free[1] == total * 4


def test_all_memory_of_a_lazy_guest(ran):
    """A guest that allocates everything has accepted everything."""
    boot, events = ran("alloc 10 1048576\ncat /proc/meminfo\n", memory=5 * GIB)
    assert unaccepted_kb(events[1]) == 0
    assert not any(boot.bitmap())
    assert all(boot.sept.mapped(*part).covers(*part) for part in boot.host.ram)


def test_free(ran):
    """Blocks of one order are given back, all of them if more are named; those of other orders stay."""
    boot, events = ran(
        "cat /proc/vmstat\nalloc 3 4\nalloc 0 2\nfree 3 3\ncat /proc/vmstat\n"
        "free 3 100\nfree 3\nfree 5\ncat /proc/vmstat\n"
    )
    free = [int(event.text.split()[1]) for event in events if isinstance(event, FileRead)]
    in_use = boot.kernel.allocator.nr_in_use()
    on_lists = sum(pcp.count for buddy in boot.kernel.allocator.buddies for pcp in buddy.pagesets)
    assert in_use == 2
    assert free[0] - free[2] == in_use + on_lists
    assert free[0] > free[2] == free[1]  # what was freed stays on the CPU's list


@pytest.mark.parametrize("text", ["", "garbage", "4G garbage", "0", "-4M", "4M4M", "0x", "all of it", "9x"])
def test_echo_of_garbage(ran, text):
    """A value that is none is -EINVAL, and nothing is accepted."""
    _, events = ran(f"cat /proc/meminfo\necho {text} > {ACCEPT}\ncat /proc/meminfo\n")
    assert (events[1].text, events[1].result) == (text, -22)
    assert events[0].text == events[2].text


@pytest.mark.parametrize(
    ("text", "kib"), [("1", 4096), ("4M", 4096), ("4194305", 8192), ("0x1000000", 16384), ("64M", 65536)]
)
def test_echo_accepts_in_blocks_of_4_mib(ran, text, kib):
    """The amount is rounded up to whole blocks; the write returns the characters it took, with the line end."""
    _, events = ran(f"cat /proc/meminfo\necho {text} > {ACCEPT}\ncat /proc/meminfo\n")
    assert events[1].result == len(text) + 1
    assert unaccepted_kb(events[0]) - unaccepted_kb(events[2]) == kib


@pytest.mark.parametrize("text", ["all", "1E", "9" * 4400])
def test_echo_all(ran, text):
    """`all`, or more than there is, accepts everything, however long the number."""
    boot, events = ran(f"echo {text} > {ACCEPT}\ncat /proc/vmstat\n")
    assert events[0].result == len(text) + 1
    assert "nr_unaccepted 0" in events[1].text.splitlines()
    assert not any(boot.bitmap())


def test_watermarks_are_set_first(ran):
    """The stage begins with the watermarks, which every allocation then respects."""
    boot, _ = ran("")
    assert all(zone.watermark.min > 0 for zone in boot.kernel.allocator.zones if zone.populated)
    boot, _ = ran("", memory=256 * MIB)  # too small for transparent huge pages: khugepaged does not raise them
    assert 0 < sum(zone.watermark.min for zone in boot.kernel.allocator.zones) < 1000


def test_runtime_before_mm_init(new_boot):
    """A stage out of order is wrong use of ours."""
    with pytest.raises(ValueError, match="runtime before mm-init"):
        Shell(new_boot("setup-arch").kernel, lambda start, end: None)


@pytest.mark.parametrize("words", ["on cpu 1 alloc 0 100", "alloc order 0 x 100 node 1", "on cpu 0 alloc 0 100 node 1"])
def test_memory_of_the_right_node(ran, words):
    """A CPU allocates from its own node, or from the one that is asked for; the other keeps what it has."""
    nodes = numa_nodes(Numa(count=2), MachineType().ram(4 * GIB))
    cat = "cat /sys/devices/system/node/node{}/meminfo\n"
    boot, events = ran(f"{words}\n{cat.format(0)}{cat.format(1)}", nodes=nodes, cpus=2)
    used = [int(re.search(r"MemUsed: +(\d+) kB", event.text)[1]) for event in events if isinstance(event, FileRead)]
    assert (used[0], used[1] >= 400) == (0, True)
    counters = boot.kernel.allocator.buddies[-1]
    assert (counters.numa_local if words.startswith("on cpu 1") else counters.numa_other) > 0


def taken(boot) -> list[object]:
    kinds = (Taken, OutOfMemory, EndlessReclaim, CommandResult)
    return [r.event for r in boot.trace.records if isinstance(r.event, kinds)]


def test_endless_reclaim(ran):
    """On a node whose memory waits to be accepted v9's kswapd reclaims the same cache for ever.

    Mainline's takes unaccepted memory for free, and goes back to sleep.
    """
    nodes = numa_nodes(Numa(count=2), MachineType().ram(8 * GIB))
    script = "on cpu 1 cache 100M in-use\nkswapd 1\nkswapd 0\n"
    for protocol in (V9, MAINLINE):
        boot, _ = ran(script, nodes=nodes, cpus=2, memory=8 * GIB, protocol=protocol)
        cache, *rest = taken(boot)
        assert (cache.who, cache.pages, cache.killed) == ("cache", 25_600, False)
        endless = [event for event in rest if isinstance(event, EndlessReclaim)]
        assert [(e.who, e.reclaimed) for e in endless] == ([("kswapd1", 32_000)] if protocol is V9 else [])
        assert all(event.unaccepted_pages > 900_000 for event in endless)


@pytest.mark.parametrize("protocol", [V9, MAINLINE], ids=lambda protocol: protocol.name)
def test_out_of_memory(ran, protocol):
    """The page cache goes first, then the largest process; nobody is killed while memory is left to accept."""
    script = "cache 16M\nrun small 16M\nrun large 900M\ncat /proc/vmstat\ncat /proc/meminfo\nexit small\nexit large\n"
    boot, events = ran(script, memory=384 * MIB, machine=MachineType(max_ram_below_4g=256 * MIB), protocol=protocol)
    _, small, kill, large, *exits = taken(boot)
    assert (small.pages, small.killed) == (4096, False)
    assert (kill.victim, kill.unaccepted_pages) == ("large", 0)
    assert large.killed
    assert 0 < large.pages < large.wanted
    assert [event.result for event in exits] == [0, -errno.ESRCH]
    vmstat, meminfo = (dict(line.split()[:2] for line in e.text.splitlines()) for e in events if hasattr(e, "path"))
    assert vmstat["oom_kill"] == "1"
    assert int(vmstat["pgsteal_file"]) == int(vmstat["pgsteal_kswapd"]) + int(vmstat["pgsteal_direct"]) > 0
    assert int(meminfo["AnonPages:"]) == 16 * 1024 == 4 * int(vmstat["nr_anon_pages"])
    assert meminfo["Cached:"] == meminfo["Inactive(file):"] == str(4 * int(vmstat["nr_zone_inactive_file"]))
    assert boot.kernel.allocator.nr_in_use() == int(vmstat["nr_file_pages"])


@pytest.mark.parametrize(
    ("protocol", "build", "killed"),
    [(V9, KernelBuild(), False), (MAINLINE, KernelBuild(), False), (MAINLINE, KernelBuild(early_accept=False), True)],
    ids=["v9", "mainline", "mainline without the fix"],
)
def test_premature_out_of_memory(ran, protocol, build, killed):
    """Before the first initcalls, while watermarks are 0, "enough" was always true: a process died of it."""
    script = "run early 200M\ncat /proc/zoneinfo\ninitcalls\ncat /proc/zoneinfo\nexit early\nrun late 200M\n"
    machine = MachineType(max_ram_below_4g=256 * MIB)
    boot, events = ran(script, protocol=protocol, build=build, memory=512 * MIB, machine=machine)
    kills = [event for event in taken(boot) if isinstance(event, OutOfMemory)]
    early, late = (event for event in taken(boot) if isinstance(event, Taken))
    assert (early.killed, late.killed) == (killed, False)
    assert [kill.unaccepted_pages > 50_000 for kill in kills] == [True] * killed
    highs = [re.findall(r"^        high +(\d+)$", event.text, re.MULTILINE) for event in events]
    assert set(highs[0]) == {"0"}
    assert "0" not in highs[1][:3]


def test_initcalls_come_once_and_first(ran):
    """Without the line the watermarks are there from the start; a second line does nothing."""
    before, after = (ran(f"{lines}cat /proc/zoneinfo\n")[1] for lines in ("", "initcalls\ninitcalls\n"))
    assert before == after != []


def test_processes_on_cpus(ran):
    """CPUs of two nodes take memory of their own nodes side by side."""
    nodes = numa_nodes(Numa(count=2), MachineType().ram(4 * GIB))
    boot, events = ran("on cpus 0-1 run a 32M\non cpus 0-1 cache 8M\ncat /proc/zoneinfo\n", nodes=nodes, cpus=2)
    assert [(event.who, event.pages, event.wanted) for event in taken(boot)] == [
        ("run a", 16384, 16384), ("cache", 4096, 4096)
    ]  # fmt: skip
    text = next(event.text for event in events if isinstance(event, FileRead))
    assert re.findall(r"nr_anon_pages (\d+)", text) == ["8192", "8192"]
    assert re.findall(r"nr_inactive_file (\d+)", text) == ["2048", "2048"]
