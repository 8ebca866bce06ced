"""The command line: rft train | check | config | eval | reward | report | watch | export | bench."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rft import __version__
from rft.utils.paths import path_argument
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
    os.environ["PYTHONUTF8"] = "1"  # engines, learner and reward workers use UTF-8 whatever the locale is
    args = _arguments(argv)
    if not args.stoppable:
        return _run(args)
    from rft.utils.signals import StopSignals

    with StopSignals(until_exit=argv is None) as args.signals:  # before the imports, which take seconds
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    """Run the chosen command, and turn what it raises into a message and an exit code."""
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
        _config(argparse.Namespace(prefix=""))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("rft", description=__doc__, epilog=_EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"rft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], int], name: str, text: str, *, config: bool = False
    ) -> Callable[..., argparse.Action]:
        help_ = name != "train"
        sub = commands.add_parser(name, help=text, description=text, epilog=_EXIT_CODES, add_help=help_)
        sub.set_defaults(run=run, stoppable=name in ("train", "eval"))
        if config:
            sub.add_argument("config", type=path_argument, help="YAML file")
            sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config overrides")
        return sub.add_argument

    add = command(_train, "train", "train as the config says", config=True)
    add("--resume", default="auto", metavar="auto|never|PATH", type=path_argument,
        help="go on from the run's last checkpoint")  # fmt: skip
    add("--restarts", type=int, default=0, metavar="N",
        help="restart automatically after a fault, at most N times in a row without a new checkpoint"
        )  # fmt: skip
    add("-h", "--help", action=_HelpWithKeys, nargs=0, help="this help, and every config key")
    add = command(
        _verify, "verify-resume", "run, kill, resume, and compare with an uninterrupted run", config=True
    )
    add("--steps", type=int, required=True, metavar="N", help="steps of the run")
    add("--kill-at", type=int, required=True, metavar="K", help="SIGKILL after this step")
    add("--out", type=path_argument, help="folder for the two runs (default: a temporary one)")
    command(_check, "check", "resolve everything and print the plan, without training", config=True)
    add = command(_eval, "eval", "held-out accuracy and pass@k of a model, as JSON on stdout", config=True)
    add("--model", type=path_argument, help="model folder or hub name (none: the config's)")
    add = command(_config, "config", "every config key with its default and meaning")
    add("prefix", nargs="?", default="", help="only keys that start with this")
    add = command(_export, "export", "the run's final model as a Hugging Face folder")
    add("run_dir", type=path_argument, help="run folder")
    add("out", type=path_argument, help="folder to write")
    add = command(_report, "report", "write one HTML page about a run")
    add("run_dir", type=path_argument, help="run folder")
    add("--out", type=path_argument, help="file to write (default: RUN/report.html)")
    add = command(_watch, "watch", "a live view of a running job, from its folder")
    add("run_dir", type=path_argument, help="run folder")
    add("--once", action="store_true", help="show one frame and exit")
    add = command(_bench, "bench", "run the benchmarks of this checkout")
    add("parts", nargs="*", help="logprob, prefix, packing, step, reward, sync, all (default)")
    add("--peers", action="store_true", help="also run the peers, in their own environments")
    add("--fresh", action="store_true", help="repeat measurements that an interrupted run completed")
    add = command(_reward, "reward", "score a file with a reward and show how it judged")
    add("rest", nargs=argparse.REMAINDER, help="see `rft reward --help`")
    return parser


# -- commands ------------------------------------------------------------------------------------------


def _note(text: str) -> None:
    say(f"rft: {text}")


def _train(args: argparse.Namespace) -> int:
    from rft import run_dir, run_training
    from rft.config.load import load_config
    from rft.plan import make_plan

    config = load_config(args.config, args.overrides)
    if args.restarts > 0:
        from rft.tools.supervise import supervise

        args.signals.release()  # the parent waits for signals and its child in one place
        return supervise([args.config, *args.overrides], config.run_dir, args.restarts, args.resume)
    with run_dir.hold(config) as warning:
        folder = run_dir.claim(config, args.resume)
        for text in filter(None, (warning, *folder.notes)):
            _note(text)
        if folder.finished is not None:
            _note(f"{folder.path} is complete: {json.dumps(folder.finished)}")
            return 0
        return run_training.train(make_plan(config), folder, args.signals)


def _verify(args: argparse.Namespace) -> int:
    from rft.tools.verify import verify_resume

    out = None if args.out is None else Path(args.out)
    verdict = verify_resume(args.config, args.overrides, args.steps, args.kill_at, out, _note)
    say("\n".join(verdict.lines()), sys.stdout)
    return 0 if verdict.kept else 1


def _check(args: argparse.Namespace) -> int:
    from rft import run_dir
    from rft.config.load import load_config
    from rft.errors import ConfigError
    from rft.plan import make_plan
    from rft.report.plan_text import plan_lines

    config = load_config(args.config, args.overrides)
    problems: list[str] = []
    for action in (
        lambda: run_dir.claim(config, "auto"),
        lambda: say("\n".join(plan_lines(make_plan(config))), sys.stdout),
    ):
        try:
            action()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return 0


def _eval(args: argparse.Namespace) -> int:
    import asyncio

    from rft.config.load import load_config
    from rft.plan import make_plan
    from rft.run_training import evaluate_model

    plan = make_plan(load_config(args.config, args.overrides), model=args.model, evaluate=True)
    metrics = asyncio.run(evaluate_model(plan, args.signals))
    print(json.dumps(metrics, indent=2))
    return 0


def _config(args: argparse.Namespace) -> int:
    from rft.config.load import describe_fields

    for key, default, text in describe_fields():
        if key.startswith(args.prefix):
            print(f"{key:<44} {default:<24} {text}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from rft.tools.export import export_run

    print(f"{export_run(Path(args.run_dir), Path(args.out))} -> {args.out}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from rft.report.report import write_report

    print(write_report(_run_folder(args.run_dir), Path(args.out) if args.out else None))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from rft.report.watch import watch

    watch(_run_folder(args.run_dir), once=args.once)
    return 0


def _run_folder(text: str) -> Path:
    from rft.errors import ConfigError

    path = Path(text)
    if not (path / "events.jsonl").exists():
        raise ConfigError([f"{path} is not a run folder: it has no events.jsonl"])
    return path


def _reward(args: argparse.Namespace) -> int:
    from rft.tools.reward import main as reward_main

    return reward_main(args.rest)


def _bench(args: argparse.Namespace) -> int:
    from rft.tools.bench import run

    return run(args.parts, peers=args.peers, fresh=args.fresh)


if __name__ == "__main__":
    sys.exit(main())
