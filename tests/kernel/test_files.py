"""Files of /proc and /sys: what they show, what they take, and what is not there."""

from __future__ import annotations

import re

import pytest

from bootstub.protocol import MAINLINE, V9
from guest.units import SZ_4G
from kernel.events import CommandResult, FileRead, FileWrite
from kernel.files import is_file, is_writable
from kernel.runtime import parse_script
from kernel.watermark import zone_wmarks
from tdx.machine_type import MachineType
from tools.numa import numa_nodes, parse_numa

MIN, SCALE = "/proc/sys/vm/min_free_kbytes", "/proc/sys/vm/watermark_scale_factor"
ACCEPT = "/sys/kernel/mm/page_alloc/accept_memory"
CPU = "/sys/devices/system/cpu"
EACCES, ENOENT, EINVAL, EOPNOTSUPP = -13, -2, -22, -95


@pytest.fixture
def files(new_boot):
    """``files(script, **config)``: the boot, and texts and results of its reads and writes."""

    def run(script, **config):
        boot = new_boot(None, script=tuple(parse_script(script)), **config)
        events = [r.event for r in boot.trace.records if isinstance(r.event, FileRead | FileWrite | CommandResult)]
        return boot, [event.text if isinstance(event, FileRead) else event.result for event in events]

    return run


def marks(boot):
    return [zone.watermark for zone in boot.kernel.allocator.zones]


def test_min_free_kbytes(files):
    """A write sets all watermarks; a read gives the number back, at first the one that the kernel computed."""
    boot, answers = files(f"cat {MIN}\necho 20000 > {MIN}\ncat {MIN}\necho 0x100 > {MIN}\ncat {MIN}\n")
    assert answers == ["67584\n", 6, "20000\n", 6, "256\n"]
    managed = [zone.managed_pages for zone in boot.kernel.allocator.zones]
    assert marks(boot) == [zone_wmarks(256, pages, sum(managed)) for pages in managed]


def test_watermark_scale_factor(files):
    """The distance of the watermarks grows with it: 1 to 3000 ten-thousandths of the zone."""
    boot, answers = files(f"cat {SCALE}\necho 500 > {SCALE}\ncat {SCALE}\n")
    assert answers == ["10\n", 4, "500\n"]
    normal = boot.kernel.allocator.zones[2]
    assert normal.watermark.low - normal.watermark.min == normal.managed_pages * 500 // 10_000


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        (MIN, ["", "x", "-1", "1 2", "1K", "4294967296", "08", "9" * 5000, "0x"]),
        (SCALE, ["0", "3001", "-1", "", "ten"]),
        ("/proc/sys/kernel/watchdog_thresh", ["61", "-1", "1s", ""]),
    ],
)
def test_what_a_sysctl_refuses(files, path, texts):
    """What is no number, or out of range, is -EINVAL and changes nothing."""
    boot, answers = files("".join(f"echo {text} > {path}\n" for text in texts) + f"cat {path}\n")
    sound, (before,) = files(f"cat {path}\n")
    assert answers == [*[EINVAL] * len(texts), before]
    assert marks(boot) == marks(sound)


def test_watchdog_thresh(files):
    """Seconds, from off to a minute."""
    _, answers = files("".join(f"echo {n} > /proc/sys/kernel/watchdog_thresh\n" for n in (0, 60, 1)))
    assert answers == [2, 3, 2]


def test_accept_memory_is_v9s(files):
    """v9's handle can only be written to; mainline has none, and its meminfo shows unaccepted memory all the same."""
    script = f"cat {ACCEPT}\necho all > {ACCEPT}\ncat /sys/devices/system/node/node0/meminfo\n"
    _, v9 = files(script, protocol=V9)
    boot, mainline = files(script, protocol=MAINLINE)
    assert (v9[:2], mainline[:2]) == ([EACCES, 4], [ENOENT, ENOENT])
    assert "Node 0 Unaccepted:            0 kB\n" in v9[2]
    pages = boot.shell.running.nr_unaccepted()
    assert f"Node 0 Unaccepted:     {pages * 4:8} kB\n" in mainline[2]
    assert pages > 0


def test_node_meminfo_agrees_with_meminfo(files):
    """One node: the same numbers in both files, under the kernel's names."""
    _, (whole, node) = files("cat /proc/meminfo\ncat /sys/devices/system/node/node0/meminfo\n")
    numbers = {line.split()[0]: int(line.split()[1]) for line in whole.splitlines()}
    of_node = {line.split()[2]: int(line.split()[3]) for line in node.splitlines()}
    assert of_node.pop("MemUsed:") == numbers["MemTotal:"] - numbers["MemFree:"]
    assert all(of_node[name] == numbers[name] for name in ("MemTotal:", "MemFree:", "Unaccepted:"))


@pytest.mark.parametrize("path", ["/proc/kcore", "/sys/devices/system/node/nodeN/meminfo", f"{CPU}/cpu02/online"])
def test_what_is_no_file(path):
    """Neither a pattern nor a number with a zero before it names a file."""
    assert not is_file(path)
    assert not is_writable(path)


def test_nodes_have_files_of_their_own(files):
    """Each node of a guest has a meminfo; their memory adds up to all. A node that is not there has none."""
    nodes = numa_nodes(parse_numa("2"), MachineType().ram(SZ_4G))
    path = "/sys/devices/system/node/node{}/meminfo"
    script = "".join(f"cat {name}\n" for name in ("/proc/meminfo", *map(path.format, range(3))))
    _, (whole, *of_nodes, missing) = files(script, nodes=nodes)
    total = int(re.search(r"MemTotal: +(\d+) kB", whole)[1])
    parts = [int(re.search(rf"Node {n} MemTotal: +(\d+) kB", text)[1]) for n, text in enumerate(of_nodes)]
    assert sum(parts) == total
    assert missing == ENOENT


def test_cpus(files):
    """maxcpus= leaves CPUs offline; they can be brought online, and a TD can take none offline."""
    steps = {
        f"cat {CPU}/present": "0-3\n",
        f"cat {CPU}/online": "0\n",
        f"cat {CPU}/cpu2/online": "0\n",
        f"echo 1 > {CPU}/cpu2/online": 2,
        f"echo on > {CPU}/cpu2/online": 3,
        f"cat {CPU}/online # now": "0,2\n",
        f"cat {CPU}/cpu3/online": "0\n",
        f"echo 0 > {CPU}/cpu2/online": EOPNOTSUPP,
        f"echo 2 > {CPU}/cpu1/online": EINVAL,
        f"echo 0 > {CPU}/cpu3/online": 2,
        f"cat {CPU}/cpu0/online": ENOENT,
        f"cat {CPU}/cpu9/online": ENOENT,
        f"echo 1 > {CPU}/cpu9/online": ENOENT,
    }
    _, answers = files("\n".join(steps), cpus=4, cmdline="maxcpus=1")
    assert answers == list(steps.values())


def test_offline_without_tdx(files):
    """A guest that is no TD can take CPUs offline."""
    _, answers = files(f"echo 0 > {CPU}/cpu1/online\ncat {CPU}/online\n", cpus=3, tdx=False)
    assert answers == [2, "0,2\n"]


@pytest.mark.parametrize("count", [1, 2, 254, 255, 256, 300])
def test_cpus_of_the_madt(files, count):
    """The kernel counts the processors in the firmware's MADT, local APICs and x2APICs."""
    _, answers = files(f"cat {CPU}/present\n", cpus=count)
    assert answers == [f"0-{count - 1}\n" if count > 1 else "0\n"]
