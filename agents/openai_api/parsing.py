"""Parsing of request bodies: models that refuse unknown fields, and errors that name the wrong field.

Shared by the APIs that the server speaks. Leaves out their fields.
"""

from __future__ import annotations

import json
import re
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, from_json

from viaticum.agents.openai_api.errors import APIError
from viaticum.errors import UnknownName

MAX_FIELDS = 5_000  # of one object, such as OpenAI's limit of all properties of a schema
_MAYBE_INFINITE = re.compile(rb"NaN|Infinity|[eE]\+?\d{3}|\d{309}")
Body = TypeVar("Body", bound=BaseModel)


class Form(BaseModel):
    """A model whose lists are validated up to the first wrong element: a million of them hold nobody up."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        parts: list[Any] = [schema]
        while parts:
            part = parts.pop()
            if isinstance(part, dict):
                if part.get("type") == "list":
                    part["fail_fast"] = True
                parts += part.values()
            elif isinstance(part, list | tuple):
                parts += part
        return schema


class StrictForm(Form):
    """A model that refuses fields which it does not know, unless they are null, as clients send them."""

    model_config = ConfigDict(
        extra="allow", strict=True, json_schema_extra={"additionalProperties": {"type": "null"}}
    )

    @model_validator(mode="after")
    def _no_unknown_field(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if value is not None:
                problem = str(UnknownName("field", name, type(self).model_fields))
                raise PydanticCustomError("unknown_field", "{problem}", {"problem": problem, "field": name})
        return self


def parse_body(model: type[Body], body: bytes) -> Body:
    """Parse a JSON body. Raises `APIError` with status 400, naming the first field that is wrong.

    Takes up to a tenth of a second for a megabyte: not for the event loop's thread.
    """
    _check_objects(body)
    try:
        parsed = model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from None
    _check_numbers(body)
    return parsed


def _check_numbers(body: bytes) -> None:
    """Raise `APIError` for a number that is none in JSON, or too large, in a field that takes any value.

    It could not be sent back.
    """
    if not _MAYBE_INFINITE.search(body):
        return
    try:
        json.dumps(json.loads(body), allow_nan=False)
    except ValueError as error:
        if "Out of range float" in str(error):
            raise APIError(400, "the body has a number that is not finite") from None
    except RecursionError:
        pass  # the model says where


def _check_objects(body: bytes) -> None:
    """Raise `APIError` for an object of so many fields that the errors in them would hold everybody up."""
    if body.count(b":") <= MAX_FIELDS:
        return
    try:
        values: list[Any] = [from_json(body)]
    except ValueError:
        return  # no JSON: the model says where
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if len(value) > MAX_FIELDS:
                raise APIError(400, f"an object with {len(value)} fields; give at most {MAX_FIELDS}")
            values += value.values()
        elif isinstance(value, list):
            values += value


def invalid_request(error: ValidationError) -> APIError:
    """The error of the first wrong field; of several forms that it may have, the nearest one."""
    first, *others = error.errors(include_url=False, include_input=False)
    others = [each for each in others if each["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    found = max((first, *others), key=lambda each: len(each["loc"]))
    context = found.get("ctx") or {}
    if found["type"] == "unknown_field":
        return APIError(400, found["msg"], param=".".join((*map(str, found["loc"]), context["field"])))
    # The names of the forms are no part of the address.
    steps = [str(step) for step in found["loc"] if re.fullmatch(r"\w+", str(step)) and step != "str"]
    field = ".".join(steps)
    message = found["msg"]
    if found["type"] == "union_tag_invalid":
        message = (
            f"a part of type {str(context.get('tag'))!r} is not taken: its tokens are not known before the "
            "call, so nothing could be held for them; send text"
        )
    return APIError(400, f"{field}: {message}" if field else message, param=field or None)
