"""The pages describe what the code does: tables and lists are regenerated, and snippets are run."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from typer.testing import CliRunner

from race_dist import RaceConfig, planning, race_attention
from race_dist.cli import app
from race_dist.launch.start import load_job_and_run
from race_dist.models import DecoderLM, ModelConfig
from race_dist.training.config import TrainConfig, load_config
from race_dist.training.config_reference import tables, to_markdown, to_text
from race_dist.training.presets import find_config, preset_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HOME = "https://github.com/race-dist/race-dist/blob/main/"
RAW = "https://raw.githubusercontent.com/race-dist/race-dist/main/"


def page(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(name: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page(name), re.DOTALL)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERM": "dumb"})
    return result.exit_code, result.output


# configuration


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_page_of_keys_is_what_the_command_prints() -> None:
    assert page("docs/configuration.md") == to_markdown(), "run: race-dist config --markdown > docs/configuration.md"
    assert sorted(leaves(TrainConfig)) == sorted(key.name for table in tables() for key in table.keys)


def test_the_command_lists_keys_by_name() -> None:
    code, text = invoke("config")
    assert code == 0
    assert all(f"\n{key} = " in "\n" + text for key in leaves(TrainConfig))
    assert "optim.lr = 0.001\n    a number. The peak learning rate.\n" in text
    code, text = invoke("config", "guard.window", "eval")
    assert (code, re.findall(r"^(\S+) =", text, re.MULTILINE)) == (0, ["eval.every", "eval.tokens", "guard.window"])
    code, text = invoke("config", "optim.learning")
    assert (code, "there is no key 'optim.learning'; did you mean" in text) == (2, True)
    assert "race-dist config" in invoke("train", "--help")[1]
    assert to_text(["model.vocab_size"]).startswith("model.vocab_size = 256\n")


def test_presets_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert preset_names() == sorted(f.stem for f in (ROOT / "configs").glob("*.toml"))
    for name in ("demo", "demo.toml"):
        assert load_config(name) == load_config(ROOT / "configs/demo.toml")
    (tmp_path / "demo.toml").write_text((ROOT / "configs/plan-1m.toml").read_text())
    assert load_config("demo.toml").name == "plan-1m"  # a file of that name counts
    assert load_config("demo").name == "demo"
    assert find_config("deepspeed-zero3", ".json").is_file()
    assert load_job_and_run(Path("demo"), [], None, [])[1].config == ROOT / "configs/demo.toml"  # a job's ranks start elsewhere
    with pytest.raises(FileNotFoundError, match=r"no configuration file dem; give a path, or the name of a preset: demo, "):
        load_config("dem")
    with pytest.raises(FileNotFoundError, match=r"no configuration file elsewhere/demo\.toml"):
        load_config("elsewhere/demo.toml")


# planning


def test_the_planning_page_shows_what_its_command_prints() -> None:
    words = re.search(r"^    race-dist (plan .*)$", page("docs/planning.md"), re.MULTILINE)
    assert words is not None
    arguments = words[1].split()
    arguments[1] = str(ROOT / arguments[1])
    env = {"COLUMNS": "80", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [sys.executable, "-m", "race_dist.cli", *arguments], env=env, capture_output=True, text=True, check=True
    )
    assert blocks("docs/planning.md", "")[0] == done.stdout


def test_the_table_of_plans_is_what_the_planner_says() -> None:
    _, _, section = page("docs/planning.md").partition("## On GH200 96 GB")
    rows = [line for line in section.splitlines() if re.match(r"\| \d+[MB] ", line)]
    assert len(rows) == 32
    assert rows == [planned_row(*(cell.strip() for cell in row.split("|")[1:4])) for row in rows]


def planned_row(size: str, context: str, gpus: str) -> str:
    settings = load_config(ROOT / f"configs/plan-{size.lower()}.toml")
    job = planning.Job.checked(settings.model, planning.parse_count(context), 1, settings.precision, compiled=settings.compile)
    plan = planning.recommend(job, planning.Cluster(planning.find_gpu("gh200"), int(gpus), 0))
    memory, layout = plan.memory, plan.layout
    if not memory.fits:
        missing = f"does not fit ({memory.peak / 2**30:.0f} of {memory.capacity / 2**30:.0f} GiB)"
        return f"| {size} | {context} | {gpus} | {missing} | | | | | | |"
    chunk = layout.chunk_size or -(-job.context // layout.sp)  # not streamed: the whole shard
    cells = [
        size,
        context,
        gpus,
        f"{layout.dp} x {layout.sp}",
        f"{chunk:,}",
        "yes" if layout.checkpointing else "no",
        "fsdp" if layout.sharding == "fsdp" else "replicated",
        f"{memory.peak / 2**30:.0f} GiB",
        seconds(plan.step),
        f"{float(f'{job.context / plan.step:.3g}'):,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def seconds(value: float) -> str:
    """Two digits below a hundred seconds, then three; minutes from ten on, hours from two on."""
    if value < 600:
        return f"{float(f'{value:.2g}'):g} s" if value < 100 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


# links


def test_links_of_the_pages_lead_to_files() -> None:
    for file in PAGES:
        text = file.read_text()
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            for prefix in (HOME, RAW):
                if target.startswith(prefix):
                    assert (ROOT / target.removeprefix(prefix)).exists(), f"{file.name}: {target}"
            if not target.startswith(("http", "mailto:")):
                assert file.name != "README.md", f"README.md is the page of the wheel too: write {HOME}{target}"
                assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_commands_of_the_pages_name_files_that_are_there() -> None:
    for file in PAGES:
        for name in re.findall(r"\bconfigs/[\w.-]+\.(?:toml|json)", file.read_text()):
            assert (ROOT / name).is_file(), f"{file.name}: {name}"


# labels


def test_every_page_that_passes_labels_says_what_they_are() -> None:
    for file in PAGES:
        text = file.read_text()
        if file.name == "transformers.md":  # whose models shift labels inside
            continue
        assert not re.search(r"labels\s*=\s*input_ids(?!\.)|\(input_ids, input_ids\)", text)
        passed = re.search(r"(?:model|streamed_backward|engine)\([^\n]*(?:labels|targets|, y\b)", text)
        if passed and file.name != "megatron.md":  # whose losses are masked otherwise
            assert "torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], 1)" in text, file.name


# defaults of normalization


def test_the_page_of_layers_names_every_default_of_normalization() -> None:
    from race_dist.integrations.core_options import CORE_DEFAULTS
    from race_dist.integrations.transformers.settings import CONVERSION_DEFAULTS, IMPLEMENTATION_DEFAULTS

    section = page("docs/layers.md").partition("default of `normalization`")[2]
    found = dict(re.findall(r"^\| `([^|]*?)`[^|]* \| `\"(\w+)\"` \|", section, re.MULTILINE))
    assert found == {
        "race_attention(...)": inspect.signature(race_attention).parameters["normalization"].default,
        "RaceConfig()": RaceConfig().normalization,
        "RaceConfig(causal=False)": RaceConfig(causal=False).normalization,
        "convert(model)": CONVERSION_DEFAULTS["normalization"],
        'attn_implementation="race"': IMPLEMENTATION_DEFAULTS["normalization"],
        "SketchAttention": CORE_DEFAULTS["normalization"],
        "RaceTransformerConfig": RaceConfig().normalization,
    }


# snippets


def test_the_snippets_of_the_readme_run() -> None:
    """In order, in one namespace, on one rank; the attention over fewer tokens. tests/distributed has them on two ranks."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"input_ids": torch.randint(256, (1, 128)), "optimizer": torch.optim.SGD([torch.zeros(1)])}
    run = 0
    for block in blocks("README.md"):
        if "group" in block:
            continue
        exec(compile(block.replace("100_000", "1_000").replace("dim=512", "dim=64"), "README.md", "exec"), names)  # noqa: S102
        run += 1
    assert run == 4
    assert isinstance(names["model"], DecoderLM)
    assert names["q"].grad is not None
    assert names["loss"].isfinite()


@pytest.mark.parametrize("name", ["docs/streaming.md", "docs/layers.md"])
def test_the_snippets_with_labels_run(name: str) -> None:
    from race_dist.models import generate

    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, dim=16, num_layers=1, num_heads=2)
    names: dict[str, Any] = {
        "input_ids": torch.randint(256, (1, 64)),
        "model": DecoderLM(config),
        "torch": torch,
        "generate": generate,
        "DecoderLM": DecoderLM,
        "ModelConfig": ModelConfig,
        "prompt_ids": torch.tensor([1, 2]),
        "optimizer": torch.optim.SGD([torch.zeros(1)]),
    }
    chosen = [block for block in blocks(name) if "labels" in block]
    assert chosen
    for block in chosen:
        exec(compile(block.replace("dim=512", "dim=64"), name, "exec"), names)  # noqa: S102
    assert names["loss"].isfinite()


def test_the_megatron_script_runs_with_what_pip_gives(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    (script,) = [block for block in blocks("docs/megatron.md") if "init_process_group" in block]
    file = tmp_path / "script.py"
    file.write_text(
        script + "\nassert abs(float(loss.detach()) - torch.log(torch.tensor(256.0))) < 0.5\n"
        "assert all(p.grad is not None for p in model.parameters())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
