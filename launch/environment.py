"""What a job file may contain: text of one line, and secrets only by reference."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, model_validator

from race_dist.messages import short_repr
from race_dist.strict_config import StrictConfig

_SECRET_WORDS = frozenset(
    {
        "KEY",
        "KEYS",
        "APIKEY",
        "TOKEN",
        "SECRET",
        "SECRETS",
        "PASSWORD",
        "PASSWORDS",
        "PASSWD",
        "PASSPHRASE",
        "PASS",
        "PWD",
        "CREDENTIAL",
        "CREDENTIALS",
        "CREDS",
        "AUTH",
        "AUTHORIZATION",
        "PAT",
        "COOKIE",
        "DSN",
        "SAS",
    }
)
_SECRET_ENDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS")
_SECRET_PARTS = ("SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "APIKEY")
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ASSIGNMENT = re.compile(r"(?:^|[=,\s])([A-Za-z_][A-Za-z0-9_]*)=([^,\s]*)")
_LOGIN_IN_URL = re.compile(r"://[^/@\s:]*:[^/@\s]+@")


def one_line(text: str, what: str = "") -> str:
    """Return the text if it is one line without control characters, so that it cannot add a line to a script or manifest.

    Args:
        text: any text.
        what: its name in the error.

    Raises:
        ValueError: it has a line break or another control character, or bytes that are not UTF-8.
    """
    bad = next((c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs")), None)
    if bad is None:
        return text
    kind = (
        "a line break"
        if bad in "\n\r\x0b\x0c\x85\u2028\u2029"
        else "bytes that are not UTF-8"
        if unicodedata.category(bad) == "Cs"
        else f"the control character {bad!r}"
    )
    raise ValueError(f"{what + ': ' if what else ''}control characters are not allowed in a job, and there is {kind} in it")


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable is a secret: by its name (``HF_TOKEN``, ``WANDB_API_KEY``, ``DB_PASSWORD``,
    ``AWS_SECRET_ACCESS_KEY``), or because its value is a URL with a password."""
    words = name.upper().split("_")
    return (
        not _SECRET_WORDS.isdisjoint(words)
        or any(word.endswith(_SECRET_ENDS) for word in words)
        or any(part in name.upper() for part in _SECRET_PARTS)
        or _LOGIN_IN_URL.search(value) is not None
    )


def no_secret(text: str) -> str:
    """Return the text if it contains no secret: no ``NAME=VALUE`` of one, as in ``--export=HF_TOKEN=...``, and no URL with a
    password.

    Raises:
        ValueError: it contains a secret, which would be written to the job's file. The message does not show it.
    """
    name = next(
        (name for name, value in _ASSIGNMENT.findall(text) if value and not value.startswith("$") and is_secret(name)), None
    )
    if name is not None:
        raise ValueError(
            f"the value of {name} would stand in the job's file: give env.{name} instead, which is passed by reference"
        )
    if _LOGIN_IN_URL.search(text):
        raise ValueError(
            "there is an address with a password in it, which would stand in the job's file: log in to the "
            "registry, or keep the password where the program looks for it"
        )
    return text


class EnvironmentReference(StrictConfig):
    """An environment variable whose value is not in the job but in the launcher's environment or in a Secret.

    Attributes:
        from_env: the name of a variable in the environment of the launcher (sbatch, ``race-dist launch``).
        secret, key: a Kubernetes Secret and its key.
    """

    from_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    secret: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")] | None = None
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$")] | None = None

    @model_validator(mode="after")
    def _check(self) -> EnvironmentReference:
        if (self.from_env is None) == (self.secret is None) or (self.secret is None) != (self.key is None):
            raise ValueError('a reference is either { from_env = "NAME" } or { secret = "NAME", key = "KEY" }')
        return self


def read_environment(value: object) -> object:
    """Parse a job's table ``env``: references, text, and numbers as text. Errors do not show values of secrets.

    Raises:
        ValueError: a value is not text, a number or a reference, or has a line break; the message names the variable.
    """
    if not isinstance(value, Mapping):
        return value
    variables: dict[object, object] = {}
    for name, given in value.items():
        where = f"env.{name}"
        if name in _OF_A_RANK:
            raise ValueError(f"{where}: {name} tells one rank from another, and launchers set it for each; leave it out")
        if isinstance(given, Mapping):
            variables[name] = EnvironmentReference.check(given, source=where, prefix=f"{where}.")
        elif isinstance(given, str | EnvironmentReference):
            variables[name] = one_line(given, where) if isinstance(given, str) else given
        elif isinstance(given, int | float) and not isinstance(given, bool):
            variables[name] = str(given)
        else:
            what = "" if is_secret(str(name)) else f"; got {short_repr(given)}"
            raise ValueError(f'{where} must be text, a number or a reference {{ from_env = "NAME" }}{what}')
    return variables
