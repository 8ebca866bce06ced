"""When to use which method: the paragraphs of docs/learning.md below the tables."""

from __future__ import annotations

# Algorithms and settings of section `exploration`.
EXPLORATION = """**`grpo`** is what the others are compared with, and the first to try.

**`entropy_bonus`** (`entropy_coef`) is for runs whose entropy falls to near zero while accuracy no longer
rises. The right weight depends on the vocabulary and the task; too large a weight makes the policy random.

**`entropy_target`** finds the weight by itself, and is off while the policy is random enough: give it the
entropy that you want to keep.

**`max_rl`** maximises the log of the success rate, the likelihood of a right answer summed over all
solutions, instead of the rate itself: hard problems count more. It is for tasks with many hard problems,
where pass@k matters.

**`mml`** has the same aim as `max_rl`, but learns from right solutions only, and keeps those of earlier
steps: for prompts with several right solutions that are found rarely. Below `beta: 1` rare solutions count
more.

**`clip_cov`** leaves the objective alone and takes the gradient from a few of the tokens that lower the
entropy most. It is for long runs, in which a bonus would have to be tuned again and again.

**`kl_cov`** holds the same tokens back by a KL penalty instead of leaving them out: gentler, with one more
weight to choose.

**`top_entropy`** trains on the fraction of tokens where the policy is least certain, and saves nothing but
noise: use it with long reasoning, where most tokens are certain.

**`entropy_advantage`** credits uncertain tokens of good completions more, and is for policies that stop
exploring early.

**`sapo`** is for several updates per batch, where single tokens with a large ratio make `grpo` unstable:
its gate fades a token out where a clip cuts it off.

**`gmpo`** is for the same runs: in the geometric mean of a completion's ratios one extreme token counts
little.

**`dppo`** bounds the change of probabilities instead of ratios, so that rare tokens may still be learned.
It is for large vocabularies, where ratios of rare tokens leave any clip range at once.

**`vespo`** is for stale samples (`rollout.staleness`, replay): it weighs whole completions by how likely
they still are, smoothly.

**`topr`** is for stale samples and for data of other policies: only wrong completions are weighed by their
ratio, and right ones are imitated in full.

**`m2po`** is for very stale samples: it masks the few tokens that moved most, and keeps all others
unclipped.

**`luspo`** is `gspo` for tasks whose completions differ much in length.

**`trajectory_balance`** samples in proportion to the exponential of the reward, and is for tasks with many
different right answers, and for asynchronous runs: any sampler's completions serve it."""

