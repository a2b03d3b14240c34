"""Untrue HOB lists: what a host may tell the firmware of memory that is not as it says (kinds of tdx/faults.py).

The HOB list is input from the host. OVMF checks its layout and measures it (ValidateHobList(), RTMR 0); what it says
of memory is taken as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from firmware.hob import Resource, ResourceType
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_1G, SZ_4M, round_down
from tdx.faults import Place, Rule

UNACCEPTED = ResourceType.EFI_RESOURCE_MEMORY_UNACCEPTED
SYSTEM = ResourceType.EFI_RESOURCE_SYSTEM_MEMORY


def tell(resources: list[Resource], rules: Iterable[Rule]) -> list[Resource]:
    """What the host says of ``resources`` by the rules that are about HOBs, one after the other."""
    for rule in rules:
        if rule.place is Place.HOB:
            starts = {resource.start for resource in resources}
            resources = [
                told
                for resource in resources
                for told in (_LIES[rule.kind](resource, starts) if _is_about(rule, resource) else [resource])
            ]
    return resources


def _is_about(rule: Rule, resource: Resource) -> bool:
    return rule.gpa is None or rule.gpa.start <= resource.start < rule.gpa.end


def _middle(resource: Resource) -> int:
    return resource.start + round_down((resource.end - resource.start) // 2, PAGE_SIZE)


def _stale(resource: Resource, starts: set[int]) -> list[Resource]:
    return [replace(resource, type=SYSTEM)]


def _accepted(resource: Resource, starts: set[int]) -> list[Resource]:
    return [replace(resource, type=UNACCEPTED)]


def _overlap(resource: Resource, starts: set[int]) -> list[Resource]:
    return [resource, replace(resource, start=_middle(resource))] if resource.type == UNACCEPTED else [resource]


def _more(resource: Resource, starts: set[int]) -> list[Resource]:
    if resource.type != UNACCEPTED or resource.end in starts:
        return [resource]
    return [replace(resource, end=min(resource.end + SZ_1G, PHYSICAL_ADDRESS_END))]


def _less(resource: Resource, starts: set[int]) -> list[Resource]:
    large = resource.type == UNACCEPTED and resource.end - resource.start >= SZ_4M
    return [replace(resource, end=_middle(resource))] if large else [resource]


_LIES: dict[str, Callable[[Resource, set[int]], list[Resource]]] = {
    "hob-stale": _stale,
    "hob-accepted": _accepted,
    "hob-overlap": _overlap,
    "hob-more": _more,
    "hob-less": _less,
}
"""Each says a resource as one or more; ``starts`` is where resources start."""
