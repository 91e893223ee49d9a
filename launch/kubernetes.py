"""Jobs in Kubernetes: a JobSet with one pod per node and torchrun in each pod; their state, logs and end through kubectl."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from race_dist.launch.command import Run, format_command, torchrun_command
from race_dist.launch.job import JobConfig
from race_dist.launch.job_store import JobRecord, remember

_NODES = "node"  # the replicated job's name; pods are NAME-node-0-INDEX
_PORT = 29400
_CONFIG = "/etc/race-dist/config.toml"


def object_name(text: str) -> str:
    """A run's name as a Kubernetes object name: lower case, digits and dashes, short enough for a pod's host name."""
    name = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:40].strip("-")
    if not name or not name[0].isalpha():
        name = f"run-{name}".strip("-")
    return name


def literal(text: str) -> str:
    """Escape text for the pod: Kubernetes expands ``$(NAME)`` in commands and variables, and reads ``$$`` as a dollar sign."""
    return text.replace("$", "$$")


def _secret_name(name: str) -> str:
    return f"{name}-env"


def _secret_variables(job: JobConfig, name: str) -> list[dict[str, Any]]:
    """The pod's variables that are passed by reference, each from a key of a Secret."""
    return [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": r.secret or _secret_name(name), "key": r.key or variable}}}
        for variable, r in job.references().items()
    ]


def own_secrets(job: JobConfig) -> list[str]:
    """The referenced variables that are in no Secret of the cluster; :func:`submit` creates one for them."""
    return [variable for variable, r in job.references().items() if r.secret is None]


def secret_command(job: JobConfig, run: Run) -> str | None:
    """The shell command that creates the job's Secret from the environment; None if it needs none."""
    variables = own_secrets(job)
    if not variables:
        return None
    sources = {variable: job.references()[variable].from_env for variable in variables}
    command = [
        "kubectl",
        "create",
        "secret",
        "generic",
        _secret_name(object_name(job.name or run.name)),
        f"--namespace={job.kubernetes.namespace}",
    ]
    return " ".join(
        [format_command(command), *(f'--from-literal={variable}="${source}"' for variable, source in sources.items())]
    )


def manifest(job: JobConfig, run: Run) -> list[dict[str, Any]]:
    """The objects to apply: a ConfigMap with the configuration, and the JobSet.

    Raises:
        ValueError: the job has no image, or its runs would be deleted with the pods.
    """
    if job.container is None:
        raise ValueError("a job in Kubernetes needs an image: give container.image")
    volumes = [*job.kubernetes.claims.values(), *(m.split(":")[1] for m in job.mounts)]
    if not any(Path(job.kubernetes.runs).is_relative_to(path) for path in volumes):
        raise ValueError(
            f"kubernetes.runs is {job.kubernetes.runs}, which lies in none of the volumes {volumes}: its checkpoints "
            'would be gone with the pod; name a claim for it, kubernetes.claims = { NAME = "/runs" }'
        )
    name = object_name(job.name or run.name)
    labels = {"app.kubernetes.io/name": "race-dist", "app.kubernetes.io/instance": name}
    queue = {} if job.kubernetes.queue is None else {"kueue.x-k8s.io/queue-name": job.kubernetes.queue}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config", "namespace": job.kubernetes.namespace, "labels": labels},
        "data": {"config.toml": run.config.read_text(encoding="utf-8")},
    }
    template = {"metadata": {"labels": labels}, "spec": _pod(job, run, name)}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": job.kubernetes.namespace, "labels": {**labels, **queue}},
        "spec": {
            "failurePolicy": {"maxRestarts": job.requeues},  # a lost pod restarts the whole set
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},
            "replicatedJobs": [
                {
                    "name": _NODES,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "parallelism": job.nodes,
                            "completions": job.nodes,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "activeDeadlineSeconds": job.time,
                            "template": template,
                        }
                    },
                }
            ],
        },
    }
    return [config, jobset]


