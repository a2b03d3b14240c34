"""What the stub reads from the command line."""

import pytest

from bootstub.stub_options import StubOptions, parse_options


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("", {}),
        ("root=/dev/vda1 console=ttyS0", {}),
        ("nokaslr quiet", {"nokaslr": True, "quiet": True}),
        ("noinitrd", {"noinitrd": True}),
        ("nokaslr=1 quiet=", {}),
        ("efi=debug,nosoftreserve", {"soft_reserve": False}),
        ("efi=nosoftreserved", {}),
        ("mem=2G memmap=1M$16M", {"memmap_override": "memmap"}),
        ("hugepages=4", {"memmap_override": "hugepages"}),
        ("mem", {}),
        ('x="nokaslr quiet" y', {}),
        ('"nokaslr"', {"nokaslr": True}),
        ('x="not closed nokaslr', {}),
    ],
)
def test_options(line, options):
    """Words in quotes are one argument; an option with a value is not the option without."""
    assert parse_options(line) == StubOptions(**options)
