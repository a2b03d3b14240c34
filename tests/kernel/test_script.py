"""The language of a runtime script: what is read, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.errors import BootError, FormatError
from guest.units import PHYSICAL_ADDRESS_END
from kernel.runtime import SYNTAX, parse_script, script_help
from kernel.script import MAX_COUNT, Command, parse_cpu_list

ACCEPT = "/sys/kernel/mm/page_alloc/accept_memory"
CPU1 = "/sys/devices/system/cpu/cpu1/online"
GIB = 1 << 30

LINES = {
    "alloc 9 96": Command("alloc", text="GFP_HIGHUSER_MOVABLE", order=9, count=96),
    "  alloc 0 # one": Command("alloc", text="GFP_HIGHUSER_MOVABLE", order=0),
    "alloc order 9 x 3 gfp GFP_ATOMIC as big": Command("alloc", text="GFP_ATOMIC", order=9, count=3, name="big"),
    "alloc as a x 2 order 1": Command("alloc", text="GFP_HIGHUSER_MOVABLE", order=1, count=2, name="a"),
    "alloc 2 as a_b-1": Command("alloc", text="GFP_HIGHUSER_MOVABLE", order=2, name="a_b-1"),
    "free 9\t2": Command("free", order=9, count=2),
    "free order 9 x 2": Command("free", order=9, count=2),
    "free big": Command("free", name="big", count=MAX_COUNT),
    "free big x 3": Command("free", name="big", count=3),
    "on cpu 2 alloc 0": Command("alloc", text="GFP_HIGHUSER_MOVABLE", cpus=(2,)),
    "on cpus 0-2,7 alloc order 9 x 64 as a": Command(
        "alloc", text="GFP_HIGHUSER_MOVABLE", order=9, count=64, name="a", cpus=(0, 1, 2, 7)
    ),
    "on cpus 3 free a": Command("free", name="a", count=MAX_COUNT, cpus=(3,)),
    "sleep 10ms": Command("sleep", ns=10_000_000),
    "sleep 2s": Command("sleep", ns=2_000_000_000),
    "cat /proc/vmstat": Command("cat", path="/proc/vmstat"),
    f"cat {CPU1}": Command("cat", path=CPU1),
    f"echo  64M >  {ACCEPT}\r": Command("echo", path=ACCEPT, text="64M"),
    f"echo > {ACCEPT}": Command("echo", path=ACCEPT),
    f"echo 0 > {CPU1}": Command("echo", path=CPU1, text="0"),
    "read zeropad a": Command("read", text="zeropad", name="a"),
    "read kcore": Command("read", text="kcore", size=PHYSICAL_ADDRESS_END),
    "read vmcore 4G 1": Command("read", text="vmcore", start=4 * GIB, size=1),
    "read devmem 0xC0000 0x40000": Command("read", text="devmem", start=0xC0000, size=0x40000),
    "cache 4M": Command("cache", count=1024),
    "cache 8K in-use": Command("cache", text="in-use", count=2),
    "run init 1G": Command("run", name="init", count=1 << 18),
    "on cpu 3 run init 4096": Command("run", name="init", cpus=(3,)),
    "exit init": Command("exit", name="init"),
    "kswapd": Command("kswapd", node=0),
    "kswapd 3": Command("kswapd", node=3),
    "alloc order 1 node 2": Command("alloc", text="GFP_HIGHUSER_MOVABLE", order=1, node=2),
    "hotadd 8G 1G": Command("hotadd", start=8 * GIB, size=GIB),
    "hotadd 8G 1G accept": Command("hotadd", text="accept", start=8 * GIB, size=GIB),
    "kexec -l": Command("kexec"),
}


@pytest.mark.parametrize("line", LINES)
def test_line(line):
    """Each form of each command, with any white space and with a comment."""
    assert parse_script(line) == [LINES[line]]


def test_comments_and_empty_lines():
    """They are no commands."""
    assert parse_script("# a script\n\n   \n # more\nkexec -l") == [Command("kexec")]


@pytest.mark.parametrize(
    "line",
    [
        "alloc",
        "alloc x",
        "alloc 11",
        "alloc -1",
        "alloc 0 1048577",
        "alloc 0 -1",
        "alloc 0 1 2",
        "alloc 0x1",
        "alloc 1.5",
        "alloc ²",
        "alloc ٣",
        "alloc " + "9" * 5000,
        "alloc x 3",
        "alloc 3 order 3",
        "alloc 3 as",
        "alloc 3 as 3a",
        "alloc 3 as " + "a" * 33,
        "alloc 3 gfp GFP_NONSENSE",
        "alloc 3 gfp __GFP_ZERO|",
        "Alloc 1",
        "free",
        "free 11",
        "free a b",
        "free a order 3",
        "on",
        "on cpu alloc 0",
        "on cpu 0",
        "on cpu 0 cat /proc/meminfo",
        "on cpu 0 on cpu 1 alloc 0",
        "on cpu 3-1 alloc 0",
        "on cpu 4096 alloc 0",
        "on cpu 0-99999 alloc 0",
        "on cpu 0, alloc 0",
        "sleep",
        "sleep 5",
        "sleep -5ms",
        "sleep 1.5s",
        "sleep 5h",
        "sleep 9999999s",
        "sleep " + "9" * 5000 + "ns",
        "cat",
        "cat /etc/passwd",
        "cat /proc/meminfo /proc/vmstat",
        "cat /sys/devices/system/cpu/cpu00/online",
        "cat /sys/devices/system/cpu/cpu12345/online",
        "echo all",
        f"echo all >{ACCEPT}",
        "echo all > /proc/meminfo",
        f"echo all >> {ACCEPT}",
        "read",
        "read minds",
        "read zeropad",
        "read zeropad 3",
        "read devmem",
        "read devmem 0",
        "read devmem 0 0",
        "read devmem 0 x",
        "read kcore 0 5P",
        "read kcore -1 1",
        "hotadd",
        "hotadd 8G",
        "cache",
        "cache 0",
        "cache 1",
        "cache 4M used",
        "cache 5G",
        "cache -4K",
        "run 4M",
        "run a",
        "run a 4M b",
        "run a 1T",
        "exit",
        "exit a b",
        "exit 7",
        "kswapd x",
        "kswapd 0 1",
        "on cpu 1 exit a",
        "alloc 0 node -1",
        "hotadd 8G 1",
        "hotadd 1 4096",
        "hotadd 8G 1G please",
        "hotadd 4P 128M",
        "kexec",
        "kexec -e",
        "rm -rf /",
        "\0",
    ],
    ids=lambda line: line[:30],
)
def test_wrong_line(line):
    """It is refused with the script's name and its number, comments and empty lines counted."""
    with pytest.raises(FormatError) as caught:
        parse_script(f"# first\n\ncat /proc/meminfo\n{line}\nalloc 0\n", "my.script")
    assert caught.value.what == "my.script, line 4"
    assert caught.value.found == repr(line.strip()[:80])
    assert "\n" not in str(caught.value)


