"""A long run: ``python -m tests.fuzz --inputs 200000``. Inputs come from a seed, or from atheris if it is there.

An input that anything but a ``BootError`` comes out of, that takes longer than two seconds, or that makes the process
larger than 2 GiB, is written to a file, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.mutate import mutated

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

_MEMORY_LIMIT = 2 << 20
"""KiB of resident memory."""
_REPORT = 10_000
_PACKAGES = ["guest", "tdx", "firmware", "bootstub", "tools"]
"""What atheris counts the coverage of."""
_SLOW = 2.0
"""Seconds of processor time that no input may take."""


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=200_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="other seeds make other inputs")
    parser.add_argument("--target", metavar="NAME", help="one target alone, such as bzImage")
    parser.add_argument("--atheris", action="store_true", help="let atheris look for inputs, guided by coverage")
    parser.add_argument("--save", type=Path, default=Path(), metavar="DIR", help="where inputs that fail are written")
    args = parser.parse_args()
    if args.atheris:
        return _atheris(args.target, args.inputs)
    return _random(_targets(args.target), args.inputs, args.seed, args.save)


def _targets(name: str | None) -> list[Target]:
    """All targets, or that of a name."""
    from tests.fuzz.targets import all_targets

    names = [target.name for target in all_targets()]
    if name not in (None, *names):
        sys.exit(f"no target {name!r}, but {', '.join(names)}")
    return [target for target in all_targets() if name in (None, target.name)]


def _random(targets: list[Target], inputs: int, seed: int, save: Path) -> int:
    start, sound, refused, failed = time.monotonic(), Counter[str](), Counter[str](), 0
    shares = [target.share for target in targets]
    for number in range(inputs):
        if number and number % _REPORT == 0:
            print(f"{number} inputs, {failed} failed", file=sys.stderr, flush=True)
        rng = random.Random(seed << 40 | number)
        (target,) = rng.choices(targets, shares)
        data = mutated(target.seeds, rng)
        begin = time.process_time()
        try:
            (sound if target.run(data) else refused)[target.name] += 1
            error = _used_too_much(time.process_time() - begin)
        except Exception as wrong:
            error = f"{type(wrong).__name__}: {wrong}"
        if error is not None:
            failed += 1
            path = save / f"fuzz-{target.name.replace(' ', '-')}-{seed}-{number}"
            path.write_bytes(data)
            print(f"{target.name}: {error[:200]}: {path}", flush=True)
    for target in targets:
        print(f"{target.name:<24}{sound[target.name]:>8} read {refused[target.name]:>8} refused")
    print(f"{inputs} inputs in {time.monotonic() - start:.0f} s, {failed} failed")
    return int(failed > 0)


def _used_too_much(seconds: float) -> str | None:
    if seconds > _SLOW:
        return f"{seconds:.1f} s"
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{largest} KiB of memory" if largest > _MEMORY_LIMIT else None


def _atheris(name: str | None, inputs: int) -> int:
    """The first byte of an input chooses the target, the others are for it. It begins with the sound inputs."""
    try:
        import atheris
    except ImportError:
        print("no module atheris: pip install atheris", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=_PACKAGES):
        targets = _targets(name)

    def one_input(data: bytes) -> None:
        if data:
            targets[data[0] % len(targets)].run(data[1:])

    corpus = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for number, target in enumerate(targets):
        for index, seed in enumerate(target.seeds):
            (corpus / f"{number}-{index}").write_bytes(bytes([number]) + seed)
    limits = (f"-runs={inputs}", "-rss_limit_mb=4096", "-timeout=20", "-max_len=16384")
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one_input)
    atheris.Fuzz()  # ends the process
    return 0


if __name__ == "__main__":
    sys.exit(main())
