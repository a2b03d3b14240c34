"""``unaccepted judge --kernel vmlinuz``: our stub and the image's own code on the same random set-ups.

A difference is shown with the set-up that makes it; ``--save DIR`` keeps that as a case, ``stub.NUMBER.jsonl``, with
what the real stub did, for ``unaccepted conform --ours``.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from guest.errors import BootError
from tools.cli import script
from tools.config import read_file
from tools.judge_maps import set_up
from tools.parallel import in_parallel
from tools.progress import counted
from tools.render import add_json_option, json_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--kernel", metavar="FILE", required=True, help="the kernel image whose stub is the judge")
    parser.add_argument("--maps", metavar="N", type=int, default=200, help="how many set-ups (default 200)")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="which set-ups (default 1)")
    parser.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count() or 1, help="processes (default: CPUs)")
    parser.add_argument("--save", metavar="DIR", type=Path, help="write set-ups that differ to this directory")
    add_json_option(parser)
    parser.set_defaults(usage_error=parser.error)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """``case`` is the set-up with what the real stub did; ``left_out`` says why nothing was compared."""

    case: dict[str, Any]
    differences: list[str] = field(default_factory=list)
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class _Judge:
    """Runs the set-up with a number. It goes to other processes; each reads the image once."""

    kernel: str
    seed: int

    def __call__(self, number: int) -> _Verdict:
        from tools.conformance.record_stub import record, run_stub
        from tools.conformance.stub import differences

        case, image = set_up(number, self.seed), _image(self.kernel)
        try:
            real = record(case, image)
        except BootError as death:
            return self._both_die(case, image, death)
        try:
            ours = run_stub(case, image, ours=True)
        except BootError as error:
            return _Verdict(real, [f"our stub stopped: {error}"])
        return _Verdict(real, differences(ours, real["out"], ours=True))

    def _both_die(self, case: dict[str, Any], image: bytes, death: BootError) -> _Verdict:
        """The real stub died: so must ours."""
        from tools.conformance.record_stub import run_stub

        try:
            run_stub(case, image, ours=True)
        except BootError:
            return _Verdict(case, left_out=f"both die: {death}")
        return _Verdict(case, [f"stop: found a guest that lives, expected {death}"])


@lru_cache(maxsize=1)
def _image(kernel: str) -> bytes:
    return read_file(kernel)


def run(args: argparse.Namespace) -> int:
    """Run all set-ups; 1 if any differs."""
    if args.jobs < 1 or args.maps < 1:
        args.usage_error("--jobs and --maps take numbers from 1 on")
    from bootstub.bzimage import parse_bzimage
    from cpu.binding import self_test

    parse_bzimage(_image(args.kernel))
    self_test()
    differing, left_out = [], []
    verdicts = in_parallel(_Judge(args.kernel, args.seed), iter(range(args.maps)), args.jobs, 1)
    for verdict in counted("maps", verdicts):
        if verdict.left_out:
            left_out.append(verdict)
        elif verdict.differences:
            differing.append(verdict)
            _save(args.save, verdict.case)
    _report(args, differing, left_out)
    return 1 if differing else 0


def _save(directory: Path | None, case: dict[str, Any]) -> None:
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"stub.{case['id']}.jsonl").write_text(json.dumps(case) + "\n", encoding="utf-8")


def _report(args: argparse.Namespace, differing: list[_Verdict], left_out: list[_Verdict]) -> None:
    agree = args.maps - len(differing) - len(left_out)
    if args.json:
        rows = [{"set_up": _set_up(v), "differences": v.differences} for v in differing]
        out = [{"id": v.case["id"], "reason": v.left_out} for v in left_out]
        report = {"schema": 1, "maps": args.maps, "seed": args.seed, "agree": agree, "differing": rows, "left_out": out}
        print(json_text(report, args.json))
        return
    for verdict in differing:
        print(f"map {verdict.case['id']} {verdict.case['profile']}: {json.dumps(_set_up(verdict))}")
        for line in verdict.differences:
            print(f"    {line[:300]}")
    for verdict in left_out:
        print(f"map {verdict.case['id']} {verdict.case['profile']}: {verdict.left_out}")
    print(
        f"{args.maps} maps, seed {args.seed}: {agree} agree, {len(differing)} differ, {len(left_out)} end both guests"
    )


def _set_up(verdict: _Verdict) -> dict[str, Any]:
    """The set-up alone."""
    from tools.conformance.record_stub import SET_UP

    return {name: verdict.case[name] for name in SET_UP if name in verdict.case}


if __name__ == "__main__":
    script("judge")
