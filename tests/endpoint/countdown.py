"""A taskset of verifiers v1 with a harness of its own: loaded in the Python that has verifiers."""

import asyncio
import os

import httpx
import verifiers.v1 as vf  # type: ignore[import-not-found]


class Data(vf.TaskData):
    answer: str = "4"


class Task(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, trace) -> float:
        return float(self.data.answer in (trace.assistant_messages[-1].content or ""))

    @vf.reward(weight=0.5)
    async def known(self, trace) -> float:
        return 1.0

    @vf.metric
    async def asked(self, trace) -> float:
        return float(trace.num_turns)


class Tasks(vf.Taskset[Task, vf.TasksetConfig]):
    def load(self):
        for i in range(3):
            data = Data(name=f"plus-{i}", prompt=f"what is 2+{i}?", answer=str(2 + i))
            yield Task(data, self.config.task)


class ChatConfig(vf.HarnessConfig):
    turns: int = 3
    fault: str = ""  # in the second turn: raise, exit, hang, leave


class Chat(vf.Harness[ChatConfig]):
    """Ask, and ask again, by plain HTTP."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, **more):
        messages = [{"role": "user", "content": data.prompt}]
        headers = {"Authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(timeout=60, headers=headers) as client:
            for turn in range(self.config.turns):
                if turn == 1:
                    await self._fail(runtime)
                body = {"model": ctx.model, "messages": messages}
                answer = await client.post(f"{endpoint}/chat/completions", json=body)
                answer.raise_for_status()
                said = answer.json()["choices"][0]["message"]["content"] or ""
                messages += [
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": f"again {turn}"},
                ]
        return vf.ProgramResult(0, "", "")

    async def _fail(self, runtime):
        match self.config.fault:
            case "raise":
                raise ValueError("the harness raised")
            case "exit":
                os._exit(3)
            case "hang":
                await asyncio.sleep(1000)
            case "leave":
                await runtime.run(["bash", "-c", "setsid sleep 1000 >/dev/null 2>&1 </dev/null &"], {})


__all__ = ["Chat", "Tasks"]
