"""What the stub reads from the command line."""

import pytest

from bootstub.stub_options import StubOptions, parse_options

QUIET, DEBUG = 4, 10


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("", {}),
        ("root=/dev/vda1 console=ttyS0", {}),
        ("nokaslr quiet", {"nokaslr": True, "loglevel": QUIET}),
        ("noinitrd", {"noinitrd": True}),
        ("nokaslr=0 quiet= noinitrd=n", {"nokaslr": True, "loglevel": QUIET, "noinitrd": True}),
        ("efi=debug quiet", {"loglevel": QUIET}),
        ("quiet efi=debug", {"loglevel": DEBUG}),
        ("efi=debug,nosoftreserve", {"loglevel": DEBUG, "soft_reserve": False}),
        ("efi=nosoftreserve efi=", {}),
        ("efi=nosoftreserve efi", {"soft_reserve": False}),
        ("efi=nosoftreserved", {}),
        ("efi=disable_early_pci_dma efi=x", {"disable_pci_dma": True}),
        ("efi=disable_early_pci_dma,no_disable_early_pci_dma", {}),
        ("mem_encrypt=off mem_encrypt=on mem_encrypt", {"mem_encrypt": True}),
        ("mem_encrypt=on mem_encrypt=off", {}),
        ("mem_encrypt=on,off", {"mem_encrypt": True}),
        ("-- nokaslr", {}),
        ("--=x nokaslr", {"nokaslr": True}),
        ('x="nokaslr quiet" y', {}),
        ('"nokaslr"', {"nokaslr": True}),
        ('"efi=debug"', {"loglevel": DEBUG}),
        ('x="not closed nokaslr', {}),
        ("x" * 2040 + " nokaslr", {}),
    ],
)
def test_options(line, options):
    """Words in quotes are one argument; an option with a value is the option all the same."""
    assert parse_options(line.encode()) == StubOptions(**options)


@pytest.mark.parametrize(
    ("line", "override"),
    [
        ("memmap=1M$16M mem=2G", "mem"),
        ("memmap=1M$16M", "memmap"),
        ("hugepages=4 memmap=x", "memmap"),
        ("quiet\thugepages=4", "hugepages"),
        ("mem memmap hugepagesz=1G", None),
        ("xmem=1G mem=2G", None),
        ('x="a mem=2G"', "mem"),
        ("-- mem=2G", "mem"),
    ],
)
def test_memmap_override(line, override):
    """The first of three options whose first occurrence begins a word, whatever is around it."""
    assert parse_options(line.encode()).memmap_override == override
