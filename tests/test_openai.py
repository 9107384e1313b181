"""The routes that OpenAI's own client speaks, with that client, over HTTP, real adapters and a real registry.

The server runs in the test's event loop on a free port of this machine; nothing waits for a clock.
"""

import asyncio
import json
import math
from contextlib import asynccontextmanager
from dataclasses import replace

import openai
import pytest
import test_app
import torch
import uvicorn
from test_app import CARDS_1, LETTERS_1, MAIL_1, SHORTEN_1, engine_held, server_of, until
from tiny_adapters import CARDS, SHORTEN, TEXTS

from multilora.prompt import Prompt
from serve.app import build_app
from serve.auth import Doorkeeper, create_key
from serve.config import ServeConfig
from serve.replica import Replica
from serve.writer import TextWork

pytestmark = pytest.mark.anyio
anyio_backend, version_of, crown = test_app.anyio_backend, test_app.version_of, test_app.crown
LONGER_1 = ("seq2seq", replace(SHORTEN, name="longer", max_new_tokens=200), 1)
LONG = 400
"""Tokens of a text that is still being written when a test looks; tiny bases hardly ever write their end token."""


@pytest.fixture
def serving(registry, tmp_path):
    """Run a replica with its routes: `async with serving(num_slots=1) as (replica, client)`; the client is OpenAI's."""

    @asynccontextmanager
    async def run(api_key="none", **settings):
        config = ServeConfig(tracking_uri=registry.tracking_uri, downloads_dir=tmp_path / "downloads", **settings)
        replica = Replica(config)
        app = build_app(replica, Doorkeeper(config.keys_file), config)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
        running = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        (port,) = {listener.getsockname()[1] for listener in server.servers[0].sockets}
        await replica.sync()
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=api_key, max_retries=0)
        try:
            async with client:
                yield replica, client
        finally:
            server.should_exit = True
            await running
            await replica.close()

    return run


def base_of(replica, task):
    return server_of(replica, task).engine.base.spec.model


def user(text):
    return [{"role": "user", "content": text}]


async def ask_chat(client, model, text, **options):
    return await client.chat.completions.create(model=model, messages=user(text), **options)


async def streamed(stream):
    return [chunk async for chunk in stream]


async def ours(client, path, model, texts):
    """The same question by the route of this project."""
    return await client.post(path, cast_to=object, body={"model": model, "input": texts})


# Models


async def test_models_are_listed_and_retrieved(crown, serving):
    version = crown(LETTERS_1, SHORTEN_1)
    async with serving() as (replica, client):
        base = base_of(replica, "shorten")
        models = (await client.models.list()).data
        assert [(model.id, model.object, model.owned_by) for model in models] == [
            ("letters", "model", "adapter"),
            ("shorten", "model", "adapter"),
            (base, "model", "base"),
        ]
        shorten = await client.models.retrieve("shorten")
        assert (shorten.id, shorten.version, shorten.digest) == ("shorten", version.version, version.digest)
        assert (await client.models.retrieve(base)).owned_by == "base"
        with pytest.raises(openai.NotFoundError, match="there is no task 'weather'; tasks are letters, shorten"):
            await client.models.retrieve("weather")


# Labels


