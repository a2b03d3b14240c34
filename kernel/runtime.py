"""Stage ``runtime``: what runs once the kernel is up, as a script says. Its language is in ``kernel.script``."""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from guest.errors import FormatError
from guest.trace import Event
from guest.units import PFN_PHYS
from kernel.accept_exclusion import BitmapSpinlock, NoExclusion, RangesInFlight
from kernel.cpus import Cpu, Cpus
from kernel.events import Allocation, CommandResult, FileRead, FileWrite, MemoryRead, ParallelAllocation, Taken
from kernel.files import ACCEPT_MEMORY, cpu_list, files, is_file, is_writable, read_file, write_file
from kernel.gfp import GFP_NAMES
from kernel.hugetlb import hugetlb_init
from kernel.kernel import Kernel
from kernel.memory_hotplug import add_memory
from kernel.page_alloc import PageAllocator
from kernel.page_requests import PageRequests
from kernel.readers import block_ranges, load_unaligned_zeropad, read_devmem, read_kcore, read_vmcore
from kernel.reclaim import PageCache
from kernel.running import RunningKernel
from kernel.script import HELP, Command, ScriptSyntax
from kernel.sysctl import Sysctl, parse_integer
from kernel.tracing import Tracing
from kernel.unaccepted_memory import Exclusion
from tdx.guest import tdx_guest_detected

_LOOK = "cat /proc/meminfo\ncat /proc/buddyinfo\n"
_ALLOCATE = "cat /proc/meminfo\nalloc 9 96\nalloc 0 256\n"
_KEXEC_DISABLED = "Disable kexec: not yet supported on systems with unaccepted memory"

_AT_A_TIME = 64
"""Pages that the page cache or a process takes between two looks at the other CPUs."""

SYNTAX = ScriptSyntax(is_file, is_writable, GFP_NAMES)


def parse_script(text: str, name: str = "script") -> list[Command]:
    """The commands of a script. A line that is none is a ``FormatError`` that names it."""
    return SYNTAX.parse(text, name)


def default_script(mainline: bool) -> list[Command]:
    """What runs without a script; v9 has a file for accepting memory by hand."""
    accept = "" if mainline else f"echo 64M > {ACCEPT_MEMORY}\n"
    return parse_script(_ALLOCATE + accept + _LOOK)


def script_help() -> str:
    """The commands of a script, and the files that they can name."""
    readable, writable = (
        "".join(f"\n  {path}" for path, can_write in files() if can_write or not must) for must in (False, True)
    )
    return HELP.replace(" FILES", readable).replace(" WRITABLE", writable)


