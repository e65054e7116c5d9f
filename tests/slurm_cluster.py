"""Try the batch scripts on a real Slurm of one node, set up and removed in a temporary folder.

Needs slurmctld, slurmd and the client's commands; as root, missing ones are installed by apt-get.
Writes  results/slurm/summary.json. Exit code 0 if everything held, 1 if not, 3 if there is no
Slurm, or it does not start.

    PYTHONPATH=.:tests python tests/slurm_cluster.py        # or make test-slurm
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("slurmctld", "slurmd", "slurm-client")
CLIENTS = ("sbatch", "scontrol", "squeue", "srun", "scancel", "sinfo")
NO_SLURM, NOT_TESTED = 3, "NOT TESTED: the batch scripts on a real Slurm:"
CONFIG = """
ClusterName=local
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
KillWait=5
MinJobAge=86400
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=16 RealMemory=200000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""One node that claims more than it has, so that the batch scripts run with the resources they ask
for; cred_expire also decides how long a requeued job waits."""


def missing() -> list[str]:
    """Programs of Slurm that are not there."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    return [name for name in ("slurmctld", "slurmd", *CLIENTS) if not shutil.which(name)]


def install() -> str:
    """Install Slurm if it is missing and we may; return what is in the way, if anything is."""
    if not missing():
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"no {missing()[0]}, and only root on a Debian system can install it"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
    apt = ["apt-get", "-qq", "-o", "Acquire::Retries=1"]
    subprocess.run([*apt, "update"], **quiet)
    subprocess.run([*apt, "install", "-y", "--no-install-recommends", *PACKAGES], **quiet)
    return f"no {missing()[0]}, and apt-get could not install it" if missing() else ""


