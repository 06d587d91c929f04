"""Function calling: constraints that make an answer a call of a tool, and calls read from an answer.

The formats are those that the models were trained on. Each is a text behind the tokens that begin an answer:

    chatglm3   get_weather\n```python\ntool_call(city='Paris', days=3)\n```           (THUDM/ChatGLM3, PROMPT.md)
    glm4       get_weather\n{"city": "Paris", "days": 3}                              (THUDM/GLM-4, composite_demo)
    llama3     {"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}    (LLaMA 3.1, prompt_format.md)
"""

import ast
import json
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from garrulax.sampling.constrain.description import Constraint, grammar, json_schema
from garrulax.sampling.constrain.schema import subschemas

OPTIONS = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)


class ToolCall(NamedTuple):
    """A call of a tool in an answer.

    Attributes:
        name: Name of the tool.
        arguments: Name of each argument -> its value, plain JSON data.

    Example:
        >>> import garrulax as gx
        >>> gx.parse_tool_calls('weather\\n{"city": "Paris"}', "glm4") == [gx.ToolCall("weather", {"city": "Paris"})]
        True
    """

    name: str
    arguments: dict[str, Any]


def tool_call(tools: Sequence[Mapping[str, Any]], format: str) -> Constraint:
    """Answers that are one valid call of one of several tools, in the format of a family of models.

    Args:
        tools: The tools, as chat templates take them: `{"name": ..., "parameters": schema}` (`description` and others
            are ignored), or this under the key "function". A tool without parameters takes none.
        format: "chatglm3", "glm4" or "llama3" (the module's docstring shows them).

    Returns:
        The constraint, for `constrain=` of `generate`.

    Raises:
        ValueError: A format that is not known, a tool without a name or with a schema that is not supported, or in
            chatglm3 an argument that its format cannot write: true, false and null within a list or an object.
        ImportError: llguidance (extra `constrain`) is not installed.

    Example:
        >>> from garrulax.sampling import constrain
        >>> weather = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
        >>> constrain.tool_call([weather], "glm4")
        Constraint(kind='tool_call')
    """
    if format not in _FORMATS:
        raise ValueError(f"there is no format {format!r} of tool calls: there are {', '.join(_FORMATS)}")
    if isinstance(tools, Mapping | str) or not tools:
        raise ValueError("tools must be a list of at least one tool: {'name': ..., 'parameters': schema}")
    rules = []
    for i, tool in enumerate(tools):
        name, parameters = _tool(tool, i)
        try:
            json_schema(parameters)  # for its messages, which know the path of a keyword
            rules.append(_FORMATS[format].rule(name, parameters, f"tool{i}"))
        except ValueError as error:
            raise ValueError(f"tool {name!r}: {str(error).removeprefix('json_schema: ')}") from error
    names = " | ".join(f"tool{i}" for i in range(len(tools)))
    return Constraint("tool_call", grammar("\n".join([f"start: {names}", *rules])).source)


def parse_tool_calls(text: str, format: str) -> list[ToolCall]:
    """The calls in an answer of a model; [] if it is an answer in words.

    Args:
        text: The answer, without its end token.
        format: "chatglm3", "glm4" or "llama3".

    Raises:
        ValueError: A format that is not known, or an answer that begins as a call does and is none.

    Example:
        >>> from garrulax.sampling import constrain
        >>> constrain.parse_tool_calls('weather\\n{"city": "Paris"}', "glm4")
        [ToolCall(name='weather', arguments={'city': 'Paris'})]
    """
    if format not in _FORMATS:
        raise ValueError(f"there is no format {format!r} of tool calls: there are {', '.join(_FORMATS)}")
    call = _FORMATS[format].parse(text.strip("\n "))
    return [] if call is None else [call]


def _tool(tool: Any, index: int) -> tuple[str, dict[str, Any]]:
    """Name and schema of the parameters."""
    if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
        tool = tool["function"]
    name = tool.get("name") if isinstance(tool, Mapping) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"tool {index} has the name {name!r}: a name has letters, digits, _, - and .")
    parameters = tool.get("parameters")
    if parameters is None:
        parameters = {"type": "object"}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"tool {name!r} has parameters {parameters!r:.40}: they must be a JSON schema")
    # Arguments that no schema describes are of no use to a tool.
    defaults = {"type": "object", "properties": {}, "additionalProperties": False}
    return name, defaults | dict(parameters)


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object, not {text:.40}")
    return value


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, **OPTIONS})}"


# -- GLM-4: the name on one line, a JSON object on the next -----------------------------------------------------------


def _glm4_rule(name: str, parameters: dict[str, Any], rule: str) -> str:
    return f"{rule}: {json.dumps(name + chr(10))} {rule}_json\n{rule}_json: {_json(parameters)}"


def _parse_glm4(text: str) -> ToolCall | None:
    name, line, arguments = text.partition("\n")
    if not line or not _NAME.fullmatch(name.strip()) or not arguments.lstrip().startswith("{"):
        return None
    return ToolCall(name.strip(), _object(arguments, f"the call of {name.strip()}"))


# -- LLaMA 3.1: a JSON object -----------------------------------------------------------------------------------------


def _llama3_rule(name: str, parameters: dict[str, Any], rule: str) -> str:
    begin = f'{{"name": {json.dumps(name)}, "parameters": '
    return f'{rule}: {json.dumps(begin)} {rule}_json "}}"\n{rule}_json: {_json(parameters)}'


