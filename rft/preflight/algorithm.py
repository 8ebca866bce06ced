"""The preflight's questions to an algorithm: does the run have what it lives on?"""

from __future__ import annotations

from rft.algorithms.base import Algorithm


def problems(
    algorithm: Algorithm,
    *,
    num_generations: int,
    has_reference: bool,
    has_critic: bool,
    has_demonstrations: bool,
    has_rewards: bool = True,
    minibatches: int = 1,
    can_mix: bool = True,
) -> list[str]:
    """What the algorithm lacks, each as one sentence with what to write instead; empty: nothing.

    num_generations: completions per prompt. has_reference: a frozen model is configured.
    has_critic: a value head or critic model is. has_demonstrations: at least some prompts come with
    one. minibatches: optimizer steps per batch, inner epochs included. can_mix: the rollout engine can
    sample from a mixture of policy and reference.
    """
    name, needs, found = type(algorithm).__name__, algorithm.needs, []
    if algorithm.online and num_generations < algorithm.min_generations:
        found.append(
            f"{name} compares completions of one prompt, and num_generations is {num_generations}; "
            f"write num_generations: {algorithm.min_generations} or more"
        )
    if algorithm.needs_reference and not has_reference:
        settled = " or beta: 0" if hasattr(algorithm, "kl_in") else ""
        found.append(f"{name} needs a reference model, and there is none; configure one{settled}")
    if "values" in needs and not has_critic:
        found.append(f"{name} needs a critic, and there is none; configure a value head or a critic model")
    if algorithm.uses_demonstrations and not has_demonstrations:
        found.append(f"{name} needs demonstrations, and the data have none; name their column")
    if "rewards" in needs and not has_rewards:
        found.append(f"{name} needs a reward, and there is none; name at least one under rewards")
    if algorithm.online:
        plan = algorithm.rollouts(max(num_generations, 1), progress=0.0, demonstration=has_demonstrations)
        if any(r.mixture for r in plan) and not can_mix:
            found.append(
                f"{name} samples from a mixture with the reference, which this rollout engine cannot; "
                "write mixture: 0, or use the hf engine"
            )
    if algorithm.on_policy and minibatches > 1:
        found.append(
            f"{name} is on-policy without a ratio, and each batch is stepped on {minibatches} times; "
            "write num_iterations: 1 and one minibatch"
        )
    if algorithm.needs_reference and algorithm.refresh_reference == 1 and minibatches == 1:
        found.append(
            "refresh_reference: 1 with one update per step makes the reference the policy at every update: "
            "log-ratios to it are 0, and the loss is another one; write refresh_reference: 20, or take "
            "several updates per step (train.minibatches, train.num_iterations)"
        )
    return found + algorithm.conflicts(num_generations)
