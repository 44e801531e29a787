"""The top command: finds its subcommands late, and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

import click

from ckpt_tasks import __version__
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.escaping import printable
from ckpt_tasks.masking import mask_text
from ckpt_tasks.stdio import open_standard_streams
from ckpt_tasks.suggest import did_you_mean
from ckpt_tasks.types import EXIT_FAILED, EXIT_USAGE

__all__ = ["main"]

_COMMANDS = {
    "adopt": "ckpt_tasks.cli.copy:adopt",
    "alias": "ckpt_tasks.cli.alias:alias",
    "bench": "ckpt_tasks.cli.bench:bench",
    "collect": "ckpt_tasks.cli.retention:collect",
    "copy": "ckpt_tasks.cli.copy:copy",
    "demo": "ckpt_tasks.cli.demo:demo",
    "expire": "ckpt_tasks.cli.retention:expire",
    "export": "ckpt_tasks.cli.export:export",
    "ls": "ckpt_tasks.cli.browse:ls",
    "maintain": "ckpt_tasks.cli.maintain:maintain",
    "pin": "ckpt_tasks.cli.retention:pin",
    "reconcile": "ckpt_tasks.cli.reconcile:reconcile",
    "runs": "ckpt_tasks.cli.browse:runs",
    "show": "ckpt_tasks.cli.browse:show",
    "train": "ckpt_tasks.cli.train:train",
    "unpin": "ckpt_tasks.cli.retention:unpin",
    "verify": "ckpt_tasks.cli.verify:verify",
}
_PLUGINS = "ckpt_tasks.cli"
# Its message is the help text; click before 8.2 prints that itself.
_NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
_EXIT_INTERRUPTED = 130


class _LateGroup(click.Group):
    """Imports a subcommand when it is called, so that `ls` does not wait for `train`'s imports.

    Further subcommands come from the entry points of the group ``ckpt_tasks.cli``.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*_COMMANDS, *_plugins()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command: click.Command
        if cmd_name in _COMMANDS:
            module, _, attribute = _COMMANDS[cmd_name].partition(":")
            command = getattr(importlib.import_module(module), attribute)
            return command
        plugins = _plugins()
        if cmd_name not in plugins:
            hint = did_you_mean(cmd_name, self.list_commands(ctx), what="commands")
            raise click.UsageError(f"no command {cmd_name!r}; {hint}", ctx)
        try:
            command = plugins[cmd_name].load()
        except ImportError as error:
            raise click.ClickException(
                f"the command {cmd_name!r} cannot be loaded: {error}; is its extra installed? "
                f"pip install 'ckpt-tasks[{cmd_name}]'"
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing those of integrations, which takes seconds."""
        limit = formatter.width - 6 - max(map(len, self.list_commands(ctx)))
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name) if name in _COMMANDS else None
            plugin = f"Commands for {name.capitalize()}."
            summary = command.get_short_help_str(limit) if command else plugin
            rows.append((name, summary))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _plugins() -> dict[str, EntryPoint]:
    return {plugin.name: plugin for plugin in entry_points(group=_PLUGINS)}


@click.group(cls=_LateGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckpt-tasks")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def _cli(debug: bool) -> None:
    """Checkpoint and resume PyTorch training; browse and verify what is stored.

    Every option of the configuration can also be set by a variable
    CKPT_TASKS_<SECTION>_<KEY>, for example CKPT_TASKS_STORE_URL.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with a code of `ckpt_tasks.types`."""
    open_standard_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(given))


def _run(arguments: list[str]) -> int:
    try:
        code = _cli.main(args=arguments, prog_name="ckpt-tasks", standalone_mode=False)
        sys.stdout.flush()
    except _NO_ARGUMENTS as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except click.ClickException as error:
        return _fail(_usage(error), EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", _EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone; Python would say so again at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except CkptTasksError as error:
        if _debugging(arguments):
            raise
        return _fail(str(error), error.exit_code)
    except Exception as error:
        if _debugging(arguments):
            raise
        what = f"{type(error).__name__}: {error}"
        return _fail(f"unexpected {what} (ckpt-tasks --debug shows the traceback)", EXIT_FAILED)
    return code if isinstance(code, int) else 0


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return f"{error.format_message().rstrip('.')}{hint}"


def _debugging(arguments: list[str]) -> bool:
    """Whether ``--debug`` stands before the subcommand."""
    return "--debug" in itertools.takewhile(lambda text: text.startswith("-"), arguments)


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {printable(mask_text(' '.join(message.split())))}", err=True)
    return code
