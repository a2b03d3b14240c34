"""What a boot can be told: the same options on the command line and in a TOML file.

``--config FILE.toml`` gives defaults; what stands on the command line wins. A key of the file is the option
without its dashes (``host-page-size = "4K"``), an option that can be repeated is an array; an unknown key is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guest.errors import FormatError
from guest.units import PAGE_SIZE, SZ_1G, memparse
from tdx.backing import MIXED
from tdx.faults import KINDS, Rule, parse_rule
from tools.pipeline import DEFAULT_CMDLINE, REAL_KERNEL_CMDLINE, BootConfig, stages_of

_MAX_FILE = SZ_1G
_MAX_MEMORY = 1 << 50
_MAX_TIMEOUT = 1 << 20
_VE_NAMES = ("cpuid", "io", "msr", "hlt")
_MAX_REAL_MEMORY = 1 << 38
_SOURCE = "unaccepted boot --help"
_MAX_FAULTS = 1024
_SANITIZE = ("error", "warn", "off")
_HOST_LEVELS = {"4K": 0, "2M": 1, "mixed": MIXED}
_HOST_BACKING = {"demand": False, "ahead": True}


@dataclass(frozen=True, slots=True)
class Option:
    """An option: its name, what its value is called, its help, the field of ``BootConfig`` and how to read it.

    If it can be given more than once (``many``), ``read`` gets all its values. Options of one field add up.
    """

    name: str
    metavar: str
    help: str
    field: str
    read: Callable[[Any], Any]
    many: bool = False


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


def _timeout(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= _MAX_TIMEOUT:
        expected = f"a number from 1 to {_MAX_TIMEOUT}"
        raise FormatError("--timeout", found=repr(text), expected=expected, source=_SOURCE)
    return int(text) * 1_000_000


def _script(path: str) -> Any:
    from kernel.runtime import parse_script

    return tuple(parse_script(read_text(path), path))


def _faults(texts: Iterable[str]) -> tuple[Rule, ...]:
    rules = tuple(map(parse_rule, texts))
    if len(rules) > _MAX_FAULTS:
        raise FormatError("--fault", found=f"{len(rules)} faults", expected=f"at most {_MAX_FAULTS}", source=_SOURCE)
    return rules


def _fault_script(path: str) -> tuple[Rule, ...]:
    """One rule a line; ``#`` starts a comment."""
    lines = (line.split("#")[0].strip() for line in read_text(path).splitlines())
    return _faults([line for line in lines if line])


OPTIONS = (
    Option("memory", "SIZE", "guest memory, split as q35 splits it (default 4G)", "memory", parse_memory),
    Option("efi-map", "FILE", "memory map instead: dmesg with efi=debug lines, or JSON", "efi_map", _efi_map),
    Option("firmware", "IMAGE", "image with TDX metadata (default: OVMF's sections)", "firmware", _firmware),
    Option("kernel", "FILE", "bzImage (default: a small one of our own)", "kernel", _kernel),
    Option("initrd", "FILE", "initrd (default with --run kernel: one that touches memory)", "initrd", read_file),
    Option("cmdline", "TEXT", f"command line [hdr.cmd_line_ptr] (default: {DEFAULT_CMDLINE!r})", "cmdline", _cmdline),
    Option("protocol", "NAME", "version of the boot code: v9", "protocol", _protocol),
    Option(
        "host-page-size", "SIZE", "largest page the host backs private memory with: 2M (default), 4K or mixed",
        "host_level", _choice("--host-page-size", _HOST_LEVELS),
    ),
    Option(
        "host-backing", "WHEN", "when the host backs private memory: on demand (default) or ahead",
        "host_ahead", _choice("--host-backing", _HOST_BACKING),
    ),
    Option("run", "DEPTH", "run the kernel image's own code: stub, decompressor or kernel", "run", _run),
    Option("ve", "LIST", "instructions that raise #VE in real code: cpuid,io,msr,hlt", "ve", _ve),
    Option("timeout", "N", "end real code after N million basic blocks", "timeout", _timeout),
    Option("script", "FILE", "commands of stage runtime: alloc, free, cat, echo", "script", _script),
    Option(
        "fault", "KIND[:ARG][@WHEN,...]",
        f"a fault of the host, can be repeated; KIND: {', '.join(KINDS)}; WHEN: accept=N, mapgpa=N, tdvmcall=N, "
        "gpa=A-B, stage=NAME, p=P, seed=S, n=TIMES",
        "faults", _faults, many=True,
    ),
    Option("fault-script", "FILE", "faults, one a line", "faults", _fault_script),
    Option(
        "sanitize", "MODE", "a finding of the acceptance sanitizer ends the boot (error), is told (warn, default), off",
        "sanitize", _choice("--sanitize", {mode: mode for mode in _SANITIZE}),
    ),
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` every option of a boot, and ``--config``."""
    group = parser.add_argument_group("the guest")
    for option in OPTIONS:
        action = "append" if option.many else "store"
        group.add_argument(f"--{option.name}", metavar=option.metavar, help=option.help, action=action)
    group.add_argument("--full", action="store_true", help="with --run: run the decompression too, do not answer it")
    group.add_argument("--config", metavar="FILE.toml", help="any of these options, by name, in TOML")


def boot_config(args: argparse.Namespace) -> BootConfig:
    """The boot that the arguments describe. Files are read here; raises ``FormatError`` and ``OSError``."""
    texts = _from_toml(args.config) if args.config is not None else {}
    given = {option.name: getattr(args, option.name.replace("-", "_")) for option in OPTIONS}
    texts |= {name: text for name, text in given.items() if text is not None}
    if "memory" in texts and "efi-map" in texts:
        raise FormatError("--memory", found="with --efi-map", expected="one of the two", source=_SOURCE)
    fields: dict[str, Any] = {}
    for option in OPTIONS:
        if option.name in texts:
            value = option.read(texts[option.name])
            fields[option.field] = fields[option.field] + value if option.field in fields else value
    if "run" in fields:
        _check_run(fields)
        fields["full"] = args.full
    if "kernel" not in fields:
        from bootstub.sample_kernel import sample_bzimage

        fields["kernel"] = sample_bzimage()
    config = BootConfig(**fields)
    _check_stages(config)
    return config


def _check_stages(config: BootConfig) -> None:
    """A fault that waits for a stage waits for one of this boot."""
    stages = stages_of(config)
    for rule in config.faults:
        if rule.stage is not None and rule.stage not in stages:
            expected = ", ".join(stages)
            raise FormatError(f"fault {str(rule)!r}", found=f"stage={rule.stage}", expected=expected, source=_SOURCE)


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


def _from_toml(path: str) -> dict[str, Any]:
    """Option texts by name from a TOML file."""
    import tomllib

    try:
        data = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # ValueError also for a number that Python will not read
        raise FormatError(path, found=str(error), expected="TOML", source="toml.io") from error
    known = {option.name: option for option in OPTIONS}
    for key, value in data.items():
        if key not in known:
            raise FormatError(path, found=f"key {key!r}", expected=", ".join(sorted(known)), source=_SOURCE)
        many = known[key].many
        strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not (strings if many else isinstance(value, str)):
            expected = "an array of strings" if many else "a string"
            raise FormatError(f"{path}, {key}", found=type(value).__name__, expected=expected, source=_SOURCE)
    return data