class Shell:
    """Runs commands on a kernel after mm-init.

    ``plug(start, end)`` makes the host add RAM; ``seed`` decides the order of CPUs that work side by side.
    """

    def __init__(self, kernel: Kernel, plug: Callable[[int, int], None], seed: int = 0) -> None:
        allocator = kernel.allocator
        if allocator is None:
            raise ValueError("runtime before mm-init")
        cpus = _bring_up_cpus(kernel, allocator, seed)
        self._had_initcalls = False
        self.running = RunningKernel(
            kernel, allocator, cpus, Sysctl(allocator, cpus), PageRequests(allocator),
            PageCache(allocator, touch=lambda pfn: kernel.machine.memory.clear(PFN_PHYS(pfn), PFN_PHYS(pfn + 1))),
            Tracing(kernel.machine.trace, cpus), tdx_guest_detected(kernel.machine), plug,
        )  # fmt: skip
        self.blocks: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        """Allocated blocks by name, without one by order: first page and order of each."""
        self._verbs: dict[str, Callable[[Command], None]] = {
            "initcalls": lambda command: self._initcalls(),
            "alloc": self._alloc,
            "free": self._free,
            "cache": self._take,
            "run": self._take,
            "exit": self._exit,
            "kswapd": self._kswapd,
            "cat": self._cat,
            "echo": self._echo,
            "sleep": lambda command: kernel.machine.clock.advance(command.ns),
            "read": self._read,
            "hotadd": self._hotadd,
            "kexec": self._kexec,
        }

    @property
    def cpus(self) -> Cpus:
        """The guest's CPUs, and what each waited for."""
        return self.running.cpus

    def run(self, commands: Iterable[Command]) -> None:
        """Run them in order, behind the first initcalls unless these are among them. What ends the guest is raised."""
        commands = list(commands)
        if not any(command.verb == "initcalls" for command in commands):
            self._initcalls()
        for command in commands:
            self.cpus.idle()
            self.running.cache.new_command()
            self._verbs[command.verb](command)

    def _initcalls(self) -> None:
        """Once: watermarks, huge pages, and the watermarks again, as khugepaged comes later."""
        if self._had_initcalls:
            return
        self._had_initcalls, kernel = True, self.running.kernel
        self.running.sysctl.init_per_zone_wmark_min()
        hugetlb_init(kernel, self.running.allocator)
        if kernel.hugetlb_gigantic:
            self.running.sysctl.setup_per_zone_wmarks()

    # Allocations.

    def _alloc(self, command: Command) -> None:
        self._check_node(command.node)
        unaccepted, start = self.running.nr_unaccepted(), self.running.machine.clock.ns
        done: list[tuple[int, int]] = []

        def allocate(cpu: Cpu) -> None:
            for _ in range(command.count):
                self.cpus.cond_resched()
                pfn = self.running.requests.alloc(command.order, command.text, cpu, command.node)
                if pfn is None:
                    break
                done.append((pfn, command.order))
                self.running.machine.memory.clear(PFN_PHYS(pfn), PFN_PHYS(pfn + (1 << command.order)))
            self.cpus.touch_softlockup_watchdog()

        cpus = self._on(command, allocate)
        self.blocks[_name(command)] += done
        accepted = unaccepted - self.running.nr_unaccepted()
        if not command.cpus:
            self._add(Allocation(command.order, len(done), command.count, accepted))
            return
        wanted, ns = command.count * len(cpus), self.running.machine.clock.ns - start
        self._add(ParallelAllocation(cpu_list(cpus).strip(), command.order, len(done), wanted, accepted, ns))

    def _check_node(self, node: int | None) -> None:
        nodes = self.running.allocator.zonelists.nodes
        if node is not None and node not in nodes:
            raise FormatError(
                f"node {node}", found="no such node", expected=f"one of {', '.join(map(str, nodes))}",
                source="unaccepted boot --script help",
            )  # fmt: skip

    def _free(self, command: Command) -> None:
        blocks = self.blocks[_name(command)]

        def free(cpu: Cpu) -> None:
            for _ in range(min(command.count, len(blocks))):
                self.cpus.cond_resched()
                if blocks:
                    self.running.requests.free(*blocks.pop(), cpu)

        self._on(command, free)

    def _take(self, command: Command) -> None:
        """Pages for the page cache or a process, from the CPU's own node."""
        cache, nodes, name = self.running.cache, self.running.allocator.cpu_nodes, command.name
        unaccepted, taken = self.running.nr_unaccepted(), 0
        cache.in_use = cache.in_use or command.text == "in-use"

        if name:
            cache.start(name)

        def take(cpu: Cpu) -> None:
            nonlocal taken
            where = {"node": nodes[cpu.number], "cpu": cpu.number}
            for at in range(0, command.count, _AT_A_TIME):
                self.cpus.cond_resched()
                if name and not cache.runs(name):
                    break
                count = min(_AT_A_TIME, command.count - at)
                got = cache.run(count, name, **where) if name else cache.read(count, **where)
                taken += got
                if got < count:
                    break

        wanted = command.count * len(self._on(command, take))
        who, killed = f"run {name}" if name else "cache", bool(name) and not cache.runs(name)
        self._add(Taken(who, taken, wanted, unaccepted - self.running.nr_unaccepted(), killed))

    def _exit(self, command: Command) -> None:
        known = self.running.cache.runs(command.name)
        self.running.cache.exit(command.name)
        self._add(CommandResult(f"exit {command.name}", 0 if known else -errno.ESRCH))

    def _kswapd(self, command: Command) -> None:
        self._check_node(command.node)
        assert command.node is not None
        before = self.running.cache.reclaimed
        self.running.cache.wakeup_kswapd(command.node)
        reclaimed = self.running.cache.reclaimed - before
        self._add(CommandResult(f"kswapd {command.node}", 0, f"{reclaimed} pages reclaimed"))

    def _on(self, command: Command, job: Callable[[Cpu], None]) -> Sequence[Cpu]:
        """Run a job on the CPUs of a command side by side; without any, on the boot CPU. Returns the CPUs."""
        if not command.cpus:
            job(self.cpus.all[0])
            return self.cpus.all[:1]
        online = {cpu.number: cpu for cpu in self.cpus.online}
        missing = [number for number in command.cpus if number not in online]
        if missing:
            raise FormatError(
                f"on cpu {missing[0]}", found="no such CPU online",
                expected=f"some of {cpu_list(self.cpus.online).strip()}", source="unaccepted boot --script help",
            )  # fmt: skip
        cpus = [online[number] for number in command.cpus]
        self.cpus.run((cpu, job) for cpu in cpus)
        return cpus

    # Files.

    def _cat(self, command: Command) -> None:
        text = read_file(self.running, command.path)
        if isinstance(text, int):
            self._add(CommandResult(f"cat {command.path}", text))
        else:
            self._add(FileRead(command.path, text))

    def _echo(self, command: Command) -> None:
        result = write_file(self.running, command.path, command.text + "\n")
        self._add(FileWrite(command.path, command.text, result))

    # The rest.

    def _read(self, command: Command) -> None:
        start, end = command.start, command.start + command.size
        read: MemoryRead | int
        if command.text == "zeropad":
            blocks = self.blocks[command.name]
            read = load_unaligned_zeropad(self.running, (r for pfn, o in blocks for r in block_ranges([pfn], o)))
        else:
            reader = {"kcore": read_kcore, "vmcore": read_vmcore, "devmem": read_devmem}[command.text]
            read = reader(self.running, start, end)
        self._add(CommandResult(f"read {command.text}", read) if isinstance(read, int) else read)

    def _hotadd(self, command: Command) -> None:
        result = add_memory(self.running, command.start, command.size, bool(command.text))
        if result < 0:
            self._add(CommandResult(f"hotadd {command.start:#x} {command.size:#x}", result))

    def _kexec(self, command: Command) -> None:
        """v9 disables kexec at boot if there is a bitmap (v6's change): kexec_load() then is -EPERM.

        Mainline hands its table on, and refuses nothing; what loading then does is not modelled.
        """
        kernel = self.running.kernel
        if not kernel.mainline and kernel.params["unaccepted_memory"]:
            self._add(CommandResult("kexec -l", -errno.EPERM, _KEXEC_DISABLED))
        else:
            self._add(CommandResult("kexec -l", 0, "not refused"))

    def _add(self, event: Event) -> None:
        self.running.machine.trace.add(event)


