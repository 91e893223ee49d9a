"""The base class of every configuration, and how one is read from TOML: mistakes are told in one sentence.

A configuration is checked strictly, however it was made (TOML, a command's ``-o key=value``, JSON, Python): a string or a
flag is no number, an unknown key is answered with the nearest known one, NaN and infinity are refused.
"""

from __future__ import annotations

import difflib
import numbers
import types
from collections.abc import Mapping
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from race_dist.messages import short_repr

SIZE_LIMIT = 2**31 - 1  # of numbers that kernels and libraries index with 32 bits
COUNT_LIMIT = 2**53  # of numbers that JSON keeps exactly
SEED_LIMIT = 2**63 - 1  # of generators
TIMEOUT_LIMIT = 10**6  # seconds; libraries hold milliseconds in a C int

NonEmpty = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dict_type": "a table",
    "mapping_type": "a table",
    "tuple_type": "a list",
    "list_type": "a list",
    "invalid_key": "a table whose keys are text",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}
_PREDICATES = ("must ", "is ")  # validators whose message begins like this leave the key and the value to the sentence


class StrictConfig(BaseModel):
    """A frozen set of checked fields.

    A whole number may be written as a float without a fraction (``1e6``), and a tuple as a list; nothing else is converted.

    Raises:
        ValueError: a field is missing, unknown, of another type or out of its range: one sentence that names it.
        A validator of a subclass raises ValueError("must be ...") and leaves the field's name and the value to that sentence.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(describe_errors(type(self), error)) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic: it is not to be called for inner tables

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, but errors are one sentence."""
        return cls.check(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's, but errors are one sentence."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise ValueError(describe_errors(cls, error)) from None

    @classmethod
    def check(cls, tree: Any, *, source: str = "", prefix: str = "", **options: Any) -> Self:
        """Check what was read already.

        Args:
            tree: a mapping of fields.
            source: what stands before the sentence, for example the name of the file.
            prefix: what stands before the name of each key in it.
        """
        try:
            return super().model_validate(tree, **options)
        except ValidationError as error:
            sentence = describe_errors(cls, error, prefix)
            raise ValueError(f"{source}: {sentence}" if source else sentence) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError:
            raise ValueError(
                f"{type(self).__name__}.{name} cannot be changed: a configuration is checked when it is made, so "
                "make another one"
            ) from None

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, value: Any, info: ValidationInfo) -> Any:
        """What is the same in another type: 1e6 for a whole number, a list for a tuple, numbers of numpy."""
        if isinstance(value, bool | str) or value is None:
            return value
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if int in kinds and float not in kinds:
            if isinstance(value, float) and value.is_integer():
                return int(value)
            if isinstance(value, numbers.Integral):
                return int(value)
        return tuple(value) if isinstance(value, list) and tuple in kinds else value


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without their parameters."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [kind for each in get_args(annotation) for kind in _kinds(each)]
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    return [origin or annotation]


def describe_errors(model: type[BaseModel], error: ValidationError, prefix: str = "") -> str:
    """All of pydantic's errors about ``model`` as one sentence; unknown keys come alone, as they explain missing ones."""
    found = error.errors(include_url=False)
    unknown = [each for each in found if each["type"] == "extra_forbidden"]
    if unknown:
        return "; ".join(dict.fromkeys(_unknown(model, each["loc"], prefix) for each in unknown))
    missing = [prefix + _key(model, each["loc"])[0] for each in found if each["type"] == "missing"]
    sentences = (
        [f"{' and '.join(filter(None, [', '.join(missing[:-1]), missing[-1]]))} {'is' if len(missing) == 1 else 'are'} missing"]
        if missing
        else []
    )
    by_key: dict[str, list[Any]] = {}
    for each in found:
        if each["type"] != "missing":
            by_key.setdefault(_key(model, each["loc"])[0], []).append(each)
    sentences += [_sentence(model, prefix + key if key else "", each) for key, each in by_key.items()]
    return "; ".join(sentences)


def _sentence(model: type[BaseModel], key: str, errors: list[Any]) -> str:
    """What is wrong with the value of one key. A value that fits no kind of a union has an error for each of them."""
    value = errors[0]["input"]
    own = [str(each["msg"]).removeprefix("Value error, ") for each in errors if each["type"] == "value_error"]
    if own:
        message = own[0]
        if not key:
            return message
        if not message.startswith(_PREDICATES):
            return message if key.rpartition(".")[2] in message else f"{key}: {message}"
        return f"{key} {message}{_got(value)}"
    bounded = [each for each in errors if each["type"] in _BOUNDS]
    expected = " or ".join(dict.fromkeys(_expected(each) for each in bounded or errors))
    return f"{key or model.__name__} must {expected}{_got(value)}"


def _expected(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = context[name]
        return f"be {words} {bound:,}" if isinstance(bound, int) and bound >= 10**6 else f"be {words} {bound:g}"
    if kind == "string_too_short":
        return "not be empty"
    if kind == "string_pattern_mismatch":
        return "have no NUL character" if "\\x00" in context["pattern"] else f"match pattern {context['pattern']!r}"
    if kind == "literal_error":
        return f"be {context['expected']}"
    if kind == "float_type" and isinstance(error["input"], int) and not isinstance(error["input"], bool):
        return "be at most 1.8e308"
    if kind in _EXPECTED:
        return f"be {_EXPECTED[kind]}"
    return str(error["msg"]).removeprefix("Input should ").removeprefix("String should ")


def _unknown(model: type[BaseModel], location: tuple[int | str, ...], prefix: str) -> str:
    key, owner = _key(model, location)
    table = prefix + key[: len(key) - len(str(location[-1]))]
    near = difflib.get_close_matches(str(location[-1]), owner.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {table}{near[0]}?" if near else f"known are {', '.join(sorted(owner.model_fields))}"
    return f"unknown key {short_repr(prefix + key) if not key.isprintable() or not location[-1] else prefix + key}; {hint}"


def _key(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """``a.b[0]`` of pydantic's location, which also names the kinds of a union, and the table that holds the last key."""
    owner, parts, inner = model, "", model
    within: Any = model
    for part in location:
        if isinstance(part, int):
            parts += f"[{part}]"
            continue
        kinds = _kinds(within) if within is not None else []
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if tables:
            owner = inner = tables[0]
            field = inner.model_fields.get(part)
            within = field.annotation if field is not None else None
        elif within is not None and dict not in kinds:
            continue  # the name of a kind
        parts += f".{part}" if parts else str(part)
    return parts, owner


def _got(value: object) -> str:
    return "" if isinstance(value, Mapping | BaseModel) else f"; got {short_repr(value)}"
