"""The commands of the command line, except `train`: their arguments, and one thin function for each.

Imports are inside the functions, so that `rft --help` stays quick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rft.utils.paths import path_argument
from rft.utils.terminal import say

AddCommand = Callable[..., Callable[..., argparse.Action]]
"""Add a command: `(run, name, text, *, config=False, stoppable=False)`; returns its `add_argument`."""


def register(command: AddCommand) -> None:
    """Add the commands to the parser of the command line."""
    add = command(
        verify_resume,
        "verify-resume",
        "run, kill, resume, and compare with an uninterrupted run",
        config=True,
    )
    add("--steps", type=int, required=True, metavar="N", help="steps of the run")
    add("--kill-at", type=int, required=True, metavar="K", help="SIGKILL after this step")
    add("--out", type=path_argument, help="folder for the two runs (default: a temporary one)")
    add = command(
        replay, "replay", "compute a step of a run again from its record, without environment or engine"
    )
    add("run_dir", type=path_argument, help="run folder")
    add("--step", type=int, required=True, metavar="N", help="the step, as metrics.jsonl counts them")
    add = command(init, "init", "write a commented config for a model, a dataset and a reward")
    text = "file to write (default: run.yaml)"
    add("out", nargs="?", default="run.yaml", metavar="CONFIG", type=path_argument, help=text)
    add("--model", default="tiny", type=path_argument, help="model folder or hub name (default: tiny)")
    add("--data", type=path_argument, help="file, folder or hub dataset (default: generated arithmetic)")
    add("--reward", help="built-in, or file.py:function (default: by the answers in the data)")
    add("--algorithm", help="algorithm (default: by the columns of the data)")
    command(check, "check", "resolve everything and print the plan, without training", config=True)
    text = "held-out accuracy and pass@k of a model or a run, in the config's environment, as JSON on stdout"
    add = command(evaluate, "eval", text, config=True, stoppable=True)
    add("--model", metavar="MODEL|RUN", type=path_argument,
        help="model folder or hub name, or a run folder: its newest weights (none: the config's model)"
        )  # fmt: skip
    add("--out", metavar="FOLDER", type=path_argument, help="also write the outcome of each problem there")
    add("--tasks", action="append", metavar="FILE.yaml", type=path_argument,
        help="instead run this task file of lm-eval, with local data; may be repeated"
        )  # fmt: skip
    text = "play sessions without training, and write them as JSON lines for `rft train`"
    add = command(collect, "collect", text, config=True, stoppable=True)
    add("--out", metavar="FOLDER", type=path_argument,
        help="folder for sessions.jsonl (default: OUTPUT_DIR/NAME-sessions); the same command goes on there"
        )  # fmt: skip
    add("--model", metavar="MODEL|RUN", type=path_argument,
        help="model folder or hub name, or a run folder: its newest weights (none: the config's model, after "
        "its warm start)"
        )  # fmt: skip
    add("--prompts", type=_positive, metavar="N", help="the first N rows (default: all)")
    add("--samples", type=_positive, metavar="N", help="sessions of a row (default: train.num_generations)")
    add("--split", choices=["train", "test"], default="train", help="rows to play (default: train)")
    text = "sample completions of each prompt, and keep the best or the right ones as demonstrations"
    add = command(sample, "sample", text, config=True, stoppable=True)
    add("--out", metavar="FOLDER", type=path_argument,
        help="folder for samples.jsonl (default: OUTPUT_DIR/NAME-samples); the same command goes on there"
        )  # fmt: skip
    add("--model", metavar="MODEL|RUN", type=path_argument, help="as for rft collect")
    add("--prompts", type=_positive, metavar="N", help="the first N rows (default: all)")
    add("--samples", type=_positive, metavar="K", help="completions a row (default: train.num_generations)")
    add("--up-to", type=_positive, metavar="N",
        help="spend K completions a row on average: rows without a right one get up to N, the others no more"
        )  # fmt: skip
    add("--split", choices=["train", "test"], default="train", help="rows to sample (default: train)")
    add("--keep", choices=["best", "success", "all"], default="best",
        help="best of each prompt (default), all that the rewards judge correct, or all"
        )  # fmt: skip
    add("--at-least", type=float, metavar="REWARD", help="lowest reward that is kept")
    text = "score the rows of a dataset by a method, and keep a part of them"
    add = command(select, "select", text)
    add("data", metavar="DATA", type=path_argument, help="file or folder of rows")
    add("--method", required=True, metavar="METHOD",
        help="length, exact, minhash, perplexity, grape, el2n, learnability, lobass, uds, q_tuning, pass_rate"
        )  # fmt: skip
    add("--out", required=True, metavar="FOLDER", type=path_argument,
        help="folder for selected.jsonl, scores.jsonl and report.html; the same command goes on there"
        )  # fmt: skip
    add(
        "--model",
        type=path_argument,
        help="model folder or hub name, for the methods that read rows with one",
    )
    add("--tuned", type=path_argument,
        help="learnability, lobass: the model after training, --model being its start"
        )  # fmt: skip
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="keep rows with scores in this range")
    add("--quantiles", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the same, as shares of the rows")
    add("--fraction", type=float, metavar="F", help="keep this share of the rows, with the highest scores")
    add("--lowest", action="store_true", help="--fraction: keep the lowest scores instead")
    add("--threshold", type=float, default=0.8, metavar="S",
        help="minhash: similarity from which a row is a duplicate (default: 0.8)"
        )  # fmt: skip
    add("--token-share", type=float, default=0.7, metavar="S",
        help="q_tuning: share of the tokens of a misconception that is marked to train on (default: 0.7)"
        )  # fmt: skip
    add("--diversity", type=float, default=10.0, metavar="W",
        help="uds: weight of the distance from rows kept before (default: 10; 0: the nuclear norm alone)"
        )  # fmt: skip
    add("--sessions", type=path_argument, metavar="FILE", help="pass_rate: sessions.jsonl of rft collect")
    add("--column", action="append", default=[], metavar="NAME=COLUMN", help="rename a column")
    add("--split", default="train", help="split to read (default: train)")
    add("--limit", type=_positive, metavar="N", help="the first N rows (default: all)")
    add("--max-length", type=_positive, default=2048, metavar="N",
        help="tokens of a row that a model reads (default: 2048)"
        )  # fmt: skip
    text = "serve a model, or the newest checkpoint of a run, in the dialects of OpenAI and Anthropic"
    add = command(serve, "serve", text, stoppable=True)
    add("target", metavar="MODEL|RUN", type=path_argument, help="model folder or hub name, or a run folder")
    add("overrides", nargs="*", metavar="key.sub=value", help="config overrides, such as rollout.engine=hf")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="port (default: 8000; 0: any)")
    add(
        "--key-env",
        metavar="NAME",
        help="environment variable with the API key (none: any key is right)",
    )
    add("--follow", action="store_true", help="reload when the run has saved a newer checkpoint")
    add = command(list_keys, "config", "every config key with its default and meaning")
    add("prefix", nargs="?", default="", help="only keys that start with this")
    add = command(export, "export", "the run's final model as a Hugging Face folder")
    add("run_dir", type=path_argument, help="run folder")
    add("out", type=path_argument, help="folder to write")
    add("--adapter", action="store_true", help="only the adapter, without the base")
    add("--dtype", metavar="DTYPE", help="bfloat16, float16 or float32 (default: as trained)")
    add(
        "--push", metavar="OWNER/NAME", help="also upload to a repository of the hub, with the token HF_TOKEN"
    )
    add("--private", action="store_true", help="of a repository that --push creates")
    add("--gguf", metavar="FILE", type=path_argument, help="also convert to GGUF, with --converter")
    add("--converter", metavar="PATH", type=path_argument, help="llama.cpp's convert_hf_to_gguf.py")
    add = command(merge, "merge", "combine models of one shape in weight space", stoppable=True)
    methods = (
        "soup, greedy, wise-ft, lines, difference, adapter, loram; with the extra mergekit also linear, "
        "arithmetic, ties, dare, breadcrumbs, stock"
    )
    add("method", metavar="METHOD", help=methods)
    add(
        "models", nargs="+", metavar="MODEL", type=path_argument, help="model folders, run folders, hub names"
    )
    add("--out", required=True, type=path_argument, help="folder to write")
    add("--weights", type=_numbers, metavar="W,W", help="weight of each model (linear) or task vector")
    text = "wise-ft: share of the tuned model (0.5); lines: first scale (0); ties, difference: scale (1)"
    add("--alpha", type=float, help=text)
    add("--beta", type=float, help="lines: increase of the scale up to the last layer (1)")
    add("--density", type=float, help="ties (0.2), dare (0.1), breadcrumbs (0.9): share that is kept")
    add("--gamma", type=float, help="breadcrumbs: share of the largest changes that is left out (0.01)")
    add("--seed", type=int, default=0, help="dare: seed of the masks (0)")
    add("--config", type=path_argument, help="greedy: config whose evaluation gives the accuracy of a model")
    add = command(
        prune, "prune", "a model without a part of its neurons and heads, to train an adapter on (LoRAM)"
    )
    add("model", metavar="MODEL", type=path_argument, help="model folder, run folder, or hub name")
    add("--out", required=True, type=path_argument, help="folder to write")
    add("--share", type=float, default=0.5, help="part of each layer's MLP neurons that is kept (0.5)")
    text = "part of its attention heads that is kept, in groups of one key/value head (default: as --share)"
    add("--heads", type=float, metavar="SHARE", help=text)
    add("--seed", type=int, default=0, help="seed of the choice (0)")
    add = command(
        compare, "compare", "two models or runs: weights, problems solved and broken, texts, settings"
    )
    add("a", metavar="A", type=path_argument, help="model folder, run folder, or hub name")
    add("b", metavar="B", type=path_argument, help="likewise")
    add("--problems", nargs=2, type=path_argument, metavar=("PA", "PB"),
        help="folders of `rft eval --out` with the problems of A and B (default: those of the runs)"
        )  # fmt: skip
    add("--start", type=path_argument, help="model that both began at (default: that of the runs' configs)")
    add(
        "--data", type=path_argument, help="rows with prompt and completion: KL and likelihood of these texts"
    )
    add("--limit", type=int, default=64, metavar="N", help="rows of --data (default: 64)")
    add("--quick", action="store_true", help="without ranks and intruder dimensions")
    add("--page", type=path_argument, metavar="FILE", help="also write an HTML page")
    add = command(report, "report", "write one HTML page about a run")
    add("run_dir", type=path_argument, help="run folder")
    add("--out", type=path_argument, help="file to write (default: RUN/report.html)")
    add = command(watch, "watch", "a live view of a running job, from its folder")
    add("run_dir", type=path_argument, help="run folder")
    add("--once", action="store_true", help="show one frame and exit")
    add = command(bench, "bench", "run the benchmarks of this checkout")
    add("parts", nargs="*", help="logprob, prefix, packing, step, reward, sync, all (default)")
    add("--peers", action="store_true", help="also run the peers, in separate environments")
    add("--fresh", action="store_true", help="repeat measurements that an interrupted run completed")
    add = command(env, "env", "run an environment without training, and report its mistakes")
    add(
        "action", choices=["check"], metavar="check", help="play sessions with three policies, and probe them"
    )
    add("spec", metavar="SPEC", type=path_argument,
        help="FILE.yaml (its environment, model, data), file.py:name with --kind, or tools: calculator,python"
        )  # fmt: skip
    add("overrides", nargs="*", metavar="key.sub=value", help="config overrides")
    add("--kind", help="class, text, function, tools or reasoning_gym")
    add("--data", metavar="FILE", type=path_argument, help="rows (default: the config's, or arithmetic)")
    add("--model", type=path_argument, help="model folder or hub name, for its tokenizer and chat template")
    add("--reward", action="append", default=[], help="a reward of the config, for tools; may be repeated")
    add("--policies", type=_names, default=["scripted", "random", "model"], metavar="A,B",
        help="scripted (--replies, or the data's solutions), random, model (a tiny random one); default: all"
        )  # fmt: skip
    add("--replies", metavar="FILE.jsonl", type=path_argument,
        help='replies of scripted: {"row": 1, "replies": ["text", {"tool": NAME, "arguments": {}}]}'
        )  # fmt: skip
    add("--rows", type=int, default=3, metavar="N", help="rows, spread over the data (default: 3)")
    add("--sessions", type=int, default=2, metavar="N", help="sessions of a row and a policy (default: 2)")
    add("--reward-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range that rewards must have")
    add("--accept", type=_names, default=[], metavar="A,B",
        help="probes whose problems do not fail the check, such as thinking"
        )  # fmt: skip
    add("--json", action="store_true", help="print the report as JSON")
    add = command(reward, "reward", "score a file with a reward and show how it judged")
    add("rest", nargs=argparse.REMAINDER, help="see `rft reward --help`")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number]


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def note(text: str) -> None:
    """Print a line about the run on stderr."""
    say(f"rft: {text}")


def verify_resume(args: argparse.Namespace) -> int:
    from rft.tools.verify import verify_resume

    out = None if args.out is None else Path(args.out)
    verdict = verify_resume(args.config, args.overrides, args.steps, args.kill_at, out, note)
    say("\n".join(verdict.lines()), sys.stdout)
    return 0 if verdict.kept else 1


def replay(args: argparse.Namespace) -> int:
    from rft.tools.recompute import replay

    result = replay(Path(args.run_dir), args.step, note)
    say("\n".join(result.lines()), sys.stdout)
    return 0 if result.kept else 1


def init(args: argparse.Namespace) -> int:
    from rft.utils.quick_imports import load_torch_late, start_quickly

    load_torch_late()
    start_quickly()
    from rft.tools.init import init

    written = init(Path(args.out), args.model, args.data, args.reward, args.algorithm, note)
    note(f"wrote {written}; next: rft check {written}")
    return 0


def check(args: argparse.Namespace) -> int:
    from rft.utils.quick_imports import load_torch_late, start_quickly

    load_torch_late()
    start_quickly()
    from rft.config.load import load_config
    from rft.plan import check_plan

    say(check_plan(load_config(args.config, args.overrides)).text, sys.stdout)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    import asyncio
    import tempfile

    from rft.config.load import load_config
    from rft.errors import ConfigError
    from rft.plan import make_plan
    from rft.tools.evaluate import evaluate_model
    from rft.tools.export import weights_of
    from rft.tools.tasks import run_tasks, task_problems

    config, out = load_config(args.config, args.overrides), Path(args.out) if args.out else None
    files = [Path(file) for file in args.tasks or ()]
    if problems := task_problems(files):
        raise ConfigError(problems)
    with tempfile.TemporaryDirectory(prefix="rft-eval-") as scratch:
        model = None if args.model is None else weights_of(args.model, Path(scratch))[0]
        plan = make_plan(config, model=model, evaluate=True)
        if files:
            metrics = run_tasks(plan, files, out, args.signals)
        else:
            metrics = asyncio.run(evaluate_model(plan, args.signals, out))
    print(json.dumps(metrics, indent=2))
    return 0


def collect(args: argparse.Namespace) -> int:
    from rft.tools.collect import collect

    return _sampled(args, "sessions", collect)


def sample(args: argparse.Namespace) -> int:
    from rft.tools.sample import sample

    return _sampled(args, "samples", partial(sample, keep=args.keep, at_least=args.at_least))


def _sampled(args: argparse.Namespace, what: str, command: Callable[..., object]) -> int:
    """Run `rft collect` or `rft sample`, which go on where they were stopped."""
    from rft.config.load import load_config
    from rft.errors import RunStopped
    from rft.tools.collect import Arguments
    from rft.utils.signals import STOPPED

    config = load_config(args.config, args.overrides)
    out = Path(args.out or f"{config.run_dir}-{what}")
    up_to = getattr(args, "up_to", None)  # of rft sample
    arguments = Arguments(args.model, args.samples, args.prompts, args.split, up_to)
    try:
        note(str(command(config, out, arguments, signals=args.signals, say=note)))
    except RunStopped:
        note(f"stopped ({args.signals.reason}): the {what} so far are in {out}; the same command goes on")
        return STOPPED
    return 0


def select(args: argparse.Namespace) -> int:
    from rft.errors import ConfigError
    from rft.tools.select import Arguments, select

    pairs = [text.partition("=") for text in args.column]
    if wrong := [name for name, equals, column in pairs if not (name and equals and column)]:
        raise ConfigError([f"--column: write NAME=COLUMN, not {wrong[0]!r}"])
    arguments = Arguments(
        data=args.data,
        method=args.method,
        model=args.model,
        range=None if args.range is None else tuple(args.range),
        quantiles=None if args.quantiles is None else tuple(args.quantiles),
        fraction=args.fraction,
        lowest=args.lowest,
        threshold=args.threshold,
        sessions=args.sessions,
        columns={name: column for name, _, column in pairs},
        split=args.split,
        limit=args.limit,
        max_length=args.max_length,
        tuned=args.tuned,
        token_share=args.token_share,
        diversity=args.diversity,
    )
    with _wrong_data("--column"):
        note(str(select(arguments, Path(args.out), note)))
    return 0


@contextmanager
def _wrong_data(columns: str = "") -> Iterator[None]:
    """Report unusable data as a mistake of the command line. columns: the option that renames a column."""
    from rft.data import DataError
    from rft.errors import ConfigError

    try:
        yield
    except DataError as error:
        here = f"; here: {columns} {error.column}=NAME_IN_YOUR_DATA" if columns and error.column else ""
        raise ConfigError([f"{error}{here}"]) from None


def serve(args: argparse.Namespace) -> int:
    from rft.tools.serve import serve

    serve(args.target, args.overrides, args.host, args.port, args.key_env, args.follow, args.signals, note)
    return 0


def list_keys(args: argparse.Namespace) -> int:
    from rft.utils.quick_imports import load_torch_late

    load_torch_late()
    from rft.config.load import describe_fields

    for key, default, text in describe_fields():
        if key.startswith(args.prefix):
            print(f"{key:<44} {default:<24} {text}")
    return 0


def export(args: argparse.Namespace) -> int:
    from rft.tools.publish import Publishing, publish

    gguf, converter = (None if p is None else Path(p) for p in (args.gguf, args.converter))
    wanted = Publishing(args.adapter, args.dtype, args.push, args.private, gguf, converter)
    say("\n".join(publish(Path(args.run_dir), Path(args.out), wanted)), sys.stdout)
    return 0


def compare(args: argparse.Namespace) -> int:
    import tempfile

    from rft.tools.compare import compare, write_page

    with tempfile.TemporaryDirectory(prefix="rft-compare-") as scratch:
        result = compare(
            args.a,
            args.b,
            Path(scratch),
            start=args.start,
            data=args.data,
            limit=args.limit,
            spectra=not args.quick,
            problems=args.problems,
        )
    if args.page is not None:
        write_page(result, Path(args.page))
        note(f"wrote {args.page}")
    print(json.dumps(result, indent=2))
    return 0


def merge(args: argparse.Namespace) -> int:
    import tempfile

    from rft.tools.merge import Options, accuracy_by, check_request, merge
    from rft.tools.model_files import local_folder

    options = Options(args.weights, args.alpha, args.beta, args.density, args.gamma, args.seed)
    out = Path(args.out)
    check_request(args.method, args.models, out, options, args.config is not None)
    score = None if args.config is None else accuracy_by(args.config, args.signals)
    with tempfile.TemporaryDirectory(prefix="rft-merge-") as scratch:
        folders = {name: local_folder(name, Path(scratch) / str(i)) for i, name in enumerate(args.models)}
        lines = merge(args.method, folders, out, options, score)
    say("\n".join(lines), sys.stdout)
    return 0


def prune(args: argparse.Namespace) -> int:
    import tempfile

    from rft.tools.model_files import local_folder
    from rft.tools.prune import check_request, prune

    check_request(Path(args.out), args.share, args.heads)
    with tempfile.TemporaryDirectory(prefix="rft-prune-") as scratch:
        folder = local_folder(args.model, Path(scratch))
        say(prune(folder, args.model, Path(args.out), args.share, args.seed, args.heads), sys.stdout)
    return 0


def report(args: argparse.Namespace) -> int:
    from rft.report.report import write_report

    print(write_report(_run_folder(args.run_dir), Path(args.out) if args.out else None))
    return 0


def watch(args: argparse.Namespace) -> int:
    from rft.report.watch import watch

    watch(_run_folder(args.run_dir), once=args.once)
    return 0


def _run_folder(text: str) -> Path:
    from rft.errors import ConfigError

    path = Path(text)
    if not (path / "events.jsonl").exists():
        raise ConfigError([f"{path} is not a run folder: it has no events.jsonl"])
    return path


def reward(args: argparse.Namespace) -> int:
    from rft.tools.reward import main

    return main(args.rest)


def env(args: argparse.Namespace) -> int:
    from rft.tools.env_check.command import main

    return main(args)


def bench(args: argparse.Namespace) -> int:
    from rft.tools.bench import run

    return run(args.parts, peers=args.peers, fresh=args.fresh)
