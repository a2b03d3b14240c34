"""``unaccepted kaslr``: where KASLR puts the kernel, over many seeds, and how often that is in unaccepted memory.

A guest is booted once, up to the point where the boot code has counted its places; then only the choice is made again
for each seed. It is the choice that a boot with that ``--seed`` makes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bootstub.events import KaslrChoice
from bootstub.kaslr import kaslr_get_random_long
from bootstub.slots import SlotArea
from guest.entropy import Entropy
from guest.errors import FormatError
from guest.ranges import Range, RangeSet
from guest.trace import Record
from guest.units import round_down, size_text
from tools.arguments import number_from
from tools.cli import script
from tools.config import add_options, boot_config
from tools.pipeline import Boot, BootConfig, stages_of
from tools.render import add_json_option, json_text, print_table

_MEMORY, _PROTOCOLS, _CMDLINE = ("4G", "64G"), ("v9", "mainline"), "efi=debug"
_BUCKETS, _BAR = 16, 40
_SOURCE = "unaccepted kaslr --help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--seeds", metavar="N", type=number_from(1), default=1000, help="how many seeds, from 0 on (default 1000)"
    )
    parser.add_argument("--memory", metavar="SIZE", action="append", help="guest memory, can be repeated (4G and 64G)")
    parser.add_argument("--protocol", metavar="NAME", action="append", help="v9 or mainline, can be repeated (both)")
    parser.add_argument("--kernel", metavar="FILE", help="bzImage (default: a small one of our own)")
    parser.add_argument("--cmdline", metavar="TEXT", default=_CMDLINE, help=f"command line (default: {_CMDLINE!r})")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Choose for all seeds, for each protocol and size of memory."""
    protocols, sizes = args.protocol or _PROTOCOLS, args.memory or _MEMORY
    spreads = [_spread(args, protocol, memory) for protocol in protocols for memory in sizes]
    if args.json:
        print(
            json_text({"schema": 1, "seeds": args.seeds, "spreads": [_json(spread) for spread in spreads]}, args.json)
        )
        return 0
    columns = ["protocol", "memory", "areas", "slots", "of them unaccepted", "chosen", "of them unaccepted", "stays"]
    print_table(columns, [_row(spread) for spread in spreads])
    for spread in spreads:
        print()
        _print_histogram(spread)
    return 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Where ``seeds`` seeds put the kernel.

    ``places`` are physical addresses with how often they were chosen; ``stays`` counts the seeds for which there was
    no place. ``unaccepted`` is what was not accepted when the choice was made.
    """

    protocol: str
    memory: str
    choice: KaslrChoice
    places: Counter[int]
    virtual: Counter[int]
    stays: int
    unaccepted: RangeSet

    def chosen_unaccepted(self) -> int:
        """Seeds that put the kernel where something has to be accepted for it."""
        size = self.choice.size
        return sum(count for at, count in self.places.items() if self.unaccepted.overlaps(at, at + size))

    def slots_unaccepted(self) -> int:
        """Places where something would have to be accepted."""
        return sum(slots_over(area, self.choice.align, self.choice.size, self.unaccepted) for area in self.choice.areas)

    def histogram(self) -> Iterator[tuple[Range, int, int]]:
        """Ranges of addresses, ascending, with the seeds that put the kernel's start there, and the places."""
        areas, align = self.choice.areas, self.choice.align
        if not areas:
            return
        last = max(area.addr + (area.num - 1) * align for area in areas)
        step = max(1 << (last // _BUCKETS).bit_length(), align)
        for start in range(round_down(min(area.addr for area in areas), step), last + 1, step):
            end = start + step
            chosen = sum(count for at, count in self.places.items() if start <= at < end)
            yield Range(start, end), chosen, sum(_slots_within(area, align, start, end) for area in areas)


def spread(config: BootConfig, memory: str, seeds: int) -> Spread:
    """Boot to the point of choice, and choose with the seeds from 0 on. ``FormatError`` if nothing is chosen."""
    boot, choice = _at_the_choice(config)
    places, virtual, stays = Counter[int](), Counter[int](), 0
    for seed in range(seeds):
        boot.machine.entropy = Entropy(boot.clock, seed)
        physical, offset = choice.place(lambda: kaslr_get_random_long(boot.machine, choice.hash))
        virtual[offset] += 1
        if physical is None:
            stays += 1
        else:
            places[physical] += 1
    unaccepted = boot.host.ram.copy()
    for start, end in boot.sept.mapped():
        unaccepted.remove(start, end)
    return Spread(config.protocol.name, memory, choice, places, virtual, stays, unaccepted)


def slots_over(area: SlotArea, align: int, size: int, ranges: RangeSet) -> int:
    """How many places of an area, for ``size`` bytes each, touch one of ``ranges``."""
    touching = RangeSet()
    for start, end in ranges.within(area.addr, area.addr + (area.num - 1) * align + size):
        first, last = (max(start - size - area.addr, -1) // align + 1, (end - 1 - area.addr) // align)
        touching.add(max(first, 0), min(last, area.num - 1) + 1)
    return touching.total()


class _Chosen(Exception):
    """The boot came to the choice."""


def _at_the_choice(config: BootConfig) -> tuple[Boot, KaslrChoice]:
    boot, stages = Boot(config), stages_of(config)
    found: list[KaslrChoice] = []

    def on_record(record: Record) -> None:
        if isinstance(record.event, KaslrChoice):
            found.append(record.event)
            raise _Chosen

    boot.trace.watchers.append(on_record)
    try:
        boot.run("decompress" if "decompress" in stages else "efi-stub")
    except _Chosen:
        return boot, found[0]
    raise FormatError("--cmdline", found=repr(config.cmdline), expected="one without nokaslr", source=_SOURCE)


def _spread(args: argparse.Namespace, protocol: str, memory: str) -> Spread:
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = [f"--protocol={protocol}", f"--memory={memory}", f"--cmdline={args.cmdline}"]
    words += [f"--kernel={args.kernel}"] if args.kernel is not None else []
    return spread(boot_config(parser.parse_args(words)), memory, args.seeds)


def _slots_within(area: SlotArea, align: int, start: int, end: int) -> int:
    """How many places of an area begin in ``[start, end)``."""
    first, behind = (min(max(-(-(edge - area.addr) // align), 0), area.num) for edge in (start, end))
    return behind - first


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f} %)" if whole else "0"


def _row(spread: Spread) -> list[str]:
    chosen, slots = sum(spread.places.values()), spread.choice.slots
    return [
        spread.protocol, spread.memory, str(len(spread.choice.areas)), str(slots),
        _share(spread.slots_unaccepted(), slots), str(chosen), _share(spread.chosen_unaccepted(), chosen),
        str(spread.stays),
    ]  # fmt: skip


def _print_histogram(spread: Spread) -> None:
    size, physical, virtual = size_text(spread.choice.size), len(spread.places), len(spread.virtual)
    print(f"{spread.protocol}, {spread.memory}: {physical} physical and {virtual} virtual addresses chosen for {size}")
    rows = list(spread.histogram())
    top = max((chosen for _, chosen, _ in rows), default=0)
    for place, chosen, slots in rows:
        bar = "#" * (chosen * _BAR // top) if top else ""
        print(f"{place.start:#014x}-{place.end - 1:#014x} {slots:8} slots {chosen:6} chosen {bar}".rstrip())


def _json(spread: Spread) -> dict[str, Any]:
    choice = spread.choice
    return {
        "protocol": spread.protocol,
        "memory": spread.memory,
        "size": choice.size,
        "align": choice.align,
        "areas": [{"addr": area.addr, "num": area.num} for area in choice.areas],
        "slots": choice.slots,
        "slots_unaccepted": spread.slots_unaccepted(),
        "chosen": sum(spread.places.values()),
        "chosen_unaccepted": spread.chosen_unaccepted(),
        "stays": spread.stays,
        "physical": [{"addr": at, "count": count} for at, count in sorted(spread.places.items())],
        "virtual": [{"addr": at, "count": count} for at, count in sorted(spread.virtual.items())],
    }


if __name__ == "__main__":
    script("kaslr")
