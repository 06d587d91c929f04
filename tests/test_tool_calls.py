"""Calls of tools: what a constraint lets a model write is what the authors of its format read."""

import json

import jsonschema
import numpy as np
import pytest
from random_schemas import bound, text_of, write

from garrulax.sampling import constrain

TOOLS = [
    {
        "name": "get_weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "metric": {"type": "boolean"},
                "unit": {"enum": ["c", "f", None]},
                "near": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city", "metric"],
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def evaluated(answer):
    """ChatGLM3's call as its authors read it (process_response of openai_api_demo/utils.py in THUDM/ChatGLM3)."""
    name, content = answer.split("\n", maxsplit=1)
    return name.strip(), eval("\n".join(content.split("\n")[1:-1]), {"tool_call": lambda **arguments: arguments})


def loaded(answer):
    """GLM-4's call (dispatch_tool of composite_demo in THUDM/GLM-4)."""
    name, content = answer.split("\n", maxsplit=1)
    return name, json.loads(content)


def llama(answer):
    """LLaMA 3.1's call (maybe_extract_custom_tool_call of tool_utils.py in meta-llama/llama-models)."""
    call = json.loads(answer)
    return call["name"], call["parameters"]


@pytest.mark.parametrize(("format", "read"), [("chatglm3", evaluated), ("glm4", loaded), ("llama3", llama)])
def test_calls_of_tools(format, read):
    grammar = bound(constrain.tool_call(TOOLS, format), "ranks")
    names = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        budget = grammar.shortest + (0, 3, 60, 150)[seed % 4]
        tokens, _ = write(grammar, budget, lambda _, size, rng=rng: rng.normal(size=size))
        answer = text_of(grammar, tokens)
        (call,) = constrain.parse_tool_calls(answer, format)
        assert call == read(answer)
        names.add(call.name)
        if call.name == "get_weather":
            jsonschema.validate(call.arguments, {**TOOLS[0]["parameters"], "additionalProperties": False})
        else:
            assert call == ("now", {})
    assert names == {"get_weather", "now"}
    assert constrain.parse_tool_calls("It is sunny.\nVery.", format) == []


def test_what_chatglm3_cannot_write():
    nested = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "boolean"}}}}
    with pytest.raises(ValueError, match="tool 'f': the argument 'a' may have true, false or null"):
        constrain.tool_call([{"name": "f", "parameters": nested}], "chatglm3")
    published = 'get_current_weather\n```python\ntool_call(location="beijing", unit="celsius")\n```'
    call = ("get_current_weather", {"location": "beijing", "unit": "celsius"})
    assert constrain.parse_tool_calls(published, "chatglm3") == [call]