async def test_a_label_is_the_answer_of_classify_with_its_calibrated_probability(crown, serving):
    version = crown(CARDS_1)
    async with serving() as (replica, client):
        results = (await ours(client, "/classify", "cards", list(TEXTS)))["results"]
        whole = await client.completions.create(model="cards", prompt=list(TEXTS), logprobs=3, max_tokens=5)
        assert whole.system_fingerprint == version.digest[:12]
        assert [choice.index for choice in whole.choices] == list(range(len(TEXTS)))
        for text, choice, result in zip(TEXTS, whole.choices, results, strict=True):
            assert (choice.text, choice.finish_reason, choice.logprobs.tokens) == (result["label"], "stop", [result["label"]])
            top = {label: math.exp(logprob) for label, logprob in choice.logprobs.top_logprobs[0].items()}
            assert top == pytest.approx(result["probabilities"], abs=1e-3)
            said = await ask_chat(client, "cards", text, logprobs=True, top_logprobs=2)
            (choice,) = said.choices
            assert (choice.message.role, choice.message.content) == ("assistant", result["label"])
            (token,) = choice.logprobs.content
            assert math.exp(token.logprob) == pytest.approx(result["probabilities"][result["label"]], abs=1e-3)
            assert bytes(token.bytes).decode() == result["label"]
            assert len(token.top_logprobs) == 2
        prompts = [server_of(replica, "cards").engine.prompt(version.key, text) for text in TEXTS]
        assert whole.usage.prompt_tokens == sum(len(prompt.token_ids) for prompt in prompts)
        assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (len(TEXTS), whole.usage.prompt_tokens + len(TEXTS))


async def test_a_streamed_label_is_one_chunk(crown, serving):
    crown(CARDS_1)
    async with serving() as (_, client):
        label = (await ask_chat(client, "cards", TEXTS[0])).choices[0].message.content
        chunk, usage = await streamed(
            await ask_chat(client, "cards", TEXTS[0], stream=True, stream_options={"include_usage": True})
        )
        (choice,) = chunk.choices
        assert (choice.delta.role, choice.delta.content, choice.finish_reason) == ("assistant", label, "stop")
        assert (usage.choices, usage.usage.completion_tokens) == ([], 1)
        (chunk,) = await streamed(await client.completions.create(model="cards", prompt=TEXTS[0], stream=True))
        assert chunk.choices[0].text == label


async def test_headers_say_which_version_answered(crown, serving):
    version = crown(CARDS_1)
    async with serving() as (_, client):
        for stream in (False, True):
            raw = await client.chat.completions.with_raw_response.create(model="cards", messages=user("a"), stream=stream)
            assert raw.headers["x-adapter-version"] == str(version.version)
            assert raw.headers["x-adapter-digest"] == version.digest


async def test_a_task_of_several_columns_takes_them_as_json(crown, serving):
    crown(MAIL_1)
    item = {"subject": TEXTS[0], "body": TEXTS[1]}
    async with serving() as (_, client):
        (result,) = (await ours(client, "/classify", "mail", [item]))["results"]
        assert (await ask_chat(client, "mail", json.dumps(item))).choices[0].message.content == result["label"]
        for text in ("hello", "[1]", '{"subject": 1, "body": "a"}', "[" * 50_000):
            with pytest.raises(openai.UnprocessableEntityError, match="mail has the columns subject, body: send them as one"):
                await ask_chat(client, "mail", text)
        with pytest.raises(openai.UnprocessableEntityError, match="input must give the columns subject, body; it gives body"):
            await ask_chat(client, "mail", '{"body": "a"}')


# Texts


async def test_texts_are_those_of_generate_streamed_or_not(crown, serving):
    crown(SHORTEN_1)
    async with serving() as (_, client):
        results = (await ours(client, "/generate", "shorten", list(TEXTS)))["results"]
        whole = await client.completions.create(model="shorten", prompt=list(TEXTS), logprobs=2)
        chunks = await streamed(await client.completions.create(model="shorten", prompt=list(TEXTS), logprobs=2, stream=True))
        for index, (choice, result) in enumerate(zip(whole.choices, results, strict=True)):
            assert choice.text == result["text"]
            assert choice.finish_reason == ("length" if result["is_cut_off"] else "stop")
            parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
            assert "".join(part.text for part in parts) == result["text"]
            assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
            for field in ("tokens", "text_offset"):
                assert [x for part in parts for x in getattr(part.logprobs, field)] == getattr(choice.logprobs, field)
            said = await ask_chat(client, "shorten", TEXTS[index], logprobs=True, top_logprobs=2)
            assert said.choices[0].message.content == result["text"]
            logprobs = [token.logprob for token in said.choices[0].logprobs.content]
            assert logprobs == pytest.approx(choice.logprobs.token_logprobs, abs=1e-3)
            for token in said.choices[0].logprobs.content:
                assert token.top_logprobs[0].token == token.token
                assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
            assert said.usage.completion_tokens == len(logprobs)
            said = await streamed(await ask_chat(client, "shorten", TEXTS[index], stream=True))
            assert "".join(chunk.choices[0].delta.content for chunk in said) == result["text"]


