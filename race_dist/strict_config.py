"""The base class of all configurations. A mistake is reported in one sentence.

A configuration is validated strictly, whether it comes from TOML, ``-o key=value``, JSON or Python: a string or a bool is not a
number, the error for an unknown key names the nearest known key, and NaN and Inf are refused.
:mod:`race_dist.config_loader` reads configurations from files.
"""

from __future__ import annotations

import difflib
import numbers
import types
from collections.abc import Mapping
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from race_dist.messages import short_repr

SIZE_LIMIT = 2**31 - 1  # kernels and libraries use 32-bit indices
COUNT_LIMIT = 2**53  # JSON represents larger integers inexactly
SEED_LIMIT = 2**63 - 1  # of random number generators
TIMEOUT_LIMIT = 10**6  # seconds; libraries store milliseconds in a C int

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
_PREDICATES = ("must ", "is ")  # messages of validators that begin with these words get the key and the value added


class StrictConfig(BaseModel):
    """A frozen set of validated fields.

    An integer may be written as a float without a fraction (``1e6``), and a tuple as a list; nothing else is converted.

    Raises:
        ValueError: a field is missing, unknown, of another type or out of its range; the message is one sentence that names it.
        A validator of a subclass raises ValueError("must be ..."); the field's name and value are added.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(describe_errors(type(self), error)) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # tells pydantic not to call it for inner tables

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
        """Validate parsed fields.

        Args:
            tree: a mapping of fields.
            source: prefix of the error message, for example the name of the file.
            prefix: prefix of each key in the error message.
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
        """Accept equal values of another type: 1e6 for an integer, a list for a tuple, numpy numbers."""
        if isinstance(value, bool | str) or value is None:
            return value
        kinds = _types(cls.model_fields[str(info.field_name)].annotation)
        if int in kinds and float not in kinds:
            if isinstance(value, float) and value.is_integer():
                return int(value)
            if isinstance(value, numbers.Integral):
                return int(value)
        return tuple(value) if isinstance(value, list) and tuple in kinds else value


def _types(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without their parameters."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [kind for argument in get_args(annotation) for kind in _types(argument)]
    if origin is Annotated:
        return _types(get_args(annotation)[0])
    return [origin or annotation]


def describe_errors(model: type[BaseModel], error: ValidationError, prefix: str = "") -> str:
    """All of pydantic's errors as one sentence. Unknown keys are reported alone, because they explain missing keys."""
    found = error.errors(include_url=False)
    unknown = [entry for entry in found if entry["type"] == "extra_forbidden"]
    if unknown:
        return "; ".join(dict.fromkeys(_unknown(model, entry["loc"], prefix) for entry in unknown))
    missing = [prefix + _key(model, entry["loc"])[0] for entry in found if entry["type"] == "missing"]
    sentences = (
        [f"{' and '.join(filter(None, [', '.join(missing[:-1]), missing[-1]]))} {'is' if len(missing) == 1 else 'are'} missing"]
        if missing
        else []
    )
    by_key: dict[str, list[Any]] = {}
    for entry in found:
        if entry["type"] != "missing":
            by_key.setdefault(_key(model, entry["loc"])[0], []).append(entry)
    sentences += [_sentence(model, prefix + key if key else "", entries) for key, entries in by_key.items()]
    return "; ".join(sentences)


def _sentence(model: type[BaseModel], key: str, errors: list[Any]) -> str:
    """The sentence about one key. A value that fits no type of a union has an error for each type."""
    value = errors[0]["input"]
    own = [str(entry["msg"]).removeprefix("Value error, ") for entry in errors if entry["type"] == "value_error"]
    if own:
        message = own[0]
        if not key:
            return message
        if not message.startswith(_PREDICATES):
            return message if key.rpartition(".")[2] in message else f"{key}: {message}"
        return f"{key} {message}{_got(value)}"
    bounded = [entry for entry in errors if entry["type"] in _BOUNDS]
    expected = " or ".join(dict.fromkeys(_expected(entry) for entry in bounded or errors))
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


# What other trainers call keys of ours, where the spelling alone does not lead to them.
_SYNONYMS = {
    "adam_epsilon": "eps",
    "block_size": "context",
    "clip_grad": "clip",
    "context_parallel_size": "sp",
    "d_model": "dim",
    "data_parallel_size": "dp",
    "global_batch_size": "batch_size",
    "grad_clip": "clip",
    "gradient_accumulation_steps": "accumulate",
    "gradient_clipping": "clip",
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "learning_rate": "lr",
    "max_grad_norm": "clip",
    "max_steps": "steps",
    "min_lr": "final_lr",
    "n_embd": "dim",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_kv_heads",
    "seq_len": "context",
    "seq_length": "context",
    "sequence_length": "context",
    "tensor_model_parallel_size": "tp",
    "train_iters": "steps",
}


def _unknown(model: type[BaseModel], location: tuple[int | str, ...], prefix: str) -> str:
    key, owner = _key(model, location)
    table = prefix + key[: len(key) - len(str(location[-1]))]
    synonym = _SYNONYMS.get(str(location[-1]))
    if synonym in owner.model_fields:
        near = [synonym]
    else:
        near = difflib.get_close_matches(str(location[-1]), owner.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {table}{near[0]}?" if near else f"known are {', '.join(sorted(owner.model_fields))}"
    return f"unknown key {short_repr(prefix + key) if not key.isprintable() or not location[-1] else prefix + key}; {hint}"


def _key(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """The key ``a.b[0]`` of pydantic's location, which also has the types of a union; and the table with the last key."""
    owner, parts, inner = model, "", model
    within: Any = model
    for part in location:
        if isinstance(part, int):
            parts += f"[{part}]"
            continue
        kinds = _types(within) if within is not None else []
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if tables:
            owner = inner = tables[0]
            field = inner.model_fields.get(part)
            within = field.annotation if field is not None else None
        elif within is not None and dict not in kinds:
            continue  # the name of a type
        parts += f".{part}" if parts else str(part)
    return parts, owner


def _got(value: object) -> str:
    return "" if isinstance(value, Mapping | BaseModel) else f"; got {short_repr(value)}"
