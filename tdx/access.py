"""The guest's accesses to memory: what Secure EPT and the host's shared EPT say to each.

    address             entry                              outcome
    above the GPA width -                                  #PF with RSVD
    shared              made shared by MapGPA              the host's bytes, after a TD exit at first touch
                        any other                          #VE to MMIO emulation, or TD exit if #VE is suppressed
    private             MAPPED                             the private bytes
                        BLOCKEDW                           the same for a read, TD exit for a write
                        PENDING                            #VE, or TD exit if TD_CTLS.PENDING_VE_DISABLE
                        FREE, *BLOCKED                     TD exit, never #VE

A host that finds a touch of a PENDING page in an exit ends the TD, and so does one that backed a FREE page for it: the
page is PENDING then. Shared and private bytes lie at different addresses: the shared bit tells them apart.
Sources: Intel TDX Module 1.5, td_ept_violation.c; arch/x86/kvm/vmx/tdx.c (6.16).
"""

from __future__ import annotations

from guest.errors import MemoryFault
from guest.memory import AccessKind
from guest.trace import Trace
from tdx.metadata import Metadata
from tdx.sept import LEVEL_4K, SecureEpt, SeptState
from tdx.td_exit import MAX_EXITS, EptViolation, unresolved
from tdx.vmm import Host

_TD_EXIT = "EPT violation, TD exit"


class Access:
    """The gate of one TD's memory."""

    def __init__(self, sept: SecureEpt, host: Host, trace: Trace, gpaw: int, metadata: Metadata) -> None:
        self._sept, self._host, self._trace, self._metadata = sept, host, trace, metadata
        self._shared_mask, self._width = 1 << gpaw - 1, 1 << gpaw

    def admit(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        """The run around an access that may be made without asking again. Empty: ask each time."""
        if gpa + size > self._width:
            at = max(gpa, self._width)
            raise self._fault(
                at, gpa, size, kind, f"an address of more than {self._width.bit_length() - 1} bits", "#PF, RSVD"
            )
        if gpa & self._shared_mask:
            return self._shared(gpa, size, kind)
        return self._private(gpa, size, kind)

    def _shared(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        start = gpa ^ self._shared_mask
        run = self._host.map_shared(start, start + max(size, 1))
        if run is None:
            at = next((gap.start for gap in self._host.shared.gaps(start, start + max(size, 1))), start)
            end = f"{_TD_EXIT}; the host has nothing to map" if self._host.suppress_ve else "#VE"
            raise self._fault(at | self._shared_mask, gpa, size, kind, "shared memory that the host does not map", end)
        return run.start | self._shared_mask, run.end | self._shared_mask

    def _private(self, gpa: int, size: int, kind: AccessKind) -> tuple[int, int]:
        end, at, low, exits = gpa + size, gpa, gpa, 0
        ask_again = False
        while True:
            start, reached, entry = self._sept.walk(at, LEVEL_4K)
            if entry.state is SeptState.MAPPED or (entry.state is SeptState.BLOCKEDW and kind == "read"):
                ask_again |= entry.state is SeptState.BLOCKEDW
                low = min(low, start)
                if reached >= end:
                    return (gpa, gpa) if ask_again else (low, reached)
                at, exits = reached, 0
                continue
            exits += 1
            self._exit(EptViolation(at, kind, entry), gpa, size, exits)

    def _exit(self, exit: EptViolation, start: int, size: int, exits: int) -> None:
        """Leave to the host. What makes the guest die of it raises; else the access is made again."""
        at, kind, state = exit.gpa, exit.kind, exit.entry.state
        if state is SeptState.PENDING:
            end = _TD_EXIT if self._metadata.pending_ve_disable else "#VE"
            raise self._fault(at, start, size, kind, "PENDING (not accepted)", end)
        if state is SeptState.FREE:
            if at not in self._host.ram:
                raise self._fault(at, start, size, kind, "no RAM", _TD_EXIT)
            self._host.ept_violation(exit)
            raise self._fault(at, start, size, kind, "FREE (not accepted)", _TD_EXIT)
        if exits > MAX_EXITS:
            raise unresolved(self._trace.stage, at, size, kind, state.name)
        self._host.ept_violation(exit)

    def _fault(self, at: int, start: int, size: int, kind: str, state: str, end: str) -> MemoryFault:
        return MemoryFault(stage=self._trace.stage, gpa=at, start=start, size=size, kind=kind, state=state, end=end)
