"""The report page: its content, and how a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from race_dist.training.config import parse_config
from race_dist.training.logging.plots import COLOURS, RunCurves, draw_loss, draw_positions, draw_progress, save_png
from race_dist.training.logging.report import write_report
from race_dist.training.run_directory import RunDirectory

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def run_folder(folder: Path, name: str, **changes: Any) -> Path:
    """The files of a finished run, made up."""
    config = parse_config(
        {
            "name": name,
            "runs": str(folder),
            "steps": 40,
            "optim": {"warmup_steps": 4, "lr": 1e-3},
            "model": {"dim": 16, "num_layers": 1, "num_heads": 2},
        }
        | changes
    )
    worse = 1 + 0.2 * (name == "second")
    directory = RunDirectory(config.directory)
    directory.create(config, overwrite=False)
    records: list[dict[str, Any]] = [
        {
            "kind": "train",
            "step": n,
            "loss": 5 / n**0.3,
            "bpb": 7 * worse / n**0.3,
            "lr": 1e-3 / n,
            "grad_norm": worse + n % 7,
            "tokens_per_second": 1e4 / worse,
            "seconds": n / 3,
            "peak_bytes": 2.0**29,
        }
        for n in range(1, 41)
    ]
    records += [
        {"kind": "eval", "step": n, "loss": 5 / n**0.3, "bpb": 7.2 * worse / n**0.3, "tokens": 100} for n in (10, 20, 30, 40)
    ]
    records.append({"kind": "event", "step": 12, "what": "skipped", "text": "the loss is <nan> & more"})
    directory.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    directory.machine.write_text(json.dumps({"processor": "a <fast> one", "dp": 2, "sp": 1, "parameters": 12345}))
    directory.positions_of(64).write_text(
        json.dumps(
            {
                "context": 64,
                "tokens": 64,
                "loss": 2.0,
                "buckets": [
                    {"start": 0, "stop": 16, "loss": 3.0, "targets": 16},
                    {"start": 16, "stop": 64, "loss": 1.7 * worse, "targets": 48},
                ],
            }
        )
    )
    directory.sample.write_text("<script>alert(1)</script> & text")
    return directory.path


@pytest.fixture
def page(tmp_path: Path) -> Path:
    runs = [run_folder(tmp_path, "first"), run_folder(tmp_path, "second", optim={"warmup_steps": 4, "lr": 3e-3})]
    return write_report(runs, tmp_path / "out")


def test_the_page_is_self_contained_and_shows_differences(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<script|<link""", text)
    assert {p.name for p in page.parent.iterdir()} == {"report.html", "loss.png", "progress.png", "positions.png"}
    assert text.count("<svg") == 3
    differing = re.findall(r"<tr class=differs><td>(.*?)</td>", text)
    assert differing == ["name", "optim.lr"]
    assert "the loss is &lt;nan&gt; &amp; more" in text
    assert "a &lt;fast&gt; one" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; text" in text


def test_runs_are_named_by_the_part_of_their_path_that_differs(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "x", "same"), run_folder(tmp_path / "y", "same")]
    text = write_report(runs, tmp_path / "out").read_text()
    assert "<title>race-dist: x/same, y/same</title>" in text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        write_report([tmp_path], tmp_path / "out")
    run = run_folder(tmp_path, "first")
    RunDirectory(run).positions_of(64).write_text("{}")
    with pytest.raises(ValueError, match=r"positions-64.json does not hold losses by position"):
        write_report([run], tmp_path / "out")
    RunDirectory(run).metrics.unlink()
    with pytest.raises(FileNotFoundError, match="the run has not begun yet"):
        write_report([run], tmp_path / "out")


def test_plots_are_drawn_from_any_records(tmp_path: Path) -> None:
    train = [{"kind": "train", "step": n, "bpb": 8 / n, "lr": 1 / n} for n in range(1, 9)]
    for records in ([], train):
        for draw in (draw_loss, draw_positions, draw_progress):
            save_png(draw([RunCurves("a run", records)]), tmp_path / "curves.png")
            assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (
        RunCurves("", [*train, {"kind": "train", "step": 3, "bpb": 9.0}]).of("train", "bpb")[1][2] == 9.0
    )  # the last one counts


def browse(page: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={page.parent / 'profile'}", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_it(page: Path, tmp_path: Path) -> None:
    probe = """<script>onload = () => { const d = document.documentElement, box = e => e.getBoundingClientRect();
        d.dataset.found = JSON.stringify({wide: d.scrollWidth, inner: innerWidth, tall: d.scrollHeight,
            svgs: [...document.querySelectorAll('svg')].map(e => [box(e).width, box(e).height]),
            heads: [...document.querySelectorAll('h2')].map(e => e.innerText)}); }</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", probe + "</body>"), encoding="utf-8")
    for width in (1100, 500):
        dom = browse(probed, f"--window-size={width},2000", "--dump-dom")
        match = re.search(r'data-found="(.*?)"', dom)
        assert match is not None
        found = json.loads(match[1].replace("&quot;", '"'))
        assert found["wide"] <= found["inner"]  # nothing sticks out
        assert len(found["svgs"]) == 3
        assert all(w > 0.85 * min(width, 960) - 40 and h > 100 for w, h in found["svgs"])
        assert found["heads"][:3] == ["Loss", "Loss by position in the context", "How it went"]
    picture = tmp_path / "page.png"
    browse(page, "--window-size=1100,2000", f"--screenshot={picture}")
    image = matplotlib.image.imread(picture)[..., :3]
    for colour in COLOURS[:2]:  # both runs' lines are there
        near = np.abs(image - np.array(matplotlib.colors.to_rgb(colour))).max(-1) < 0.02
        assert near.sum() > 200
        rows = np.flatnonzero(near.any(1))
        assert rows[-1] - rows[0] > 900  # in the first picture and in the last ones
