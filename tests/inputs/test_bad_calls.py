"""Calls of the public names with invalid values: each is refused with one sentence that names the argument."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.inputs import attention_calls, deepspeed_calls, layer_calls, model_calls, rank_calls, streaming_calls
from tests.inputs.table import Subject, accepted_inputs, check_input, inputs, report

SUBJECTS: list[Subject] = [
    *attention_calls.SUBJECTS,
    *layer_calls.SUBJECTS,
    *model_calls.SUBJECTS,
    *rank_calls.SUBJECTS,
    *streaming_calls.SUBJECTS,
]
if find_spec("deepspeed") is not None:
    SUBJECTS += deepspeed_calls.SUBJECTS
ACCEPTED = accepted_inputs()


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.call)
def test_a_bad_argument_is_named(subject: Subject) -> None:
    faults = [fault for one in inputs(subject) if (fault := check_input(one, ACCEPTED))]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)


@pytest.mark.parametrize("subject", [one for one in SUBJECTS if one.complete], ids=lambda subject: subject.call)
def test_the_valid_call_succeeds(subject: Subject) -> None:
    """Otherwise inputs would be refused for other reasons than the value under test."""
    subject.run(**subject.base())


def test_there_are_many_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nbad calls: {report(SUBJECTS)}")
    assert sum(1 for subject in SUBJECTS for _ in inputs(subject)) >= 1500
