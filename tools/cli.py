"""The command ``unaccepted VERB``: finds the verb's module, runs it, and turns errors into one line.

Its exit status stands in the help (``_STATUS``).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from guest.errors import BootError

VERBS = {
    "boot": "boot a guest through every stage; print its log and a table of stages",
    "step": "boot a guest stage by stage, or to an event, and look at it",
    "dump": "show a structure: boot-params, tdvf, hob, acpi, kernel",
    "diff": "compare two boots, and say who wrote what differs",
    "explore": "boot once for every call and every fault of a hostile host; what does the guest do?",
    "kaslr": "where KASLR puts the kernel, over many seeds; how much of that is unaccepted?",
    "map": "show, convert and compare memory maps",
    "conform": "run recorded answers of the real code through our stages",
    "replay": "run captured boots of real kernels through our kernel stages and compare",
    "judge": "run our stub and a real one on random memory maps; do they do the same?",
}
"""Every verb has a module of its own in tools/, with ``add_arguments(parser)`` and ``run(args)``."""
_STATUS = (
    "Exit status: 0 done; 1 input refused, the guest did not come through, or what was compared differs; "
    "2 wrong usage; 130 interrupted by Ctrl-C."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="unaccepted", description="The boot of a TD, byte by byte.", epilog=_STATUS)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + "." * (not text.endswith("?")))
        if verb in arguments:  # the others are not imported
            import_module(f"tools.{verb}").add_arguments(sub)
    args = parser.parse_args(arguments)
    try:
        status = int(import_module(f"tools.{args.verb}").run(args))
        sys.stdout.flush()  # here, where a reader that has gone is known
        return status
    except BootError as error:
        return _refuse(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("unaccepted: interrupted", file=sys.stderr)
        return 130


def script(verb: str) -> None:
    """Run one verb as a program of its own: ``python -m tools.boot``."""
    sys.exit(main([verb, *sys.argv[1:]]))


def _refuse(message: str) -> int:
    line = "".join(character if character.isprintable() else "?" for character in " ".join(message.split()))
    print(f"unaccepted: error: {line}", file=sys.stderr)
    return 1


class _Version(argparse.Action):
    """Prints the version; reading it from the installed package is too slow to do it beforehand."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            text = version("unaccepted")
        except PackageNotFoundError:
            text = "(not installed)"
        print(f"unaccepted {text}, kernel rules: v9, mainline")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
