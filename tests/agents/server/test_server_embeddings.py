"""Embeddings through OpenAI's SDK, unchanged, by a real, tiny encoder of the catalogue."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tiny_encoder import LONGEST, write_tiny_encoder
from viaticum_server import FIELDS, RunningServer, serving, wait_until

from viaticum.catalogue import Catalogue
from viaticum.models.remote.request import load_litellm

TEXTS = ["how many apples are left", "who is her uncle", "apples"]


def catalogue_with(encoder: Path, folder: Path) -> Catalogue:
    file = folder / "catalogue.toml"
    source = f'[[models.tiny.sources]]\ntype = "path"\npath = "{encoder}"\n'
    file.write_text(
        f'[models.fast]\ntext = "42"{FIELDS}\n'
        '[models.tiny]\ndescription = "d"\nkind = "encoder"\ncontext_length = 16\n'
        f"input_price = 1\noutput_price = 0\n{source}"
    )
    return Catalogue.load(file)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def server(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("home")
    with serving(folder, catalogue=catalogue_with(encoder, folder)) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client
    server.assert_settled()


def vectors(response: openai.types.CreateEmbeddingResponse) -> np.ndarray[Any, Any]:
    assert [each.index for each in response.data] == list(range(len(response.data)))
    return np.array([each.embedding for each in response.data])


def test_texts_by_the_client_s_default_and_as_numbers(client: openai.OpenAI, encoder: Path) -> None:
    """The client asks for base64 where nobody says otherwise, and decodes it."""
    from sentence_transformers import SentenceTransformer

    found = client.embeddings.create(model="tiny", input=TEXTS)
    as_numbers = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    own = SentenceTransformer(str(encoder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert vectors(found) == pytest.approx(own, abs=1e-6)
    assert vectors(as_numbers) == pytest.approx(own, abs=1e-6)
    assert found.usage.prompt_tokens == found.usage.total_tokens == (5 + 4 + 1) + 3 * 2
    (one,) = client.embeddings.create(model="tiny", input=TEXTS[1]).data
    assert one.embedding == pytest.approx(own[1], abs=1e-6)


def test_base64_is_float32(server: RunningServer) -> None:
    body = {"model": "tiny", "input": "apples", "encoding_format": "base64"}
    (one,) = server.http.post("/v1/embeddings", json=body).json()["data"]
    decoded = np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4")
    assert (decoded.shape, float(np.linalg.norm(decoded))) == ((8,), pytest.approx(1))


def test_token_ids_of_the_encoder_s_tokenizer(client: openai.OpenAI) -> None:
    how, many, apples = 5, 6, 7
    texts = vectors(client.embeddings.create(model="tiny", input=["how many apples", "apples"]))
    ids = client.embeddings.create(model="tiny", input=[[how, many, apples], [2, apples, 3]])
    assert vectors(ids) == pytest.approx(texts, abs=1e-6)
    assert ids.usage.prompt_tokens == 8
    (one,) = client.embeddings.create(model="tiny", input=[how, many, apples]).data
    assert one.embedding == pytest.approx(texts[0], abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="15 tokens"):
        client.embeddings.create(model="tiny", input=[[how], [100_000]])


def test_dimensions_are_the_first_ones_at_length_one(client: openai.OpenAI) -> None:
    whole = vectors(client.embeddings.create(model="tiny", input=TEXTS, dimensions=8))
    cut = vectors(client.embeddings.create(model="tiny", input=TEXTS, dimensions=3))
    assert cut == pytest.approx(whole[:, :3] / np.linalg.norm(whole[:, :3], axis=1, keepdims=True), abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tiny", input="apples", dimensions=9)


def test_each_call_is_held_and_settled_once(server: RunningServer, client: openai.OpenAI) -> None:
    before = server.spent_and_held()[0]
    raw = client.embeddings.with_raw_response.create(model="tiny", input="how many")
    assert raw.headers["x-viaticum-cost"] == "4000"
    assert server.spent_and_held() == (before + 4_000, 0)
    (post,) = [
        entry
        for entry in server.client.ledger.entries()
        if entry.kind == "post" and entry.nanousd == 4_000 and entry.usage["tiny"].input_tokens == 4
    ][-1:]
    assert post.usage["tiny"].output_tokens == 0
    with pytest.raises(openai.APIStatusError) as poor:
        client.embeddings.create(model="tiny", input="how many", extra_body={"budget": 0.000003})
    assert (poor.value.status_code, poor.value.code) == (402, "budget_exceeded")
    assert client.embeddings.create(model="tiny", input="how", extra_body={"budget": 0.000004}).data
    assert server.spent_and_held() == (before + 7_000, 0)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["apples", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, "apples"]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": "apples " * LONGEST}, "18 tokens; tiny reads 16"),
        ({"input": "apples", "dimensions": 0}, "dimensions"),
        ({"input": "apples", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "apples", "truncate": True}, "unknown field 'truncate'"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server: RunningServer, body: Any, says: str) -> None:
    before = server.spent_and_held()
    response = server.http.post("/v1/embeddings", json={"model": "tiny", **body})
    assert (response.status_code, says in response.json()["error"]["message"]) == (400, True)
    assert server.spent_and_held() == before


def test_a_batch_of_embeddings(server: RunningServer, client: openai.OpenAI) -> None:
    before = server.spent_and_held()[0]
    lines = [
        {
            "custom_id": text,
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "tiny", "input": text},
        }
        for text in (*TEXTS, "apples " * LONGEST)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
    batch = client.batches.retrieve(batch.id)
    found = {
        row["custom_id"]: row["response"]["body"]["data"][0]["embedding"]
        for row in map(json.loads, client.files.content(batch.output_file_id or "").text.splitlines())
    }
    expected = vectors(client.embeddings.create(model="tiny", input=TEXTS))
    assert np.array([found[text] for text in TEXTS]) == pytest.approx(expected, abs=1e-6)
    (failed,) = map(json.loads, client.files.content(batch.error_file_id or "").text.splitlines())
    assert failed["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert batch.usage is not None
    assert batch.usage.input_tokens == 16
    assert server.spent_and_held() == (before + 2 * 16_000, 0)


def test_names(server: RunningServer, client: openai.OpenAI) -> None:
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").id == "tiny"
    for name in ("fast", "nobody", "auto"):
        with pytest.raises(openai.NotFoundError, match="unknown encoder"):
            client.embeddings.create(model=name, input="apples")
    assert server.ask("tiny").status_code == 404


def test_langchain_and_litellm(server: RunningServer, client: openai.OpenAI) -> None:
    from langchain_openai import OpenAIEmbeddings

    embedder = OpenAIEmbeddings(
        model="tiny",
        base_url=f"{server.url}/v1",
        api_key="any",  # type: ignore[arg-type]
        check_embedding_ctx_length=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = np.array(embedder.embed_documents(TEXTS))
        litellm = load_litellm()
        options = {"api_base": f"{server.url}/v1", "api_key": "any"}
        one = litellm.embedding(model="openai/tiny", input=[TEXTS[0]], **options).data[0]["embedding"]
    expected = vectors(client.embeddings.create(model="tiny", input=TEXTS))
    assert found == pytest.approx(expected, abs=1e-6)
    assert one == pytest.approx(expected[0], abs=1e-6)


def test_keys_and_many_at_once(encoder: Path, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    where: Any = {"extra_body": {"only": "eu"}}
    with serving(tmp_path, catalogue=catalogue_with(encoder, tmp_path), concurrency=2, queue=64) as server:
        token, _ = server.keys.create("all")
        other, _ = server.keys.create("fast alone", models=["fast"])
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=other, max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                client.embeddings.create(model="tiny", input="apples")
            assert [model.id for model in client.models.list()] == ["fast"]
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=token, max_retries=0) as client,
            ThreadPoolExecutor(16) as threads,
        ):
            asked = [threads.submit(client.embeddings.create, model="tiny", input=TEXTS) for _ in range(32)]
            assert {each.result().usage.prompt_tokens for each in asked} == {16}
            with pytest.raises(openai.PermissionDeniedError, match="tiny"):
                client.embeddings.create(model="tiny", input=TEXTS, **where)
        server.assert_settled()
        assert server.spent_and_held() == (32 * 16_000, 0)
