"""Consistency checks: ranks compare their calls before data moves, so that a mismatch is an error that names it and not a
hang."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.distributed.communication import group_device, group_rank, group_size, start_all_gather, start_all_reduce
from race_dist.distributed.watchdog import format_ranks

_DIGEST_BYTES = 32
_TEXT_BYTES = 4096
_MAX_LISTED = 4  # ranks that an error lists one by one


def check_same_on_all_ranks(facts: Mapping[str, object], group: ProcessGroup | None, *, what: str = "this run") -> None:
    """Raise on every rank, in the same words, unless all ranks of the group hold the same facts.

        check_same_on_all_ranks({"planes": digest, "config": digest, "code": version}, group)

    Args:
        facts: names and values (digests, versions, shapes), compared as text; the names are the same on every rank.
        group: the ranks to compare; None is one rank.
        what: what is compared, for the error.

    Raises:
        ValueError: the ranks differ; the message names the ranks and the facts.
    """
    checks.mapping("facts", facts)
    if group_size(group) > 1:
        assert group is not None
        _compare({k: str(v) for k, v in facts.items()}, group, group_device(group), what, length=0)


_compared: set[tuple[str, ...]] = set()  # (group, call, facts) that a CUDA group has compared already


def check_same_call(
    op: str,
    facts: Mapping[str, object],
    group: ProcessGroup,
    device: torch.device,
    *,
    length: int = 0,
    need_lengths: bool = False,
) -> Tensor | None:
    """Check that every rank of ``group`` makes the same call, before any data moves.

    On the CPU the ranks compare a header of fixed size at each call. On CUDA that would synchronize with the device, so they
    compare once per new set of facts; a mismatch in a later call ends in the group's timeout.

    Args:
        op: name of the call.
        facts: values that must be the same on every rank.
        group: the ranks, more than one.
        device: of the data.
        length: this rank's number of rows; may differ between ranks.
        need_lengths: on CUDA, exchange ``length`` too (on the CPU it travels in the header).

    Returns:
        ``[W]`` int64, the ranks' lengths, on ``device``; None on CUDA without ``need_lengths``.

    Raises:
        ValueError: the ranks' calls differ; the message names the ranks and what differs.
    """
    key = (group.group_name, op, *map(str, facts.values()))
    if device.type == "cpu" or key not in _compared:
        text = {"call": op, **{k: str(v) for k, v in facts.items()}}
        lengths = _compare(text, group, device, f"{op} over the ranks {dist.get_process_group_ranks(group)}", length)
        if device.type == "cpu":
            return lengths
        _compared.add(key)
    if not need_lengths:
        return None
    return start_all_gather(torch.full((1,), length, device=device), group).wait().view(-1)


def all_gather_lengths(
    length: int, group: ProcessGroup, device: torch.device | str | None, op: str, facts: Mapping[str, object]
) -> Tensor:
    """``[W]`` int64: the number of rows on each rank, on the group's own device."""
    target = torch.device(device) if device is not None else torch.device("cpu")
    if target.type not in _backends(group):
        target = group_device(group)
    lengths = check_same_call(op, facts, group, target, length=length, need_lengths=True)
    assert lengths is not None
    return lengths


def _backends(group: ProcessGroup) -> set[str]:
    return {device.type for device in group._device_types}


def _digest(text: Mapping[str, str]) -> bytes:
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).digest()


def _compare(text: dict[str, str], group: ProcessGroup, device: torch.device, what: str, length: int) -> Tensor:
    """All-gather (digest, length); where digests differ, all-gather the texts and raise."""
    header = _digest(text) + length.to_bytes(8, "little")
    headers = start_all_gather(torch.frombuffer(bytearray(header), dtype=torch.uint8).to(device), group).wait()
    if (headers[:, :_DIGEST_BYTES] == headers[:1, :_DIGEST_BYTES]).all():
        return headers[:, _DIGEST_BYTES:].contiguous().view(torch.int64).view(-1)
    body = json.dumps(text, sort_keys=True).encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES)
    bodies = start_all_gather(torch.frombuffer(bytearray(body), dtype=torch.uint8).to(device), group).wait().cpu()
    texts = [_parse(bytes(row.numpy().tobytes())) for row in bodies]
    raise ValueError(_difference(texts, group, what))


def _parse(body: bytes) -> dict[str, str]:
    try:
        return dict(json.loads(body))
    except ValueError:  # longer than what is exchanged
        return {"facts": body.decode(errors="replace").strip()}


def _difference(texts: list[dict[str, str]], group: ProcessGroup, what: str) -> str:
    """One sentence: for each fact that differs, the ranks that differ from the most common value."""
    ranks = dist.get_process_group_ranks(group)
    parts = []
    for name in sorted({name for text in texts for name in text}):
        values = [text.get(name, "(absent)") for text in texts]
        common = max(values, key=lambda value: (values.count(value), value == values[0]))
        differing = [(ranks[i], value) for i, value in enumerate(values) if value != common]
        if differing:
            majority = [ranks[i] for i, value in enumerate(values) if value == common]
            usual = format_ranks(majority) if len(majority) <= _MAX_LISTED else f"{len(majority)} ranks"
            parts.append(
                f"{name} is {common} on {usual}, but "
                + ", ".join(f"{value} on rank {rank}" for rank, value in differing[:_MAX_LISTED])
                + (f" and so on for {len(differing)} ranks" if len(differing) > _MAX_LISTED else "")
            )
    return (
        f"the ranks do not agree on {what} (this is rank {ranks[group_rank(group)]}): "
        + "; ".join(parts)
        + ". Every rank must make the same call with the same settings."
    )


def min_over_ranks(value: int, group: ProcessGroup | None) -> int:
    """The minimum of the ranks' integers, the same on every rank; on the CPU where the group has a CPU backend."""
    return -max_over_ranks([-value], group)[0]


def max_over_ranks(values: list[int], group: ProcessGroup | None) -> list[int]:
    """The elementwise maximum of the ranks' integers; on the CPU where the group has a CPU backend."""
    if group_size(group) == 1:
        return values
    assert group is not None
    local = torch.tensor(values, dtype=torch.int64, device=group_device(group))
    return [int(v) for v in start_all_reduce(local, group, op="max").wait()]
