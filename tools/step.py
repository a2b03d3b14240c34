"""``unaccepted step``: a debugger for the boot. Stops after each stage or at an event; goes back by running again.

Commands come from the terminal, from a file (``--commands``) or from standard input; ``help`` lists them. Once stage
runtime has run, those of its script (``--script help``) can be typed too.
"""

from __future__ import annotations

import argparse
import cmd
import re
import sys
from dataclasses import dataclass

from bootstub.boot_params import BOOT_PARAMS
from guest.errors import BootError, FormatError
from guest.ranges import Range, RangeSet
from guest.records import field_extents
from guest.trace import Event, Record, StageBegin
from guest.units import PHYSICAL_ADDRESS_END, size_text
from guest.write_journal import authors
from kernel.runtime import SYNTAX, Shell, script_help
from tools.cli import script
from tools.config import add_options, boot_config
from tools.files import read_text
from tools.output import hex_dump
from tools.pipeline import Boot, BootConfig
from tools.postmortem import add_symbols_option, postmortem
from tools.progress import StatusLine, interruptible
from tools.render import LogText, event_text
from tools.until import add_until_option, resolve_until

MAX_MEM = 1 << 16
_SHOWN = 12
_SHOWN_CHARACTERS = 80
_COUNT = re.compile(r"[0-9]{1,9}")
_SOURCE = "unaccepted step, help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_options(parser)
    add_until_option(parser)
    add_symbols_option(parser)
    parser.add_argument("--break", dest="breaks", metavar="EVENT", action="append", default=[], help="see `help break`")
    parser.add_argument("--commands", metavar="FILE", help="read commands from a file, then end")


def run(args: argparse.Namespace) -> int:
    """Read commands until their end; 1 if the guest died."""
    if args.script == "help":
        print(script_help(), end="")
        return 0
    lines = read_text(args.commands).splitlines() if args.commands is not None else None
    config, until = resolve_until(args, boot_config(args))
    stepper = Stepper(config, lines, until, args.system_map)
    for text in args.breaks:
        stepper.breakpoints.append(parse_breakpoint(text))
    stepper.loop()
    return 1 if stepper.dead else 0


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """Stops at events of one kind whose text has ``text`` in it."""

    event: str
    text: str

    def hits(self, record: Record) -> bool:
        """True if the boot stops at ``record``."""
        return record.event.name == self.event and self.text.lower() in event_text(record.event).lower()


def event_names() -> list[str]:
    """Names of all events that a boot can have."""
    return sorted({kind.__name__ for kind in Event.__subclasses__()})


def parse_breakpoint(text: str) -> Breakpoint:
    """``EVENT`` or ``EVENT:TEXT``. An unknown event is a ``FormatError`` that names the known ones."""
    name, _, part = text.partition(":")
    if name not in event_names():
        raise FormatError("break", found=repr(name), expected=", ".join(event_names()), source=_SOURCE)
    return Breakpoint(name, part)


class _Rewind(Exception):
    """Unwinds a stage that stopped at an event: the boot starts again and runs up to ``stages`` stages."""

    def __init__(self, stages: int) -> None:
        self.stages = stages


class _Quit(Exception):
    """Leaves the debugger, from inside a stage too."""


