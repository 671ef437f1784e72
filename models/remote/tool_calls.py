"""Tool calls put together from the deltas of a stream, in the shapes that servers send them in.

OpenAI numbers the calls of a message, and gives id and name once. Others give every call the index 0 or none,
repeat id and name in each delta, make a new id for each delta, give no ids at all, or send `function_call`.
Leaves out the rest of a response (`models.remote.response`).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

LEGACY = "function_call"


@dataclass(slots=True)
class _Call:
    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether the arguments are a JSON object, to which nothing can be added."""
        try:
            return isinstance(json.loads(self.arguments), dict)
        except ValueError:
            return False

    def is_continued_by(self, id_: str, name: str, arguments: str) -> bool:
        """Whether a delta at this call's index is a piece of this call. A call begins with its name."""
        if not name or not self.name:
            return True
        if name == self.name:
            if self.is_complete and arguments.strip():
                return False
            # Some servers make an id for every delta; then the arguments are under way.
            return not id_ or id_ == self.id or (bool(self.arguments) and not self.is_complete)
        # Pieces of a name come without an id, of servers that give ids.
        return not id_ and bool(self.id) and not self.arguments


class ToolCalls:
    """The tool calls of one message, in the order of their indices, then of their beginnings."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def __bool__(self) -> bool:
        return bool(self._calls)

    def add(self, position: int, part: Any, *, whole: bool) -> list[str]:
        """Add a call, or a piece of one. Return what is new of its name and arguments, which is billed.

        Args:
            position: in its message or delta.
            part: LiteLLM's object or a mapping.
            whole: from a whole response, where each part is a call of its own.
        """
        function = field_of(part, "function")
        id_, name = text_of(field_of(part, "id")), text_of(field_of(function, "name"))
        arguments = _arguments(field_of(function, "arguments"))
        given = field_of(part, "index")
        index = position if whole or not isinstance(given, int) else given
        call = None if whole else self._continued(index, id_, name, arguments)
        if call is None:
            taken = {each.id for each in self._calls}
            call = _Call(index, id_ if id_ not in taken else "", name, arguments)
            self._calls.append(call)
            return [each for each in (name, arguments) if each]
        call.id = call.id or id_
        new = "" if name == call.name else name
        call.name += new
        call.arguments += arguments
        return [each for each in (new, arguments) if each]

    def finish(self) -> None:
        """Give ids to calls without one, so that results can name them, and arguments to those without.

        Objects of arguments one after the other are calls of the same tool, whose server sent one name.
        """
        calls, self._calls = self._calls, []
        for call in calls:
            first, *others = _objects(call.arguments)
            call.arguments = first
            self._calls += [call, *(_Call(call.index, "", call.name, each) for each in others)]
        for call in self._calls:
            call.id = call.id or f"call_{uuid.uuid4().hex[:24]}"
            call.arguments = "{}" if call.arguments.strip() in ("", "null") else call.arguments

    def to_json(self) -> tuple[Mapping[str, Any], ...]:
        """The calls in the form of OpenAI's API."""
        return tuple(
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in sorted(self._calls, key=lambda each: each.index)
        )

    def _continued(self, index: int, id_: str, name: str, arguments: str) -> _Call | None:
        """The call that a delta is a piece of: the one of its id, or the last one at its index."""
        same_id = (call for call in reversed(self._calls) if id_ and call.id == id_)
        same_index = (call for call in reversed(self._calls) if call.index == index)
        call = next(chain(same_id, same_index), None)
        return call if call is not None and call.is_continued_by(id_, name, arguments) else None


def _objects(arguments: str) -> list[str]:
    """The JSON objects that a text consists of; the text itself where it is anything else."""
    decoder, found, end = json.JSONDecoder(), list[str](), 0
    while rest := arguments[end:].lstrip():
        start = len(arguments) - len(rest)
        try:
            value, end = decoder.raw_decode(arguments, start)
        except ValueError:
            return [arguments]
        if not isinstance(value, dict):
            return [arguments]
        found.append(arguments[start:end])
    return found if len(found) > 1 else [arguments]


def field_of(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _arguments(value: Any) -> str:
    """Arguments as JSON; some servers send the object itself."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else text_of(value)
