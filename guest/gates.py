"""Call gates: firmware services live at guest addresses and are reached through pointers in guest tables.

A Python stage calls an address; an emulated CPU that arrives at the address finds the same handler there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guest.errors import GuestPanic
from guest.trace import ServiceCall, Trace

_MAX_ARGUMENTS = 128


@dataclass(frozen=True, slots=True)
class CallGate:
    """A service: its name, its number of arguments, and the function that answers with a status.

    Arguments are unsigned 64-bit, in the order of the prototype (Microsoft x64 convention: RCX, RDX, R8, R9,
    stack; UEFI 2.10, section 2.3.4.2).
    """

    name: str
    nargs: int
    handler: Callable[..., int]
    variadic: bool = False
    """Behind the ``nargs``, pairs of arguments follow, up to one whose first word is null."""

    def arguments(self, nth: Callable[[int], int]) -> tuple[int, ...]:
        """The arguments of one call, where ``nth`` gives the argument with a number.

        Of a variadic service, the null at their end is the last one; it is missing if they do not end.
        """
        args = [nth(number) for number in range(self.nargs)]
        while self.variadic and len(args) < _MAX_ARGUMENTS:
            args.append(nth(len(args)))
            if args[-1] == 0:
                break
            args.append(nth(len(args)))
        return tuple(args)


class CallGates:
    """The gates by guest physical address."""

    def __init__(self, trace: Trace) -> None:
        self._gates: dict[int, CallGate] = {}
        self._trace = trace

    def install(self, address: int, gate: CallGate) -> None:
        """Let ``gate`` answer calls to ``address``. Two gates at one address are a ``ValueError``."""
        if address in self._gates:
            raise ValueError(f"call gate at {address:#x}: taken by {self._gates[address].name}")
        self._gates[address] = gate

    def at(self, address: int) -> CallGate | None:
        """The gate at ``address``, or None."""
        return self._gates.get(address)

    def call(self, address: int, *args: int) -> int:
        """Call the service at ``address`` and return its status. A call to anywhere else is fatal."""
        gate = self._gates.get(address)
        if gate is None:
            raise GuestPanic(self._trace.stage, f"call to {address:#x}, where no firmware service is")
        if len(args) != gate.nargs and not (gate.variadic and len(args) > gate.nargs):
            raise ValueError(f"{gate.name}: found {len(args)} arguments, expected {gate.nargs}")
        status = gate.handler(*args)
        self._trace.add(ServiceCall(gate.name, args, status))
        return status
