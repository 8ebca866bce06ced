"""The command line: rft train | check | config | eval | reward | report | watch | export | bench."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rft import __version__
from rft.utils.paths import path_argument
from rft.utils.terminal import say

_EXIT_CODES = (
    "exit codes: 0 done, 1 failed, 2 your mistake, 75 stopped on request (the message names the checkpoint), "
    "76 a part of the machine failed: the same command goes on from the last checkpoint"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    _print_any_text()
    args = _arguments(argv)
    if not args.stoppable:
        return _run(args)
    from rft.utils.signals import StopSignals

    with StopSignals(until_exit=argv is None) as args.signals:  # before the imports, which take seconds
        return _run(args)


def _run(args: argparse.Namespace) -> int:
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


def _print_any_text() -> None:
    """Escape the characters that the locale's encoding lacks, here; let Python processes started from here
    (engines, learner, reward workers) use UTF-8 whatever the locale is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ["PYTHONUTF8"] = "1"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; argparse by itself takes overrides before the options only."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")] if "overrides" in args else []
    if unknown := [word for word in rest if word not in late]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("rft", description=__doc__, epilog=_EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"rft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    class HelpWithKeys(argparse.Action):
        """--help that ends with every config key."""

        def __call__(self, sub: argparse.ArgumentParser, *_: object) -> None:
            sub.print_help()
            print("\nconfig keys, with defaults:")
            _print_keys("")
            sub.exit()

    def command(name: str, run: object, text: str, *, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=_EXIT_CODES, add_help=name != "train"
        )
        sub.set_defaults(run=run, stoppable=name in ("train", "eval"))
        if config:
            sub.add_argument("config", type=path_argument, help="YAML file")
            sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config overrides")
        return sub

    train = command("train", _train, "train as the config says")
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        type=path_argument,
        help="go on from the run's last checkpoint",
    )
    train.add_argument(
        "--restarts", type=int, default=0, metavar="N",
        help="start again by itself after a fault, at most N times in a row without a new checkpoint",
    )  # fmt: skip
    train.add_argument("-h", "--help", action=HelpWithKeys, nargs=0, help="this help, and every config key")
    verify = command("verify-resume", _verify, "run, kill, resume, and compare with an uninterrupted run")
    verify.add_argument("--steps", type=int, required=True, metavar="N", help="steps of the run")
    verify.add_argument("--kill-at", type=int, required=True, metavar="K", help="SIGKILL after this step")
    verify.add_argument(
        "--out", type=path_argument, help="folder for the two runs (default: a temporary one)"
    )
    command("check", _check, "resolve everything and print the plan, without training")
    evaluate = command("eval", _eval, "held-out accuracy and pass@k of a model, as JSON on stdout")
    evaluate.add_argument("--model", type=path_argument, help="model folder or hub name (none: the config's)")
    show = command("config", _config, "every config key with its default and meaning", config=False)
    show.add_argument("prefix", nargs="?", default="", help="only keys that start with this")
    export = command("export", _export, "the run's final model as a Hugging Face folder", config=False)
    export.add_argument("run_dir", type=path_argument, help="run folder")
    export.add_argument("out", type=path_argument, help="folder to write")
    report = command("report", _report, "write one HTML page about a run", config=False)
    report.add_argument("run_dir", type=path_argument, help="run folder")
    report.add_argument("--out", type=path_argument, help="file to write (default: RUN/report.html)")
    watch = command("watch", _watch, "a live view of a running job, from its folder", config=False)
    watch.add_argument("run_dir", type=path_argument, help="run folder")
    watch.add_argument("--once", action="store_true", help="show one frame and end")
    bench = command("bench", _bench, "run the benchmarks of this checkout", config=False)
    bench.add_argument("parts", nargs="*", help="logprob, prefix, packing, step, reward, sync, all (default)")
    bench.add_argument("--peers", action="store_true", help="also run the peers, in their own environments")
    bench.add_argument(
        "--fresh", action="store_true", help="measure anew what an interrupted run has measured"
    )
    reward = command("reward", _reward, "score a file with a reward and show how it judged", config=False)
    reward.add_argument("rest", nargs=argparse.REMAINDER, help="see `rft reward --help`")
    return parser


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
        for note in filter(None, (warning, *folder.notes)):
            say(f"rft: {note}")
        if folder.finished is not None:
            say(f"rft: {folder.path} is complete: {json.dumps(folder.finished)}")
            return 0
        return run_training.train(make_plan(config), folder, args.signals)


def _verify(args: argparse.Namespace) -> int:
    import tempfile

    from rft.tools.verify import verify_resume

    def tell(text: str) -> None:
        say(f"rft: {text}")

    with tempfile.TemporaryDirectory(prefix="rft-verify-") as temporary:
        out = Path(args.out or temporary)
        verdict = verify_resume(args.config, args.overrides, args.steps, args.kill_at, out, tell)
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
    from rft.tools.standalone import evaluate_model

    config = load_config(args.config, args.overrides)
    plan = make_plan(config, model=args.model, evaluate=True)
    metrics = asyncio.run(evaluate_model(plan, args.signals))
    print(json.dumps(metrics, indent=2))
    return 0


def _config(args: argparse.Namespace) -> int:
    _print_keys(args.prefix)
    return 0


def _print_keys(prefix: str) -> None:
    from rft.config.load import describe_fields

    for key, default, text in describe_fields():
        if key.startswith(prefix):
            print(f"{key:<44} {default:<24} {text}")


def _export(args: argparse.Namespace) -> int:
    from rft import checkpoint
    from rft.errors import ConfigError

    run_dir, out = Path(args.run_dir), Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError([f"{out} is not empty: choose another folder"])
    source = run_dir / "model"
    if not (source / "config.json").exists():
        found = checkpoint.latest(run_dir / "checkpoints")
        if found is None:
            raise ConfigError([f"{run_dir} has neither a final model nor a checkpoint"])
        source = found.path / "model"
        if not source.exists():  # an adapter's checkpoint: the base comes from where the run began
            from rft.tools.standalone import export_checkpoint

            export_checkpoint(run_dir / "config.yaml", found.path, out)
            print(f"{found.path} -> {out}")
            return 0
    shutil.copytree(source, out, dirs_exist_ok=True)
    print(f"{source} -> {out}")
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
        raise ConfigError([f"{path} is no run folder: it has no events.jsonl"])
    return path


def _reward(args: argparse.Namespace) -> int:
    from rft.rewards.dry_run import main as reward_main

    return reward_main(args.rest)


def _bench(args: argparse.Namespace) -> int:
    from rft.tools.bench import run

    return run(args.parts, peers=args.peers, fresh=args.fresh)


if __name__ == "__main__":
    sys.exit(main())