# Methods that have no row in the tables above, or whose row is on the page of offline algorithms.
OTHERS = """### Policy gradient

**`refresh_reference`** is for long runs with a KL term: against a fixed reference the KL ends up as a brake
on all progress. With `reset_optimizer` the run continues as if it began at the new reference (ProRL).

**`turn_returns`** and **`per_step`** give credit within a completion. Use the first in environments that
reward turns, the second for long solutions whose steps a reward or sampled continuations can judge.

**Truncated sampling** (`rollout.sampling.top_p`, `top_k`, `min_p`) is for models whose tail of unlikely
tokens derails long completions. The learner trains on the distribution that was sampled from, at the cost
of exploration: tokens outside the set are never tried. Sample from the whole vocabulary where that works.

### Distillation

**`distill`** is the cheapest way to a small model's skill where a larger model has it: a signal for each
token, from the student's completions. Prefer it to imitation where the student's mistakes differ from the
teacher's.

**`logit_distill`** trains on a fixed dataset with the teacher's distributions computed once (FIRST), and is
for teachers that are too expensive to run during training.

**A teacher behind an endpoint** (`teacher.base_url`) is for teachers that do not fit beside the student.
Its K most likely tokens and one outcome for all others stand for the vocabulary: 20 is a good start.

**Divergences.** Reverse KL (`beta: 1`) commits to what the teacher finds likely, and suits a student too
small for all of it; forward KL (`beta: 0`) covers everything, at the price of unlikely tokens between; JS
lies between the two, and `skew` mixes the distributions, so that the divergence stays finite where one has
no mass.

**Other tokenizers** (`by_rank`, ULD) compare sorted probabilities only. Take it if no teacher with the
student's tokenizer exists: it knows how sure the teacher is, and not of what.

**Self-distillation** (`teacher.template` with a hint, such as the answer) is for problems that the model
solves with the hint and not without.

**`reward_weight`** adds rewards to `distill`: for students that should pass their teacher where a reward
can tell.

### Self-training

**STaR** and **ReST-EM** ([stages](guides/self-training.md)) are for sampling and training on different
machines or days. Each stage starts from the base model, which the paper of ReST-EM finds to transfer better
than a chain of stages. Where both run at once, `expert_iteration` does it with fresher samples.

**`mml_partial`** is for prompts that are hardly ever solved as a whole: prefixes from which a continuation
succeeds are learned as well. The continuations cost as much sampling as the completions.

**`rwr`** on second attempts (RISE) teaches to improve an answer that is in the context: for chat and tools,
where a second attempt exists at inference too.

**`prefix_dpo`** contrasts continuations of one beginning, for long solutions that go wrong at one step.

**`critic_warmup`** of `ppo` (as in WSRL) is for starts that a fresh critic would spoil: it is trained on
samples of the frozen policy first.

**`train.curriculum`** is for datasets in which many prompts are always or never solved. `model: beta` keeps
a posterior of each pass rate instead of an average, so that prompts measured once, or long ago, are tried
again. **`allocate`** gives prompts with undecided outcomes more completions, at an equal number in all.

### Supervised and preference

**`asft`** anchors `dft` by a divergence to the start: for small datasets that make `dft` drift. `weight:
none` is plain `sft` with the anchor, and `refresh_reference` lets the anchor follow.

**`reward_regression`** with `confidence`, and **`weak_to_strong`**, learn from labels of a weaker model.
The first is for labels, with the threshold of the paper; the second for texts.

**`token_cleaning`** is for demonstrations with wrong or empty parts. `better: reference` needs a model
trained on clean data; with `base: start` the choice of tokens is fixed before the run, and training cannot
drift away from it. `better: policy` needs no second model, and improves its choice as it goes on.

**`q_tuning`** is for more demonstrations than the run has time for: of each step it leaves out the rows
that the model knows or finds hopeless, and trains on a part of the tokens where it is confidently wrong.

**`bco`** is for single answers that were labelled good or bad, where good and bad ones are to different
prompts; `kto` for the same data where losses and gains should count differently.

**Directions in the prompt** (`data.directions`, DPA) are for rewards whose balance users choose when they
ask: one policy for every balance, in place of one for each. On the model of 0.2 M parameters it was not
shown: one policy became briefer, with 60 steps as with 150, and ignored the direction. With `rft eval
examples/dpa.yaml --model RUN warm_start=null eval.problems=256 'data.directions.degrees=[0,0]'` (one seed):

| degrees | start | 60 steps | 150 steps | tokens: start | 60 steps | 150 steps |
|---|---|---|---|---|---|---|
| 0: right alone | 55.5 % | 52.1 % | 67.5 % | 11.8 | 8.70 | 8.24 |
| 45 | | 53.2 % | | | 8.70 | |
| 90: brief alone | | 52.3 % | 68.4 % | | 8.68 | 8.26 |

**`mft`** is for mixtures of tasks of very different sizes that should be learned equally well.

### Learner

Numbers are of [one table](learning_offline.md#methods-of-the-learner), two seeds at one budget on a model of
0.2 M parameters: problems solved, from 54.7 % at the start, and KL to the start on what was not trained.

**`optimizer: muon`** is for training all weights, and is worth trying wherever AdamW is limited by its
learning rate. Here it solved 81.1 %, AdamW 83.2 %, with less optimizer state.

**`lift`** trains few entries of each matrix, in its paper at the quality of all: for fine-tuning that must
not forget. **`saft`** chooses by the gradient of the first batch instead, for data that touch little of the
model. LIFT solved 77.7 % with 4.5 % of the weights at half of AdamW's KL, SAFT 68.0 % with 1 % at a third.

**COLA** (`restart_every`) is for LoRA runs whose rank is too small for the task, and which are long enough
for several adapters in a row. In 100 steps three adapters solved 79.1 %, one LoRA 82.2 %: within the spread
of two seeds.

**LoRAM** (`rft prune`, `rft merge loram`) is for models that do not fit beside their training state even
when quantised. It trains an adapter on a part of the model; the whole one has to be served.
Without training the pruned model first it only harmed the small model (23.6 % with half of the neurons).

**EVA with ranks redistributed** (`eva_config: {rho: 2.0}`) is for a fixed budget of adapter parameters:
layers that see more varied inputs get more of it. **`bone`** trains a block for each matrix, without a low
rank: for changes that are not of low rank. EVA solved 83.0 % and Bone 81.1 %, LoRA
82.2 % (two seeds), at 1.7 and 2.4 times LoRA's KL.

**`learner.privacy`** (DP-SGD) is for data about people. It needs large batches and costs accuracy: compare
with a run without it first. LoRA under it solved 57.6 % at an epsilon of 1.5, without it 82.2 %."""
