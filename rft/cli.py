"""The command line: rft init | train | check | config | eval | env | serve | report | watch | ..."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

from rft import __version__
from rft.tools.commands import list_keys, register
from rft.utils.paths import path_argument
from rft.utils.quiet import quiet_libraries
from rft.utils.terminal import say

_EXIT_CODES = (
    "exit codes: 0 done, 1 failed, 2 wrong config or command line, 75 stopped on request (the message "
    "names the checkpoint), 76 a part of the machine failed: the same command resumes from the last "
    "checkpoint"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape the characters that the locale's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    quiet_libraries()
    os.environ["PYTHONUTF8"] = "1"  # engines, learner and reward workers use UTF-8 whatever the locale is
    args = _arguments(argv)
    if not args.stoppable:
        return _run(args)
    from rft.utils.signals import StopSignals

    with StopSignals(until_exit=argv is None) as args.signals:  # before the imports, which take seconds
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    """Run the chosen command, and convert its exceptions to a message and an exit code."""
    from rft.errors import ConfigError, RunStopped

    try:
        code: int = args.run(args)
        return code
    except RunStopped as stopped:
        from rft.utils.signals import STOPPED, print_stop

        print_stop(f"{stopped} ({args.signals.reason}): nothing was saved")
        return STOPPED
    except BrokenPipeError:  # `rft config | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ConfigError as error:
        count = len(error.problems)
        say(f"rft: {count} problem{'s' if count > 1 else ''} found:")
        for problem in error.problems:
            say(f"  - {problem}")
        return 2
    except KeyboardInterrupt:
        say("rft: interrupted")
        return 1
    except Exception as error:
        from rft.run_training import report_failure

        return report_failure(error)


# -- arguments -----------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Plain argparse accepts overrides before the options only."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")] if "overrides" in args else []
    if unknown := [word for word in rest if word not in late]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


class _HelpWithKeys(argparse.Action):
    """--help that ends with every config key."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.print_help()
        print("\nconfig keys, with defaults:")
        list_keys(argparse.Namespace(prefix=""))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("rft", description=__doc__, epilog=_EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"rft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], int],
        name: str,
        text: str,
        *,
        config: bool = False,
        stoppable: bool = False,
        add_help: bool = True,
    ) -> Callable[..., argparse.Action]:
        sub = commands.add_parser(name, help=text, description=text, epilog=_EXIT_CODES, add_help=add_help)
        sub.set_defaults(run=run, stoppable=stoppable)
        if config:
            sub.add_argument("config", type=path_argument, help="YAML file")
            sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config overrides")
        return sub.add_argument

    add = command(_train, "train", "train as the config says", config=True, stoppable=True, add_help=False)
    add("--resume", default="auto", metavar="auto|never|PATH", type=path_argument,
        help="continue from the run's last checkpoint")  # fmt: skip
    add("--restarts", type=int, default=0, metavar="N",
        help="restart automatically after a fault, at most N times in a row without a new checkpoint"
        )  # fmt: skip
    add("-h", "--help", action=_HelpWithKeys, nargs=0, help="this help, and every config key")
    register(command)
    return parser


# -- the command train ---------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    from rft.utils.quick_imports import load_torch_late, start_quickly

    load_torch_late()
    start_quickly()  # this process runs no model
    from rft import run_training
    from rft.config.load import load_config

    config = load_config(args.config, args.overrides)
    if args.restarts > 0:
        from rft.tools.supervise import supervise

        args.signals.release()  # the parent waits for signals and its child in one place
        return supervise([args.config, *args.overrides], config.run_dir, args.restarts, args.resume)
    return run_training.run(config, args.resume, args.signals)


if __name__ == "__main__":
    sys.exit(main())