def _name(command: Command) -> str:
    """The name of a command's blocks; those without one go by their order."""
    return command.name or str(command.order)


def _bring_up_cpus(kernel: Kernel, allocator: PageAllocator, seed: int) -> Cpus:
    """The CPUs that the MADT names, online up to ``maxcpus=``; with more than one, accepting needs care."""
    machine = kernel.machine
    count = len(kernel.cpu_nodes)
    cpus = Cpus(count, machine.clock, seed, machine.panic)
    cpus.on_soft_lockup = lambda cpu, seconds: machine.print(
        f"watchdog: BUG: soft lockup - CPU#{cpu.number} stuck for {seconds}s!"
    )
    maxcpus = parse_integer(kernel.early.values.get("maxcpus") or "")
    for node in kernel.cpu_nodes[1:]:
        allocator.online_cpu(node)
    for cpu in cpus.all[max(maxcpus, 1) if maxcpus is not None else count :]:
        cpu.online = False
    if count > 1:
        kernel.unaccepted.exclusion = _exclusion(kernel, cpus)
    return cpus


def _exclusion(kernel: Kernel, cpus: Cpus) -> Exclusion:
    """How this kernel's CPUs keep out of each other's way."""
    if not kernel.build.accept_exclusion:
        return NoExclusion(cpus)
    if kernel.mainline and kernel.build.ranges_in_flight:
        return RangesInFlight(cpus, exact=kernel.build.overlap_fix)
    return BitmapSpinlock(cpus, kernel.build.queued_spinlocks)
