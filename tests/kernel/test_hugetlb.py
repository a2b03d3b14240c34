"""Huge pages: what the command line asks for, what the kernel says of it, and where they are counted."""

from __future__ import annotations

import re

import pytest

from bootstub.protocol import MAINLINE, V9
from kernel.early_param import parse_args
from kernel.events import FileRead, FileWrite
from kernel.hstate import Hstate, Hugetlb
from kernel.runtime import parse_script
from tdx.machine_type import MachineType
from tests.kernel.plain_guest import booted, log_of
from tools.numa import Numa, numa_nodes

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PROTOCOLS = pytest.mark.parametrize("protocol", [V9, MAINLINE], ids=lambda protocol: protocol.name)
TWICE = "HugeTLB: hugepages= specified twice without interleaving hugepagesz=, ignoring hugepages="
NOT_VALID = "HugeTLB: hugepages={} does not follow a valid hugepagesz, ignoring"


def asked(command_line: str) -> tuple[dict[int, int], list[str], Hugetlb]:
    """Pages asked for by size, the kernel's words, and the pools; there are nodes 0 and 1."""
    said: list[str] = []
    pools = Hugetlb(True, said.append)
    pools.parse(parse_args(command_line), (0, 1), lambda pool: said.append(f"{pool.max_huge_pages} gigantic"))
    pools.complete()
    return {pool.size: pool.max_huge_pages for pool in pools.hstates if pool.max_huge_pages}, said, pools


@pytest.mark.parametrize(
    ("command_line", "pages", "said"),
    [
        ("", {}, []),
        ("hugepages=64", {2 * MIB: 64}, []),
        ("hugepages=64x", {2 * MIB: 64}, []),
        ("hugepages", {}, []),
        ("hugepages=3 hugepages=4", {2 * MIB: 3}, [TWICE + "4"]),
        ("hugepagesz=1G hugepages=2 hugepagesz=2M hugepages=3", {GIB: 2, 2 * MIB: 3}, ["2 gigantic"]),
        ("default_hugepagesz=1G hugepages=2", {GIB: 2}, ["2 gigantic"]),
        ("hugepages=2 default_hugepagesz=1G", {GIB: 2}, ["2 gigantic"]),
        ("hugepagesz=4K hugepages=2", {}, ["HugeTLB: unsupported hugepagesz=4K", NOT_VALID.format(2)]),
        ("default_hugepagesz=3M hugepages=2", {}, ["HugeTLB: unsupported default_hugepagesz=3M", NOT_VALID.format(2)]),
        (
            "hugepagesz=2M hugepages=2 hugepagesz=2M hugepages=5", {2 * MIB: 2},
            ["HugeTLB: hugepagesz=2M specified twice, ignoring", NOT_VALID.format(5)],
        ),
        ("default_hugepagesz=2M hugepagesz=2M hugepages=5", {2 * MIB: 5}, []),
        (
            "default_hugepagesz=2M default_hugepagesz=1G", {},
            ["HugeTLB: default_hugepagesz previously specified, ignoring 1G"],
        ),
        (
            "hugepages=3 hugepagesz=2M hugepages=5", {2 * MIB: 3},
            [
                "HugeTLB: Ignoring hugepages=5 associated with 2.00 MiB page size",
                "HugeTLB: Using hugepages=3 for number of default huge pages",
            ],
        ),
        ("hugepages=0:1,1:2", {2 * MIB: 3}, []),
        ("hugepages=0:1,7:2", {}, ["HugeTLB: Invalid hugepages parameter 7:2"]),
        ("hugepages=0:1,2", {}, ["HugeTLB: Invalid hugepages parameter 2"]),
        ("hugepages=0:x", {}, ["HugeTLB: Invalid hugepages parameter 0:x"]),
        ("hugepages=x", {}, ["HugeTLB: Invalid hugepages parameter x"]),
        ("hugepages=", {}, ["HugeTLB: Invalid hugepages parameter "]),
        ("hugepages=-1", {}, ["HugeTLB: Invalid hugepages parameter -1"]),
        ("-- hugepages=3", {}, []),
    ],
)  # fmt: skip
def test_what_is_asked_for(command_line, pages, said):
    """Each number belongs to the size in front of it, or to the default one; what is refused has the kernel's words."""
    assert asked(command_line)[:2] == (pages, said)


def test_pages_by_node():
    """``NODE:N`` pairs say where."""
    assert asked("hugepages=0:1,1:2")[2].default.max_of_node == {0: 1, 1: 2}


