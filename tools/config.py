"""What a boot can be told: the same options on the command line and in a TOML file.

``--config FILE.toml`` gives defaults; what stands on the command line wins. A key of the file is the option
without its dashes (``host-page-size = "4K"``); an unknown key is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guest.errors import FormatError
from guest.units import PAGE_SIZE, SZ_1G, memparse
from tools.pipeline import DEFAULT_CMDLINE, REAL_KERNEL_CMDLINE, BootConfig

_MAX_FILE = SZ_1G
_MAX_MEMORY = 1 << 50
_MAX_TIMEOUT = 1 << 20
_MAX_SEED = (1 << 64) - 1
_VE_NAMES = ("cpuid", "io", "msr", "hlt")
_MAX_REAL_MEMORY = 1 << 38
_SOURCE = "unaccepted boot --help"
_HOST_LEVELS = {"4K": 0, "2M": 1}


@dataclass(frozen=True, slots=True)
class Option:
    """An option: its name, what its value is called, its help, the field of ``BootConfig`` and how to read it."""

    name: str
    metavar: str
    help: str
    field: str
    read: Callable[[str], Any]


def read_file(path: str) -> bytes:
    """The bytes of a file, up to 1 GiB. ``OSError`` as it comes; a larger file is a ``FormatError``."""
    if "\0" in path:
        raise FormatError(repr(path), found="a NUL character", expected="the name of a file", source=_SOURCE)
    size = Path(path).stat().st_size
    if size > _MAX_FILE:
        raise FormatError(path, found=f"{size} bytes", expected=f"at most {_MAX_FILE}", source=_SOURCE)
    return Path(path).read_bytes()


def read_text(path: str) -> str:
    """The text of a file, as UTF-8; bytes that are none become replacement characters."""
    return read_file(path).decode("utf-8", errors="replace")


def parse_memory(text: str) -> int:
    """A size of guest memory in bytes, with a suffix K, M, G or T: whole pages, up to 1 PiB."""
    size, rest = memparse(text)
    if rest or not 0 < size <= _MAX_MEMORY or size % PAGE_SIZE:
        raise FormatError("--memory", found=repr(text), expected="whole 4 KiB pages, such as 4G", source=_SOURCE)
    return size


def _choice(option: str, choices: dict[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text not in choices:
            raise FormatError(option, found=repr(text), expected=" or ".join(choices), source=_SOURCE)
        return choices[text]

    return read


def _firmware(path: str) -> Any:
    from firmware.tdvf import parse_tdvf

    return parse_tdvf(read_file(path))


def _kernel(path: str) -> bytes:
    from bootstub.bzimage import parse_bzimage

    data = read_file(path)
    parse_bzimage(data)
    return data


def _efi_map(path: str) -> Any:
    from tools.efi_map import parse_efi_map

    return parse_efi_map(read_text(path), path)


def _cmdline(text: str) -> str:
    """The command line; bytes of the shell's that are no UTF-8 reach Python as lone surrogates."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise FormatError("--cmdline", found=repr(text), expected="UTF-8", source=_SOURCE)
    return text


def _protocol(text: str) -> Any:
    from bootstub.protocol import PROTOCOLS

    return _choice("--protocol", dict(PROTOCOLS))(text)


def _run(text: str) -> Any:
    from tools.pipeline import RUNS

    return _choice("--run", {name: name for name in RUNS})(text)


