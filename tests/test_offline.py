"""Offline runs in this process: order, resume, streams, evaluation, references."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rft import checkpoint
from rft.batch import Batch
from rft.config.load import parse_config
from rft.errors import LearnerError, RunStopped
from rft.learner.learner import Learner
from rft.learner.objective import LogpGap
from rft.loops.offline import train_offline
from rft.metrics import Progress, RunLog
from rft.metrics.names import is_documented
from rft.plan import Plan, make_plan
from rft.report.history import Run as History
from rft.report.report import facts
from rft.run_dir import RunFolder
from tests.in_process import InProcessLearner

ROWS = [
    {"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 10}"}
    for a in range(5)
    for b in range(4)
]


def plan_of(tiny_folder: Path, where: Path, **changes: Any) -> Plan:
    rows = where / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    (where / "held.jsonl").write_text("\n".join(map(json.dumps, ROWS[:6])))
    raw: dict[str, Any] = {
        "output_dir": str(where),
        "algorithm": {"name": "dpo", "beta": 0.5},
        "model": {"path": str(tiny_folder)},
        "data": {"path": str(rows), "eval_path": str(where / "held.jsonl"), "chat_template": "never"},
        "train": {"steps": 6, "batch_size": 4},
        "learner": {"learning_rate": 3e-3, "threads": 1},
        "eval": {"every": 2},
        "checkpoint": {"every": 2, "keep": 9},
    }
    return make_plan(parse_config({**raw, **changes}))


def loaded(plan: Plan) -> InProcessLearner:
    return InProcessLearner(plan.learner_spec(), plan.channel_spec())


class Run:
    """One process's part of an offline run."""

    def __init__(self, plan: Plan, name: str, resume: bool = False) -> None:
        self.plan, self.path = plan, Path(plan.config.output_dir) / name
        self.path.mkdir(exist_ok=True)
        self.handle = loaded(plan)
        self.learner = self.handle.actor.learner
        self.stop = asyncio.Event()
        found = checkpoint.latest(self.path / "checkpoints") if resume else None
        self.folder = RunFolder(self.path, found)

    def carry_out(self, stop_after: int | None = None) -> dict[str, float]:
        stop = self.stop

        class Stopping(Progress):
            def update(self, step: int, metrics: Any) -> None:
                super().update(step, metrics)
                if step == stop_after:
                    stop.set()

        config = self.plan.config
        log = RunLog(self.path, config.train.steps, config.tracking, resumed_at=self.folder.resumed_at)
        try:
            with Stopping(config.train.steps, "test", display="quiet") as progress:
                running = train_offline(self.plan, self.folder, self.handle, progress, log, stop, None)
                return asyncio.run(running)
        finally:
            log.close("done")

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]


def weights(run: Run) -> list[torch.Tensor]:
    return [p.detach() for p in run.learner.policy.model.parameters()]


@pytest.mark.parametrize("form", ["file", "stream", "mixture"])
def test_a_stopped_and_resumed_run_is_the_run_that_never_stopped(
    tiny_folder: Path, tmp_path: Path, form: str
) -> None:
    plan = plan_of(tiny_folder, tmp_path)
    if form == "mixture":
        plan = plan_of(tiny_folder, tmp_path, data=mixture_of(plan))
    if form == "stream":  # it goes on where it is: every run reads its own
        data = {**plan.config.data.model_dump(), "streaming": True, "shuffle_buffer": 7}
        make = lambda: plan_of(tiny_folder, tmp_path, data=data)  # noqa: E731
    else:
        make = lambda: plan  # noqa: E731
    whole = Run(make(), "whole")
    whole.carry_out()
    first = Run(make(), "cut")
    with pytest.raises(RunStopped) as stopped:
        first.carry_out(stop_after=3)
    assert stopped.value.step == 3 and str(stopped.value) == "stopped at step 3"
    second = Run(make(), "cut", resume=True)
    assert second.folder.resumed_at == 3
    second.carry_out()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    assert [line["step"] for line in second.lines] == list(range(7))
    for a, b in zip(whole.lines, second.lines, strict=True):
        assert {n for n in a if n.startswith(("eval/", "preference/"))} <= set(b)
        for name in ("train/loss", "preference/margin", "eval/loss", "eval/preference_margin", "data/epoch"):
            assert a.get(name) == b.get(name), (name, a["step"])
    assert not {n for line in whole.lines for n in line if not is_documented(n)}
    if form == "mixture":
        names = [f"data/{source}/{key}" for source in "ab" for key in ("rows", "share", "epoch", "tokens")]
        assert [[line.get(n) for n in names] for line in whole.lines] == [
            [line.get(n) for n in names] for line in second.lines
        ]
        rows = [line["data/b/rows"] for line in whole.lines if line["step"]]
        assert rows == [1, 2, 3, 6, 9, 12]  # a quarter of 4 rows a step, then three quarters


