"""What a chat is asked for so that its answers fit a schema, in OpenAI's form, and the parser of them.

Leaves out the chat itself (`agents.integrations.chat_model`).
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Literal

from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from viaticum.errors import InputError

Method = Literal["function_calling", "json_schema", "json_mode"]


def structured(
    schema: dict[str, Any] | type, method: Method, strict: bool | None
) -> tuple[dict[str, Any], Any]:
    """What to bind to a chat (tools and their choice, or a response format), and the parser.

    Raises:
        InputError: the method is unknown.
    """
    tracing = {
        "ls_structured_output_format": {"kwargs": {"method": method, "strict": strict}, "schema": schema}
    }
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    parser: Any
    if method == "function_calling":
        name = convert_to_openai_tool(schema)["function"]["name"]
        bind = {"tools": [schema], "tool_choice": name, "strict": strict, "parallel_tool_calls": False}
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)  # type: ignore[list-item]
            if is_class
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    elif method in ("json_schema", "json_mode"):
        form = {"type": "json_object"} if method == "json_mode" else _json_schema(schema, strict)
        bind = {"response_format": form}
        parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()  # type: ignore[arg-type]
    else:
        raise InputError(f"unknown method {method!r}; use function_calling, json_schema or json_mode")
    return bind | tracing, parser


def with_raw(model: Runnable[Any, AIMessage], parser: Any) -> Runnable[Any, Any]:
    """The message (`raw`), what the parser makes of it (`parsed`), and its error (`parsing_error`)."""
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def tool_choice_of(choice: str | dict[str, Any] | bool, names: list[str]) -> str | dict[str, Any]:
    """OpenAI's form of a tool choice; LangChain's `any` and True become `required`."""
    if isinstance(choice, dict) or choice in ("auto", "none", "required"):
        return choice
    if choice is True or choice == "any":
        return "required"
    if choice not in names:
        raise InputError(f"no tool is named {choice!r}; known: {', '.join(names)}, or auto, any, none")
    return {"type": "function", "function": {"name": choice}}


def _json_schema(schema: dict[str, Any] | type, strict: bool | None) -> dict[str, Any]:
    function = convert_to_openai_tool(schema, strict=strict)["function"]
    form: dict[str, Any] = {"name": function["name"], "schema": convert_to_json_schema(schema)}
    if strict is not None:
        form |= {"strict": strict, "schema": function.get("parameters", form["schema"])}
    return {"type": "json_schema", "json_schema": form}
