"""``unaccepted judge --kernel vmlinuz``: our code and the image's own on the same random set-ups.

A difference is shown with the set-up that makes it; ``--save DIR`` keeps that as a case, ``stub.NUMBER.jsonl``, with
what the real code did, for ``unaccepted conform --ours``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from guest.units import U64_MAX
from tools.arguments import add_jobs_option, number_from
from tools.cli import script
from tools.files import read_file
from tools.parallel import in_parallel
from tools.progress import counted
from tools.render import add_json_option, json_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--kernel", metavar="FILE", required=True, help="the kernel image whose code is the judge")
    parser.add_argument(
        "--decompressor", action="store_true", help="its decompressor, entered by a boot loader, not its EFI stub"
    )
    parser.add_argument(
        "--full", action="store_true", help="with --decompressor: let it unpack the kernel, and compare that (slow)"
    )
    parser.add_argument("--maps", metavar="N", type=number_from(1), default=200, help="how many set-ups (default 200)")
    parser.add_argument(
        "--first", metavar="N", type=number_from(0), default=0, help="number of the first set-up (default 0)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=number_from(0, U64_MAX), default=1, help="which set-ups (default 1)"
    )
    add_jobs_option(parser)
    parser.add_argument("--save", metavar="DIR", type=Path, help="write set-ups that differ to this directory")
    add_json_option(parser)
    parser.set_defaults(usage_error=parser.error)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """``case`` is the set-up with what the real code did; ``death`` is how both guests died, if they did."""

    case: dict[str, Any]
    differences: list[str] = field(default_factory=list)
    death: str | None = None


@dataclass(frozen=True, slots=True)
class _JudgeOfStub:
    """Runs the set-up with a number. It goes to other processes; each reads the image once."""

    kernel: str
    seed: int

    def __call__(self, number: int) -> _Verdict:
        from tools.conformance.record_stub import record, run_stub
        from tools.conformance.stub import differences
        from tools.judge_maps import set_up

        case, image = set_up(number, self.seed), _image(self.kernel)
        real = record(case, image, to_death=True)
        ours = run_stub(case, image, ours=True, to_death=True)
        return _Verdict(real, differences(ours, real["out"], ours=True), real["out"]["died"])


@dataclass(frozen=True, slots=True)
class _JudgeOfDecompressor:
    """The same for a decompressor; with ``full``, the kernel that it leaves is compared too."""

    kernel: str
    seed: int
    full: bool

    def __call__(self, number: int) -> _Verdict:
        from bootstub.bzimage import parse_bzimage
        from tools.conformance.decompressor import comparable, differences
        from tools.conformance.record_decompressor import record, run_decompressor
        from tools.judge_decompressor_maps import set_up

        image = _image(self.kernel)
        case = set_up(number, self.seed, parse_bzimage(image).init_size)
        real = record(case, image, self.full)
        ours = run_decompressor(real, image, ours=True, full=self.full)
        return _Verdict(real, differences(ours, comparable(real), ours=True), real["died"])


@lru_cache(maxsize=1)
def _image(kernel: str) -> bytes:
    return read_file(kernel)


def run(args: argparse.Namespace) -> int:
    """Run all set-ups; 1 if any differs."""
    if args.full and not args.decompressor:
        args.usage_error("--full goes with --decompressor")
    from bootstub.bzimage import parse_bzimage
    from cpu.binding import self_test

    parse_bzimage(_image(args.kernel))
    self_test()
    differing, dead = [], []
    numbers = iter(range(args.first, args.first + args.maps))
    for verdict in counted("maps", in_parallel(_judge(args), numbers, args.jobs, 1)):
        if verdict.differences:
            differing.append(verdict)
            _save(args, verdict.case)
        elif verdict.death is not None:
            dead.append(verdict)
    _report(args, differing, dead)
    return 1 if differing else 0


def _judge(args: argparse.Namespace) -> _JudgeOfStub | _JudgeOfDecompressor:
    if args.decompressor:
        return _JudgeOfDecompressor(args.kernel, args.seed, args.full)
    return _JudgeOfStub(args.kernel, args.seed)


def _save(args: argparse.Namespace, case: dict[str, Any]) -> None:
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        family = "decompressor" if args.decompressor else "stub"
        (args.save / f"{family}.{case['id']}.jsonl").write_text(json.dumps(case) + "\n", encoding="utf-8")


def _report(args: argparse.Namespace, differing: list[_Verdict], dead: list[_Verdict]) -> None:
    agree = args.maps - len(differing)
    if args.json:
        rows = [{"set_up": _set_up(v), "differences": v.differences} for v in differing]
        deaths = [{"id": v.case["id"], "death": v.death} for v in dead]
        report = {"schema": 1, "maps": args.maps, "seed": args.seed, "agree": agree, "differing": rows, "dead": deaths}
        print(json_text(report, args.json))
        return
    for verdict in differing:
        print(f"map {verdict.case['id']} {verdict.case['profile']}: {json.dumps(_set_up(verdict))}")
        for line in verdict.differences:
            print(f"    {line[:300]}")
    for verdict in dead:
        print(f"map {verdict.case['id']} {verdict.case['profile']}: both guests die alike: {verdict.death}")
    print(f"{args.maps} maps, seed {args.seed}: {agree} agree, {len(differing)} differ, {len(dead)} end both guests")


def _set_up(verdict: _Verdict) -> dict[str, Any]:
    """The set-up alone."""
    from tools.conformance import decompressor_set_up, record_stub

    names = {*record_stub.SET_UP, *decompressor_set_up.SET_UP}
    return {name: value for name, value in verdict.case.items() if name in names}


if __name__ == "__main__":
    script("judge")
