"""Results of the preflight checks, with a verdict each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "warn", "fail", "unknown"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check of a rank, a node or the whole group.

    Attributes:
        name: what was checked: ``"gpu memory"``.
        verdict: ``"fail"`` refuses the node, ``"warn"`` needs a person to look, ``"unknown"`` could not be measured.
        value: the measurement, of JSON types; None is unknown, never 0.
        detail: a sentence that explains the value where needed.
    """

    name: str
    verdict: Verdict
    value: Any = None
    detail: str = ""


@dataclass
class RankReport:
    """All check results of one rank.

    Attributes:
        rank, local_rank: its rank in the job and on its node.
        node: its host name.
        facts: values that must be the same on all ranks (versions, digests).
        findings: results of the checks of its device and its node.
    """

    rank: int
    local_rank: int
    node: str
    facts: dict[str, str] = field(default_factory=dict)
    findings: list[CheckResult] = field(default_factory=list)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> RankReport:
        """The report of another rank, from what ``dataclasses.asdict`` returned there."""
        return cls(**{**tree, "findings": [CheckResult(**finding) for finding in tree["findings"]]})


def compare_facts(reports: Sequence[RankReport]) -> list[CheckResult]:
    """One result per fact: it is the same on all ranks, or names the ranks that differ."""
    results = []
    for name in sorted({name for report in reports for name in report.facts}):
        values = [report.facts.get(name, "unknown") for report in reports]
        common = max(values, key=lambda value: (values.count(value), value == values[0]))
        odd = [f"{report.node} (rank {report.rank}) has {value}" for report, value in zip(reports, values) if value != common]
        if odd:
            results.append(
                CheckResult(name, "fail", common, f"not the same everywhere: most have {common}, {'; '.join(odd[:8])}")
            )
        else:
            results.append(CheckResult(name, "ok" if common != "unknown" else "unknown", common))
    return results


def compare_speeds(reports: Sequence[RankReport], name: str, *, slow: float = 0.8) -> list[CheckResult]:
    """Ranks whose value of ``name`` (larger is better) is below ``slow`` times the median: the stragglers."""
    values = {r.rank: f.value for r in reports for f in r.findings if f.name == name and f.value is not None}
    if len(values) < 2:
        return []
    median = sorted(values.values())[len(values) // 2]
    late = [
        f"{r.node} (rank {r.rank}) {values[r.rank]:.3g}" for r in reports if r.rank in values and values[r.rank] < slow * median
    ]
    if late:
        return [
            CheckResult(f"{name}, compared", "warn", median, f"slower than the others' {median:.3g}: {', '.join(late[:8])}")
        ]
    return [CheckResult(f"{name}, compared", "ok", median)]


def refusals(reports: Iterable[RankReport], shared: Iterable[CheckResult]) -> list[str]:
    """Reasons not to start the job here: one sentence per failed check, with the node's name."""
    reasons = [
        f"{r.node} (rank {r.rank}): {f.name}: {f.detail or f.value}" for r in reports for f in r.findings if f.verdict == "fail"
    ]
    return reasons + [f"{f.name}: {f.detail or f.value}" for f in shared if f.verdict == "fail"]


def table(reports: Sequence[RankReport], shared: Sequence[CheckResult]) -> Any:
    """A rich table: all results of the group and of the first rank, and those of other ranks that are not ok."""
    from rich.table import Table

    rich_table = Table(box=None, pad_edge=False, show_edge=False)
    for column in ("where", "what", "verdict", "found"):
        rich_table.add_column(column, overflow="fold")
    colours: Mapping[str, str] = {"ok": "green", "warn": "yellow", "fail": "bold red", "unknown": "dim"}
    rows = [
        (f"{r.node}/{r.rank}", f)
        for i, r in enumerate(reports)
        for f in r.findings
        if i == 0 or f.verdict not in ("ok", "unknown")
    ]
    for where, finding in [*rows, *(("all", f) for f in shared)]:
        found = finding.detail or ("" if finding.value is None else _short(finding.value))
        rich_table.add_row(where, finding.name, f"[{colours[finding.verdict]}]{finding.verdict}[/]", found)
    return rich_table


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    return str(value)