class Cluster:
    """A Slurm of one node, in a folder that also takes the logs of its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls.txt"
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        for name in ("state", "spool", "counted", "logs"):
            (folder / name).mkdir()
        text = CONFIG.format(ports=ports, user=user, folder=folder)
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        for name in CLIENTS:  # found before the real ones by `run(..., counted=True)`
            script = folder / "counted" / name
            script.write_text(
                f'#!/bin/sh\necho {name} >> {self.calls}\nexec {shutil.which(name)} "$@"\n'
            )
            script.chmod(0o755)
        outer = ("SLURM", "SBATCH", "SRUN", "MANGA")
        plain = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
        self.env = {
            **plain,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "SBATCH_OUTPUT": str(folder / "logs" / "%x-%A_%a.out"),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Cluster:
        self.run("slurmctld", "-c")
        self.run("slurmd", "-c", "-N", "localhost")
        try:
            self.wait(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T"), 30, "no idle node")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--me"], env=self.env, check=False)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.run("squeue", "-h"):
            time.sleep(0.5)
        for name in ("slurmd", "slurmctld"):
            file = self.folder / f"{name}.pid"
            if file.is_file():
                pid = int(file.read_text())
                os.kill(pid, signal.SIGTERM)
                while time.monotonic() < deadline + 20 and Path(f"/proc/{pid}").exists():
                    time.sleep(0.2)

    def run(self, *words: object, counted: bool = False, **variables: str) -> str:
        """Output of a command; `counted`: of it and its jobs, Slurm's commands are counted."""
        path = {"PATH": f"{self.folder / 'counted'}:{os.environ['PATH']}"} if counted else {}
        done = subprocess.run(
            list(map(str, words)), env={**self.env, **path, **variables}, cwd=ROOT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{words}: code {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout.strip()

    def submit(self, *words: object) -> str:
        """Submit a job; its number."""
        return self.run("sbatch", "--parsable", *words)

    def about(self, job: str, field: str) -> str:
        """Field of a job; of an array, of one of its tasks."""
        found = re.search(rf"\b{field}=(\S+)", self.run("scontrol", "show", "job", job))
        return found[1] if found else ""

    def state(self, job: str) -> str:
        """State of a job that has not ended for long."""
        return self.about(job, "JobState")

    def log_of(self, job: str) -> str:
        """What a job has written."""
        path = Path(self.about(job, "StdOut"))
        return path.read_text() if path.is_file() else ""

    def end(self, *jobs: str, limit_s: float = 600) -> list[str]:
        """Wait until jobs have ended; their states."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.wait(lambda: {*map(self.state, jobs)} <= ended, limit_s, f"jobs {jobs} go on")
        return [self.state(job) for job in jobs]

    def wait(self, until: Callable[[], object], limit_s: float, complaint: str) -> None:
        """Wait until something is true."""
        deadline = time.monotonic() + limit_s
        while not until():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{complaint} after {limit_s} s:\n{self.run('squeue')}")
            time.sleep(0.5)

    def pipeline(self, data: Path, run_dir: Path, *words: object, **variables: str) -> dict:
        """Submit slurm/pipeline.sh; the jobs by stage."""
        said = self.run(
            "bash", "slurm/pipeline.sh", data, run_dir, *words, counted=True, **variables
        )
        return {m[1]: m[2] for m in re.finditer(r"(\w+): job (\d+)", said)}


class Report:
    """What held and what did not."""

    def __init__(self) -> None:
        self.claims: dict[str, bool] = {}
        self.numbers: dict[str, float] = {}

    def check(self, claim: str, held: object, found: object = "") -> None:
        self.claims[claim] = bool(held)
        print(f"{'held  ' if held else 'FAILED'} {claim}{'' if held else f': {found}'}", flush=True)

    def number(self, name: str, value: float) -> None:
        self.numbers[name] = round(value, 1)
        print(f"       {name}: {value:.4g}", flush=True)


def written_since(folder: Path, pattern: str, start: float) -> int:
    return sum(p.stat().st_mtime > start for p in folder.rglob(pattern))


def failures(data: Path) -> list[str]:
    """Galaxies in the one table of failures."""
    tables = list((data / "processed").glob("failed*.csv"))
    if not tables:
        return []
    (table,) = tables
    with table.open() as f:
        return [row["plateifu"] for row in csv.DictReader(f)]


# Scenarios


def chain_on_galaxies(cluster: Cluster, report: Report, work: Path) -> None:
    """The pipeline on simulated galaxies, one of them damaged, then mended."""
    data, run_dir = work / "data", work / "run"
    cluster.run(
        sys.executable, "mock_manga.py", "--data-dir", data, "--n-galaxies", 6, "--bundles", 19
    )
    damaged = sorted((data / "raw").glob("*/*/*LOGCUBE*"))[2]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100_000])
    name = re.search(r"\d+-\d+", damaged.name)[0]
    resources = {"PER_TASK": "2", "LIMIT": "2", "CUBES": "--cpus-per-task=1"}

    def chain(**variables: str) -> tuple[dict, list[str]]:
        words = ("--label-task", "logOH", "--epochs", 2, "--device", "cpu")
        jobs = cluster.pipeline(data, run_dir, *words, **resources, **variables)
        return jobs, cluster.end(*jobs.values())

    jobs, states = chain()
    report.check(
        "chain: a failing galaxy stops it before training, and the state of each stage says so",
        states[1:] == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"] and not run_dir.exists(),
        states,
    )
    report.check("chain: the failing galaxy is in one table", failures(data) == [name])
    report.check("chain: the log says what to do", "Mend them" in cluster.log_of(jobs["splits"]))
    jobs, states = chain(MAX_FAILED="1")
    maps = sorted(p.stem for p in (run_dir / "maps").glob("*.fits"))
    report.check(
        "chain: goes on after a partial failure that was allowed, to scores and maps",
        states[1:] == ["COMPLETED"] * 4 and len(maps) == 5 and (run_dir / "test").is_dir(),
        (states, maps, {k: cluster.log_of(j)[-500:] for k, j in jobs.items()}),
    )
    damaged.write_bytes(whole)
    start = time.time()
    jobs, states = chain()
    cubes = written_since(data / "processed" / "cubes", "*.h5", start)
    maps = written_since(run_dir / "maps", "*.fits", start)
    report.check(
        "chain: after mending, a rerun makes the one cube and map that were missing",
        states == ["COMPLETED"] * 5 and (cubes, maps, failures(data)) == (1, 1, []),
        (states, cubes, maps),
    )


def training_words(data: Path, run_dir: Path, epochs: int) -> list[object]:
    words = "--split-dir hard --cutout 7 --patience 0 --no-baselines --device cpu".split()
    return ["--data-dir", data, "--run-dir", run_dir, *words, "--epochs", epochs]


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights, best weights and history."""
    import pandas as pd
    import torch

    import run_folder

    runs = [run_folder.read_checkpoint(run) for run in (one, other)]
    best = [run_folder.read_tensors(run / run_folder.WEIGHTS_FILE)[0] for run in (one, other)]
    tables = [pd.read_csv(run / run_folder.METRICS_FILE) for run in (one, other)]
    numbers = [t.drop(columns=["seconds", "spaxels_per_s"]) for t in tables]
    pairs = zip((runs[0]["model"], best[0]), (runs[1]["model"], best[1]), strict=True)
    return numbers[0].equals(numbers[1]) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs
    )


def interrupted_training(cluster: Cluster, report: Report, work: Path) -> None:
    """Training that meets its time limit, or is cancelled, beside an undisturbed one."""
    import mock_cubes

    data = mock_cubes.make_data_dir(work / "small")
    for processes in (1, 2):
        flags = (f"--ntasks-per-node={processes}", "--cpus-per-task=1", "--gres=gpu:0")
        interrupt(cluster, report, data, work / str(processes), processes, *flags)


def interrupt(
    cluster: Cluster, report: Report, data: Path, runs: Path, n: int, *flags: str
) -> None:
    """The same training by n processes three times: undisturbed, with a time limit, cancelled."""

    def submit(run: Path, epochs: int, *more: str) -> str:
        words = training_words(data, run, epochs)
        return cluster.submit(*flags, *more, "slurm/train.sbatch", *words)

    start, of = time.monotonic(), f"{n} process{'es' if n > 1 else ''}"
    cluster.end(submit(runs / "trial", 40))
    epochs = round(40 * 60 / (time.monotonic() - start))  # a minute and more: others run, too
    whole, limited, cancelled = (runs / name for name in ("whole", "limited", "cancelled"))
    jobs = [submit(whole, epochs)]
    jobs.append(submit(limited, epochs, "--time=1", "--signal=USR1@50"))  # sent after 10 to 40 s
    after = ("--kill-on-invalid-dep=yes", "--wrap=true")
    jobs.append(cluster.submit(f"--dependency=afterok:{jobs[1]}", *after))
    job = submit(cancelled, epochs)
    cluster.wait((cancelled / "metrics.csv").is_file, 120, "no epoch of the job to be cancelled")
    cluster.run("scancel", job)
    time.sleep(8)  # a requeued job would start again after 5 s
    report.check(
        f"cancelled, {of}: the job is not requeued, and its checkpoint is whole",
        cluster.end(job) == ["CANCELLED"] and same_bits(cancelled, cancelled),
        cluster.state(job),
    )
    jobs.append(submit(cancelled, epochs))
    states, restarts = cluster.end(*jobs), int(cluster.about(jobs[1], "Restarts"))
    report.number(f"time limit of a minute, {of}: restarts", restarts)
    report.check(
        f"time limit, {of}: the job is saved, requeued, finished; then starts what waits for it",
        restarts > 0 and states == ["COMPLETED"] * 4,
        (states, restarts, cluster.log_of(jobs[1])[-2000:]),
    )
    for run in (limited, cancelled):
        report.check(f"{run.name}, {of}: the bits of the undisturbed run", same_bits(whole, run))


def drained_node(cluster: Cluster, report: Report, work: Path) -> None:
    """A node that is drained while an array runs, and given back."""
    array = [
        "--array=0-3%2", "--cpus-per-task=1", "slurm/process.sbatch", "--data-dir", work / "data",
        "--no-remove-gas-velocity", "--overwrite", "--jobs", 1,
    ]  # fmt: skip
    job = cluster.submit(*array)
    cluster.wait(lambda: "R" in cluster.run("squeue", "-h", "-o", "%t"), 60, "nothing runs")
    cluster.run("scontrol", "update", "NodeName=localhost", "State=DRAIN", "Reason=test")
    cluster.wait(
        lambda: not {"R", "CG"} & set(cluster.run("squeue", "-h", "-o", "%t").split()),
        120, "jobs on the drained node",
    )  # fmt: skip
    states = Counter(cluster.run("squeue", "-h", "-r", "-o", "%t").split())
    report.check("drained: tasks that ran finish, the others wait", states == {"PD": 2}, states)
    cluster.run("scontrol", "update", "NodeName=localhost", "State=RESUME")
    cluster.wait(lambda: not cluster.run("squeue", "-h"), 120, "the array goes on")
    logs = [p.read_text() for p in (cluster.folder / "logs").glob(f"manga-cubes-{job}_*.out")]
    report.check(
        "drained: once it is back, the array is finished",
        len(logs) == 4 and all("Results: " in log for log in logs),
        logs,
    )


def plan_of_ten_thousand(cluster: Cluster, report: Report, work: Path, n: int) -> None:
    """A survey whose galaxies take 1 ms each; some fail."""
    data = work / "survey"
    names = [f"{8000 + i // 10}-{1900 + i % 10}" for i in range(n)]
    for name in names:
        plate, ifu = name.split("-")
        path = data / "raw" / plate / ifu / f"manga-{name}-LOGCUBE-X.fits.gz"
        path.parent.mkdir(parents=True)
        path.touch()
    (data / "done").mkdir()
    (data / "broken.txt").write_text("\n".join(names[5::1500]))
    broken = names[5::1500]
    stub = cluster.folder / "stub"
    stub.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={ROOT}/tests\n"
        f'exec {sys.executable} {ROOT}/tests/slurm_stub.py "$@"\n'
    )
    stub.chmod(0o755)

    def chain() -> tuple[list[str], int, float]:
        cluster.calls.unlink(missing_ok=True)
        start = time.monotonic()
        jobs = cluster.pipeline(data, work / "none", PYTHON=str(stub))
        states = cluster.end(*jobs.values(), limit_s=1800)
        calls = Counter(cluster.calls.read_text().split())
        print(f"       calls: {dict(calls)}", flush=True)
        return states, calls.total(), time.monotonic() - start

    states, calls, seconds = chain()
    report.number(f"plan of {n}: calls of Slurm's commands, by the user and all jobs", calls)
    report.number(f"plan of {n}: seconds", seconds)
    done = len(list((data / "done").iterdir()))
    report.check(f"plan of {n}: at most 100 calls", calls <= 100, calls)
    report.check(
        f"plan of {n}: every galaxy is done or in one table of failures, and the chain stops",
        done == n - len(broken) and failures(data) == sorted(broken)
        and states[1:] == ["FAILED"] + ["CANCELLED"] * 3,
        (done, failures(data), states),
    )  # fmt: skip
    (data / "broken.txt").write_text("")
    start = time.time()
    states, calls, seconds = chain()
    report.number(f"plan of {n}, again: calls", calls)
    report.number(f"plan of {n}, again: seconds", seconds)
    repaired = written_since(data / "done", "*", start)
    report.check(
        f"plan of {n}: a rerun does only what failed, and the chain ends",
        repaired == len(broken) and not failures(data) and states == ["COMPLETED"] * 5,
        (repaired, failures(data), states),
    )