async def test_max_tokens_cuts_a_text_but_never_goes_past_the_tasks_limit(crown, serving):
    crown(SHORTEN_1)
    async with serving() as (_, client):
        for asked, most in ((1, 1), (3, 3), (1000, 6)):
            said = await client.completions.create(model="shorten", prompt=TEXTS[0], max_tokens=asked)
            assert (said.usage.completion_tokens, said.choices[0].finish_reason) == (most, "length")
            said = await ask_chat(client, "shorten", TEXTS[0], max_completion_tokens=asked)
            assert said.usage.completion_tokens == most


# The base by itself


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
async def test_a_base_writes_under_its_own_name_what_transformers_writes_whatever_adapters_write(
    kind, crown, serving, fresh_base
):
    crown((kind, CARDS, 1), (kind, SHORTEN, 1))
    plain = fresh_base(kind)
    async with serving() as (replica, client):
        name = base_of(replica, "shorten")
        asking = [client.completions.create(model=name, prompt=text or "x", max_tokens=20) for text in TEXTS]
        beside = [client.completions.create(model="shorten", prompt=list(TEXTS)), ask_chat(client, "cards", TEXTS[0])]
        said, shortened, _ = await asyncio.gather(asyncio.gather(*asking), *beside)
        for text, completion in zip(TEXTS, said, strict=True):
            ids = torch.tensor([plain.tokenizer(text or "x")["input_ids"]])
            written = plain.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=plain.pad_id
            )[0, 1 if kind == "seq2seq" else ids.shape[1] :]
            assert completion.choices[0].text == plain.tokenizer.decode(written, skip_special_tokens=True).strip()
            assert completion.usage.completion_tokens == len(written)
            assert completion.system_fingerprint == plain.files.fingerprint[:12]
        assert (await ask_chat(client, name, TEXTS[0], max_tokens=20)).choices[0].message.content == said[0].choices[0].text
        results = (await ours(client, "/generate", "shorten", list(TEXTS)))["results"]
        assert [choice.text for choice in shortened.choices] == [result["text"] for result in results]
        raw = await client.completions.with_raw_response.create(model=name, prompt="x", max_tokens=1)
        assert raw.headers["x-adapter-version"] == "base"


async def test_a_bases_text_has_a_default_length_and_a_most(crown, serving):
    crown(("causal", SHORTEN, 1))
    async with serving(max_base_tokens=150) as (replica, client):
        name = base_of(replica, "shorten")
        for asked, wrote in ((openai.omit, 128), (1000, 150), (2, 2)):
            said = await client.completions.create(model=name, prompt="x", max_tokens=asked)
            assert said.usage.completion_tokens == wrote
        with pytest.raises(openai.UnprocessableEntityError, match=r"the prompt has \d+ tokens, base .* has room for 2048"):
            await client.completions.create(model=name, prompt="card " * 20_000)


async def test_an_encoder_writes_no_text(crown, serving):
    crown(CARDS_1)
    async with serving() as (replica, client):
        with pytest.raises(openai.UnprocessableEntityError, match="is an encoder, which writes no text: ask one of its tasks"):
            await ask_chat(client, base_of(replica, "cards"), "x")


