"""What cannot be trained is told by `rft check`, before weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.cli import main
from tests.test_bad_input import run


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner.adapter={target_modules: [q_prj]}"], "'q_prj' matches no layer (did you mean 'q_proj'?)"),
        (["learner.adapter={method: loraa}"], "unknown method 'loraa' (did you mean 'lora'?)"),
        (["learner.adapter={method: prompt_tuning}"], "adds tokens or states to the prompt"),
        (["learner.adapter={options: {lora_dropuot: 0.1}}"], "did you mean 'lora_dropout'?"),
        (["learner.adapter={options: {lora_dropout: 0.1}}"], "set it to 0 for online training"),
        (["learner.adapter={target_modules: [lm_head]}"], "lm_head shares its weights with the embeddings"),
        (["learner.quantize=nf4"], "weights in 4 bits cannot be trained themselves"),
        (
            ["learner.quantize=nf4", "learner.adapter={method: vera}"],
            "vera does not work on a quantised base",
        ),
        (["learner.adapter={method: loftq}"], "loftq compensates for 4-bit quantisation"),
        (
            ["learner.adapter={}", "learner.strategy={name: lisa}"],
            "remove either the strategy",
        ),
        (["learner.strategy={name: lisa, layers: 9}"], "the model has only 3 layers"),
        (
            ["learner.strategy={name: galore}", "learner.optimizer=adamw_8bit"],
            "galore cannot be combined with optimizer",
        ),
        (["learner.strategy={name: subnetwork, mask: nowhere}"], "the mask 'nowhere' does not exist"),
        (["learner.strategy={name: lissa}"], "lisa"),
        (
            ["learner.strategy={name: lift}", "learner.optimizer=adamw_8bit"],
            "lift moves AdamW's moments to other elements",
        ),
        (["learner.adapter={method: dora, restart_every: 5}"], "only plain LoRA begins anew, not dora"),
        (["learner.adapter={restart_every: 5}", "learner.quantize=nf4"], "without rounding it away"),
        (
            ["learner.adapter={restart_every: 5}", "sync.transport=adapter"],
            "restart_every changes the base",
        ),
        (["model.options={vocab_size: 300}", "model.tokenizer={other}"], "the model's vocabulary has"),
    ],
)
def test_check_names_the_mistake(
    tmp_path: Path, capsys, tiny_folder, overrides: list[str], words: str
) -> None:
    overrides = [text.replace("{other}", str(tiny_folder)) for text in overrides]
    assert main(run(tmp_path, *overrides)) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def test_the_plan_says_what_is_trained(tmp_path: Path, capsys) -> None:
    assert main(run(tmp_path, "learner.adapter={r: 4}", "learner.quantize=nf4")) == 0
    told = capsys.readouterr().out
    assert "an adapter (lora) of" in told and "on a base in nf4" in told
