"""The description of a job: one typed configuration for all launchers, read from a template or a file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from race_dist.config_loader import ConfigLoader, NamedFiles, read_toml
from race_dist.launch.environment import EnvironmentReference, is_secret, no_secret, one_line, read_environment
from race_dist.strict_config import SIZE_LIMIT, TIMEOUT_LIMIT, StrictConfig

TEMPLATES = NamedFiles(Path(__file__).with_name("templates"), hidden=("fabrics",))
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_LONGEST = 3650 * _DAY
_OWN_DIRECTIVES = {  # written by the job itself, and the key that sets them
    "job-name": "set name",
    "nodes": "set nodes",
    "ntasks-per-node": "set ranks_per_node",
    "time": "set time",
    "signal": "set slurm.signal and stop_before",
    "output": "set logs",
    "open-mode": "its logs are appended to",
    "requeue": "set requeues",
    "no-requeue": "set requeues = 0",
}


def parse_time(value: object) -> int:
    """Seconds of ``"90m"``, ``"24h"``, ``"7d"``, ``"MM"``, ``"HH:MM:SS"`` or ``"D-HH:MM:SS"`` (Slurm's forms).

    Raises:
        ValueError: the text has another form, or the time is not positive.
    """
    text = str(value).strip()
    if match := re.fullmatch(r"([0-9]{1,9})([smhd])", text):
        seconds = int(match[1]) * {"s": 1, "m": _MINUTE, "h": _HOUR, "d": _DAY}[match[2]]
    elif match := re.fullmatch(r"(?:([0-9]{1,9})-)?([0-9]{1,9}):([0-9]{2})(?::([0-9]{2}))?", text):
        days, first, second, third = (int(part or 0) for part in match.groups())
        if match[1] is None and match[4] is None:
            seconds = first * _MINUTE + second  # Slurm reads M:S here and H:M after days
        else:
            seconds = days * _DAY + first * _HOUR + second * _MINUTE + third
    elif re.fullmatch(r"[0-9]{1,9}", text):
        seconds = int(text) * _MINUTE
    else:
        raise ValueError(f"a time must look like 90m, 24h, 7d, 30 (minutes), 12:00:00 or 1-00:00:00; got {value!r}")
    if seconds < 1:
        raise ValueError(f"a time must be positive; got {value!r}")
    if seconds > _LONGEST:
        raise ValueError(f"a time must be at most 3650d; got {value!r}")
    return seconds


def slurm_time(seconds: int) -> str:
    """``D-HH:MM:SS``, as sbatch reads it, rounded up."""
    minutes = -(-seconds // _MINUTE)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty; leave the key out for its default")
    return text


def _mount(text: str) -> str:
    parts = text.split(":") if "," not in text else []
    if len(parts) not in (2, 3) or not all(p.startswith("/") for p in parts[:2]) or parts[2:] not in ([], ["ro"], ["rw"]):
        raise ValueError(
            f"a mount must be /host/path:/container/path, with :ro or :rw behind it where wanted, without commas; got {text!r}"
        )
    return text


def _inner_path(text: str) -> str:
    if not text.startswith("/") or ":" in text:
        raise ValueError("must be a path inside the container that begins with / and has no colon")
    return text


Seconds = Annotated[int, BeforeValidator(parse_time)]
Text = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(one_line)]  # may be empty
Line = Annotated[Text, AfterValidator(_filled)]
PublicText = Annotated[Text, AfterValidator(no_secret)]  # written to files and printed
PublicLine = Annotated[Line, AfterValidator(no_secret)]
Mount = Annotated[str, AfterValidator(one_line), AfterValidator(_mount)]
InnerPath = Annotated[str, AfterValidator(one_line), AfterValidator(_inner_path)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+:@/=,-]*$")]
Amount = Annotated[str, BeforeValidator(_number_as_text), Field(pattern=r"^[0-9]+(\.[0-9]+)?([kKMGTPE]i?)?$")]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class ContainerConfig(StrictConfig):
    """A container image and its runtime.

    Attributes:
        image: a registry path, an .sqsh or .sif file, or the TOML of an ``edf``.
        runtime: ``"pyxis"`` (srun --container-image), ``"edf"`` (CSCS container engine: srun --environment),
            ``"apptainer"``, ``"podman"`` or ``"docker"``.
        workdir: the working folder inside the container.
    """

    image: PublicLine
    runtime: Literal["pyxis", "edf", "apptainer", "podman", "docker"] = "pyxis"
    workdir: InnerPath | None = None


class SlurmConfig(StrictConfig):
    """Settings for Slurm only.

    Attributes:
        partition, account, qos, constraint, reservation: as sbatch takes them.
        gpu_request: how GPUs are requested: ``--gpus-per-node``, ``--gpus-per-task``, ``--gres=gpu:N`` or not at all.
        exclusive: allocate whole nodes.
        signal: sent to every rank ``stop_before`` seconds before the end of the time limit.
        directives: further ``#SBATCH --KEY=VALUE`` lines; an empty value writes ``--KEY``.
        srun: further options of srun.
    """

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Line | None = None
    reservation: Word | None = None
    gpu_request: Literal["gpus-per-node", "gpus-per-task", "gres", "none"] = "gpus-per-node"
    exclusive: bool = True
    signal: Literal["USR1", "USR2", "TERM"] = "USR2"
    directives: dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], PublicText] = {}
    srun: tuple[PublicLine, ...] = ()

    @field_validator("directives", mode="after")
    @classmethod
    def _check_directives(cls, value: dict[str, str]) -> dict[str, str]:
        own = next((key for key in value if key in _OWN_DIRECTIVES), None)
        if own is not None:
            raise ValueError(f"slurm.directives.{own}: the job writes --{own} itself; {_OWN_DIRECTIVES[own]}")
        return value


class KubernetesConfig(StrictConfig):
    """Settings for Kubernetes only.

    Attributes:
        namespace: of the job's objects.
        queue: a Kueue queue.
        image_pull_policy: of the container.
        gpu_resource: the resource name of the GPU device plugin.
        claims: persistent volume claims and their mount paths, ``{"data": "/data"}``.
        node_selector: labels that the nodes must have.
        shared_memory: size of /dev/shm.
        tolerate: keys of taints to tolerate.
        runs: the folder of all runs inside the pods; it must be in a claim or a mount, because the pod's own disk is deleted.
        host_network: use the host network (RoCE and InfiniBand without a secondary network).
        resources: further resources per pod, ``{"rdma/ib": "8"}``.
        grace: seconds between SIGTERM and SIGKILL, in which the run saves.
    """

    namespace: Word = "default"
    queue: Word | None = None
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    gpu_resource: Word = "nvidia.com/gpu"
    claims: dict[Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")], InnerPath] = {}
    node_selector: dict[Word, Text] = {}
    shared_memory: Amount = "16Gi"
    tolerate: tuple[Word, ...] = ("nvidia.com/gpu",)
    runs: InnerPath = "/runs"
    host_network: bool = False
    resources: dict[Word, Amount] = {}
    grace: Seconds = 300


class JobConfig(StrictConfig):
    """One job: its nodes, ranks, time limit, software and network.

    Attributes:
        name: of the job; the default is the run's.
        nodes: number of machines.
        min_nodes: torchrun continues with this many nodes if others are lost; None waits for all nodes.
        ranks_per_node: processes per node, one per GPU.
        device: ``"cuda"`` or ``"cpu"``. The default is the configuration's; if that is "auto", ``"cuda"``, or under
            ``launch local`` what this machine has.
        cpus_per_rank: cores per rank; None leaves it to the launcher.
        memory: per node, ``"200G"``; None requests none, ``"0"`` requests all of it under Slurm.
        time: the time limit.
        stop_before: how long before the time limit the run is signaled to save, stop and be requeued.
        restarts: how often failed ranks are restarted in place before the job is requeued.
        requeues: how often the job is requeued in total.
        timeout: seconds that a collective waits for a rank before the run fails and restarts; None: as the run configures.
        numa: bind each rank to the cores near its GPU.
        venv: a virtual environment to run in; None is this one. Not together with ``container``.
        container: a container to run in.
        mounts: folders for the container, ``/host:/container[:ro]``.
        fabric: a profile of ``templates/fabrics.toml``, or ``"none"``.
        env: further environment variables, which override those of the fabric. Secrets (by name, ``WANDB_API_KEY``) are
            passed by reference and never written to a file; so is ``{ from_env = "NAME" }`` or, in Kubernetes,
            ``{ secret = "NAME", key = "KEY" }``.
        cache: a folder on each node's local disk for compiled kernels.
        preflight: check the machines before training.
        logs: a folder for the launcher's logs; None is ``.jobs/NAME`` beside the run's folder.
        tested: how far this template was tested; printed by ``race-dist launch templates``.
        slurm, kubernetes: settings for only one of them.
    """

    name: Word | None = None
    nodes: int = Field(1, ge=1, le=10**6)
    min_nodes: int | None = Field(None, ge=1, le=SIZE_LIMIT)
    ranks_per_node: int = Field(1, ge=1, le=2**16)
    device: Literal["cuda", "cpu"] = "cuda"
    cpus_per_rank: int | None = Field(None, ge=1, le=2**16)
    memory: Amount | None = None
    time: Seconds = 24 * _HOUR
    stop_before: Seconds = 180
    restarts: int = Field(3, ge=0, le=SIZE_LIMIT)
    requeues: int = Field(100, ge=0, le=SIZE_LIMIT)
    timeout: float | None = Field(None, gt=0, le=TIMEOUT_LIMIT)
    numa: bool = True
    venv: Line | None = None
    container: ContainerConfig | None = None
    mounts: tuple[Mount, ...] = ()
    fabric: Word = "none"
    env: dict[EnvironmentName, str | EnvironmentReference] = {}
    cache: Line | None = "/tmp/race-dist-cache"
    preflight: bool = False
    logs: Line | None = None
    tested: str = ""
    slurm: SlurmConfig = SlurmConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()

    @field_validator("env", mode="before")
    @classmethod
    def _read_environment(cls, value: object) -> object:
        return read_environment(value)

    @model_validator(mode="after")
    def _check(self) -> JobConfig:
        if self.venv is not None and self.container is not None:
            raise ValueError("venv and container are both given; a job runs in one of them")
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes is {self.min_nodes}, more than nodes = {self.nodes}")
        if self.stop_before >= self.time:
            raise ValueError(f"stop_before is {self.stop_before} s, which leaves nothing of the time limit of {self.time} s")
        if self.mounts and self.container is None:
            raise ValueError("mounts are for a container, and there is none; give container.image or leave them out")
        fabric(self.fabric)
        return self

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.nodes * self.ranks_per_node

    def environment(self) -> dict[str, str]:
        """Environment variables of every rank that may be written to files: our defaults, the fabric's, the user's; later ones
        override earlier ones. Variables of :meth:`references` are not included."""
        defaults = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        if self.device == "cuda":
            defaults |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if self.cpus_per_rank is not None:
            defaults["OMP_NUM_THREADS"] = str(self.cpus_per_rank)
        if self.cache is not None:
            defaults["RACE_DIST_CACHE"] = self.cache
        if self.numa and self.device == "cuda":
            defaults["RACE_DIST_NUMA"] = "1"
        merged, references = {**defaults, **fabric(self.fabric), **self.env}, self.references()
        return {name: value for name, value in merged.items() if name not in references and isinstance(value, str)}

    def references(self) -> dict[str, EnvironmentReference]:
        """Variables that are passed by reference: those given as references, and all secrets."""
        references = {}
        for name, value in self.env.items():
            if isinstance(value, EnvironmentReference):
                references[name] = value
            elif is_secret(name, value):
                references[name] = EnvironmentReference(from_env=name)
        return references

    def secrets(self, environment: Mapping[str, str]) -> dict[str, str]:
        """The values of :meth:`references` for the launcher's environment: secrets given in ``env`` itself, and those taken
        from ``environment``.

        Raises:
            ValueError: a referenced variable is not set in ``environment``.
        """
        values = {}
        for name, reference in self.references().items():
            given = self.env[name]
            if isinstance(given, str):
                values[name] = given
            elif reference.from_env is not None:
                if reference.from_env not in environment:
                    raise ValueError(
                        f"env.{name} is taken from the environment variable {reference.from_env}, which is not set"
                    )
                values[name] = one_line(environment[reference.from_env], f"the environment variable {reference.from_env}")
            else:
                raise ValueError(
                    f"env.{name} is in a Secret of Kubernetes, which only race-dist launch kubernetes can read; "
                    f'give env.{name} = {{ from_env = "NAME" }}'
                )
        return values


def template_names() -> list[str]:
    """The templates that come with the package."""
    return TEMPLATES.names()


def fabric(name: str) -> dict[str, str]:
    """The environment variables of a fabric profile. ValueError if there is no profile of that name."""
    if name == "none":
        return {}
    profiles = read_toml(TEMPLATES.folder / "fabrics.toml")
    if name not in profiles:
        raise ValueError(f"fabric {name!r} is not known; known are none, {', '.join(sorted(profiles))}")
    return {k: str(v) for k, v in profiles[name]["env"].items()}


def load_job(source: str | Path | None, changes: Iterable[str] = ()) -> JobConfig:
    """Read the description of a job and apply changes ``"a.b=value"``, whose values are TOML (a bare word is a string).

    Args:
        source: a TOML file, the name of a template, or None for the defaults.
        changes: of single keys.

    Raises:
        ValueError: a name, a key or a value is wrong; one sentence that names it.
        FileNotFoundError: there is no such file.
    """
    path = None if source is None else TEMPLATES.find(str(source)) or Path(source)
    if path is not None and not path.is_file():
        near = difflib.get_close_matches(str(source), template_names(), n=1)
        raise FileNotFoundError(
            f"there is no job description {source}: give a TOML file or one of the templates "
            f"{', '.join(template_names())}" + (f" (did you mean {near[0]}?)" if near else "")
        )
    loader = ConfigLoader(JobConfig, "--set", "key=value, for example nodes=4 or slurm.account=abc")
    return loader.load(path, changes, source="the job's description" if source is None else str(source))
