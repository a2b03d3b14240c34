"""No command imports what it does not need: that would be half of its time."""

import subprocess
import sys

import pytest

_RUN = """
import sys
from tools.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""
_MAP = "tests/samples/maps/worst-case-4-pib.toml"


def modules_of(*arguments: str) -> set[str]:
    """The modules that a command has imported when it is done."""
    done = subprocess.run([sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, check=False)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("arguments", "not_needed"),
    [
        (["--help"], {"construct", "dataclasses", "json", "tools.output"}),
        (["dump", "boot-params", "/dev/null"], {"elftools", "firmware", "tdx", "kernel.kernel", "tools.pipeline"}),
        (["map", _MAP], {"elftools", "kernel.kernel", "firmware.boot_services", "tools.pipeline", "tools.render"}),
        (["boot", "--until", "setup-arch"], {"elftools.dwarf", "rich", "matplotlib", "unicorn", "tools.plot"}),
    ],
    ids=["help", "dump", "map", "boot"],
)
def test_imports(arguments, not_needed):
    """A module that another verb needs is not there, nor what is in a package that this one uses a part of."""
    found = modules_of(*arguments)
    assert "tools.cli" in found
    assert not found & not_needed
