"""``--until``: where a boot is to stop, short of its end."""

from __future__ import annotations

import argparse
from dataclasses import replace

from tools.pipeline import STAGE_NAMES, BootConfig, stages_of

_HELP = (
    f"stop after a stage ({', '.join(STAGE_NAMES)}), or, with --run kernel, when the kernel prints TEXT; "
    "`accept` stops at its first accept"
)


def add_until_option(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the option ``--until``."""
    parser.add_argument("--until", metavar="STAGE|TEXT", help=_HELP)
    parser.set_defaults(usage_error=parser.error)


def resolve_until(args: argparse.Namespace, config: BootConfig) -> tuple[BootConfig, str | None]:
    """The configuration, and the stage to stop after; None if it is no stage, and the kernel's code is to stop."""
    until, stages = args.until, tuple(stages_of(config))
    if until is None or until in stages:
        return config, until
    if config.run != "kernel":
        args.usage_error(f"--until: {until!r} is no stage: {', '.join(stages)}")
    return replace(config, until=until), None
