"""Hostile inputs out of sound ones: bytes, numbers and pieces are changed, and the end is cut off."""

from __future__ import annotations

import random

_SIZES = (1, 2, 4, 8)
_HEAD = 0x400
"""Headers are here, and half of all changes."""
_MAX_PIECE = 256


def mutated(seeds: list[bytes], rng: random.Random) -> bytes:
    """One of ``seeds`` with up to six changes; ``rng`` decides everything."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(0, 6)):
        _CHANGES[rng.randrange(len(_CHANGES))](data, rng)
    return bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    limit = min(len(data), _HEAD) if rng.random() < 0.5 else len(data)
    return rng.randrange(limit) if limit else 0


def _bit(data: bytearray, rng: random.Random) -> None:
    if data:
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random) -> None:
    if data:
        data[_place(data, rng)] = rng.randrange(256)


def _number(data: bytearray, rng: random.Random) -> None:
    """A number that parsers stumble over: a limit, the size of the input, a little more or less than was there."""
    size, at = rng.choice(_SIZES), _place(data, rng)
    old = int.from_bytes(data[at : at + size], "little")
    edges = (0, 1, (1 << 8 * size) - 1, 1 << 8 * size - 1, len(data), at, old + 1, old - 1, old << 1, 0x1000, 1 << 52)
    value = rng.choice(edges) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, rng.choice(("little", "little", "big")))


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _remove(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    del data[at : at + rng.randrange(_MAX_PIECE)]


def _repeat(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    data[at:at] = data[at : at + rng.randrange(_MAX_PIECE)] * rng.choice((1, 1, 1, 8))


def _move(data: bytearray, rng: random.Random) -> None:
    start, at = _place(data, rng), _place(data, rng)
    piece = data[start : start + rng.randrange(_MAX_PIECE)]
    data[at : at + len(piece)] = piece


_CHANGES = (_bit, _byte, _number, _number, _number, _number, _cut, _remove, _repeat, _move)