def _ve(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(_VE_NAMES):
        raise FormatError("--ve", found=repr(text), expected=f"some of {','.join(_VE_NAMES)}", source=_SOURCE)
    return names


def _number(option: str, text: str, low: int, high: int) -> int:
    """A decimal number within limits, with no more digits than these have."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(high)) and low <= int(text) <= high):
        raise FormatError(option, found=repr(text[:80]), expected=f"a number from {low} to {high}", source=_SOURCE)
    return int(text)


def _timeout(text: str) -> int:
    return _number("--timeout", text, 1, _MAX_TIMEOUT) * 1_000_000


def _seed(text: str) -> int:
    return _number("--seed", text, 0, _MAX_SEED)


def _script(path: str) -> Any:
    from kernel.runtime import parse_script

    return tuple(parse_script(read_text(path), path))


OPTIONS = (
    Option("memory", "SIZE", "guest memory, split as q35 splits it (default 4G)", "memory", parse_memory),
    Option("efi-map", "FILE", "memory map instead: dmesg with efi=debug lines, or JSON", "efi_map", _efi_map),
    Option("firmware", "IMAGE", "image with TDX metadata (default: OVMF's sections)", "firmware", _firmware),
    Option("kernel", "FILE", "bzImage (default: a small one of our own)", "kernel", _kernel),
    Option("initrd", "FILE", "initrd (default with --run kernel: one that touches memory)", "initrd", read_file),
    Option("cmdline", "TEXT", f"command line [hdr.cmd_line_ptr] (default: {DEFAULT_CMDLINE!r})", "cmdline", _cmdline),
    Option("protocol", "NAME", "version of the boot code: v9", "protocol", _protocol),
    Option(
        "host-page-size", "SIZE", "largest page the host backs private memory with: 2M (default) or 4K",
        "host_level", _choice("--host-page-size", _HOST_LEVELS),
    ),
    Option("run", "DEPTH", "run the kernel image's own code: stub, decompressor or kernel", "run", _run),
    Option("ve", "LIST", "instructions that raise #VE in real code: cpuid,io,msr,hlt", "ve", _ve),
    Option("seed", "N", "seed of RDRAND and of the start of the TSC in real code (default 0)", "seed", _seed),
    Option("timeout", "N", "end real code after N million instructions", "timeout", _timeout),
    Option("script", "FILE", "commands of stage runtime: alloc, free, cat, echo", "script", _script),
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` every option of a boot, and ``--config``."""
    group = parser.add_argument_group("the guest")
    for option in OPTIONS:
        group.add_argument(f"--{option.name}", metavar=option.metavar, help=option.help)
    group.add_argument("--full", action="store_true", help="with --run: run the decompression too, do not answer it")
    group.add_argument("--config", metavar="FILE.toml", help="any of these options, by name, in TOML")


def boot_config(args: argparse.Namespace) -> BootConfig:
    """The boot that the arguments describe. Files are read here; raises ``FormatError`` and ``OSError``."""
    texts = _from_toml(args.config) if args.config is not None else {}
    given = {option.name: getattr(args, option.name.replace("-", "_")) for option in OPTIONS}
    texts |= {name: text for name, text in given.items() if text is not None}
    if "memory" in texts and "efi-map" in texts:
        raise FormatError("--memory", found="with --efi-map", expected="one of the two", source=_SOURCE)
    fields = {option.field: option.read(texts[option.name]) for option in OPTIONS if option.name in texts}
    if "run" in fields:
        _check_run(fields)
        fields["full"] = args.full
    if "kernel" not in fields:
        from bootstub.sample_kernel import sample_bzimage

        fields["kernel"] = sample_bzimage()
    return BootConfig(**fields)


def _check_run(fields: dict[str, Any]) -> None:
    """Real code needs a real kernel, and a console to print to; and its processor has 40 bits of address."""
    if "kernel" not in fields:
        raise FormatError("--run", found="no --kernel", expected="the bzImage to run", source=_SOURCE)
    if fields["run"] == "kernel":
        fields.setdefault("cmdline", REAL_KERNEL_CMDLINE)
        if "initrd" not in fields:
            from cpu.initrd import build_initrd

            fields["initrd"] = build_initrd()
    if fields.get("memory", 0) > _MAX_REAL_MEMORY:
        raise FormatError(
            "--memory", found=f"{fields['memory']} bytes", expected="at most 256G with --run", source=_SOURCE
        )


def _from_toml(path: str) -> dict[str, str]:
    """Option texts by name from a TOML file."""
    import tomllib

    try:
        data = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # ValueError also for a number that Python will not read
        raise FormatError(path, found=str(error), expected="TOML", source="toml.io") from error
    known = {option.name for option in OPTIONS}
    for key, value in data.items():
        if key not in known:
            raise FormatError(path, found=f"key {key!r}", expected=", ".join(sorted(known)), source=_SOURCE)
        if not isinstance(value, str):
            raise FormatError(f"{path}, {key}", found=type(value).__name__, expected="a string", source=_SOURCE)
    return data
