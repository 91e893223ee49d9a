"""What a training run is made of: TrainConfig, read from TOML, with overrides from the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from race_dist.config_loader import ConfigLoader
from race_dist.files import read_json_object
from race_dist.messages import short_repr
from race_dist.models import ModelConfig
from race_dist.strict_config import (
    COUNT_LIMIT,
    SEED_LIMIT,
    SIZE_LIMIT,
    TIMEOUT_LIMIT,
    NonEmpty,
    StrictConfig,
)
from race_dist.training.data.corpus import BYTE_VOCAB, HeldOut
from race_dist.training.presets import find_config

FLOAT32_LIMIT = 3.4e38  # of numbers that a step multiplies float32 tensors by
MINUTES_LIMIT = 10**7  # 19 years: more than any run
TEMPERATURES = (1e-4, 1e4)  # between which sampling divides logits without overflow; 0 takes the likeliest


class DataConfig(StrictConfig):
    """Which text is read and how it is cut.

    Attributes:
        path: ``"python-stdlib"`` (the source of the running Python's standard library: nothing to download), a text
            file, or a folder, whose files are read in the order of their paths.
        pattern: which files of a folder are read, by name.
        documents: ``"joined"`` (the whole text is one document, read in windows) or ``"separate"`` (files, or the documents
            of a packed corpus, never see each other, also where a window holds several).
        held_out: what is measured and not trained on: ``"blocks"`` (every tenth block of 256 Ki tokens), ``"documents"``
            (every tenth) or ``"tail"`` (the last tenth: the rest stays one piece).
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
    """AdamW and its learning rate: a linear warm-up to ``lr``, then a cosine down to ``lr * final_lr``.

    Attributes:
        lr: the highest learning rate.
        final_lr: what the last step has left of it, as a fraction.
        warmup_steps: steps to get there.
        planes_lr: the highest learning rate of hyperplanes that are trained (model.race.train_planes); None: ``lr``.
        weight_decay: applied to the matrices of linear maps only.
        beta1, beta2, eps: of AdamW.
        clip: largest norm of the gradient, over the whole mesh; 0 turns clipping off.
        accumulate: parts in which a rank works through its rows of a batch, one after the other; the gradients add up.
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
    """How the ranks share the work. One of the two left out takes what the other leaves; both left out: all to ``sp``.

    Attributes:
        dp: groups of ranks, each with its share of the batch.
        sp: ranks of a group, each with its shard of every sequence.
        tp: ranks that share every layer's heads (engine = "megatron" only): each place of dp x sp has that many.
        layout: order of the shards, ``"contiguous"`` or ``"zigzag"``.
        sharding: ``"none"`` (every rank holds all parameters) or ``"fsdp"`` (parameters, gradients and optimizer states are
            divided over all ranks).
        timeout: seconds after which a collective that a rank has not come to fails, naming that rank.
    """

    dp: int | None = Field(None, ge=1, le=SIZE_LIMIT)
    sp: int | None = Field(None, ge=1, le=SIZE_LIMIT)
    tp: int = Field(1, ge=1, le=SIZE_LIMIT)
    layout: Literal["contiguous", "zigzag"] = "contiguous"
    sharding: Literal["none", "fsdp"] = "none"
    timeout: float = Field(600.0, gt=0, le=TIMEOUT_LIMIT)

    def mesh(self, world_size: int) -> tuple[int, int]:
        """``(dp, sp)`` for that many ranks. Raises ValueError where they (and tp) do not multiply to it."""
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
    """Sequences of any length in chunks, with exact gradients: only one chunk's activations exist at a time.

    Attributes:
        chunk_size: tokens of each row that a rank works on at a time; 0: sequences are not streamed.
        keep: where the states at the chunks' starts wait: ``"device"``, ``"host"``, or ``"subtract"`` (recovered; no decay).
        minutes: between two times of storing a step under way, if checkpoints are on; 0: never.
    """

    chunk_size: int = Field(0, ge=0, le=COUNT_LIMIT)
    keep: Literal["device", "host", "subtract"] = "device"
    minutes: float = Field(10.0, ge=0, le=MINUTES_LIMIT)


class EvalConfig(StrictConfig):
    """Measuring on the held-out text.

    Attributes:
        every: steps between two measurements; the last step is always measured.
        tokens: how much of the held-out text is read each time, at most.
    """

    every: int = Field(100, ge=1, le=COUNT_LIMIT)
    tokens: int = Field(2**17, ge=1, le=COUNT_LIMIT)


class CheckpointConfig(StrictConfig):
    """What is saved, so that a run goes on where it was stopped or has crashed.

    Attributes:
        every: steps between two checkpoints; 0: by time alone.
        minutes: the same in minutes; 0: by steps alone. The end of a run is always saved, unless both are 0.
        keep: how many of the newest stay.
        keep_every: older ones whose step is a multiple of it stay too; 0: none.
    """

    every: int = Field(0, ge=0, le=COUNT_LIMIT)
    minutes: float = Field(10.0, ge=0, le=MINUTES_LIMIT)
    keep: int = Field(3, ge=1, le=COUNT_LIMIT)
    keep_every: int = Field(0, ge=0, le=COUNT_LIMIT)

    @property
    def on(self) -> bool:
        """Whether anything is saved."""
        return bool(self.every or self.minutes)


class GuardConfig(StrictConfig):
    """What is done about steps that go wrong. A loss or gradient that is no number is never stepped on.

    Attributes:
        loss_spike: a step whose loss is more than this many times the median of the last ones is skipped; 0: off.
        norm_spike: the same for the gradient's norm, before it is clipped; 0: off.
        norm_alarm: the same, but it is only said; 0: off.
        window: how many steps the median is taken of.
        skips: steps in a row that may be skipped; after that the run goes back to its last checkpoint and on with other
            data.
        rollbacks: how often it may, before it ends with an error.
    """

    loss_spike: float = Field(3.0, ge=0, le=FLOAT32_LIMIT)
    norm_spike: float = Field(0.0, ge=0, le=FLOAT32_LIMIT)
    norm_alarm: float = Field(10.0, ge=0, le=FLOAT32_LIMIT)
    window: int = Field(100, ge=10, le=10**6)
    skips: int = Field(3, ge=0, le=COUNT_LIMIT)
    rollbacks: int = Field(3, ge=0, le=COUNT_LIMIT)


class SampleConfig(StrictConfig):
    """The text written when training ends.

    Attributes:
        prompt: what it goes on from; left out: a few words of the held-out text.
        tokens: how many bytes it gets; 0 writes none.
        temperature: 0 always takes the likeliest byte.
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
        name: of the run: its files go to ``runs/NAME``.
        runs: the folder of all runs.
        steps: optimizer steps.
        seed: of the weights, the planes, the batches and the sample (model.seed and model.race.seed may differ).
        init: weights to begin with: a safetensors file, or the folder of a run; None: drawn from the seed.
        precision: ``"float32"``, ``"bfloat16"`` (autocast; weights stay float32) or ``"float64"``.
        device: ``"auto"`` (one GPU per rank where there are GPUs), ``"cpu"`` or ``"cuda"``.
        compile: compile the model's blocks with torch.compile.
        log_every: steps between two lines of metrics.
        tensorboard: write the metrics for TensorBoard too, to ``runs/NAME/tensorboard``.
        engine: who holds parameters and makes the optimizer's step: ``"native"``, ``"deepspeed"`` or ``"megatron"`` (whose
            model, optimizer and checkpoints are megatron-core's: docs/megatron.md).
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
        """Tokens are bytes unless the model says otherwise, and one seed is enough: what is left out is filled in."""
        model = values.get("model") if isinstance(values, Mapping) else None
        if not isinstance(model, Mapping):
            return values
        given = values.get("seed")
        seed = {"seed": given} if type(given) is int and 0 <= given <= SEED_LIMIT else {}  # a wrong one is told once
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
        if "R" in self.model.layer_kinds and not self.model.race.causal:
            raise ValueError("model.race.causal must be true: a language model reads only what came before; got false")
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
                "steps; lower it or raise steps"
            )
        if self.stream.chunk_size:
            self._check_streamed()
        return self

    def _check_planes_rate(self) -> None:
        if self.engine != "native":
            raise ValueError(f'optim.planes_lr needs engine = "native"; it is "{self.engine}": leave it out')
        if not (self.model.race.train_planes and "R" in self.model.layer_kinds):
            raise ValueError(
                f"optim.planes_lr is {self.optim.planes_lr}, but no layer trains its planes: set "
                "model.race.train_planes = true or leave it out"
            )

    def _check_streamed(self) -> None:
        if self.engine != "native":
            raise ValueError(f'stream.chunk_size needs engine = "native"; it is "{self.engine}"')
        if "S" in self.model.layer_kinds:
            raise ValueError(
                f"stream.chunk_size does not go with the full-softmax layers of model.layer_pattern = "
                f"{self.model.layer_pattern!r}: they carry every key and value so far; use R and W"
            )
        if self.parallel.layout == "zigzag":
            raise ValueError('stream.chunk_size shares each chunk out in order: leave parallel.layout = "contiguous"')
        if self.stream.keep == "subtract" and "R" in self.model.layer_kinds and self.model.race.decay != "none":
            raise ValueError(
                f'stream.keep = "subtract" needs model.race.decay = "none", but it is '
                f'"{self.model.race.decay}": what has decayed cannot be brought back; use "host"'
            )
        if self.stream.keep == "subtract" and self.data.documents == "separate":
            raise ValueError(
                'stream.keep = "subtract" does not go with data.documents = "separate": nothing of the state '
                'before a document is left to subtract from; use "host"'
            )

    @property
    def directory(self) -> Path:
        """Where the run's files go."""
        return Path(self.runs) / self.name

    def to_json(self) -> str:
        """Everything, defaults and what the model fills into its layers included: :func:`parse_config` reads it back."""
        return self.model_dump_json(indent=2) + "\n"


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a TOML file, or the preset of that name (``demo``), and apply overrides ``"a.b=value"``, whose values are TOML too
    (a bare word is a string).

    Raises:
        ValueError: the file is not TOML, an override has no ``=``, a key is unknown (the nearest known one is named)
            or a value is out of its range; one sentence that names the file and the key.
        FileNotFoundError: there is no such file and no such preset.
    """
    path = find_config(path)
    return ConfigLoader(TrainConfig, "--override", "a.b=value, for example optim.lr=3e-4").load(path, overrides)


def parse_config(tree: Mapping[str, Any], *, source: str = "the configuration") -> TrainConfig:
    """Check a configuration already read. Raises ValueError as :func:`load_config` does."""
    return TrainConfig.check(tree, source=source)


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys ``a.b.c`` that two configurations (as trees) both have, with different values."""
    keys = []
    for key in one:
        a, b = one[key], other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif key in other and a != b:
            keys.append(prefix + key)
    return keys
