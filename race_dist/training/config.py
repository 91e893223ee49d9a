"""The configuration of a training run: TrainConfig, read from TOML with overrides from the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from race_dist.config_loader import ConfigLoader
from race_dist.files import read_json_object
from race_dist.messages import short_repr
from race_dist.models import ModelConfig
from race_dist.nn import kinds_in, streamable_letters
from race_dist.strict_config import (
    COUNT_LIMIT,
    SEED_LIMIT,
    SIZE_LIMIT,
    TIMEOUT_LIMIT,
    NonEmpty,
    StrictConfig,
)
from race_dist.training.data.splits import BYTE_VOCAB, HeldOut
from race_dist.training.presets import find_config

FLOAT32_LIMIT = 3.4e38  # of factors that multiply float32 tensors
MINUTES_LIMIT = 10**7  # 19 years
TEMPERATURES = (1e-4, 1e4)  # the range in which logits / temperature does not overflow; 0 is greedy sampling


class DataConfig(StrictConfig):
    """The text to train on, and how it is split.

    Attributes:
        path: ``"python-stdlib"`` (the source of the running Python's standard library: nothing to download), a text
            file, a packed corpus, or a folder, whose files are read in the order of their paths.
        pattern: of the names of the files that are read from a folder.
        documents: ``"joined"`` (the text is one document, read in windows) or ``"separate"`` (files, or the documents of a
            packed corpus, do not attend to each other, even within one window).
        held_out: which part is used for evaluation only: ``"blocks"`` (every tenth block of 256 Ki tokens), ``"documents"``
            (every tenth document) or ``"tail"`` (the last tenth, so that the training text stays contiguous).
        context: tokens per training sequence.
        batch_size: sequences per step, over all ranks together.
    """

    path: NonEmpty = "python-stdlib"
    pattern: NonEmpty = "*"
    documents: Literal["joined", "separate"] = "joined"
    held_out: HeldOut = "blocks"
    context: int = Field(1024, ge=1, le=COUNT_LIMIT)
    batch_size: int = Field(8, ge=1, le=SIZE_LIMIT)


class OptimConfig(StrictConfig):
    """AdamW and its learning rate schedule: linear warm-up to ``lr``, then cosine decay to ``lr * final_lr``.

    Attributes:
        lr: the peak learning rate.
        final_lr: the learning rate of the last step, as a fraction of ``lr``.
        warmup_steps: steps of the warm-up.
        planes_lr: the peak learning rate of trained hyperplanes (model.race.train_planes); None: ``lr``.
        weight_decay: applied to the matrices of linear layers only.
        beta1, beta2, eps: of AdamW.
        clip: the norm to which the global gradient is clipped; 0 turns clipping off.
        accumulate: gradient accumulation: number of micro-batches into which a rank splits its rows of a batch.
    """

    lr: float = Field(1e-3, ge=1e-38, le=1e30)
    planes_lr: float | None = Field(None, ge=1e-38, le=1e30)
    final_lr: float = Field(0.1, ge=0, le=1)
    warmup_steps: int = Field(100, ge=0, le=COUNT_LIMIT)
    weight_decay: float = Field(0.1, ge=0, le=1000)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, ge=1e-38, le=1)
    clip: float = Field(1.0, ge=0, le=FLOAT32_LIMIT)
    accumulate: int = Field(1, ge=1, le=SIZE_LIMIT)


class ParallelConfig(StrictConfig):
    """The mesh of ranks. If one of ``dp`` and ``sp`` is left out, it is inferred; if both are, all ranks go to ``sp``.

    Attributes:
        dp: data parallelism: number of groups of ranks, each with its rows of the batch.
        sp: context parallelism: number of ranks in a group, each with its shard of every sequence (Megatron-LM's "sequence
            parallelism" is something else).
        tp: tensor parallelism: number of ranks that share every layer's heads (engine = "megatron" only).
        layout: how a sequence is sharded, ``"contiguous"`` or ``"zigzag"``.
        sharding: ``"none"`` (every rank holds all parameters) or ``"fsdp"`` (FSDP2: parameters, gradients and optimizer states
            are sharded over all ranks).
        timeout: seconds after which a collective fails that a rank has not joined; the error names the rank.
    """

    dp: int | None = Field(None, ge=1, le=SIZE_LIMIT)
    sp: int | None = Field(None, ge=1, le=SIZE_LIMIT)
    tp: int = Field(1, ge=1, le=SIZE_LIMIT)
    layout: Literal["contiguous", "zigzag"] = "contiguous"
    sharding: Literal["none", "fsdp"] = "none"
    timeout: float = Field(600.0, gt=0, le=TIMEOUT_LIMIT)

    def mesh(self, world_size: int) -> tuple[int, int]:
        """``(dp, sp)`` for that many ranks. Raises ValueError unless ``dp * sp * tp`` is their number."""
        started, tp = world_size, self.tp
        if started % tp:
            raise ValueError(
                f"parallel.tp = {tp} does not divide the {started} ranks that were started; start a multiple of "
                f"{tp} or change parallel.tp"
            )
        world_size //= tp
        if self.dp is not None and self.sp is not None:
            dp, sp = self.dp, self.sp
        elif self.dp is not None:
            dp, sp = self.dp, max(1, world_size // self.dp)
        else:
            sp = self.sp or world_size
            dp = max(1, world_size // sp)
        if dp * sp != world_size:
            needed = dp * sp * tp
            raise ValueError(
                f"parallel.dp = {dp} times parallel.sp = {sp}{f' times parallel.tp = {tp}' if tp > 1 else ''} "
                f"makes {needed} ranks, but {started} {'was' if started == 1 else 'were'} started; start {needed} "
                f"(race-dist train ... --nproc {needed}) or change parallel.dp or parallel.sp"
            )
        return dp, sp


class StreamConfig(StrictConfig):
    """Streamed training: sequences of any length in chunks, with exact gradients and the activations of one chunk at a time.

    Attributes:
        chunk_size: tokens of each row in one chunk of a rank; 0: sequences are not streamed.
        keep: where the state at the start of each chunk is kept for the backward pass: ``"device"``, ``"host"``, or
            ``"subtract"`` (not kept but recomputed by subtraction; without decay only).
        minutes: between two times that a step in progress is stored, if checkpoints are on; 0: never.
    """

    chunk_size: int = Field(0, ge=0, le=COUNT_LIMIT)
    keep: Literal["device", "host", "subtract"] = "device"
    minutes: float = Field(10.0, ge=0, le=MINUTES_LIMIT)


class EvalConfig(StrictConfig):
    """Evaluation on the held-out text.

    Attributes:
        every: steps between two evaluations; there is always one after the last step.
        tokens: largest number of held-out tokens per evaluation.
    """

    every: int = Field(100, ge=1, le=COUNT_LIMIT)
    tokens: int = Field(2**17, ge=1, le=COUNT_LIMIT)


class CheckpointConfig(StrictConfig):
    """Checkpoints, from which a run resumes after a stop or a crash.

    Attributes:
        every: steps between two checkpoints; 0: by time alone.
        minutes: minutes between two checkpoints; 0: by steps alone. The last step is always saved, unless both are 0.
        keep: how many of the newest checkpoints to keep.
        keep_every: older checkpoints whose step is a multiple of it are kept too; 0: none.
    """

    every: int = Field(0, ge=0, le=COUNT_LIMIT)
    minutes: float = Field(10.0, ge=0, le=MINUTES_LIMIT)
    keep: int = Field(3, ge=1, le=COUNT_LIMIT)
    keep_every: int = Field(0, ge=0, le=COUNT_LIMIT)

    @property
    def on(self) -> bool:
        """Whether checkpoints are written."""
        return bool(self.every or self.minutes)


class GuardConfig(StrictConfig):
    """The guard against bad steps. A step with a NaN or Inf loss or gradient is always skipped.

    Attributes:
        loss_spike: skip a step whose loss is more than this many times the median of the last steps; 0: off.
        norm_spike: the same for the gradient's norm, before clipping; 0: off.
        norm_alarm: the same, but the step is only reported; 0: off.
        window: number of steps for the median.
        skips: bad steps in a row that may be skipped; after more, the run rolls back to its last checkpoint and continues with
            other data.
        rollbacks: number of rollbacks before the run ends with an error.
    """

    loss_spike: float = Field(3.0, ge=0, le=FLOAT32_LIMIT)
    norm_spike: float = Field(0.0, ge=0, le=FLOAT32_LIMIT)
    norm_alarm: float = Field(10.0, ge=0, le=FLOAT32_LIMIT)
    window: int = Field(100, ge=10, le=10**6)
    skips: int = Field(3, ge=0, le=COUNT_LIMIT)
    rollbacks: int = Field(3, ge=0, le=COUNT_LIMIT)


class SampleConfig(StrictConfig):
    """The text that is generated when training ends.

    Attributes:
        prompt: its beginning; None: a few words of the held-out text.
        tokens: number of tokens; 0: no sample.
        temperature: 0 is greedy sampling.
    """

    prompt: NonEmpty | None = None
    tokens: int = Field(400, ge=0, le=COUNT_LIMIT)
    temperature: float = Field(0.8, ge=0, le=TEMPERATURES[1])

    @field_validator("temperature")
    @classmethod
    def _temperature(cls, value: float) -> float:
        if 0 < value < TEMPERATURES[0]:
            raise ValueError(f"must be 0 or at least {TEMPERATURES[0]:g}")
        return value


class TrainConfig(StrictConfig):
    """One training run.

    Attributes:
        name: of the run; its files go to ``runs/NAME``.
        runs: the folder of all runs.
        steps: number of optimizer steps.
        seed: of the weights, the planes, the batches and the sample (model.seed and model.race.seed may differ).
        init: initial weights: a safetensors file, or the folder of a run; None: random, from the seed.
        precision: ``"float32"``, ``"bfloat16"`` (autocast; weights stay float32) or ``"float64"``.
        device: ``"auto"`` (one GPU per rank if there are GPUs), ``"cpu"`` or ``"cuda"``.
        compile: compile the model's blocks with torch.compile.
        log_every: steps between two lines of metrics.
        tensorboard: also write the metrics for TensorBoard, to ``runs/NAME/tensorboard``.
        engine: what holds the parameters and makes the optimizer step: ``"native"``, ``"deepspeed"`` or ``"megatron"`` (model,
            optimizer and checkpoints of megatron-core: docs/megatron.md).
        deepspeed: the DeepSpeed configuration of that engine: a table of DeepSpeed's own keys, or the path of a JSON file,
            whose content is then stored with the run.
    """

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs: NonEmpty = "runs"
    steps: int = Field(1000, ge=1, le=COUNT_LIMIT)
    seed: int = Field(0, ge=0, le=SEED_LIMIT)
    init: NonEmpty | None = None
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    log_every: int = Field(10, ge=1, le=COUNT_LIMIT)
    tensorboard: bool = False
    engine: Literal["native", "deepspeed", "megatron"] = "native"
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    model: ModelConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    stream: StreamConfig = StreamConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_model(cls, values: Any) -> Any:
        """Fill in defaults: tokens are bytes unless the model says otherwise, and all seeds are the run's seed."""
        model = values.get("model") if isinstance(values, Mapping) else None
        if not isinstance(model, Mapping):
            return values
        given = values.get("seed")
        seed = {"seed": given} if type(given) is int and 0 <= given <= SEED_LIMIT else {}  # a wrong seed is reported once
        filled = {"vocab_size": BYTE_VOCAB, **seed, **model}
        if isinstance(filled.get("race", {}), Mapping):
            filled["race"] = {**seed, **filled.get("race", {})}
        return {**values, "model": filled}

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read_deepspeed(cls, value: Any) -> Any:
        for key in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler") if isinstance(value, Mapping) else ():
            if not isinstance(value.get(key, {}), Mapping):
                raise ValueError(f"deepspeed.{key} must be a table; got {short_repr(value[key])}")
        if not isinstance(value, str):
            return value
        try:
            return read_json_object(find_config(value, ".json"))
        except (OSError, ValueError) as error:
            raise ValueError(f"deepspeed = {value!r} is the path of no DeepSpeed configuration: {error}") from None

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        for kind in kinds_in(self.model.layer_kinds):
            if kind.is_causal(self.model) is False:
                raise ValueError(
                    f"model.{kind.options_name}.causal must be true: a language model reads only earlier tokens; got false"
                )
        if self.deepspeed and self.engine != "deepspeed":
            raise ValueError(f'deepspeed is given but engine is "{self.engine}": set engine = "deepspeed" or leave it out')
        if self.engine != "megatron" and self.parallel.tp > 1:
            raise ValueError(
                f'parallel.tp is {self.parallel.tp}, but only engine = "megatron" divides heads over ranks; '
                "make it 1 or choose that engine"
            )
        if self.optim.planes_lr is not None:
            self._check_planes_rate()
        if self.optim.warmup_steps >= self.steps:
            raise ValueError(
                f"optim.warmup_steps is {self.optim.warmup_steps}, which leaves none of the {self.steps} "
                "steps; lower optim.warmup_steps or raise steps"
            )
        if self.stream.chunk_size:
            self._check_streamed()
        return self

    def _check_planes_rate(self) -> None:
        if self.engine != "native":
            raise ValueError(f'optim.planes_lr needs engine = "native"; it is "{self.engine}": leave it out')
        if not (self.model.race.train_planes and any(k.options_name == "race" for k in kinds_in(self.model.layer_kinds))):
            raise ValueError(
                f"optim.planes_lr is {self.optim.planes_lr}, but no layer trains its planes: set "
                "model.race.train_planes = true or leave it out"
            )

    def _check_streamed(self) -> None:
        if self.engine != "native":
            raise ValueError(f'stream.chunk_size needs engine = "native"; it is "{self.engine}"')
        for kind in kinds_in(self.model.layer_kinds):
            if not kind.fixed_size_carry:
                raise ValueError(
                    f"stream.chunk_size does not go with the {kind.adjective} layers of model.layer_pattern = "
                    f"{self.model.layer_pattern!r}: their carry, {kind.carry_text}, grows with the sequence; "
                    f"use {streamable_letters()}"
                )
            reason = kind.why_not_subtracted(self.model, prefix="model.")
            if self.stream.keep == "subtract" and reason is not None:
                raise ValueError(f'stream.keep = "subtract" {reason}; use "host"')
        if self.parallel.layout == "zigzag":
            raise ValueError('stream.chunk_size shards each chunk in order: leave parallel.layout = "contiguous"')
        if self.stream.keep == "subtract" and self.data.documents == "separate":
            raise ValueError(
                'stream.keep = "subtract" does not go with data.documents = "separate": the state before a document '
                'boundary cannot be recomputed by subtraction; use "host"'
            )

    @property
    def directory(self) -> Path:
        """The folder of the run."""
        return Path(self.runs) / self.name

    def to_json(self) -> str:
        """The complete configuration, defaults included; :func:`parse_config` reads it back."""
        return self.model_dump_json(indent=2) + "\n"


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read the configuration of a run.

    Args:
        path: a TOML file, or the name of a preset (``demo``).
        overrides: ``"a.b=value"``; the values are TOML, and a bare word is a string.

    Raises:
        ValueError: as :meth:`race_dist.config_loader.ConfigLoader.load`.
        FileNotFoundError: there is no such file and no such preset.
    """
    path = find_config(path)
    return ConfigLoader(TrainConfig, "--override", "a.b=value, for example optim.lr=3e-4").load(path, overrides)


def parse_config(tree: Mapping[str, Any], *, source: str = "the configuration") -> TrainConfig:
    """Check a configuration that is already parsed. Raises ValueError as :func:`load_config` does."""
    return TrainConfig.check(tree, source=source)


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys ``a.b.c`` that two configurations (as nested mappings) both have, with different values."""
    keys = []
    for key in one:
        a, b = one[key], other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif key in other and a != b:
            keys.append(prefix + key)
    return keys
