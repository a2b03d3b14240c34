"""The files of /proc and /sys that a script can read or write: one table.

A file that another kernel has is known by name, and not there: -ENOENT.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kernel import proc
from kernel.cpus import Cpu
from kernel.page_alloc import PageAllocator
from kernel.running import RunningKernel
from kernel.sysctl import parse_integer

ACCEPT_MEMORY = "/sys/kernel/mm/page_alloc/accept_memory"
TRACING = "/sys/kernel/tracing"
_FALSE, _TRUE = ("0", "n", "N", "off"), ("1", "y", "Y", "on")


@dataclass(frozen=True, slots=True)
class KernelFile:
    """``read(running)`` gives its text, ``write(running, text)`` characters taken; both perhaps a negative errno."""

    read: Callable[[RunningKernel], str | int] | None = None
    write: Callable[[RunningKernel, str], int] | None = None
    v9_only: bool = False


def _proc(text: Callable[[PageAllocator], str]) -> KernelFile:
    return KernelFile(lambda running: text(running.allocator))


def _accept_memory(running: RunningKernel, text: str) -> int:
    return running.allocator.accept_memory_sysfs(text)


def _enable_event(running: RunningKernel, text: str) -> int:
    """A write to an event's ``enable``: 0 or 1."""
    value = parse_integer(text)
    if value not in (0, 1):
        return -errno.EINVAL
    running.tracing.enable(bool(value))
    return len(text)


def _clear_trace(running: RunningKernel, text: str) -> int:
    running.tracing.clear()
    return len(text)


def cpu_list(cpus: Sequence[Cpu]) -> str:
    """``0-3,7``, as the kernel prints a cpumask (``%*pbl``)."""
    numbers = [cpu.number for cpu in cpus]
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)) + "\n"


FILES = {
    **{path: _proc(text) for path, text in proc.PROC_FILES.items()},
    "/proc/sys/vm/min_free_kbytes": KernelFile(
        lambda running: f"{running.sysctl.min_free_kbytes}\n",
        lambda running, text: running.sysctl.write_min_free_kbytes(text),
    ),
    "/proc/sys/vm/watermark_scale_factor": KernelFile(
        lambda running: f"{running.sysctl.watermark_scale_factor}\n",
        lambda running, text: running.sysctl.write_watermark_scale_factor(text),
    ),
    "/proc/sys/vm/nr_hugepages": KernelFile(
        lambda running: f"{running.sysctl.nr_hugepages}\n",
        lambda running, text: running.sysctl.write_nr_hugepages(text),
    ),
    "/proc/sys/kernel/watchdog_thresh": KernelFile(
        lambda running: f"{running.sysctl.watchdog_thresh}\n",
        lambda running, text: running.sysctl.write_watchdog_thresh(text),
    ),
    "/sys/devices/system/cpu/present": KernelFile(lambda running: cpu_list(running.cpus.all)),
    "/sys/devices/system/cpu/online": KernelFile(lambda running: cpu_list(running.cpus.online)),
    f"{TRACING}/events/kmem/mm_page_alloc_extfrag/enable": KernelFile(
        lambda running: f"{running.tracing.enabled:d}\n", _enable_event
    ),
    f"{TRACING}/trace": KernelFile(lambda running: running.tracing.text(), _clear_trace),
    ACCEPT_MEMORY: KernelFile(write=_accept_memory, v9_only=True),
}


_NUMBERED: dict[str, Callable[[int], KernelFile]] = {
    "/sys/devices/system/node/nodeN/meminfo": lambda n: KernelFile(lambda running: _node_meminfo(running, n)),
    "/sys/devices/system/cpu/cpuN/online": lambda n: KernelFile(
        lambda running: _read_online(running, n), lambda running, text: _write_online(running, n, text)
    ),
}
"""Files of which there is one for each number."""
_NUMBER = re.compile(r"(?<=[a-z])(0|[1-9][0-9]{0,3})(?=/)")


def files() -> Iterator[tuple[str, bool]]:
    """The path of every file, with an ``N`` for a number, and whether some kernel lets it be written to."""
    yield from ((path, file.write is not None) for path, file in FILES.items())
    yield from ((path, numbered(0).write is not None) for path, numbered in _NUMBERED.items())


def is_file(path: str) -> bool:
    """True if a script may name ``path``."""
    return _find(path) is not None


def is_writable(path: str) -> bool:
    """True if some kernel lets ``path`` be written to."""
    file = _find(path)
    return file is not None and file.write is not None


def read_file(running: RunningKernel, path: str) -> str | int:
    """The text of a file, or a negative errno: -EACCES for one that can only be written to."""
    file = _file(running, path)
    if file is None:
        return -errno.ENOENT
    return file.read(running) if file.read is not None else -errno.EACCES


def write_file(running: RunningKernel, path: str, text: str) -> int:
    """Write ``text`` to a file: the number of characters taken, or a negative errno."""
    file = _file(running, path)
    if file is None:
        return -errno.ENOENT
    return file.write(running, text) if file.write is not None else -errno.EACCES


def _find(path: str) -> KernelFile | None:
    """The file of that path in any kernel."""
    number = _NUMBER.search(path)
    numbered = _NUMBERED.get(_NUMBER.sub("N", path)) if number else None
    return numbered(int(number[1])) if number and numbered else FILES.get(path)


def _file(running: RunningKernel, path: str) -> KernelFile | None:
    """The file of that path in this kernel."""
    file = _find(path)
    return None if file is None or (file.v9_only and running.kernel.mainline) else file


def _node_meminfo(running: RunningKernel, node: int) -> str | int:
    known = node in running.allocator.zonelists.nodes
    return proc.node_meminfo(running.allocator, node) if known else -errno.ENOENT


def _cpu(running: RunningKernel, number: int) -> Cpu | None:
    """A CPU that can go offline: all but the first."""
    return running.cpus.all[number] if 0 < number < len(running.cpus.all) else None


def _read_online(running: RunningKernel, number: int) -> str | int:
    cpu = _cpu(running, number)
    return f"{cpu.online:d}\n" if cpu is not None else -errno.ENOENT


def _write_online(running: RunningKernel, number: int, text: str) -> int:
    """cpuN/online: 1 brings the CPU up; 0 takes it down, which a TD cannot do (CC_ATTR_HOTPLUG_DISABLED)."""
    cpu, word = _cpu(running, number), text.rstrip("\n")
    if cpu is None:
        return -errno.ENOENT
    if word not in _FALSE + _TRUE:
        return -errno.EINVAL
    online = word in _TRUE
    if cpu.online and not online and running.tdx:
        return -errno.EOPNOTSUPP
    cpu.online = online
    return len(text)
