"""What there is once the kernel is up: the state that files of /proc and /sys show, and that commands change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guest.machine import Machine
from kernel.cpus import Cpus
from kernel.kernel import Kernel
from kernel.page_alloc import PageAllocator
from kernel.page_requests import PageRequests
from kernel.reclaim import PageCache
from kernel.sysctl import Sysctl
from kernel.tracing import Tracing


@dataclass(slots=True)
class RunningKernel:
    """A kernel after its initcalls. ``plug(start, end)`` is the host: it adds RAM there."""

    kernel: Kernel
    allocator: PageAllocator
    cpus: Cpus
    sysctl: Sysctl
    requests: PageRequests
    cache: PageCache
    tracing: Tracing
    tdx: bool
    plug: Callable[[int, int], None]

    @property
    def machine(self) -> Machine:
        return self.kernel.machine

    def nr_unaccepted(self) -> int:
        """Unaccepted pages of all zones."""
        return sum(zone.nr_unaccepted for zone in self.allocator.zones)
