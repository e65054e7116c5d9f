"""Batch scripts, run with stand-ins for python, srun and scontrol; what the Makefile may remove."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"process": "cube_processing.py", "train": "run_SSFTT_training.py"}
WORDS = {"process": ("--jobs", "4"), "train": ("--config", "a b.json", "--run-dir", "runs/a")}
COMMANDS = {
    "process": "cube_processing.py [--jobs] [4]",
    "train": "run_SSFTT_training.py [--config] [a b.json] [--run-dir] [runs/a] [--resume] [auto]",
}


@pytest.fixture
def batch(tmp_path):
    """Function that runs a batch script; the stdout of its result lists the commands it called."""
    (bin_dir := tmp_path / "bin").mkdir()
    stubs = {
        "python": 'echo "$PWD: python $(script=$1; shift; printf %s "$script"; '
        'for word; do printf " [%s]" "$word"; done)"; exit ${CODE:-0}',
        "srun": 'echo "srun ${SRUN_CPUS_PER_TASK:-}"; exec "$@"',
        "scontrol": 'echo "scontrol $*"',
    }
    for name, text in stubs.items():
        (bin_dir / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_dir / name).chmod(0o755)
    for tool in ("bash", "sh", "dirname"):  # and no srun of the machine's
        (bin_dir / tool).symlink_to(shutil.which(tool))

    def run(name, *words, script=None, cwd=ROOT, srun=True, **variables):
        if not srun:
            (bin_dir / "srun").unlink()
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SRUN"))}
        plain.pop("PYTHON", None)
        return subprocess.run(
            ["bash", str(script or ROOT / "slurm" / f"{name}.sbatch"), *words],
            cwd=cwd, env={**plain, "PATH": str(bin_dir), **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_batch_script_runs_from_any_folder_without_slurm(batch, tmp_path, name):
    assert batch(name, *WORDS[name]).stdout.startswith("srun \n")  # no number of CPUs
    done = batch(name, *WORDS[name], cwd=tmp_path, srun=False, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.stdout == f"{ROOT}: python {COMMANDS[name]}\n"
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_job_runs_a_copy_of_the_script_in_the_folder_of_submission(batch, tmp_path, name):
    spool = tmp_path / "spool" / "job7"
    spool.mkdir(parents=True)
    copy = shutil.copy(ROOT / "slurm" / f"{name}.sbatch", spool / "slurm_script")
    variables = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    done = batch(name, *WORDS[name], script=copy, **variables)
    assert done.stdout == f"srun 8\n{ROOT}: python {COMMANDS[name]}\n"
    done = batch(name, *WORDS[name], script=copy, cwd=tmp_path, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"no {SCRIPTS[name]} in {tmp_path}" in done.stderr


@pytest.mark.parametrize(
    ("array", "shards", "expected"),
    [
        ("0 0 99 100", None, "0/100"),
        ("99 0 99 100", None, "99/100"),
        ("7 3 7 2", "100", "7/100"),
        ("5 5 5 1", "100", "5/100"),
        ("0 0 0 1", "1", "0/1"),
        ("0 0 0 1", None, None),  # the first of an unknown number
        ("5 5 5 1", None, None),
        ("7 3 7 2", None, None),
        ("1 1 100 100", None, None),
        ("3 0 9 10", "5", None),  # fewer than the array has
        ("2 0 8 5", None, None),
    ],
)
def test_array_task_takes_its_share_or_is_refused(batch, array, shards, expected):
    names = (f"SLURM_ARRAY_TASK_{k}" for k in ("ID", "MIN", "MAX", "COUNT"))
    variables = dict(zip(names, array.split(), strict=True))
    done = batch("process", **variables, **({"SHARDS": shards} if shards else {}))
    if expected:
        assert done.stdout.endswith(f"python cube_processing.py [--shard] [{expected}]\n")
    else:
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "SHARDS=" in done.stderr


@pytest.mark.parametrize(("code", "job"), [(75, "7"), (75, ""), (0, "7"), (1, "7")])
def test_only_a_job_that_was_stopped_early_is_requeued(batch, code, job):
    done = batch("train", CODE=str(code), SLURM_JOB_ID=job)
    assert done.returncode == code
    assert ("scontrol requeue 7" in done.stdout) == (code == 75 and job == "7")


def make(*words, cwd):
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "VENV", "SETUP"}  # of `make test`
    return subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), *words],
        cwd=cwd, env={k: v for k, v in os.environ.items() if k not in outer},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("target", ["setup", "clean", "test"])
def test_make_does_not_set_up_or_clear_an_environment_of_the_users_own(tmp_path, target):
    done = make("--dry-run", "VENV=own", target, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "add SETUP=no" in done.stderr


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ((), {"results/mine", "data/manga"}),
        (("SETUP=no",), {"results/mine", "data/manga", ".venv"}),
        (("SETUP=no", "VENV=own"), {"results/mine", "data/manga", ".venv", "own"}),
    ],
)
def test_make_clean_removes_only_what_make_created(tmp_path, words, left):
    for name in left | {".venv", "data/demo", "results/demo", "results/bench"}:
        (tmp_path / name).mkdir(parents=True)
    make(*words, "clean", cwd=tmp_path)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.glob("**/*")}
    assert found == left | {"results", "data"}
