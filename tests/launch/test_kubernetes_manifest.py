"""The manifest for Kubernetes: every field one that JobSet and pods know, of the right type, and the right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kubeflow_trainer_api.models.io_k8s_api_core_v1_config_map import IoK8sApiCoreV1ConfigMap
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from race_dist.launch.command import Run
from race_dist.launch.job import load_job
from race_dist.launch.kubernetes import manifest, object_name, to_text

CONFIG = 'name = "My_Run.1"\n[model]\ndim = 16\n'
WIDE = [
    "kubernetes.queue=team",
    "kubernetes.node_selector={zone='a'}",
    "kubernetes.host_network=true",
    "kubernetes.resources={'rdma/ib'='8'}",
    "mounts=['/host:/in:ro']",
    "container.workdir=/work",
]


def objects(tmp_path: Path, changes: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)
    made = manifest(load_job("kubernetes", changes), Run(config, "My_Run.1", Path("/ours"), ("optim.lr=1e-3",)))
    first, second = made
    return first, second


def lost(given: Any, kept: Any, path: str = "") -> list[str]:
    """What the schema's models dropped or changed: unknown fields, wrong types."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            p for key in given for p in (lost(given[key], kept[key], f"{path}.{key}") if key in kept else [f"{path}.{key}"])
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [p for i, (a, b) in enumerate(zip(given, kept)) for p in lost(a, b, f"{path}[{i}]")]
    return [] if given == kept else [path]


@pytest.mark.parametrize(
    "changes", [[], WIDE, ["device=cpu", "nodes=1", "kubernetes.tolerate=[]"]], ids=["plain", "wide", "cpu"]
)
def test_the_manifest_fits_the_schema(tmp_path: Path, changes: list[str]) -> None:
    config, jobset = objects(tmp_path, changes)
    assert lost(jobset, JobsetV1alpha2JobSet.from_dict(jobset).to_dict()) == []
    assert lost(config, IoK8sApiCoreV1ConfigMap.from_dict(config).to_dict()) == []


def test_the_check_against_the_schema_can_fail(tmp_path: Path) -> None:
    _, jobset = objects(tmp_path, [])
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["restartPolicies"] = "Never"
    assert lost(jobset, JobsetV1alpha2JobSet.from_dict(jobset).to_dict()) == [
        ".spec.replicatedJobs[0].template.spec.template.spec.restartPolicies"
    ]
    pod["containers"][0]["image"] = 7
    with pytest.raises(ValueError, match="image"):
        JobsetV1alpha2JobSet.from_dict(jobset)


def test_pods_run_torchrun_with_the_rendezvous_at_the_first(tmp_path: Path) -> None:
    config, jobset = objects(tmp_path, ["nodes=3", "ranks_per_node=4"])
    assert config["data"]["config.toml"] == CONFIG
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (3, 3, "Indexed", 0)
    pod = job["template"]["spec"]
    command = pod["containers"][0]["command"]
    name = jobset["metadata"]["name"]
    assert f"--rdzv-endpoint={name}-node-0-0.{name}:29400" in command
    assert {"--nnodes=3", "--nproc-per-node=4", "--node-rank=$(JOB_COMPLETION_INDEX)", "--resume"} <= set(command)
    assert command[command.index("race_dist.launch.rank") + 1 :][:2] == ["train", "/etc/race-dist/config.toml"]
    assert "runs=/runs" in command
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "4"
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 300
    mounted = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert set(mounted) == {v["name"] for v in pod["volumes"]}
    assert mounted["runs"] == "/runs"


@pytest.mark.parametrize(("text", "name"), [("My_Run.1", "my-run-1"), ("7b", "run-7b"), ("-x-", "x"), ("a" * 60, "a" * 40)])
def test_run_names_become_valid_kubernetes_names(text: str, name: str) -> None:
    assert object_name(text) == name


def test_runs_on_a_pods_own_disk_and_jobs_without_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kubernetes.runs is /elsewhere, which lies in none of the volumes"):
        objects(tmp_path, ["kubernetes.runs=/elsewhere"])
    with pytest.raises(ValueError, match="needs an image"):
        manifest(load_job(None), Run(tmp_path / "x", "x", tmp_path))


def test_the_text_is_one_list_for_kubectl(tmp_path: Path) -> None:
    tree = json.loads(to_text(objects(tmp_path, [])))
    assert (tree["kind"], [item["kind"] for item in tree["items"]]) == ("List", ["ConfigMap", "JobSet"])