def mixture_of(plan: Plan) -> dict[str, Any]:
    """The rows of a plan as two sources, one of which is drawn more often in the second half."""
    data = plan.config.data
    b = {"path": data.path, "template": "So {prompt}", "rate": [[0, 0.25], [0.5, 0.75]]}
    a = {"path": data.eval_path, "eval_path": data.eval_path, "rate": [[0, 0.75], [0.5, 0.25]]}
    return {"mixture": {"a": a, "b": b}, "chat_template": "never"}


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The result and the lines of a run that nothing interrupted."""
    run = Run(plan_of(tiny_folder, tmp_path_factory.mktemp("uninterrupted")), "run")
    return run.carry_out(), run.lines


@pytest.mark.parametrize("step", [2, 6])
@pytest.mark.parametrize("fault", [None, LearnerError("the loss is not finite")])
def test_an_evaluation_that_was_cut_short_is_made_up_for(
    tiny_folder: Path,
    tmp_path: Path,
    uninterrupted: tuple[dict[str, float], list[dict[str, Any]]],
    step: int,
    fault: Exception | None,
) -> None:
    """By a stop, or by an error after which the step is saved; in the middle of the run, or at its end. The
    result and every line are those of the run that never stopped."""
    expected, expected_lines = uninterrupted
    plan = plan_of(tiny_folder, tmp_path)
    first = Run(plan, "cut")
    evaluate = first.learner.evaluate

    def cut(batch: Any, at: int) -> Any:
        if at == step and fault is not None:
            raise fault
        if at == step:
            first.stop.set()
        return evaluate(batch, at)

    first.learner.evaluate = cut  # type: ignore[method-assign]
    stops = first.handle.evaluate

    async def slow(*args: Any) -> Any:
        sums = await stops(*args)
        await asyncio.sleep(0.05)  # the stop is seen here
        return sums

    first.handle.evaluate = slow  # type: ignore[method-assign]
    with pytest.raises(RunStopped if fault is None else LearnerError):
        first.carry_out()
    assert first.lines[-1]["step"] == step and "train/loss" in first.lines[-1]
    assert "eval/loss" not in first.lines[-1]
    second = Run(plan, "cut", resume=True)
    assert second.folder.resumed_at == step
    result = second.carry_out()
    evaluation = {n: v for n, v in second.lines[-1].items() if n.startswith("eval/") or n == "time/eval"}
    assert result == evaluation
    assert {n: v for n, v in result.items() if n != "time/eval"} == {
        n: v for n, v in expected.items() if n != "time/eval"
    }
    history = History(second.path)  # of the report, `rft watch` and `rft.Run`
    assert history.step == 6 and history.last("eval/loss") == result["eval/loss"]
    assert [row["step"] for row in history.metrics if "eval/loss" in row] == [0, 2, 4, 6]
    assert "held-out loss" in {fact.label for fact in facts(history)}
    for a, b in zip(expected_lines, second.lines, strict=True):
        assert set(a) == set(b), a["step"]
        assert {n: v for n, v in a.items() if n.startswith("eval/")} == {
            n: v for n, v in b.items() if n.startswith("eval/")
        }


@pytest.mark.parametrize("every", [0, 2])
def test_a_finished_run_that_is_resumed_has_the_same_result(
    tiny_folder: Path, tmp_path: Path, every: int
) -> None:
    """It was stopped in its export: nothing is computed, or logged, a second time."""
    plan = plan_of(tiny_folder, tmp_path, eval={"every": every})
    run = Run(plan, "run")
    result = run.carry_out()
    lines = run.lines
    again = Run(plan, "run", resume=True)
    again.learner.evaluate = lambda *_: pytest.fail("evaluated again")  # type: ignore[assignment]
    assert again.carry_out() == result and again.lines == lines


def test_a_step_is_logged_before_its_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    """The line of a step must be there whenever a checkpoint claims that the step is done."""
    run = Run(plan_of(tiny_folder, tmp_path), "run")
    logged: list[int] = []
    actor = run.handle.actor
    save = actor.begin_save

    def watched(root: str, step: int, *rest: Any) -> None:
        logged.append(run.lines[-1]["step"])
        assert logged[-1] == step
        save(root, step, *rest)

    actor.begin_save = watched  # type: ignore[method-assign]
    run.carry_out()
    assert logged == [2, 4, 6]


def test_held_out_numbers_are_those_of_the_models_themselves(tiny_folder: Path, tmp_path: Path) -> None:
    """Preference accuracy, margin and -log p of the final weights, one sequence at a time."""
    run = Run(plan_of(tiny_folder, tmp_path), "run")
    last = run.carry_out()
    assert [line["step"] for line in run.lines if "eval/loss" in line] == [0, 2, 4, 6]
    first = run.lines[0]
    assert first["eval/preference_accuracy"] == 0.5 and first["eval/preference_margin"] == 0.0
    assert last["eval/preference_accuracy"] > 0.5 and last["eval/preference_margin"] > 0.0
    offline = run.plan.data
    assert offline is not None and offline.held_out is not None and run.learner.reference is not None
    margins, surprise, tokens = [], 0.0, 0
    for group in offline.held_out:
        ratios = []
        for c in group.completions:
            ids = torch.tensor([[*group.prompt.tokens, *c.tokens]])
            with torch.no_grad():
                new, old = (
                    m.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(c.tokens) :]
                    for m in (run.learner.policy, run.learner.reference)
                )
            ratios.append(0.5 * float((new - old).sum()))
            if c.reward == 1.0:
                surprise, tokens = surprise - float(new.sum()), tokens + len(c.tokens)
        margins.append(ratios[0] - ratios[1])
    assert last["eval/preference_margin"] == pytest.approx(sum(margins) / 6, rel=1e-4)
    assert last["eval/preference_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 6)
    assert last["eval/nll"] == pytest.approx(surprise / tokens, rel=1e-4)
    assert last["eval/examples"] == 6.0


def test_cached_reference_log_probs_are_those_of_the_live_reference(
    tiny_folder: Path, tmp_path: Path
) -> None:
    live = Run(plan_of(tiny_folder, tmp_path), "live")
    live.carry_out()
    learner = {"learning_rate": 3e-3, "threads": 1, "reference_logps": "cached"}
    plan = plan_of(tiny_folder, tmp_path, learner=learner)
    cached = Run(plan, "cached")
    assert cached.learner.reference is None
    cached.carry_out()
    assert cached.learner.reference is None  # released after it was asked
    for a, b in zip(live.lines, cached.lines, strict=True):
        for name in ("train/loss", "eval/loss", "eval/preference_margin"):
            assert (name in a) == (name in b)
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4, abs=1e-6)
    files = sorted((tmp_path / ".cache").glob("reference-*.safetensors"))
    assert len(files) == 2  # training rows and held-out rows
    again = Run(plan, "again")
    again.learner._load_reference = lambda: pytest.fail("the cache was not read")  # type: ignore[assignment]
    again.carry_out()
    assert again.lines[-1]["train/loss"] == cached.lines[-1]["train/loss"]


def test_fixed_cleaning_keeps_the_tokens_that_the_start_and_the_reference_choose(
    tiny_folder: Path, tmp_path: Path
) -> None:
    from rft.loops.offline import scored
    from rft.tasks.tiny import build_tiny

    build_tiny(tmp_path / "other", seed=8, hidden_size=32, layers=1, heads=1, intermediate_size=64)
    algorithm = {"name": "token_cleaning", "base": "start", "share": 0.5}
    columns = {"prompt": "prompt", "completion": "chosen"}
    changes: dict[str, Any] = {
        "model": {"path": str(tiny_folder), "reference": str(tmp_path / "other")},
        "data": {"path": str(tmp_path / "rows.jsonl"), "chat_template": "never", "columns": columns},
        "eval": {"every": 0},
    }
    plan = plan_of(tiny_folder, tmp_path, algorithm=algorithm, **changes)
    run = Run(plan, "run")
    start = run.learner.score(Batch.build(plan.data.sample))["logps"]
    run.carry_out()
    run.learner.score_policy = lambda batch: pytest.fail("computed again")  # type: ignore[assignment]
    batch = Batch.build(asyncio.run(scored(plan, run.handle, plan.data.sample, False)))
    assert (run.learner.score(batch)["logps"] - start).abs().max() > 0.1, "the policy has moved"
    score = (run.learner.score_reference(batch) - start)[batch.mask]
    kept = run.learner.prepare(run.learner.at_step(batch, 5), LogpGap()).mask[batch.mask]
    assert kept.sum() == round(len(score) / 2)
    assert score[kept].min() >= score[~kept].max()


def test_the_cache_is_keyed_by_model_and_data(tiny_folder: Path, tmp_path: Path) -> None:
    from rft.loops.offline import cache_file

    plan = plan_of(tiny_folder, tmp_path)
    groups = plan.data.sample
    file = cache_file(tmp_path, groups, str(tiny_folder), "float32")
    assert file == cache_file(tmp_path, list(groups), str(tiny_folder), "float32")
    assert file != cache_file(tmp_path, groups[1:], str(tiny_folder), "float32")
    assert file != cache_file(tmp_path, groups, str(tiny_folder), "bfloat16")
    other = tmp_path / "other"
    loaded(plan).actor.export(str(other))
    (other / "config.json").write_text((tiny_folder / "config.json").read_text() + "\n")
    assert file != cache_file(tmp_path, groups, str(other), "float32")


def test_another_model_as_the_reference(tiny_folder: Path, tmp_path: Path) -> None:
    from rft.tasks.tiny import build_tiny

    other = tmp_path / "other"
    build_tiny(other, seed=8, hidden_size=32, layers=1, heads=1, intermediate_size=64)
    model = {"path": str(tiny_folder), "reference": str(other)}
    run = Run(plan_of(tiny_folder, tmp_path, model=model), "run")
    reference = run.learner.reference
    assert reference is not None and reference.model.config.hidden_size == 32
    batch = Batch.build(run.plan.data.sample[:2])
    expected = run.learner.score(batch, model=reference)["logps"]
    torch.testing.assert_close(run.learner.score_reference(batch), expected)
    metrics = run.learner.step(batch, 0)
    own = Run(plan_of(tiny_folder, tmp_path), "own").learner.step(batch, 0)
    assert metrics["train/loss"] != pytest.approx(own["train/loss"], rel=1e-3)


def test_reference_free_loads_no_reference(tiny_folder: Path, tmp_path: Path) -> None:
    algorithm = {"name": "dpo", "reference_free": True}
    run = Run(plan_of(tiny_folder, tmp_path, algorithm=algorithm), "run")
    assert run.learner.reference is None
    run.carry_out()


def test_dpo_trains_an_adapter_against_the_policy_without_it(tiny_folder: Path, tmp_path: Path) -> None:
    """The reference costs no second model: it is the base, and stays what it was while the adapter learns."""
    from transformers import AutoModelForCausalLM

    learner = {"learning_rate": 1e-2, "threads": 1, "adapter": {"r": 4}}
    plan = plan_of(tiny_folder, tmp_path, learner=learner)
    run = Run(plan, "lora")
    batch = Batch.build(plan.data.sample[:3])

    def of_folder(folder: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = torch.zeros(batch.num_tokens)
        for tree in range(6):
            one = batch.select([tree])
            with torch.no_grad():
                logps = model(one.tokens[None]).logits[0].log_softmax(-1)
            where = batch.mask & (batch.tree[batch.segment] == tree)
            found[where] = logps[one.source[one.mask], one.tokens[one.mask]]
        return found

    base = of_folder(tiny_folder)
    torch.testing.assert_close(run.learner.score_reference(batch), base, rtol=1e-4, atol=1e-5)
    last = run.carry_out()
    assert last["eval/preference_accuracy"] > 0.5 and last["eval/preference_margin"] > 0.01
    torch.testing.assert_close(run.learner.score_reference(batch), base, rtol=1e-4, atol=1e-5)
    exported = Path(run.learner.export(str(tmp_path / "model")))
    trained = run.learner.score(batch)["logps"]
    assert (trained - base).abs().max() > 0.01
    torch.testing.assert_close(of_folder(exported), trained, rtol=1e-4, atol=1e-4)
    again = Run(plan, "lora", resume=True)
    assert again.folder.resumed_at == 6
    again.carry_out()  # nothing is left to do, but the state is read
    torch.testing.assert_close(again.learner.score(batch)["logps"], trained, rtol=1e-5, atol=1e-6)


def test_evaluation_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    with_it = Run(plan_of(tiny_folder, tmp_path), "with")
    with_it.carry_out()
    without = Run(plan_of(tiny_folder, tmp_path, eval={"every": 0}), "without")
    last = without.carry_out()
    assert "train/loss" in last and not any("eval/loss" in line for line in without.lines)
    assert all(torch.equal(a, b) for a, b in zip(weights(with_it), weights(without), strict=True))


def test_dropped_groups_of_a_cut_cache_file_are_noticed(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from rft.loops.offline import attach

    plan = plan_of(tiny_folder, tmp_path)
    file = tmp_path / "short.safetensors"
    save_file({"logps": torch.zeros(3)}, file)
    with pytest.raises(
        ValueError, match=r"contains 3 reference log-probs, but the data has \d+ tokens: delete the file"
    ):
        attach(plan.data.sample, file)
    first = plan.data.sample[0]
    tokens = sum(len(c.tokens) for c in first.completions)
    save_file({"logps": torch.arange(tokens, dtype=torch.float32)}, file)
    (filled,) = attach([first], file)
    batch = Batch.build([filled])
    assert batch.ref_logps is not None
    assert batch.ref_logps[batch.mask].tolist() == list(range(tokens))
    masked = replace(first.completions[0], mask=(False,) + (True,) * (len(first.completions[0].tokens) - 1))
    save_file({"logps": torch.arange(tokens - 1, dtype=torch.float32)}, file)
    (filled,) = attach([replace(first, completions=(masked, first.completions[1]))], file)
    assert filled.completions[0].ref_logps is not None and filled.completions[0].ref_logps[0] == 0.0


def failing_from(learner: Learner, step: int, error: Exception) -> Learner:
    """A learner whose step `step` fails."""
    right = learner.step

    def fails(batch: Any, at: int) -> dict[str, float]:
        if at == step:
            raise error
        return right(batch, at)

    learner.step = fails  # type: ignore[method-assign]
    return learner


@pytest.mark.parametrize("streaming", [False, True])
def test_a_step_that_fails_is_saved_up_to_it_and_drawn_again(
    tiny_folder: Path, tmp_path: Path, streaming: bool
) -> None:
    """The gradient of step 4 is not finite: the weights after step 3 are saved, and the resumed run trains on
    the batch that failed, as the run that never failed does."""

    def make() -> Plan:
        plan = plan_of(tiny_folder, tmp_path, checkpoint={"every": 0, "keep": 9})
        data = {**plan.config.data.model_dump(), "streaming": True, "shuffle_buffer": 7}
        return plan_of(tiny_folder, tmp_path, data=data, checkpoint={"every": 0}) if streaming else plan

    whole = Run(make(), "whole")
    whole.carry_out()
    first = Run(make(), "cut")
    failing_from(first.learner, 3, LearnerError("the gradient norm is nan"))
    with pytest.raises(LearnerError, match="norm is nan"):
        first.carry_out()
    events = [json.loads(line) for line in (first.path / "events.jsonl").read_text().splitlines()]
    (told,) = [e for e in events if e["kind"] == "fault/learner"]
    assert "a checkpoint of step 3 is saved" in told["action"]
    second = Run(make(), "cut", resume=True)
    assert second.folder.resumed_at == 3
    second.carry_out()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))


def test_weights_that_are_not_finite_do_not_replace_a_good_checkpoint(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """A weight decay beyond float32 makes the weights infinite in one update: no push finds that offline."""
    learner = {"learning_rate": 1e37, "weight_decay": 1e3, "threads": 1, "max_grad_norm": None}
    checkpoints = {"every": 1, "keep": 1}
    run = Run(
        plan_of(tiny_folder, tmp_path, learner=learner, checkpoint=checkpoints, eval={"every": 0}), "run"
    )
    with pytest.raises(LearnerError, match=r"weights of version \d+ are not finite, first"):
        run.carry_out()
    found = checkpoint.latest(run.path / "checkpoints")
    assert found is None or found.step < run.learner.version