SCENARIOS = (chain_on_galaxies, drained_node, interrupted_training, plan_of_ten_thousand)


def main() -> int:
    """Run the scenarios; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [s.__name__ for s in SCENARIOS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--galaxies", type=int, default=10_000, help="of the simulated plan")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    options = parser.parse_args()
    if obstacle := install():
        print(f"{NOT_TESTED} {obstacle}", file=sys.stderr)
        return NO_SLURM
    report, start = Report(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with contextlib.ExitStack() as stack:
            try:
                cluster = stack.enter_context(Cluster(folder))
            except RuntimeError as error:
                print(f"{NOT_TESTED} it does not start here: {error}", file=sys.stderr)
                return NO_SLURM
            for scenario in SCENARIOS:
                if scenario.__name__ not in options.only:
                    continue
                (work := folder / "work").mkdir(exist_ok=True)
                more = (options.galaxies,) if scenario is plan_of_ten_thousand else ()
                scenario(cluster, report, work, *more)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    report.number("seconds in total", time.monotonic() - start)
    out = ROOT / "results" / "slurm" / "summary.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"held": all(report.claims.values()), "claims": report.claims, **report.numbers}
    out.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{sum(report.claims.values())} of {len(report.claims)} held; summary: {out}")
    return 0 if content["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
