"""A loopback server with two API models for tests of `tune`: each is right on its own kinds of question."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from openai_server import OpenAIServer, error
from starlette.requests import Request
from starlette.responses import Response
from synthetic_outcomes import NAMES, WORDS

MODELS = {"openai/stub-cheap": ("sums", "games"), "openai/stub-dear": ("sums", "games", "kin")}


class KindServer(OpenAIServer):
    """Answers the length of the question in letters where the model knows the kind of question, else 0."""

    down: str | None = None  # the model that answers 503

    def reset(self) -> None:
        super().reset()
        self.down = None

    async def chat(self, request: Request) -> Response:
        if self.down is not None and (body := await request.json())["model"] == self.down:
            self.requests.append(body)
            response: Response = error(503, "it is down")
        else:
            response = await super().chat(request)
        # Threads that ask at the same time make a client each, and drop all but one with its open socket.
        response.headers["connection"] = "close"
        return response

    def answer(self, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        question = body["messages"][-1]["content"]
        kinds = next(each for name, each in MODELS.items() if name.endswith(body["model"]))
        known = any(word in question.split() for kind in kinds for word in WORDS[kind])
        number = next((each for each in question.split() if each.startswith("name")), "name0")
        value = int(number.removeprefix("name")) if known else 0
        return {"role": "assistant", "content": f"The answer is {value}."}, "stop"


def write_catalogue(path: Path, server: OpenAIServer, *, retries: int = 2) -> Path:
    """The two models as entries; the second costs ten times as much."""
    entries = [
        f'[models.{name.rpartition("-")[2]}]\ndescription = "stub"\nkind = "remote"\ncontext_length = 4000\n'
        f'litellm_model = "{name}"\napi_base = "{server.url}"\napi_key_env = "STUB_KEY"\n'
        f"input_price = {price}\noutput_price = {price}\nmax_retries = {retries}\n"
        for name, price in zip(MODELS, (0.1, 1.0), strict=True)
    ]
    path.write_text("\n".join(entries))
    return path


def write_questions(path: Path, count: int) -> Path:
    """Questions of three kinds in turn; the answer is the number of the name in them."""
    kinds = list(WORDS)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "answer", "kind", "source"])
        for number in range(count):
            words = WORDS[kinds[number % 3]]
            picked = [words[(number * 7 + step * (1 + number // 10)) % len(words)] for step in range(4)]
            name = NAMES[1 + number]
            writer.writerow([f"q{number}", " ".join([*picked, name]), number + 1, "number", "test"])
    return path


def write_encoder(folder: Path) -> Path:
    """A sentence-transformers model that counts the words of these questions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    words = [*NAMES, *(word for kind in WORDS.values() for word in kind), "cheap", "dear", "direct", "stub"]
    SentenceTransformer(modules=[BoW(words)], device="cpu").save(str(folder))
    return folder
