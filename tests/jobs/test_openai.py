"""OpenAI's batch format: what its requests ask for, and what is refused."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spmd_infer as si
from spmd_infer.errors import TaskError
from spmd_infer.jobs.openai_bodies import CHAT, COMPLETIONS, asked_of, texts_of
from tests.jobs.conftest import Run

USER = [{"role": "user", "content": "hello"}]


def test_a_chat() -> None:
    asked = asked_of(
        CHAT,
        {
            "model": "any",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
            ],
            "max_completion_tokens": 7,
            "temperature": 0.5,
            "stop": "END",
            "logit_bias": {"11": -3},
            "logprobs": True,
            "top_logprobs": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
            "user": "someone",
            "surprise": 1,
        },
        seed=5,
    )
    assert asked.prompts == [USER]
    params = asked.params
    assert (params.max_tokens, params.temperature, params.stop, params.seed) == (7, 0.5, ("END",), 5)
    assert params.logit_bias == {11: -3.0}
    assert (params.logprobs, asked.top_logprobs) == (2, 2)
    assert params.structured_outputs is not None
    assert asked.ignored == ["surprise"]


def test_what_a_request_leaves_open() -> None:
    chat, text = asked_of(CHAT, {"messages": USER}, 3), asked_of(COMPLETIONS, {"prompt": "x"}, 3)
    assert (chat.params.temperature, chat.params.max_tokens) == (1.0, 256)
    assert (text.params.temperature, text.params.max_tokens) == (1.0, 16)
    assert (text.params.seed, asked_of(COMPLETIONS, {"prompt": "x", "seed": 8}, 3).params.seed) == (3, 8)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    assert asked_of(COMPLETIONS, {"prompt": prompt}, 0).prompts == expected


@pytest.mark.parametrize(
    ("url", "body", "why"),
    [
        (CHAT, {}, "messages must be a list"),
        (CHAT, {"messages": []}, "messages must be a list"),
        (CHAT, {"messages": [{"content": "x"}]}, r"messages\[0\] has no role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "of type 'text'"),
        (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools is not offered"),
        (CHAT, {"messages": USER, "top_logprobs": 3}, "needs logprobs"),
        (CHAT, {"messages": USER, "temperature": -1}, "temperature"),
        (CHAT, {"messages": USER, "logit_bias": {"x": 1}}, "logit_bias must map"),
        (CHAT, {"messages": USER, "response_format": {"type": "xml"}}, "response_format must be"),
        (COMPLETIONS, {}, "prompt must be"),
        (COMPLETIONS, {"prompt": []}, "prompt must be"),
        (COMPLETIONS, {"prompt": "x", "echo": True}, "echo is not offered"),
        (COMPLETIONS, {"prompt": "x", "n": 0}, "n must be"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "many"}, "max_tokens"),
    ],
)
def test_what_is_refused(url: str, body: dict[str, Any], why: str) -> None:
    with pytest.raises(TaskError, match=why):
        asked_of(url, body, 0)


@pytest.mark.parametrize("body", [{}, {"input": []}, {"input": [1]}, {"input": [""]}, {"input": "x", "dimensions": 3}])
def test_embeddings_that_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(TaskError):
        texts_of(body)


@pytest.mark.demo
def test_embeddings(minilm: Path, tmp_path: Path, run: Run) -> None:
    requests = [
        {"custom_id": "one", "method": "POST", "url": "/v1/embeddings", "body": {"input": "a cat", "model": "m"}},
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": USER}},
        {"custom_id": "two", "url": "/v1/embeddings", "body": {"input": ["a", "cat"], "encoding_format": "base64"}},
        {"custom_id": "bad", "method": "POST", "url": "/v1/embeddings", "body": {"input": []}},
        {"custom_id": "where", "method": "POST", "url": "/v2/what", "body": {}},
    ]
    source, output = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in requests) + "not json\n")
    figures = run(minilm, "embed", source, output, mesh="data=1").figures
    assert figures is not None
    assert (figures.rows, figures.failed) == (6, 4)
    one, two = map(json.loads, output.read_text().splitlines())
    assert [one["custom_id"], two["custom_id"]] == ["one", "two"]
    assert one["error"] is None
    assert one["response"]["status_code"] == 200
    body = one["response"]["body"]
    assert (body["object"], body["model"], body["data"][0]["object"]) == ("list", "m", "embedding")
    assert len(body["data"][0]["embedding"]) == 384
    assert body["usage"]["total_tokens"] == 4
    second = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in two["response"]["body"]["data"]]
    assert [vector.shape for vector in second] == [(384,), (384,)]
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [error["custom_id"] for error in errors] == ["chat", "bad", "where", None]
    assert {error["response"]["status_code"] for error in errors} == {400}
    said = [error["response"]["body"]["error"]["message"] for error in errors]
    assert "cannot generate" in said[0]
    assert "input must be" in said[1]
    assert "/v2/what" in said[2]
    assert "not JSON" in said[3]


def test_chats_and_completions(llama: Path, tmp_path: Path, run: Run) -> None:
    def request(name: str, url: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "tiny", "max_tokens": 4, **body}}

    requests = [
        request("chat", CHAT, messages=USER, temperature=0, logprobs=True, top_logprobs=2),
        request("text", COMPLETIONS, prompt="The capital", temperature=0, logprobs=1, ignore_eos=True),
        request("two", COMPLETIONS, prompt=["One,", "Two,"], n=2),
        request("long", COMPLETIONS, prompt="x" * 900),
    ]
    source, output = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in requests))
    figures = run(llama, "generate", source, output, mesh="data=1").figures
    assert figures is not None
    assert (figures.rows, figures.failed) == (4, 1)
    chat, text, two = (json.loads(line)["response"]["body"] for line in output.read_text().splitlines())
    engine = si.Engine.load(llama, mesh="data=1")
    said, continued = engine.generate([USER, "The capital"], si.SamplingParams(max_tokens=4, ignore_eos=True))
    assert chat["object"] == "chat.completion"
    (choice,) = chat["choices"]
    assert choice["message"] == {"role": "assistant", "content": said.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["content"]) == chat["usage"]["completion_tokens"] == 4
    assert chat["usage"]["prompt_tokens"] == said.prompt_tokens
    for token in choice["logprobs"]["content"]:
        assert len(token["top_logprobs"]) == 2
        assert token["logprob"] == token["top_logprobs"][0]["logprob"]
    assert text["object"] == "text_completion"
    assert text["choices"][0]["text"] == continued.text
    assert "".join(text["choices"][0]["logprobs"]["tokens"]) == continued.text
    assert text["created"] == chat["created"] > 1_700_000_000
    assert [choice["index"] for choice in two["choices"]] == [0, 1, 2, 3]
    (error,) = map(json.loads, (tmp_path / "out.errors.jsonl").read_text().splitlines())
    assert error["custom_id"] == "long"
    assert "900 tokens" in error["response"]["body"]["error"]["message"]
