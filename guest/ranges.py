"""Half-open address ranges: a value for every address, kept as sorted runs.

The cost of an operation depends on the number of runs it meets, never on the number of pages.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

TOP = 1 << 64
"""End of every address space, exclusive."""


class Range(NamedTuple):
    """The addresses ``start <= address < end``."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


def _check(start: int, end: int) -> None:
    if not 0 <= start <= end <= TOP:
        raise ValueError(f"range [{start:#x}, {end:#x}): expected 0 <= start <= end <= 2^64")


class RangeMap(Generic[T]):
    """A value for each address below 2^64; neighbouring runs of equal value are one run."""

    def __init__(self, default: T) -> None:
        self._starts = [0]
        self._values = [default]

    def __getitem__(self, address: int) -> T:
        return self._values[bisect_right(self._starts, address) - 1]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeMap):
            return NotImplemented
        return self._starts == other._starts and self._values == other._values

    __hash__ = None  # type: ignore[assignment]  # mutable

    def run_at(self, address: int) -> tuple[int, int, T]:
        """The maximal run ``(start, end, value)`` that holds ``address``."""
        index = bisect_right(self._starts, address) - 1
        end = self._starts[index + 1] if index + 1 < len(self._starts) else TOP
        return self._starts[index], end, self._values[index]

    def runs(self, start: int = 0, end: int = TOP) -> Iterator[tuple[int, int, T]]:
        """The runs that meet ``[start, end)``, ascending, clipped to it. Do not assign while iterating."""
        _check(start, end)
        index = bisect_right(self._starts, start) - 1
        while start < end:
            index += 1
            stop = self._starts[index] if index < len(self._starts) else TOP
            stop = min(stop, end)
            yield start, stop, self._values[index - 1]
            start = stop

    def assign(self, start: int, end: int, value: T) -> None:
        """Give ``value`` to every address of ``[start, end)``."""
        _check(start, end)
        if start == end:
            return
        starts, values = self._starts, self._values
        first = bisect_left(starts, start)
        last = bisect_left(starts, end)
        if first == last and values[first - 1] == value:
            return
        new_starts, new_values = [], []
        if first == 0 or values[first - 1] != value:
            new_starts.append(start)
            new_values.append(value)
        after = values[last - 1] if last == len(starts) or starts[last] != end else values[last]
        if last < len(starts) and starts[last] == end:
            last += 1
        if end < TOP and after != value:
            new_starts.append(end)
            new_values.append(after)
        starts[first:last] = new_starts
        values[first:last] = new_values

    def move_border(self, start: int, end: int, before: T, after: T) -> bool:
        """Give ``after`` to ``[start, end)`` if it begins a longer run of ``before`` behind a run of ``after``.

        False, and nothing is changed, if it does not. The values must be these very objects.
        """
        starts, values = self._starts, self._values
        index = bisect_left(starts, start)
        if index == 0 or index == len(starts) or values[index] is not before or values[index - 1] is not after:
            return False
        if starts[index] != start or end >= (starts[index + 1] if index + 1 < len(starts) else TOP):
            return False
        starts[index] = end
        return True


class RangeSet:
    """A set of addresses, kept as disjoint ranges that do not touch."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._map = RangeMap(False)
        for start, end in ranges:
            self.add(start, end)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._map == other._map

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RangeSet({', '.join(map(str, self))})"

    def __contains__(self, address: int) -> bool:
        return self._map[address]

    def __iter__(self) -> Iterator[Range]:
        return self.within(0, TOP)

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None

    def add(self, start: int, end: int) -> None:
        """Put every address of ``[start, end)`` into the set."""
        self._map.assign(start, end, True)

    def remove(self, start: int, end: int) -> None:
        """Take every address of ``[start, end)`` out of the set."""
        self._map.assign(start, end, False)

    def within(self, start: int, end: int) -> Iterator[Range]:
        """The ranges of the set inside ``[start, end)``, ascending, clipped to it."""
        return (Range(s, e) for s, e, present in self._map.runs(start, end) if present)

    def gaps(self, start: int, end: int) -> Iterator[Range]:
        """The ranges of ``[start, end)`` that are not in the set, ascending."""
        return (Range(s, e) for s, e, present in self._map.runs(start, end) if not present)

    def covers(self, start: int, end: int) -> bool:
        """True if every address of ``[start, end)`` is in the set."""
        return start == end or (self._map[start] and self._map.run_at(start)[1] >= end)

    def end_at(self, address: int) -> int:
        """Where the range that holds ``address`` ends; ``address`` itself if none does."""
        _, end, present = self._map.run_at(address)
        return end if present else address

    def overlaps(self, start: int, end: int) -> bool:
        """True if some address of ``[start, end)`` is in the set."""
        _check(start, end)
        _, stop, present = self._map.run_at(start)
        return start < end and (present or stop < end)

    def total(self) -> int:
        """Number of addresses in the set."""
        return sum(r.size for r in self)

    def copy(self) -> RangeSet:
        """An independent set with the same addresses."""
        return RangeSet(self)