def _pod(job: JobConfig, run: Run, name: str) -> dict[str, Any]:
    assert job.container is not None
    k = job.kubernetes
    inside = replace(run, config=Path(_CONFIG), overrides=(*run.overrides, f"runs={k.runs}"))
    pod = f"{name}-{_NODES}-0"  # pods' host names: this, their index and the domain JobSet name
    words = [literal(word) for word in inside.arguments(job)]
    command = torchrun_command(
        job,
        words,
        endpoint=f"{pod}-0.{name}:{_PORT}",
        run_id=name,
        node_rank="$(JOB_COMPLETION_INDEX)",
        local_address=f"{pod}-$(JOB_COMPLETION_INDEX).{name}",
    )
    resources: dict[str, str] = dict(k.resources)
    if job.device == "cuda":
        resources[k.gpu_resource] = str(job.ranks_per_node)
    if job.cpus_per_rank is not None:
        resources["cpu"] = str(job.cpus_per_rank * job.ranks_per_node)
    if job.memory is not None:
        resources["memory"] = job.memory
    index = {
        "name": "JOB_COMPLETION_INDEX",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}},
    }
    mounts = [
        {"name": "config", "mountPath": str(Path(_CONFIG).parent), "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": f"{name}-config"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": k.shared_memory}},
    ]
    for claim, path in k.claims.items():
        mounts.append({"name": claim, "mountPath": path})
        volumes.append({"name": claim, "persistentVolumeClaim": {"claimName": claim}})
    for number, (host, path, *mode) in enumerate(m.split(":") for m in job.mounts):
        mounts.append({"name": f"host-{number}", "mountPath": path, "readOnly": mode == ["ro"]})
        volumes.append({"name": f"host-{number}", "hostPath": {"path": host}})
    container: dict[str, Any] = {
        "name": "ranks",
        "image": job.container.image,
        "imagePullPolicy": k.image_pull_policy,
        "command": command,
        "env": [
            index,
            *({"name": n, "value": literal(v)} for n, v in job.environment().items()),
            *_secret_variables(job, name),
        ],
        "ports": [{"containerPort": _PORT}],
        "volumeMounts": mounts,
        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
    }
    if job.container.workdir is not None:
        container["workingDir"] = job.container.workdir
    if resources:
        container["resources"] = {"requests": resources, "limits": resources}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": k.grace,
        "containers": [container],
        "volumes": volumes,
    }
    if k.tolerate:
        spec["tolerations"] = [{"key": key, "operator": "Exists"} for key in k.tolerate]
    if k.node_selector:
        spec["nodeSelector"] = dict(k.node_selector)
    if k.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return spec


def to_text(objects: Sequence[dict[str, Any]]) -> str:
    """The objects as one JSON List, which kubectl reads like YAML."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}, indent=2) + "\n"


def kubectl(command: Sequence[str], text: str | None = None) -> str:
    """Run kubectl. OSError if it is not installed or fails."""
    if shutil.which("kubectl") is None:
        raise OSError("kubectl is not found: write the manifest with --write FILE and apply it where kubectl is")
    done = subprocess.run(["kubectl", *command], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{format_command(['kubectl', *command])} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def submit(job: JobConfig, run: Run) -> JobRecord:
    """Apply the manifest and store the job's record."""
    objects = manifest(job, run)
    meta = objects[-1]["metadata"]
    if variables := own_secrets(job):
        values = job.model_copy(update={"env": {name: job.env[name] for name in variables}}).secrets(os.environ)
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "stringData": values,
            "metadata": {k: meta[k] for k in ("namespace", "labels")} | {"name": _secret_name(meta["name"])},
        }
        # server-side: a client-side apply would copy the values into an annotation
        kubectl(["apply", "--server-side", "--force-conflicts", "-f", "-"], to_text([secret]))
    kubectl(["apply", "-f", "-"], to_text(objects))
    return remember(run.folder, job_id=f"{meta['namespace']}/{meta['name']}", name=run.name, scheduler="kubernetes", logs="")


def state(record: JobRecord) -> dict[str, str]:
    """State of a JobSet, with the keys of :func:`race_dist.launch.slurm.state`."""
    namespace, name = record.id.split("/")
    try:
        tree = json.loads(kubectl(["get", "jobset", name, "--namespace", namespace, "--output", "json"]))
    except OSError as error:
        if "NotFound" in str(error):
            return {"state": "ENDED", "reason": "the JobSet is gone", "nodes": "", "restarts": ""}
        raise
    status = tree.get("status", {})
    done = [c for c in status.get("conditions", []) if c.get("status") == "True"]
    return {
        "state": done[-1]["type"].upper() if done else "RUNNING",
        "reason": done[-1].get("message", "") if done else "",
        "nodes": "",
        "restarts": str(status.get("restarts", 0)),
    }


def logs(record: JobRecord, lines: int) -> str:
    """The last lines of every pod."""
    namespace, name = record.id.split("/")
    return kubectl(
        [
            "logs",
            "--namespace",
            namespace,
            "--selector",
            f"jobset.sigs.k8s.io/jobset-name={name}",
            "--prefix",
            f"--tail={lines}",
        ]
    )


def cancel(record: JobRecord) -> None:
    """Delete the JobSet; its pods get SIGTERM and save within the grace period."""
    namespace, name = record.id.split("/")
    kubectl(["delete", "jobset", name, "--namespace", namespace])
