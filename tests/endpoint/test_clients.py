"""The official clients of OpenAI and Anthropic, unchanged, against sessions with exact tokens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from anthropic import AsyncAnthropic
from openai import APIError, AsyncOpenAI, AuthenticationError, BadRequestError

from rft.rollout.episodes import leaves
from rft.rollout.session import Budget
from tests.endpoint.served import ADD, END, Served, served, trained

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
ASK: Any = [{"role": "user", "content": "hi"}]


def openai(server: Served, key: str, **more: Any) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, **more)


async def test_chat_of_several_turns_is_append_only() -> None:
    async with served(f"four{END}", f"five{END}") as server:
        calls, key = server.open()
        client, messages = openai(server, key), list(ASK)
        for text in ("four", "five"):
            reply = await client.chat.completions.create(model="any", messages=messages, temperature=0.3)
            message = reply.choices[0].message
            assert message.content == text and reply.choices[0].finish_reason == "stop"
            messages += [message.model_dump(exclude_none=True), {"role": "user", "content": "and now?"}]
        first, second = calls.session.calls
        assert second.prompt[: len(first.prompt + first.sampled)] == first.prompt + first.sampled
        assert reply.usage is not None and reply.usage.prompt_tokens == len(second.prompt)
        assert reply.usage.completion_tokens == len(second.sampled) and reply.model == "any"
        assert trained(calls).num_sampled == len(first.sampled) + len(second.sampled)
        assert [m["content"] for m in calls.remote.messages] == ["hi", "four", "and now?", "five"]
        models = await client.models.list()
        assert models.data[0].model_dump()["max_model_len"] == server.budget.context


async def test_tools() -> None:
    async with served(f"Let me see. {ADD}{END}", f"3{END}") as server:
        calls, key = server.open()
        client, messages = openai(server, key), list(ASK)
        reply = await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
        message = reply.choices[0].message
        assert reply.choices[0].finish_reason == "tool_calls" and message.content == "Let me see."
        (call,) = message.tool_calls or []
        assert call.type == "function" and json.loads(call.function.arguments) == {"a": 1, "b": 2}
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "3"}]
        reply = await client.chat.completions.create(
            model="m", messages=messages, tools=[TOOL], tool_choice="required"
        )
        assert reply.choices[0].message.content == "3" and reply.choices[0].message.tool_calls is None
        first, second = calls.session.calls
        assert second.prompt[: len(first.prompt + first.sampled)] == first.prompt + first.sampled
        assert trained(calls).branches == ()
        hidden = await client.chat.completions.create(
            model="m", messages=ASK, tools=[TOOL], tool_choice="none"
        )
        assert hidden.choices[0].message.tool_calls is None
        assert "Add." not in server.render.tokenizer.decode(calls.session.calls[2].prompt)


async def test_a_stream_is_the_same_answer() -> None:
    async with served(f"{'four ' * 120}{ADD}{END}") as server:
        calls, key = server.open()
        client = openai(server, key)
        stream = client.chat.completions.stream(
            model="m", messages=ASK, tools=[TOOL], stream_options={"include_usage": True}
        )
        async with stream as events:
            deltas = [e.delta async for e in events if e.type == "content.delta"]
            whole = await events.get_final_completion()
        choice = whole.choices[0]
        assert len(deltas) > 1 and "".join(deltas) == choice.message.content == ("four " * 120).strip()
        assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": 1, "b": 2}
        assert whole.usage is not None and whole.usage.completion_tokens == len(
            calls.session.calls[0].sampled
        )


async def test_token_ids_and_logprobs_are_those_of_the_record() -> None:
    async with served(f"four{END}") as server:
        calls, key = server.open()
        client = openai(server, key)
        more: Any = {"return_token_ids": True}
        reply = await client.chat.completions.create(model="m", messages=ASK, logprobs=True, extra_body=more)
        (call,) = calls.session.calls
        choice = reply.choices[0]
        assert reply.model_dump()["prompt_token_ids"] == list(call.prompt)
        assert choice.model_dump()["token_ids"] == list(call.sampled)
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert "".join(t.token for t in choice.logprobs.content) == f"four{END}"
        assert [t.logprob for t in choice.logprobs.content] == list(call.logps)
        text = await client.completions.create(model="m", prompt="hello", logprobs=1, extra_body=more)
        ids = server.render.tokenizer("hello")["input_ids"]
        assert text.choices[0].text == "four" and calls.session.calls[1].prompt == tuple(ids)
        again = await client.completions.create(model="m", prompt=ids, max_tokens=2, stream=False)
        assert calls.session.calls[2].prompt == tuple(ids) and again.choices[0].finish_reason == "length"
        pieces = [c async for c in await client.completions.create(model="m", prompt=ids, stream=True)]
        assert pieces[0].choices[0].text == "four"
        body = {"model": "m", "token_ids": ids, "sampling_params": {"max_tokens": 9, "logprobs": 1}}
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(headers=headers) as plain:
            raw = (await plain.post(f"{server.url}/inference/v1/generate", json=body)).json()
        call = calls.session.calls[-1]
        assert raw["choices"][0]["token_ids"] == list(call.sampled) and raw["prompt_token_ids"] == ids
        tokens = [t["token"] for t in raw["choices"][0]["logprobs"]["content"]]
        assert tokens == [f"token_id:{t}" for t in call.sampled]


async def test_stop_strings_are_cut_and_the_next_prompt_still_extends() -> None:
    async with served("I look it up. Observation: nothing", f"four{END}") as server:
        calls, key = server.open()
        client, messages = openai(server, key), list(ASK)
        reply = await client.chat.completions.create(model="m", messages=messages, stop=["Observation:"])
        assert reply.choices[0].message.content == "I look it up. "
        assert server.policy.requests[0].sampling.stop == ("Observation:",)
        messages += [reply.choices[0].message, {"role": "user", "content": "Observation: four"}]
        await client.chat.completions.create(model="m", messages=messages, stop=["Observation:"])
        first, second = calls.session.calls
        assert second.prompt[: len(first.prompt + first.sampled)] == first.prompt + first.sampled


async def test_untrained_calls_are_answered_but_not_trained_on() -> None:
    async with served() as server:
        calls, key = server.open()
        client = openai(server, key)
        await client.chat.completions.create(model="rft-untrained", messages=ASK)
        await client.chat.completions.create(model="m", messages=ASK, extra_headers={"rft-untrained": "1"})
        await client.chat.completions.create(model="m", messages=ASK)
        assert [c.trained for c in calls.session.calls] == [False, False, True]
        assert trained(calls).num_sampled == len(calls.session.calls[2].sampled)


async def test_limits_and_wrong_requests_are_errors_of_the_client() -> None:
    async with served(f"four{END}") as server:
        calls, key = server.open(budget=Budget(1, 50, 60))
        client = openai(server, key)
        with pytest.raises(BadRequestError) as full:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 99}])
        assert full.value.code == "context_length_exceeded" and "max_episode_tokens" in str(full.value)
        for wrong in ({"n": 2}, {"max_tokens": 0}, {"top_logprobs": 3}, {"frequency_penalty": 1.0}):
            with pytest.raises(BadRequestError):
                await client.chat.completions.create(model="m", messages=ASK, **wrong)  # type: ignore[call-overload]
        await client.chat.completions.create(model="m", messages=ASK)
        with pytest.raises(BadRequestError, match="max_turns"):
            await client.chat.completions.create(model="m", messages=ASK)
        with pytest.raises(AuthenticationError):
            await openai(server, key[:-1] + "x").chat.completions.create(model="m", messages=ASK)
        assert server.server.counts["refused"] == 1 and len(calls.session.calls) == 1
        assert calls.limit is not None


async def test_rewards_and_the_end_of_a_session() -> None:
    async with served() as server:
        calls, key = server.open()
        client = openai(server, key)
        ids = [(await client.chat.completions.create(model="m", messages=ASK)).id for _ in range(2)]
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}) as plain:
            for body, status in (
                ({"reward": 0.5, "interaction_id": ids[1]}, 200),
                ({"reward": 9}, 200),
                ({"reward": 1}, 200),
                ({"reward": float("nan")}, 400),
                ({"reward": 1, "interaction_id": "chatcmpl-other-0"}, 400),
                ({}, 400),
            ):
                data = json.dumps(body)
                assert (
                    await plain.post(f"{server.url}/v1/rl/set_reward", content=data)
                ).status_code == status
            calls.finish()
            assert [c.reward for c in calls.session.calls] == [None, 0.5]
            assert calls.session.rewards == {"reward": 1.0} and sorted(calls.remote.given) == [0.5, 1.0]
            assert (await plain.post(f"{server.url}/rl/end_session")).status_code == 200
        with pytest.raises(AuthenticationError):
            await client.chat.completions.create(model="m", messages=ASK)


async def test_anthropic() -> None:
    async with served(f"Let me see. {ADD}{END}", f"3{END}", f"so: STOP{END}") as server:
        calls, key = server.open()
        client = AsyncAnthropic(base_url=server.url, api_key=key, max_retries=0)
        tools: Any = [{"name": "add", "description": "Add.", "input_schema": TOOL["function"]["parameters"]}]
        messages: list[Any] = [{"role": "user", "content": "hi"}]
        more: Any = {"model": "m", "max_tokens": 200, "system": "Be brief.", "tools": tools}
        first = await client.messages.create(messages=messages, **more)
        assert first.stop_reason == "tool_use" and [b.type for b in first.content] == ["text", "tool_use"]
        use = first.content[1]
        assert use.type == "tool_use" and use.input == {"a": 1, "b": 2}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "3"}]}
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = await client.messages.create(messages=messages, **more)
        assert second.content[0].type == "text" and second.content[0].text == "3"
        assert second.stop_reason == "end_turn"
        a, b = calls.session.calls
        assert b.prompt[: len(a.prompt + a.sampled)] == a.prompt + a.sampled
        assert second.usage.input_tokens == len(b.prompt)
        third = await client.messages.create(messages=messages, stop_sequences=["STOP"], **more)
        assert (third.stop_reason, third.stop_sequence) == ("stop_sequence", "STOP")
    async with served(f"Let me see. {ADD}{END}") as server:
        calls, key = server.open()
        client = AsyncAnthropic(base_url=server.url, api_key=key, max_retries=0)
        async with client.messages.stream(messages=messages[:1], **more) as stream:
            final = await stream.get_final_message()
        assert [b.model_dump(exclude_none=True) for b in final.content][1]["input"] == {"a": 1, "b": 2}
        assert final.usage.output_tokens == len(calls.session.calls[0].sampled)
        with pytest.raises(Exception, match="authentication_error"):
            await AsyncAnthropic(base_url=server.url, api_key="x", max_retries=0).messages.create(
                model="m", max_tokens=1, messages=messages[:1]
            )


async def test_responses() -> None:
    async with served(f"Let me see. {ADD}{END}", f"3{END}") as server:
        calls, key = server.open()
        client = openai(server, key)
        tools: Any = [{"name": "add", "type": "function", "parameters": TOOL["function"]["parameters"]}]
        given: list[Any] = [{"role": "user", "content": "hi"}]
        first = await client.responses.create(model="m", input=given, instructions="Be brief.", tools=tools)
        assert [item.type for item in first.output] == ["message", "function_call"]
        call = first.output[1]
        assert call.type == "function_call" and json.loads(call.arguments) == {"a": 1, "b": 2}
        given += [item.model_dump(exclude_none=True) for item in first.output]
        given += [{"type": "function_call_output", "call_id": call.call_id, "output": "3"}]
        second = await client.responses.create(model="m", input=given, instructions="Be brief.", tools=tools)
        assert second.output_text == "3" and second.status == "completed"
        a, b = calls.session.calls
        assert b.prompt[: len(a.prompt + a.sampled)] == a.prompt + a.sampled
        calls, key = server.open("t")
        async with openai(server, key).responses.stream(model="m", input="hi", tools=tools) as stream:
            final = await stream.get_final_response()
        assert final.output_text == "Let me see." and final.output[1].type == "function_call"
        with pytest.raises(BadRequestError, match="whole conversation"):
            await client.responses.create(model="m", input="hi", previous_response_id=first.id)


async def test_an_error_after_the_stream_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins after some seconds without an answer; then errors are events, in each dialect."""
    monkeypatch.setattr("rft.endpoint.server.OPEN_AFTER_S", 0.05)
    monkeypatch.setattr("rft.endpoint.server.ALIVE_S", 0.05)
    async with served(gate=asyncio.Event()) as server:
        _, key = server.open()
        server.policy.failure = ValueError("a bad day")
        assert server.policy.gate is not None
        client = openai(server, key)
        events = await client.chat.completions.create(model="m", messages=ASK, stream=True)
        others = await client.responses.create(model="m", input="x", stream=True)
        assert (await anext(aiter(events))).choices[0].delta.role == "assistant"
        assert (await anext(aiter(others))).type == "response.created"
        await asyncio.sleep(0.2)
        server.policy.gate.set()
        with pytest.raises(APIError, match="a bad day"):
            async for _ in events:
                pass


@pytest.mark.parametrize("drift", [False, True])
async def test_token_prompts_of_verifiers(drift: bool) -> None:
    """Its client renders: the sampled ids extend the prompt; with re-encoded ones each turn branches."""
    async with served(f"four and five{END}") as server:
        calls, key = server.open()
        ids = list(server.render.tokenizer("hi", add_special_tokens=False)["input_ids"])
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}) as http:
            for _ in range(3):
                body = {"model": "m", "token_ids": ids, "sampling_params": {"max_tokens": 99, "logprobs": 1}}
                (choice,) = (await http.post(f"{server.url}/inference/v1/generate", json=body)).json()[
                    "choices"
                ]
                said = choice["token_ids"]
                again = [*server.render.tokenizer("z", add_special_tokens=False)["input_ids"], *said[1:]]
                ids = ids + (again if drift else said) + ids[:1]
        made = calls.session.calls
        assert leaves(made) == (3 if drift else 1)
        assert trained(calls).num_sampled == sum(len(call.sampled) for call in made)
