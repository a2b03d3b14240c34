"""Which memory the firmware accepts itself, with how many processors, and how: all of it in this file.

Upstream OVMF accepts every unaccepted range below 4 GiB and leaves the rest to the operating system ("first stage
of lazy accept", edk2 commit d1e41c620f, November 2022); before that it accepted all of it. td-shim accepts the first
so many bytes, and so did an RFC for OVMF. Source: OvmfPkg/Library/PlatformInitLib/IntelTdx.c, ProcessHobList(),
AcceptMemoryForAPsStack(), MpAcceptMemoryResourceRange() and BspAcceptMemoryResourceRange(); td-shim
td-shim/src/bin/td-shim/memory.rs, accept_memory_resources().
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from firmware.hob import Resource, ResourceType
from guest.machine import Machine
from guest.units import PMD_SIZE, SZ_2M, SZ_4G, SZ_16K, SZ_32M, U64_MAX, round_up
from tdx.guest import accept_pages
from tdx.sept import LEVEL_2M, LEVEL_4K

CHUNK_SIZE = SZ_32M
"""PcdTdxAcceptMemoryChunkSize: what a processor accepts before it leaves the next piece to another one."""
AP_STACK_SIZE = SZ_16K


@dataclass(frozen=True, slots=True)
class AcceptPolicy:
    """Accept what lies below ``end``, and of that no more than the first ``size`` bytes, if there is a size."""

    end: int = U64_MAX
    size: int | None = None


BELOW_4G = AcceptPolicy(end=SZ_4G)
ALL = AcceptPolicy()


def accept_resources(
    machine: Machine, resources: Iterable[Resource], policy: AcceptPolicy = BELOW_4G, cpus: int = 1
) -> list[Resource]:
    """Accept the unaccepted resources, each clamped to ``policy``; return what of them stays unaccepted.

    With more ``cpus`` than one, the first one accepts stacks for the others before. They work side by side, so the
    events of a range are not in the order of their times.
    """
    todo, left = divide(resources, policy)
    if cpus > 1:
        todo = _accept_stacks(machine, todo, cpus)
    if todo or left:
        machine.print(_headline(policy))
    for start, end in todo:
        machine.print(f"MpAccept : {start:#x} - {end:#x} ({end - start:#x})")
        accept_range(machine, start, end, cpus)
    return left


def divide(resources: Iterable[Resource], policy: AcceptPolicy) -> tuple[list[tuple[int, int]], list[Resource]]:
    """What of the unaccepted resources to accept, and what to leave, both in the order of the HOBs."""
    todo, left, room = [], [], policy.size
    for r in resources:
        if r.type != ResourceType.EFI_RESOURCE_MEMORY_UNACCEPTED:
            continue
        end = max(r.start, min(r.end, policy.end))
        if room is not None:
            end = min(end, r.start + room)
            room -= end - r.start
        if end > r.start:
            todo.append((r.start, end))
        if r.end > end:
            left.append(Resource(r.type, end, r.end, r.attributes))
    return todo, left


def accept_range(machine: Machine, start: int, end: int, cpus: int = 1) -> None:
    """Accept ``[start, end)`` as OVMF cuts it: up to a 2 MiB border alone, and the rest in pieces of 32 MiB by turns.

    One processor, and one that has no more than one piece left, does it all itself. Memory that cannot be accepted
    stops the firmware.
    """
    border = min(round_up(start, PMD_SIZE), end)
    if cpus == 1 or end - border <= CHUNK_SIZE:
        ok = _accept_alone(machine, start, end)
    else:
        ok = _accept_alone(machine, start, border) and _accept_together(machine, border, end, cpus)
    if not ok:
        raise machine.panic(f"Accept memory failed: {start:#x} - {end:#x}")


def _accept_alone(machine: Machine, start: int, end: int) -> bool:
    """4 KiB pages up to a 2 MiB border, 2 MiB pages, a 4 KiB tail; False if a page was refused.

    2 MiB pages are used only where strictly more than 2 MiB are left behind the border. A refused 2 MiB page is
    accepted as 4 KiB pages.
    """
    border = min(round_up(start, PMD_SIZE), end)
    tail = border + (end - border) // PMD_SIZE * PMD_SIZE if end - border > PMD_SIZE else border
    ok = accept_pages(machine, start, border, (LEVEL_4K,))
    ok = ok and accept_pages(machine, border, tail, (LEVEL_2M, LEVEL_4K))
    return ok and accept_pages(machine, tail, end, (LEVEL_4K,))


def _accept_together(machine: Machine, start: int, end: int, cpus: int) -> bool:
    """Pieces of 32 MiB by turns. Every processor's time runs on its own; the slowest one says when they are done."""
    free_at = [machine.clock.ns] * cpus
    for number, piece in enumerate(range(start, end, CHUNK_SIZE)):
        cpu = number % cpus
        machine.clock.ns = free_at[cpu]
        if not accept_pages(machine, piece, min(piece + CHUNK_SIZE, end), (LEVEL_2M, LEVEL_4K)):
            return False
        free_at[cpu] = machine.clock.ns
    machine.clock.ns = max(free_at)
    return True


def _accept_stacks(machine: Machine, todo: list[tuple[int, int]], cpus: int) -> list[tuple[int, int]]:
    """AcceptMemoryForAPsStack(): accept ranges up to the first that has room for the stacks; return the others.

    Of a range of more than one piece only the stacks are accepted.
    """
    size = round_up(cpus * AP_STACK_SIZE, SZ_2M)
    machine.print(f"AcceptMemoryForAPsStack with APsStackSize={size:#x}")
    for number, (start, end) in enumerate(todo):
        found = end - start >= size
        stop = start + size if found and end - start > CHUNK_SIZE else end
        if not _accept_alone(machine, start, stop):
            raise machine.panic(f"Accept memory failed: {start:#x} - {stop:#x}")
        if found:
            rest = [(stop, end)] if stop < end else []
            return rest + todo[number + 1 :]
    raise machine.panic(f"no range of {size:#x} bytes for the stacks of {cpus} processors")


def _headline(policy: AcceptPolicy) -> str:
    """OVMF's words: today's, those of a build with PcdAcceptMemoryEndAddress, and for a size, where none are known."""
    if policy.size is not None:
        return f"AcceptMemory of {policy.size:#x} bytes"
    return "AcceptMemory under address of 4G" if policy == BELOW_4G else f"AcceptMemory till {policy.end:#x}"
