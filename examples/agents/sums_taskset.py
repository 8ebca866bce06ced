"""A taskset of verifiers with its harness: sums, asked again once if the answer is wrong.

It knows nothing of rft, and is loaded in a Python that has verifiers 0.4.
"""

import re

import httpx
import verifiers.v1 as vf


class Sum(vf.TaskData):
    answer: str


class SumTask(vf.Task[Sum, vf.State, vf.TaskConfig]):
    @vf.reward
    async def solved(self, trace: vf.Trace) -> float:
        """Pay less for the second try."""
        answers = [last_number(message.content) for message in trace.assistant_messages]
        return 1.25 - 0.25 * len(answers) if answers and answers[-1] == self.data.answer else 0.0


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self):
        for a in range(10):
            for b in range(10):
                yield SumTask(
                    Sum(name=f"{a}+{b}", prompt=f"{a}+{b}=?\n", answer=str(a + b)), self.config.task
                )


class TriesConfig(vf.HarnessConfig):
    tries: int = 2


class Tries(vf.Harness[TriesConfig]):
    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, **more):
        messages = [{"role": "user", "content": data.prompt}]
        async with httpx.AsyncClient(timeout=600, headers={"Authorization": f"Bearer {secret}"}) as client:
            for _ in range(self.config.tries):
                body = {"model": ctx.model, "messages": messages}
                reply = await client.post(f"{endpoint}/chat/completions", json=body)
                reply.raise_for_status()
                text = reply.json()["choices"][0]["message"]["content"]
                if last_number(text) == data.answer:
                    break
                messages += [
                    {"role": "assistant", "content": text or ""},
                    {"role": "user", "content": "That is wrong. Try again."},
                ]
        return vf.ProgramResult(0, "", "")


def last_number(text: str | None) -> str | None:
    numbers = re.findall(r"-?\d+", text or "")
    return numbers[-1] if numbers else None


__all__ = ["Sums", "Tries"]
