"""JSON of any schema: a hundred that were drawn, judged by another library."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs

from tests.contract.asking import QUESTIONS, Api, Json

COUNT, AT_ONCE = 100, 20
WORDS = ("a", "mood", "Größe", 'quo"te', "x_1", "two words")


def draw(chance: random.Random, depth: int) -> Json:
    """A small schema; its longest text is about 100 tokens."""
    kinds = ["integer", "boolean", "enum", "string", "pattern", "null"]
    kind = chance.choice([*kinds, "object", "object", "array", "anyOf", "ref"] if depth else kinds)
    match kind:
        case "integer":
            least = chance.randint(-50, 50)
            return {"type": "integer", "minimum": least, "maximum": least + chance.randint(0, 500)}
        case "enum":
            return {"enum": chance.sample([1, 2.5, "yes", "no", None, True, [1], {"k": "v"}], chance.randint(1, 4))}
        case "string":
            return {"type": "string", "minLength": 1, "maxLength": chance.randint(1, 6)}
        case "pattern":
            return {"type": "string", "pattern": chance.choice([r"^[A-Z]{2}\d{2}$", r"^(red|blue)-[0-9a-f]{3}$"])}
        case "array":
            most = chance.randint(1, 3)
            return {"type": "array", "items": draw(chance, depth - 1), "minItems": 1, "maxItems": most}
        case "anyOf":
            return {"anyOf": [draw(chance, depth - 1) for _ in range(2)]}
        case "ref":
            return {"$ref": "#/$defs/shared"}
        case "object":
            return draw_object(chance, depth)
        case _:
            return {"type": kind}


def draw_object(chance: random.Random, depth: int) -> Json:
    names = chance.sample(WORDS, chance.randint(1, 3))
    required = [name for name in names if chance.random() < 0.7]
    properties = {name: draw(chance, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def draw_schema(seed: int) -> Json:
    chance = random.Random(seed)
    schema = draw_object(chance, 2)
    return {**schema, "$defs": {"shared": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}}}


def test_answers_fit_a_hundred_schemas(api: Api) -> None:
    schemas = [draw_schema(seed) for seed in range(COUNT)]

    def ask(number: int) -> dict[str, Any]:
        format_ = {"type": "json_schema", "json_schema": {"name": "drawn", "schema": schemas[number], "strict": True}}
        asked: Json = {"temperature": number % 3 / 2, "seed": number, "max_tokens": 480, "response_format": format_}
        return dict(api.chat(QUESTIONS[number % 4], **asked)["choices"][0])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        choices = list(pool.map(ask, range(COUNT)))
    for schema, choice in zip(schemas, choices, strict=True):
        assert choice["finish_reason"] == "stop", (schema, choice["message"]["content"])
        answer = json.loads(choice["message"]["content"])
        assert jsonschema_rs.validator_for(schema).is_valid(answer), (schema, answer)
    assert len({choice["message"]["content"] for choice in choices}) > COUNT / 2
