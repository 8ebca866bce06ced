"""An environment of verifiers v0: loaded in the Python that has verifiers 0.3."""

import verifiers as vf  # type: ignore[import-not-found]
from datasets import Dataset


class Guess(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **more):
        return [{"role": "user", "content": "again"}]

    @vf.stop
    async def three(self, state) -> bool:
        return len(state["trajectory"]) >= 3


def right(completion, answer, **more) -> float:
    last = completion[-1]
    return float(answer in (last["content"] if isinstance(last, dict) else last.content))


def load_environment(rows: int = 3):
    dataset = Dataset.from_list([{"question": f"what is 2+{i}?", "answer": str(2 + i)} for i in range(rows)])
    return Guess(dataset=dataset, rubric=vf.Rubric(funcs=[right]), system_prompt="Be brief.")
