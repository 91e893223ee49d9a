"""The tree says what the field says: names and phrases that were replaced do not come back.

docs/notation.md defines the project's own words. Patterns have one letter in brackets, so that this file does not match them.
"""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Figures as they were measured, pinned packages, and the one list of old module names that still import.
EXCEPT = ("docs/benchmarks/", "constraints.txt", "race_dist/renamed_modules.py", "CHANGELOG.md")

# package: modules that it no longer has
OLD_MODULES = {
    "parallel": "agree comm collectives mesh rendezvous replicas watch eager passes routes cut layout documents graphs",
    "ops": "problem functional",
    "planning": "tally fused rates costs cluster",
    "training": "using rehearsal closing agreement",
    "benchmarks": "peers",
    "streaming": "text",
    "launch": "findings place records",
    "kernels": "snapshot shares sums walk walk_backward",
    "kernels.hopper": "rings out queries keys weights features states",
    "nn": "pieces calls core conv convolve gate init tail",
}

# Names in Python code; strings and comments are not looked at. A pattern matches the whole name.
OLD_IDENTIFIERS = {
    "state exchange, shard partition": r"rout[e]s?|Rout[e]|shard_c[u]t",
    "consistency checks": r"agr[e]e_on_\w+|check_ranks_agr[e]e|agr[e]ement",
    "watchdog": r"stop_w[a]tch|guard_st[a]lls",
    "data parallel": r"R[e]plica|GradientS[u]m",
    "started, partial results": r"beg[u]n|Beg[u]n|begin_(?:forw[a]rd|backw[a]rd)",
    "chunk recurrence": r"w[a]lk_\w+|W[A]LKS",
    "materialized states": r"sn[a]pshot_\w+|SN[A]PSHOTS?",
    "initial, final, dfinal": r"enter[i]ng|leav[i]ng",
    "tanh_projection, bits": r"sh[a]rp|corn[e]rs?",
    "partial gradients": r"SH[A]RES|unproject_sh[a]res",
    "dry_run, finalize": r"reh[e]arse|reh[e]arsal",
    "reset_constants": r"s[e]ttle",
    "log_event": r"_?t[e]lling",
    "parameter_counts and activation_memory": r"t[a]lly",
    "elementwise_traffic": r"f[u]sed_by_\w+",
    "activations": r"saved_b[y]_\w+",
    "tma_load, tma_store": r"copy_eng[i]ne",
    "baselines": r"P[e]er|PE[E]RS|pe[e]rs_of|pe[e]rs",
}

# In code and pages.
OLD_PHRASES = {
    "per head, per layer, per token": r"\b(?:norm|sketch|matrix|carry|constant|state|number|bytes?|tokens?|numbers) "
    r"an? (?:h[e]ad|l[a]yer|t[o]ken|r[o]w|r[a]nk|t[i]le|p[i]ece|n[o]de|GP[U]|device)\b",
    "tokens per second": r"\b(?:tokens|bytes|operations|steps) a s[e]cond\b",
    "NaN or Inf": r"\b(?:is|are|that are) n[o] numbers?\b",
    "fault tolerance": r"\bwhat a run surv[i]ves\b",
    "saved prompt state": r"\bkept c[o]ntexts?\b",
    "decay rates": r"\brates? of dec[a]y\b",
    "a GPU": r"\b(?:the|a|one|that|on|per) c[a]rd\b|\bc[a]rd's\b",
    "launch-bound": r"\bhost's l[a]unches\b",
    "TMA": r"\bcopy eng[i]ne\b",
    "SM": r"\bmultiproc[e]ssors?\b",
    "cannot be recovered": r"\bgone cannot be brought b[a]ck\b",
    "import layers": r"\bfl[o]ors? (?:below|of imports|\d)",
    "baselines": r"\bbeside its pe[e]rs\b|\bthe pe[e]rs\b|\blinear pe[e]rs\b",
}


@cache
def tracked() -> tuple[tuple[str, str], ...]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    chosen = [n for n in names if n.endswith((".py", ".md", ".toml", ".json", ".sh", ".yaml", ".txt", ".svg", ".j2"))]
    chosen = [n for n in chosen if not n.startswith(EXCEPT) and (ROOT / n).is_file()]
    return tuple((n, (ROOT / n).read_text(encoding="utf-8")) for n in chosen)


def occurrences(pattern: str, ending: str = "") -> Iterator[str]:
    expression = re.compile(pattern)
    for name, text in tracked():
        if name.endswith(ending) and expression.search(text):
            for number, line in enumerate(text.splitlines(), 1):
                if expression.search(line):
                    yield f"{name}:{number}: {line.strip()[:120]}"


@pytest.mark.parametrize("package", OLD_MODULES)
def test_old_modules_are_not_named(package: str) -> None:
    names = "|".join(OLD_MODULES[package].split())
    root = "" if package.startswith(("kernels", "launch")) else r"race_dist[./]"
    path = rf"\b{root}{package.replace('.', '[./]')}[./](?:{names})\b(?!\.\w+\()"
    imported = rf"\bfrom race_dist\.{re.escape(package)} import (?:\w+, )*(?:{names})\b"
    assert not list(occurrences(f"{path}|{imported}"))


@cache
def identifiers() -> tuple[tuple[str, int, str], ...]:
    """File, line and name of every name in the Python code, each once per file."""
    found = {}
    for file, text in tracked():
        if file.endswith(".py"):
            for token in tokenize.generate_tokens(io.StringIO(text).readline):
                if token.type == tokenize.NAME:
                    found.setdefault((file, token.string), token.start[0])
    return tuple((file, line, name) for (file, name), line in found.items())


@pytest.mark.parametrize("instead", OLD_IDENTIFIERS)
def test_old_identifiers_are_not_used(instead: str) -> None:
    pattern = re.compile(OLD_IDENTIFIERS[instead])
    found = [f"{file}:{line}: {name}" for file, line, name in identifiers() if pattern.fullmatch(name)]
    assert not found, f"say {instead}:\n" + "\n".join(found)


@pytest.mark.parametrize("instead", OLD_PHRASES)
def test_old_phrases_are_not_used(instead: str) -> None:
    found = list(occurrences(OLD_PHRASES[instead]))
    assert not found, f"say {instead}:\n" + "\n".join(found)


def test_no_phrase_matches_this_file() -> None:
    text = Path(__file__).read_text()
    assert not [p for p in OLD_PHRASES.values() if re.search(p, text)]