@given(st.text(max_size=100) | st.text("alocfrethdsxpn 0123456789#>\n/,-", max_size=100))
def test_random_text(text):
    """Any text is a list of commands or refused, behind any verb."""
    for verb in ("", "alloc ", "free ", "on cpu ", "read ", "hotadd ", "sleep ", "echo "):
        with contextlib.suppress(BootError):
            assert isinstance(parse_script(verb + text), list)


@given(st.sets(st.integers(0, 200), min_size=1))
def test_cpu_list(numbers):
    """A list of numbers and spans names each CPU once, ascending."""
    ordered = sorted(numbers)
    assert parse_cpu_list(",".join(map(str, reversed(ordered)))) == tuple(ordered)
    assert parse_cpu_list(f"{ordered[0]}-{ordered[-1]}") == tuple(range(ordered[0], ordered[-1] + 1))


def test_help_names_every_command():
    """The help has a line for each verb, and all files."""
    text = script_help()
    assert all(
        f"\n{verb} " in text for verb in ("alloc", "free", "on", "sleep", "cat", "echo", "read", "hotadd", "kexec")
    )
    assert all(path in text for path in (ACCEPT, "/proc/buddyinfo", "/proc/sys/vm/min_free_kbytes", "cpuN/online"))
    assert SYNTAX.knows("alloc")
    assert not SYNTAX.knows("help")