def test_the_kernel_s_report():
    """A log of Debian's 6.12 has these lines; sizes are in the order in which their pools were made."""
    said: list[str] = []
    pools = Hugetlb(True, said.append)
    pools.complete()
    pool = pools.hstate(2 * MIB)
    assert isinstance(pool, Hstate)
    pool.pages[0] = list(range(128))
    pools.report()
    assert said == [
        "HugeTLB: registered 1.00 GiB page size, pre-allocated 0 pages",
        "HugeTLB: 16380 KiB vmemmap can be freed for a 1.00 GiB page",
        "HugeTLB: registered 2.00 MiB page size, pre-allocated 128 pages",
        "HugeTLB: 28 KiB vmemmap can be freed for a 2.00 MiB page",
    ]


@pytest.fixture
def ran(new_boot):
    """``ran(script, cmdline, **config)``: the boot and the texts of the files that it printed, as words by name."""

    def run(script: str, cmdline: str = "nokaslr", **config: object):
        boot = new_boot(None, script=tuple(parse_script(script)), cmdline=cmdline, **config)
        reads = [r.event.text for r in boot.trace.records if isinstance(r.event, FileRead)]
        return boot, [{name: int(n) for name, n in re.findall(r"(\w+):? +(\d+)(?: kB)?\n", text)} for text in reads]

    return run


@PROTOCOLS
def test_pages_of_2_mib(ran, protocol):
    """They are taken when CPUs are up, and accepted; no memory is lost to MemTotal."""
    files = "cat /proc/meminfo\ncat /sys/devices/system/node/node0/meminfo\ncat /proc/vmstat\n"
    _, (without, *_) = ran(files, protocol=protocol)
    boot, (meminfo, node, vmstat) = ran(files, "nokaslr hugepages=64", protocol=protocol)
    assert meminfo["MemTotal"] == without["MemTotal"]
    assert meminfo["MemFree"] == without["MemFree"] - 64 * 2048
    assert meminfo["Unaccepted"] < without["Unaccepted"] - 64 * 1024
    assert [meminfo[name] for name in ("HugePages_Total", "HugePages_Free", "Hugetlb")] == [64, 64, 64 * 2048]
    assert (node["HugePages_Total"], vmstat["htlb_buddy_alloc_success"]) == (64, 64)
    assert "HugeTLB: registered 2.00 MiB page size, pre-allocated 64 pages" in log_of(boot.machine)


@PROTOCOLS
def test_pages_of_1_gib_stay_managed(ran, protocol):
    """memblock gives them, MemTotal has them all the same (gather_bootmem_prealloc())."""
    _, (without,) = ran("cat /proc/meminfo\n", protocol=protocol)
    boot, (meminfo,) = ran("cat /proc/meminfo\n", "nokaslr default_hugepagesz=1G hugepages=9", protocol=protocol)
    assert meminfo["MemTotal"] == without["MemTotal"]
    assert (meminfo["HugePages_Total"], meminfo["Hugepagesize"], meminfo["Hugetlb"]) == (1, GIB // KIB, GIB // KIB)
    warning = "HugeTLB: allocating 9 of page size 1.00 GiB failed.  Only allocated 1 hugepages."
    assert warning in log_of(boot.machine)


def test_two_nodes_take_turns(ran):
    """Without nodes in the parameter half of the pages is on each; a node that is full leaves the rest to the other."""
    nodes = numa_nodes(Numa(sizes=(3 * GIB, GIB)), MachineType().ram(4 * GIB))
    path = "/sys/devices/system/node/node{}/meminfo"
    script = f"cat {path.format(0)}\ncat {path.format(1)}\necho 2000 > /proc/sys/vm/nr_hugepages\n"
    boot, (zero, one) = ran(script, "nokaslr hugepages=11", nodes=nodes)
    assert (zero["HugePages_Total"], one["HugePages_Total"]) == (6, 5)
    pool = boot.kernel.allocator.hugetlb.default
    assert 500 > pool.nr_huge_pages(1) > 400 < pool.nr_huge_pages(0) < 2000 - pool.nr_huge_pages(1)
    assert pool.max_huge_pages == pool.nr_huge_pages()


def test_nr_hugepages(ran):
    """A write grows or shrinks the pool; what is no number is refused."""
    path = "/proc/sys/vm/nr_hugepages"
    script = "".join(f"echo {text} > {path}\ncat {path}\n" for text in ("10", "3", "x", "-1", "0"))
    boot, _ = ran(script + "cat /proc/meminfo\n")
    events = [r.event for r in boot.trace.records if isinstance(r.event, FileWrite)]
    assert [event.result for event in events] == [3, 2, -22, -22, 2]
    texts = [r.event.text for r in boot.trace.records if isinstance(r.event, FileRead)]
    assert texts[:-1] == ["10\n", "3\n", "3\n", "3\n", "0\n"]
    assert boot.kernel.allocator.nr_in_use() == 0
    assert boot.kernel.allocator.vm_events["htlb_buddy_alloc_success"] == 10


def test_a_processor_without_pages_of_1_gib():
    """The size is then unsupported."""
    _, log = booted(cmdline="hugepagesz=1G hugepages=1")
    assert "HugeTLB: unsupported hugepagesz=1G" in log