async def test_a_conversation_is_for_a_base_with_a_chat_template_alone(crown, serving):
    crown(("causal", SHORTEN, 1))
    talk = [{"role": "system", "content": "Be brief."}, *user([{"type": "text", "text": "Hello"}])]
    async with serving() as (replica, client):
        base = server_of(replica, "shorten").engine.base
        for model in ("shorten", base.spec.model):
            with pytest.raises(openai.UnprocessableEntityError, match="reads one message: send its input as the only user"):
                await client.chat.completions.create(model=model, messages=talk)
        base.tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no turns') }}{% endif %}"
            "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
        )
        said = await client.chat.completions.create(model=base.spec.model, messages=talk, max_tokens=9)
        prompt = "system: Be brief.\nuser: Hello\nassistant:"
        ids = base.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert said.usage.prompt_tokens == len(ids)
        with pytest.raises(openai.UnprocessableEntityError, match=r"the chat template of base .* refuses this .*: no turns"):
            await client.chat.completions.create(model=base.spec.model, messages=[*talk, {"role": "assistant", "content": ""}])


# Refused requests


async def test_errors_are_the_clients_own_exceptions_with_our_words(crown, serving, tmp_path):
    crown(CARDS_1, SHORTEN_1)
    keys = tmp_path / "keys.json"
    _, secret = create_key(keys, "cards only", ["cards"], 2, "")
    async with serving(keys_file=keys, api_key=secret) as (replica, client):
        for stream in (False, True):
            with pytest.raises(openai.PermissionDeniedError, match="does not open task shorten; it opens cards"):
                await ask_chat(client, "shorten", "a", stream=stream)
        with pytest.raises(openai.PermissionDeniedError):
            await ask_chat(client, base_of(replica, "shorten"), "a")
        with pytest.raises(openai.PermissionDeniedError):
            await client.models.retrieve("shorten")
        assert [model.id for model in (await client.models.list()).data] == ["cards"]
        with pytest.raises(openai.AuthenticationError):
            await ask_chat(client.with_options(api_key="ak-no-key"), "cards", "a")
        await client.completions.create(model="cards", prompt=["a", "b"])
        with pytest.raises(openai.RateLimitError) as refused:
            await ask_chat(client, "cards", "a")
        assert int(refused.value.response.headers["retry-after"]) >= 1
    async with serving(max_inputs_per_request=2) as (_, client):
        with pytest.raises(openai.NotFoundError, match="there is no task 'weather'"):
            await ask_chat(client, "weather", "a", stream=True)
        with pytest.raises(openai.UnprocessableEntityError, match="a request takes 1 to 2 inputs, this one has 3"):
            await client.completions.create(model="cards", prompt=["a", "b", "c"], stream=True)


REFUSED = {
    "n": 2,
    "stop": ["\n"],
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "logit_bias": {"1": 5},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "response_format": {"type": "json_object"},
    "max_tokens": 0,
    "top_logprobs": 21,
}


@pytest.mark.parametrize("field", REFUSED)
async def test_what_would_change_an_answer_and_is_not_there_is_refused(serving, field):
    async with serving() as (_, client):
        with pytest.raises(openai.UnprocessableEntityError, match=field):
            await ask_chat(client, "cards", "a", **{field: REFUSED[field]})


async def test_what_cannot_change_the_most_likely_answer_is_taken(crown, serving):
    crown(SHORTEN_1)
    shaping = {"temperature": 1.5, "top_p": 0.1, "seed": 7, "user": "me", "n": 1, "presence_penalty": 0, "frequency_penalty": 0}
    more = {"response_format": {"type": "text"}, "tools": [], "logit_bias": {}, "metadata": {"a": "b"}, "store": False}
    async with serving() as (_, client):
        plain = (await ask_chat(client, "shorten", TEXTS[0])).choices
        assert (await ask_chat(client, "shorten", TEXTS[0], **shaping, **more)).choices == plain


# Texts and labels at the same time


async def test_a_label_is_answered_while_a_long_text_is_written(crown, serving):
    crown(LETTERS_1, SHORTEN_1)
    async with serving(num_slots=1) as (replica, client):
        server = server_of(replica, "shorten")
        stream = await client.completions.create(model=base_of(replica, "shorten"), prompt="x", max_tokens=LONG, stream=True)
        await anext(stream)
        # Evicts nobody's text for good, though there is one slot.
        _, (answer,) = await replica.classify("letters", [TEXTS[0]])
        assert server.num_writing == 1
        await stream.close()
        assert answer.label == (await ask_chat(client, "letters", TEXTS[0])).choices[0].message.content
        await until(lambda: not server.num_writing)


