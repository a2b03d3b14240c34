"""``unaccepted explore``: one boot for every pair of a call and a fault that fits it; what does the guest do?

Places are the calls of the plain boot of the given options: each TDG.MEM.PAGE.ACCEPT (its TD exits are met by the
faults ``withhold`` and ``size-mismatch`` of that call), each TDG.VP.VMCALL, and the HOB list. Of equal accepts in a run
the first, second, middle and last are places; with ``--every`` all are. Other TDCALLs stay inside the TDX module, which
is trusted: no fault fits them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from guest.errors import FormatError
from guest.trace import Record
from guest.units import SZ_4G
from tdx.events import TdCall, TdVmCall
from tdx.faults import KINDS, Place
from tdx.leaves import Leaf, SubFunction
from tools.arguments import add_jobs_option, number_from
from tools.cli import script
from tools.config import add_options, boot_config
from tools.explained import EXPLAINED, explain
from tools.journal import Journal
from tools.parallel import in_parallel
from tools.pipeline import BootConfig
from tools.render import print_table
from tools.trial import OUTCOMES, Stages, Trial, contents, try_fault

_ACCEPT = Leaf.TDG_MEM_PAGE_ACCEPT.spec_name
_SOURCE = "unaccepted explore --help"
_ALL = 1 << 32
"""More pairs than there are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_options(parser)
    parser.add_argument("--every", action="store_true", help="every accept of a run, not four of it")
    parser.add_argument("--limit", metavar="N", type=number_from(1), default=_ALL, help="run at most N pairs")
    add_jobs_option(parser)
    parser.add_argument("--resume", metavar="FILE", help="keep finished pairs in FILE, and leave out those in it")
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON")


def run(args: argparse.Namespace) -> int:
    """Explore; 1 if a guest used memory that it must not, and nothing explains it."""
    config = boot_config(args)
    if config.faults:
        raise FormatError("--fault", found="with explore", expected="none: explore has its own", source=_SOURCE)
    with ExitStack() as stack:
        journal = Journal(Path(args.resume), config, stack) if args.resume is not None else None
        trials = explore(
            config, every=args.every, limit=args.limit, jobs=args.jobs, journal=journal, progress=_progress(stack)
        )
    if args.json is not None:
        Path(args.json).write_text(json.dumps(report(trials), indent=2) + "\n")
    print_trials(trials)
    return 1 if any(trial.outcome == "violation" for trial in trials) else 0


def explore(
    config: BootConfig, *, stages: Stages | None = None, every: bool = False, limit: int = _ALL, jobs: int = 1,
    journal: Journal | None = None, progress: Callable[[int], Callable[[], None]] | None = None,
) -> list[Trial]:  # fmt: skip
    """The trials of all pairs, the plain boot first. ``stages`` take the place of the boot's own stages.

    Trials that ``journal`` has are not run again; new ones go into it. ``progress`` is told how many will be run, and
    gives what is called after each.
    """
    boot, plain = try_fault(config, stages, None, None)
    done = journal.trials if journal is not None else {}
    rules = list(pairs(boot.trace.records, every))
    wanted = [rule for rule in rules if rule not in done][:limit]
    trials = [plain, *(done[rule] for rule in rules if rule in done)]
    tick = progress(len(wanted)) if progress is not None else lambda: None
    one = partial(_try, config, stages, contents(boot))
    for trial in in_parallel(one, iter(wanted), jobs):
        if journal is not None:
            journal.add(trial)
        trials.append(trial)
        tick()
    return trials


def _try(config: BootConfig, stages: Stages | None, expected: Any, rule: str) -> Trial:
    return try_fault(config, stages, rule, expected)[1]


def pairs(records: Iterable[Record], every: bool) -> Iterator[str]:
    """The rules to try, by the calls of a plain boot, in their order; the HOB list comes first."""
    for kind in (kind for kind in KINDS.values() if kind.place is Place.HOB):
        yield f"{kind.name}@gpa=0-{SZ_4G:#x}"
        yield f"{kind.name}@gpa={SZ_4G:#x}-0x10000000000000"
    accepts = vmcalls = 0
    for event in (record.event for record in records):
        if isinstance(event, TdCall) and event.leaf == _ACCEPT:
            for number in range(event.count) if every else sorted(_few(event.count)):
                yield from _fitting(Place.ACCEPT, f"accept={accepts + number + 1}", event.rcx & 7)
            accepts += event.count
        if isinstance(event, TdVmCall):
            vmcalls += 1
            if event.sub_function == SubFunction.MapGPA.spec_name:
                yield from _fitting(Place.MAPGPA, f"tdvmcall={vmcalls}")
            yield from _fitting(Place.TDVMCALL, f"tdvmcall={vmcalls}")


def _few(count: int) -> set[int]:
    return {0, min(1, count - 1), count // 2, count - 1}


def _fitting(place: Place, when: str, level: int | None = None) -> Iterator[str]:
    for kind in KINDS.values():
        if kind.place is place and (level is None or level in kind.levels):
            yield f"{kind.name}@{when}"


def print_trials(trials: list[Trial]) -> None:
    """A table by kind of fault, why the guest does what it does, and each violation that nothing explains."""
    counts = Counter((trial.kind, trial.outcome) for trial in trials)
    kinds = list(dict.fromkeys(trial.kind for trial in trials))
    rows = [[kind, *(str(counts[kind, outcome]) for outcome in OUTCOMES)] for kind in kinds]
    sums = Counter(trial.outcome for trial in trials)
    rows.append(["sum", *(str(sums[outcome]) for outcome in OUTCOMES)])
    print_table(["fault", *OUTCOMES], rows)
    for trial in {(trial.kind, trial.reasons): trial for trial in trials}.values():
        for reason in trial.reasons:
            if (why := explain(trial.kind, reason)) is not None:
                print(f"explained: {trial.kind}, {reason}: {why.text} [{why.source}]")
    for trial in trials:
        if trial.outcome == "violation":
            print(f"violation: {trial.rule or 'plain boot'}: {'; '.join(trial.findings) or trial.text}")


def report(trials: list[Trial]) -> dict[str, Any]:
    """All results as JSON values."""
    return {
        "schema": 1,
        "outcomes": {outcome: sum(trial.outcome == outcome for trial in trials) for outcome in OUTCOMES},
        "explained": [{"fault": e.kind, "reason": e.reason, "text": e.text, "source": e.source} for e in EXPLAINED],
        "trials": [trial.as_dict() for trial in trials],
    }


def _progress(stack: ExitStack) -> Callable[[int], Callable[[], None]] | None:
    """A bar on a terminal; None elsewhere."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = stack.enter_context(
        Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
                 console=Console(stderr=True))
    )  # fmt: skip

    def start(total: int) -> Callable[[], None]:
        task = bar.add_task("boots", total=total)
        return lambda: bar.advance(task)

    return start


if __name__ == "__main__":
    script("explore")
