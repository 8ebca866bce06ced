"""Agent frameworks in kind `command`, each in its own environment, unchanged, with OPENAI_BASE_URL and
OPENAI_API_KEY only.

RFT_LITELLM_PYTHON, RFT_AGENTS_PYTHON and RFT_SMOLAGENTS_PYTHON name Pythons that have them; else pip makes
environments.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.metrics.log import read_jsonl
from tests.endpoint.served import ADD, END
from tests.endpoint.test_command import group, play, sampler
from tests.venvs import python_with

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LITELLM = """
import json, litellm
parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
tools = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": parameters}}]
messages = [{"role": "user", "content": "What is 1 + 2?"}]
reply = litellm.completion(model="openai/policy", messages=messages, tools=tools)
(call,) = reply.choices[0].message.tool_calls
result = sum(json.loads(call.function.arguments).values())
messages += [reply.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": str(result)}]
stream = litellm.completion(model="openai/policy", messages=messages, tools=tools, stream=True)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
print(float("3" in text))
"""
AGENTS = """
import agents
agents.set_tracing_disabled(True)

@agents.function_tool
def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b

agent = agents.Agent(name="Adder", instructions="Be brief.", model="policy", tools=[add])
print(float("3" in agents.Runner.run_sync(agent, "What is 1 + 2?").final_output))
"""
SMOLAGENTS = '''
from smolagents import OpenAIModel, ToolCallingAgent, tool

@tool
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b

agent = ToolCallingAgent(tools=[add], model=OpenAIModel("policy"), verbosity_level=0)
print(float(str(agent.run("What is 1 + 2?")) == "3"))
'''
FINAL = '<tool_call>\n{"name": "final_answer", "arguments": {"answer": "3"}}\n</tool_call>'
FRAMEWORKS = {
    "litellm": ("RFT_LITELLM_PYTHON", "litellm==1.110.0", LITELLM, f"It is 3.{END}", 1),
    "openai-agents": ("RFT_AGENTS_PYTHON", "openai-agents==0.24.0", AGENTS, f"It is 3.{END}", 1),
    # smolagents shows the policy its calls as text: each turn is a branch
    "smolagents": ("RFT_SMOLAGENTS_PYTHON", "smolagents[openai]==1.26.0", SMOLAGENTS, f"{FINAL}{END}", 2),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
async def test_a_framework_calls_a_tool_and_answers(tmp_path: Path, ray_here: None, name: str) -> None:
    variable, requirement, code, answer, branches = FRAMEWORKS[name]
    (tmp_path / "agent.py").write_text(code)
    others = ("OPENAI_API_BASE", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY")
    hidden = [word for other in others for word in ("-u", other)]
    command = ["env", *hidden, python_with(variable, requirement), str(tmp_path / "agent.py")]
    async with sampler(tmp_path, command, f"{ADD}{END}", answer, max_episode_tokens=8000) as episodes:
        played, metrics = await play(episodes, 2)
        assert [c.reward for c in played.completions] == [1.0] * 2, read_jsonl(tmp_path / "events.jsonl")
        batch = await group(episodes, played)  # raises unless each sampled token follows its exact context
    ids = episodes.render.tokenizer([f"{ADD}{END}", answer])["input_ids"]
    assert int(batch.mask.sum()) == 2 * sum(map(len, ids)) == sum(c.num_sampled for c in played.completions)
    assert metrics["session/turns"] == 2 and metrics["session/branches"] == branches
    assert metrics["environment/endpoint/calls"] == 4 and metrics["environment/endpoint/errors"] == 0
