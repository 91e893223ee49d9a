"""A Slurm cluster for tests: munged, slurmctld and slurmd on this machine, in a folder and on ports of their own.

Nothing of the system's own Slurm is touched: every command runs with ``SLURM_CONF`` set (:attr:`Slurm.environment`).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1,sched_min_interval=100000
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
MinJobAge=900
InactiveLimit=0
GresTypes=gpu
ResumeProgram=/bin/false
SuspendProgram=/bin/false
SuspendTime=-1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
# nodes that do not exist, for sbatch --test-only
NodeName=far[0-7] NodeAddr=127.0.0.1 CPUs=288 SocketsPerBoard=4 CoresPerSocket=72 RealMemory=800000 Gres=gpu:8 State=CLOUD
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES:4
PartitionName=far Nodes=far[0-7] MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why Slurm cannot be started here, as a sentence; None if it can."""
    if os.geteuid() != 0:
        return "starting munged, slurmctld and slurmd for a test needs root"
    lacking = [p for p in PROGRAMS if shutil.which(p) is None]
    if lacking:
        return f"Slurm is not installed ({', '.join(lacking)} missing): tests/cluster/install.sh installs it with apt"
    return None


class Slurm:
    """A running Slurm; use it as a context manager."""

    def __init__(self, folder: Path, *, kill_wait: int = 30) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._kill_wait = kill_wait

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.processes:
            subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, check=False, timeout=30)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.run("squeue", "-h", check=False).strip():
                time.sleep(0.3)
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def run(self, *command: str, check: bool = True) -> str:
        """Run a Slurm command against this cluster and return what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """``scontrol show job`` as a dictionary."""
        text = self.run("scontrol", "show", "job", "-o", job_id)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait(self, job_id: str, *states: str, timeout: float = 120.0) -> dict[str, str]:
        """Wait until a job is in one of ``states``."""
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(job_id)
            if job["JobState"] in states:
                return job
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"job {job_id} is {job['JobState']} ({job.get('Reason')}), not {' or '.join(states)}, after {timeout:g} s"
                )
            time.sleep(0.3)

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for part in ("state", "spool"):
            (self.folder / part).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        host = socket.gethostname().split(".")[0]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        (self.folder / "slurm.conf").write_text(
            _CONF.format(
                host=host,
                folder=self.folder,
                ctld_port=_free_port(),
                slurmd_port=_free_port(),
                cpus=max(2, os.cpu_count() or 2),
                memory=memory - 512,
                kill_wait=self._kill_wait,
            )
        )
        self._spawn(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
            "--num-threads=2",
        )
        self._await((self.folder / "munge.socket").exists, "munged made no socket")
        self._spawn("slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf"))
        self._await(lambda: bool(self.run("scontrol", "ping", check=False).count("UP")), "slurmctld does not answer")
        self._spawn("slurmd", "-D", "-N", host, "-f", str(self.folder / "slurm.conf"))
        self._await(
            lambda: self.run("sinfo", "-h", "-p", "test", "-o", "%t", check=False).strip() == "idle", "slurmd did not register"
        )

    def _spawn(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as log:
            self.processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=self.folder))

    def _await(self, done, message: str, timeout: float = 30.0) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes):
                logs = "\n".join(
                    f"--- {f.name}\n" + "\n".join(f.read_text(errors="replace").splitlines()[-15:])
                    for f in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
                )
                raise AssertionError(f"{message}\n{logs}")
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