class Stepper(cmd.Cmd):
    """The boot under a prompt."""

    prompt = "(unaccepted) "
    doc_header = "Commands (help COMMAND):"

    def __init__(
        self, config: BootConfig, lines: list[str] | None, until: str | None = None, system_map: str | None = None
    ) -> None:
        super().__init__()
        self._config, self._until, self._system_map = config, until, system_map
        self._given = lines is not None
        self._interactive = lines is None and sys.stdin.isatty()
        self.cmdqueue = list(lines or [])
        self.use_rawinput = self._interactive
        if not self._interactive:
            self.prompt = ""
        self.breakpoints: list[Breakpoint] = []
        self.dead = self._paused = self._running = self._quiet = False
        self._start()

    def loop(self) -> None:
        """Run commands until ``quit`` or the end of input; ``back`` starts the boot anew underneath."""
        self._say(f"next stage: {self._boot.next_stage}")
        while True:
            try:
                self.cmdloop()
            except _Quit:
                return
            except _Rewind as rewind:
                self._start()
                for _ in range(rewind.stages):
                    self._step_quietly()
                stage = self._boot.next_stage
                self._say(f"back before stage {stage}" if stage else "back at the end of the last stage")

    # Movement

    def do_step(self, arg: str) -> bool:
        """step: run to the end of the stage, or to the next break."""
        return self._go(running=False)

    def do_continue(self, arg: str) -> bool:
        """continue: run to the next break, to the end of the stage of --until, or to the end of the boot."""
        return self._go(running=True)

    def do_back(self, arg: str) -> bool:
        """back: go back to before the stage that ran last, died, or is stopped. The boot runs again up to there."""
        stages = len(self._boot.done) - (not self._paused and not self.dead)
        if stages < 0:
            self._say("back: this is the start")
            return False
        raise _Rewind(stages)

    def do_break(self, arg: str) -> bool:
        """break EVENT[:TEXT]: stop at events of that kind with that text in their line; without EVENT, list them.

        Break at calls with `break ServiceCall:ExitBootServices`, at output with `break Print:Zone ranges`.
        """
        if arg:
            self.breakpoints.append(parse_breakpoint(arg))
        for number, b in enumerate(self.breakpoints, 1):
            self._say(f"{number}: {b.event}{':' if b.text else ''}{b.text}")
        return False

    def do_quit(self, arg: str) -> bool:
        """quit: leave."""
        raise _Quit

    # Looking

    def do_regs(self, arg: str) -> bool:
        """regs: show the registers that are not zero."""
        values = self._boot.registers().as_dict()
        self._say("  ".join(f"{name}={value:#x}" for name, value in values.items() if value) or "all zero")
        return False

    def do_changes(self, arg: str) -> bool:
        """changes: memory that the stage wrote, largest ranges first."""
        self._show(self._wrote, list(self._written()))
        return False

    def do_accepted(self, arg: str) -> bool:
        """accepted: memory that the stage made accepted."""
        self._show("accepted", list(self._newly_accepted()))
        return False

    def do_mem(self, arg: str) -> bool:
        """mem ADDRESS [SIZE]: show memory as it is, accepted or not."""
        words = arg.split()
        try:
            address, size = int(words[0], 0), int(words[1], 0) if len(words) > 1 else 64
        except (ValueError, IndexError):
            address, size = -1, 0
        if not 0 <= address <= address + size <= PHYSICAL_ADDRESS_END or size > MAX_MEM:
            raise FormatError("mem", found=repr(arg), expected=f"ADDRESS [SIZE up to {MAX_MEM}]", source=_SOURCE)
        for line in hex_dump(self._boot.physical.read(address, size), address):
            self._say(line)
        return False

    def do_who(self, arg: str) -> bool:
        """who ADDRESS | boot_params[+OFFSET] | boot_params.FIELD: who wrote that byte last, before which event."""
        address = self._address(arg)
        ((_, _, write),) = authors(self._boot.keep_journal().writes, address, address + 1)
        unless = "" if self._boot.real_code is None else ", unless real code did"
        if write is None:
            self._say(f"{address:#x}: nobody wrote it{unless}")
            return False
        records = self._boot.trace.records
        self._say(f"{address:#x}: {write.text}, [{write.start:#x}, {write.end:#x}){unless and unless + ' since'}")
        if write.event < len(records):
            self._say(f"    then {_record_text(records[write.event])}")
        return False

    def do_events(self, arg: str) -> bool:
        """events [COUNT]: the last events (default 10)."""
        if arg and not _COUNT.fullmatch(arg):
            raise FormatError("events", found=repr(arg), expected="a number of events", source=_SOURCE)
        count = int(arg or 10)
        for record in self._boot.trace.records[-count:] if count else []:
            self._say(_record_text(record))
        return False

    def do_stages(self, arg: str) -> bool:
        """stages: which stages ran."""
        for name in self._boot.stages:
            self._say(f"{'done' if name in self._boot.done else '    '}  {name}")
        return False

    def emptyline(self) -> bool:
        """An empty line does nothing."""
        return False

    def default(self, line: str) -> None:
        if line == "EOF":
            self.do_quit("")
        if not SYNTAX.knows(line):
            raise FormatError("command", found=repr(line), expected="one that `help` lists", source=_SOURCE)
        if self._boot.shell is None:
            raise FormatError("command", found=repr(line), expected="stage runtime to have begun", source=_SOURCE)
        self._run_script(self._boot.shell, line)

    def help_script(self) -> None:
        """The commands of stage runtime, which can be typed here too."""
        self._say(script_help().rstrip())

    def _run_script(self, shell: Shell, line: str) -> None:
        """A command of stage runtime, typed: it runs on the guest as it is now. `back` forgets it."""
        command = SYNTAX.parse_line(line, "command")
        if command is None:
            return
        if self.dead or self._paused:
            self._say("the guest is dead; `back` brings it to life" if self.dead else "the guest is inside a command")
            return
        log, first = LogText(), self._boot.trace.count
        try:
            shell.run([command])
        except FormatError:
            raise
        except BootError as error:
            self._died(error)
        for record in self._boot.trace.records[first:]:
            for text in log.lines(record):
                self._say(text)

    def precmd(self, line: str) -> str:
        """Comments are empty lines; the end of a command file is the end."""
        return line.split("#")[0].strip()

    def postcmd(self, stop: bool, line: str) -> bool:
        if self._given and not self.cmdqueue and not stop:
            self.do_quit("")
        return stop

    def onecmd(self, line: str) -> bool:
        """Run one command. A mistake at the terminal is said and forgiven; in a file it ends the run."""
        try:
            return super().onecmd(line)
        except FormatError as error:
            if not self._interactive:
                raise
            self._say(f"error: {error}")
            return False

    # Inside

    def _address(self, arg: str) -> int:
        """An address as it was typed: a number, or a field or an offset of boot_params."""
        base, text = 0, arg
        if arg.startswith("boot_params") and self._boot.boot_params is not None:
            base, text = self._boot.boot_params_gpa, arg.removeprefix("boot_params").removeprefix("+") or "0"
            offset, _ = field_extents(BOOT_PARAMS).get(text.removeprefix("."), (None, 0))
            text = text if offset is None else str(offset)
        try:
            address = base + int(text, 0)
        except ValueError:
            address = -1
        if not 0 <= address < PHYSICAL_ADDRESS_END:
            expected = "ADDRESS, boot_params[+OFFSET] or boot_params.FIELD once the stub ran"
            raise FormatError("who", found=repr(arg[:_SHOWN_CHARACTERS]), expected=expected, source=_SOURCE)
        return address

    def _start(self) -> None:
        self._boot = Boot(self._config)
        self._status = StatusLine()
        self._boot.keep_journal()
        self._boot.trace.watchers.append(self._watch)
        self.dead = self._paused = self._running = self._quiet = False
        self._accepted_before, self._first_event = RangeSet(), 0

    def _step_quietly(self) -> None:
        self._quiet = True
        self._begin_stage()
        self._run_next()
        self._quiet = False

    def _begin_stage(self) -> None:
        self._accepted_before = self._boot.sept.mapped()
        self._first_event = self._boot.trace.count

    def _go(self, running: bool) -> bool:
        """Run on; True leaves the prompt of a break, so that the stage below it goes on."""
        self._running = running
        if self._paused:
            self._paused = False
            return True
        self._run_stage()
        while self._running and self._boot.next_stage is not None and self._until not in self._boot.done:
            self._run_stage()
        return False

    def _run_stage(self) -> None:
        if self.dead or self._boot.next_stage is None:
            self._say("the guest is dead; `back` brings it to life" if self.dead else "the boot is over")
            return
        self._begin_stage()
        before = self._boot.machine.regs.as_dict()
        try:
            name = self._run_next()
        except BootError as error:
            self._died(error)
            return
        after = self._boot.machine.regs.as_dict()
        changed = [f"{reg}={value:#x}" for reg, value in after.items() if value != before[reg]]
        self._say(f"stage {name} done at {self._boot.clock.ns / 1e6:.3f} ms")
        self._say(f"registers {'  '.join(changed) or 'unchanged'}")
        self._show(self._wrote, list(self._written()))
        self._show("accepted", list(self._newly_accepted()))

    def _died(self, error: BootError) -> None:
        self.dead, self._running = True, False
        for line in postmortem(self._boot, error, self._system_map):
            self._say(line)
        self._say(f"the guest died: {error}")

    def _run_next(self) -> str:
        """Run a stage; real code says on a terminal how far it is, and heeds Ctrl-C."""
        self._boot.progress = self._status.show
        try:
            with interruptible(self._boot, lambda: self._paused):
                return self._boot.step()
        finally:
            self._status.wipe()

    def _watch(self, record: Record) -> None:
        self._status.on_record(record)
        if self._quiet or not any(b.hits(record) for b in self.breakpoints):
            return
        self._status.wipe()
        self._say(f"stopped at {_record_text(record)}")
        self._paused, self._running = True, False
        self.cmdloop()

    def _written(self) -> RangeSet:
        writes = self._boot.machine.memory.writes
        return RangeSet((start, end) for number, start, end in writes if number >= self._first_event)

    @property
    def _wrote(self) -> str:
        """Stores of real code are the engine's; only what the machine wrote for it is known."""
        return "wrote" if self._boot.real_code is None else "wrote, besides real code's own stores,"

    def _newly_accepted(self) -> RangeSet:
        accepted = self._boot.sept.mapped()
        for start, end in self._accepted_before:
            accepted.remove(start, end)
        return accepted

    def _show(self, verb: str, ranges: list[Range]) -> None:
        total = sum(r.size for r in ranges)
        self._say(f"{verb} {size_text(total)} in {len(ranges)} ranges" if ranges else f"{verb} nothing")
        largest = sorted(ranges, key=lambda r: -r.size)[:_SHOWN]
        for r in sorted(largest):
            self._say(f"    [{r.start:#018x}, {r.end:#018x})  {size_text(r.size)}")
        if len(ranges) > _SHOWN:
            self._say(f"    and {len(ranges) - _SHOWN} smaller ones")

    def _say(self, text: str) -> None:
        self.stdout.write(text + "\n")


def _record_text(record: Record) -> str:
    name = "" if isinstance(record.event, StageBegin) else f"{record.event.name} "
    return f"#{record.number} {record.stage} {record.ns / 1e6:.3f} ms: {name}{event_text(record.event)}"


if __name__ == "__main__":
    script("step")
