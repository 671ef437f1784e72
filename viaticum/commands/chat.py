"""`viaticum chat`: a conversation on the terminal or from a pipe, each turn within the budget.

The text of the model is streamed to stdout; thoughts, prompts, costs and errors go to stderr. Later turns do
not send thoughts back.
"""

from __future__ import annotations

import json
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viaticum.commands.completion import complete_model
from viaticum.commands.generation import POLICY, Load, MaxSeconds, Only, Policy, with_generation_options
from viaticum.commands.models import CatalogueFile
from viaticum.commands.serve import Folder
from viaticum.commands.terminal import visible
from viaticum.commands.thoughts import ShowThinking, ThoughtPrinter
from viaticum.errors import ViaticumError
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.money import format_usd
from viaticum.signals import SignalHandler
from viaticum.types import Message, ThinkingDelta

if TYPE_CHECKING:
    from viaticum.agents.client import Viaticum
    from viaticum.agents.completions import CompletionFinished

HELP = "/budget what is left   /route who wrote the last answer   /new forget the conversation   /quit"


@with_generation_options
def chat(
    model: Annotated[
        str,
        typer.Option(
            help="auto, a model of the catalogue, or MODEL+STRATEGY.", autocompletion=complete_model
        ),
    ] = "auto",
    dollars: Annotated[
        str | None, typer.Option("--budget", help="Dollars that the whole conversation may cost at most.")
    ] = None,
    budget_name: Annotated[
        str | None, typer.Option("--budget-name", help="The budget that pays; a new one by default.")
    ] = None,
    policy: Policy = POLICY,
    router: Annotated[Path | None, typer.Option(help="The folder of a fitted router.", metavar="DIR")] = None,
    only: Only = None,
    max_seconds: MaxSeconds = None,
    load: Load = None,
    generation: GenerationSettings = NO_SETTINGS,
    catalogue: CatalogueFile = None,
    folder: Folder = None,
    show_thinking: ShowThinking = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON a turn, on stdout.")] = False,
) -> None:
    """Chat with a model within a budget.

    A line is a turn; /help lists the commands; Ctrl-C stops an answer.
    """
    from viaticum.agents.client import Viaticum
    from viaticum.agents.completions import check_name

    with Viaticum(
        dollars,
        budget_name=budget_name,
        policy=policy,
        router=router,
        catalogue=catalogue,
        folder=folder,
        strategies=load or (),
        only=only,
        max_seconds=max_seconds,
        concurrency=1,
        generation=generation.model_copy(update={"system": None}),
    ) as client:
        check_name(client, model)
        conversation = _Conversation(client, model, generation.system, as_json, ThoughtPrinter(show_thinking))
        if sys.stdin.isatty():
            sys.stderr.write(f"{model}, {_left(client)}. {HELP}\n")
        failed = False
        for line in _lines():
            if line == "/quit":
                break
            failed |= not conversation.handle(line)
    if failed and not sys.stdin.isatty():
        raise typer.Exit(1)


class _Conversation:
    """The messages so far. A turn that failed or was stopped is dropped."""

    def __init__(
        self,
        client: Viaticum,
        model: str,
        system: str | None,
        as_json: bool,
        thoughts: ThoughtPrinter,
    ) -> None:
        self._thoughts = thoughts
        self._client, self._model, self._as_json = client, model, as_json
        self._first_messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._first_messages)
        self._routes: tuple[str, ...] = ()
        self._why = ""
        self._session = uuid.uuid4().hex

    def handle(self, line: str) -> bool:
        """Run a command or a turn. Returns whether it succeeded."""
        if not line.startswith("/"):
            return self._turn(line)
        if line == "/budget":
            self._print(_left(self._client))
        elif line == "/route":
            why = f": {self._why}" if self._why else ""
            self._print((" -> ".join(self._routes) or "no answer yet") + why)
        elif line == "/new":
            self._messages, self._session = list(self._first_messages), uuid.uuid4().hex
        else:
            self._print(HELP)
        return True

    def _turn(self, question: str) -> bool:
        from viaticum.agents.cancellation import CallerGone

        messages: list[Message] = [*self._messages, {"role": "user", "content": question}]
        try:
            finished = self._answer(messages)
        except ViaticumError as error:
            self._thoughts.end()
            self._print(f"error: {error}")
            return False
        except CallerGone:
            self._thoughts.end()
            self._print("\nstopped; what was written is paid for")
            return True
        self._messages = [*messages, {"role": "assistant", "content": finished.text}]
        self._routes, self._why = finished.routes, finished.why
        if self._as_json:
            payload = {
                "text": finished.text,
                "thinking": finished.thinking,
                "answer": finished.answer,
                "routes": finished.routes,
                "why": finished.why,
                "switched_from": finished.switched_from or None,
                "cost_nanousd": finished.cost,
                "left_nanousd": self._client.budget().left_nanousd,
            }
            sys.stdout.write(json.dumps(payload) + "\n")
            sys.stdout.flush()
        else:
            sys.stdout.write("\n")
            sys.stdout.flush()
            if finished.switched_from:
                self._print(f"no longer {finished.switched_from}: {finished.why}")
            self._print(f"{' -> '.join(finished.routes)}: {format_usd(finished.cost)}, {_left(self._client)}")
        return True

    def _answer(self, messages: list[Message]) -> CompletionFinished:
        from viaticum.agents.cancellation import CancellationToken
        from viaticum.agents.completions import CompletionFinished, CompletionRequest, complete

        token = CancellationToken()
        request = CompletionRequest(
            self._model,
            messages,
            self._client.budget_name,
            f"chat-{uuid.uuid4().hex}",
            session=self._session,
        )
        # Ctrl-C cancels the call at its next piece of text; it is settled, and the conversation continues.
        interrupts = SignalHandler(lambda number: token.close(), (signal.SIGINT,))
        with interrupts, closing(complete(self._client, request, token)) as events:  # type: ignore[type-var]
            for event in events:
                token.wait()
                if isinstance(event, CompletionFinished):
                    self._thoughts.end()
                    return event
                if isinstance(event, ThinkingDelta):
                    self._thoughts.thought(event.text)
                if isinstance(event, str) and event and not self._as_json:
                    self._thoughts.end()
                    sys.stdout.write(visible(event, sys.stdout))
                    sys.stdout.flush()
        raise AssertionError("a stream ends with CompletionFinished")

    def _print(self, text: str) -> None:
        sys.stderr.write(visible(text, sys.stderr) + "\n")
        sys.stderr.flush()


def _lines() -> Iterator[str]:
    """The non-empty lines of stdin, with a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _left(client: Viaticum) -> str:
    budget = client.budget()
    left = "no limit" if budget.left_nanousd is None else f"{format_usd(budget.left_nanousd)} left"
    return f"{format_usd(budget.posted_nanousd)} spent, {left}"