@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_a_caller_that_leaves_frees_its_row_and_its_version(crown, serving, route):
    crown(SHORTEN_1)
    async with serving() as (replica, client):
        server, name = server_of(replica, "shorten"), base_of(replica, "shorten")
        if route == "chat":
            stream = await ask_chat(client, name, "x", max_tokens=LONG, stream=True)
        else:
            stream = await client.completions.create(model=name, prompt=["x", "y"], max_tokens=LONG, stream=True)
        await anext(stream)
        assert server.num_writing
        await stream.close()
        await until(lambda: not server.num_writing and not server.num_waiting)
        with engine_held(replica, SHORTEN):
            stream = asyncio.create_task(ask_chat(client, "shorten", "x", stream=True))
            await until(lambda: replica._store.num_in_use == 1)
            stream.cancel()
            await until(lambda: replica._store.num_in_use == 0)
        await until(lambda: not server.num_writing and not server.num_waiting)


async def test_an_adapter_that_goes_bad_is_an_error_in_the_stream_and_before_the_next(crown, serving):
    crown(LETTERS_1, LONGER_1)
    async with serving(num_slots=1) as (replica, client):
        server = server_of(replica, "longer")
        stream = await ask_chat(client, "longer", TEXTS[0], stream=True)
        await anext(stream)
        for a_RI, _ in server.engine.bound(replica._champions["longer"].key).tensors.values():
            a_RI.mul_(math.nan)
        await ask_chat(client, "letters", TEXTS[0])  # takes the only slot, so the other adapter is loaded again
        with pytest.raises(openai.APIError, match=r"longer@.* gives its tokens scores that are no numbers") as refused:
            await streamed(stream)
        assert refused.value.body["type"] == "AdapterError"
        with pytest.raises(openai.InternalServerError, match="scores that are no numbers") as refused:
            await ask_chat(client, "longer", TEXTS[0], stream=True)
        assert refused.value.status_code == 503
        assert replica._store.num_in_use == server.num_writing == 0


async def test_a_step_that_fails_as_a_whole_is_tried_adapter_by_adapter(crown, serving):
    version = crown(SHORTEN_1)
    async with serving() as (replica, client):
        server = server_of(replica, "shorten")
        good = TextWork(version.key, server.engine.prompt(version.key, TEXTS[0]), 6)
        no_token = TextWork(None, Prompt((10**6,) * len(good.prompt.token_ids), is_truncated=False), 6)
        bad, fine = server.write(no_token), server.write(good)
        with pytest.raises(IndexError):
            await bad.answer
        assert (await fine.answer).label == (await ask_chat(client, "shorten", TEXTS[0])).choices[0].message.content


# Limits and versions


async def test_what_does_not_fit_is_413_and_what_takes_too_long_504(crown, serving):
    crown(CARDS_1, LONGER_1)
    async with serving(deadline_s=0.05) as (replica, client):
        with pytest.raises(openai.APIStatusError, match="does not fit the task's max_length of 128 tokens") as caught:
            await ask_chat(client, "cards", "card " * 500)
        assert (caught.value.status_code, caught.value.code, caught.value.param) == (413, "too_large", "input")
        for stream in (False, True):
            with engine_held(replica, CARDS), pytest.raises(openai.InternalServerError, match="no answer within") as caught:
                await ask_chat(client, "cards", TEXTS[0], stream=stream)
            assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        assert replica._store.num_in_use == 0


async def test_a_version_is_asked_by_its_number(crown, serving, version_of):
    first, second = version_of(CARDS_1), crown(("encoder", CARDS, 2))
    async with serving() as (_, client):
        for version in (first, second):
            assert (await ask_chat(client, version.key, TEXTS[0])).system_fingerprint == version.digest[:12]
            assert (await client.models.retrieve(version.key)).digest == version.digest