def _parse_llama3(text: str) -> ToolCall | None:
    if not text.startswith("{"):
        return None
    call = _object(text, "the call")
    name, arguments = call.get("name"), call.get("parameters", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f'a call must be {{"name": ..., "parameters": {{...}}}}, not {text:.60}')
    return ToolCall(name, arguments)


# -- ChatGLM3: the name on one line, then Python ----------------------------------------------------------------------


def _chatglm3_rule(name: str, parameters: dict[str, Any], rule: str) -> str:
    """`tool_call(a=1, b="x")`: required and optional arguments in the order of the properties."""
    extra = set(parameters) - {
        "type",
        "properties",
        "required",
        "additionalProperties",
        "title",
        "description",
        "$defs",
    }
    if extra or parameters["additionalProperties"] not in (False, True):
        raise ValueError(f"in chatglm3, parameters have properties and required only, not {sorted(extra)}")
    properties, required = parameters["properties"], parameters.get("required", ())
    if missing := [argument for argument in required if argument not in properties]:
        raise ValueError(f"the required argument {missing[0]!r} is not among the properties")
    rules, arguments = [], list(properties)
    for i, argument in enumerate(arguments):
        if not argument.isidentifier() or keyword.iskeyword(argument):
            raise ValueError(f"the argument {argument!r} is no name in Python, in which chatglm3 writes calls")
        value = _python_value(argument, properties[argument], parameters.get("$defs"))
        rules.append(f"{rule}_{i}: {json.dumps(argument + '=')} {rule}_{i}_value\n{rule}_{i}_value: {value}")
    # rule_after_i: the arguments from i on, after at least one other; rule_from_i: the same, as the first ones.
    for i in range(len(arguments), -1, -1):
        for place, comma in (("from", ""), ("after", '", " ')):
            if i == len(arguments):
                rules.append(f'{rule}_{place}_{i}: ""')
                continue
            ways = [f"{comma}{rule}_{i} {rule}_after_{i + 1}"]
            ways += [] if arguments[i] in required else [f"{rule}_{place}_{i + 1}"]
            rules.append(f"{rule}_{place}_{i}: {' | '.join(ways)}")
    begin = json.dumps(f"{name}\n```python\ntool_call(")
    return "\n".join([f"{rule}: {begin} {rule}_from_0 {json.dumps(')' + chr(10) + '```')}", *rules])


def _python_value(argument: str, schema: Any, definitions: Any) -> str:
    """The rule of a value. JSON is Python but for true, false and null, which only a whole value may be."""
    if isinstance(schema, dict) and schema.get("type") in ("boolean", "null"):
        return '"True" | "False"' if schema["type"] == "boolean" else '"None"'
    if isinstance(schema, dict) and isinstance(schema.get("enum"), list):
        words = [x for x in schema["enum"] if x is None or isinstance(x, bool)]
        others = [x for x in schema["enum"] if x not in words or not (x is None or isinstance(x, bool))]
        ways = [json.dumps(repr(word)) for word in words]
        return " | ".join(ways + ([_json({**schema, "enum": others})] if others else []))
    for path, part in subschemas(schema):
        if not isinstance(part, dict) or _has_words(part):
            raise ValueError(
                f"the argument {argument!r} may have true, false or null ({path}), which chatglm3 can only write as a "
                "whole argument: give a type to every part of its schema"
            )
    whole = {**schema, **({"$defs": definitions} if definitions else {})}
    return _json(whole)


def _has_words(schema: Mapping[str, Any]) -> bool:
    """Whether a schema allows true, false or null by itself, or objects and lists of anything."""
    if "enum" in schema or "const" in schema:
        values = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]
        return bool(re.search(r"\b(true|false|null)\b", json.dumps([x for x in values if not isinstance(x, str)])))
    if any(key in schema for key in ("anyOf", "oneOf", "allOf", "$ref")):
        return "$ref" in schema
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if any(kind not in ("string", "number", "integer", "array", "object") for kind in types):
        return True
    return ("array" in types and "items" not in schema) or (
        "object" in types and schema.get("additionalProperties", True) is True
    )


def _parse_chatglm3(text: str) -> ToolCall | None:
    name, line, code = text.partition("\n")
    found = re.fullmatch(r"\s*```python\n(.*?)\n?```\s*", code, re.DOTALL)
    if not line or not _NAME.fullmatch(name.strip()) or (not found and "tool_call(" not in code):
        return None
    name = name.strip()
    try:
        call = ast.parse((found[1] if found else code).strip(), mode="eval").body
        if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "tool_call" or call.args:
            raise ValueError("it is not tool_call(name=value, ...)")
        arguments = {str(pair.arg): ast.literal_eval(_without_json_words(pair.value)) for pair in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the call of {name} cannot be read: {error}") from error
    return ToolCall(name, arguments)


def _without_json_words(value: ast.expr) -> ast.expr:
    """The tree of a value, with true, false and null as Python's constants: models write both."""
    words = {"true": True, "false": False, "null": None}

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return ast.Constant(words[node.id]) if node.id in words else node

    return Replace().visit(value)


class _Format(NamedTuple):
    rule: Callable[[str, dict[str, Any], str], str]
    parse: Callable[[str], ToolCall | None]


_FORMATS = {
    "chatglm3": _Format(_chatglm3_rule, _parse_chatglm3),
    "glm4": _Format(_glm4_rule, _parse_glm4),
    "llama3": _Format(_llama3_rule, _parse_llama3),
}
