"""Batch scripts, run with stand-ins for python, srun and scontrol; what the Makefile may remove."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    "process": ("--jobs", "4"),
    "train": ("--config", "a b.json", "--run-dir", "runs/a"),
    "evaluate": ("--run-dir", "runs/a"),
}
COMMANDS = {
    "process": ["cube_processing.py [--jobs] [4]"],
    "train": ["run_SSFTT_training.py [--config] [a b.json] [--run-dir] [runs/a] [--resume] [auto]"],
    "evaluate": ["eval_fns.py [--run-dir] [runs/a]", "map_galaxies.py [--run-dir] [runs/a]"],
}
STUBS = {
    "python": '[ -z "${MADE:-}" ] || cp "$MADE" "${MADE%.made}"; '
    'echo "$PWD: python $(script=$1; shift; printf %s "$script"; '
    'for word; do printf " [%s]" "$word"; done)"; exit ${CODE:-0}',
    "srun": 'echo "srun ${SRUN_CPUS_PER_TASK:-}"; shift; exec "$@"',  # its own flag is one word
    "scontrol": 'echo "scontrol $*"; echo "MaxArraySize = ${MOST:-1001}"',
    "sbatch": 'echo "sbatch $*" >&2; echo $((RANDOM + 1))',
}


@pytest.fixture
def batch(tmp_path):
    """Function that runs a batch script; the stdout of its result lists the commands it called."""
    (bin_dir := tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (bin_dir / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_dir / name).chmod(0o755)
    tools = "bash dirname grep find wc awk mkdir rm cp"  # no srun of the machine's
    for tool in tools.split():
        (bin_dir / tool).symlink_to(shutil.which(tool))

    def run(name, *words, script=None, cwd=ROOT, without=(), **variables):
        for stub in without:
            (bin_dir / stub).unlink()
        ours = ("SLURM", "SRUN", "SBATCH")
        plain = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        ending = "" if "." in name else ".sbatch"
        return subprocess.run(
            ["bash", str(script or ROOT / "slurm" / f"{name}{ending}"), *map(str, words)],
            cwd=cwd, env={**plain, "PATH": str(bin_dir), "PYTHON": "python", **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def ran(name):
    return "".join(f"{ROOT}: python {command}\n" for command in COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_batch_script_runs_from_any_folder_without_slurm(batch, tmp_path, name):
    assert batch(name, *WORDS[name]).stdout == ran(
        name
    )  # without srun, which would wait for a node
    without = ("srun", "scontrol")
    done = batch(name, *WORDS[name], cwd=tmp_path, without=without, SLURM_SUBMIT_DIR=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, ran(name), "")


@pytest.mark.parametrize("name", COMMANDS)
def test_job_runs_a_copy_of_the_script_in_the_folder_of_submission(batch, tmp_path, name):
    spool = tmp_path / "spool" / "job7"
    spool.mkdir(parents=True)
    copy = shutil.copy(ROOT / "slurm" / f"{name}.sbatch", spool / "slurm_script")
    variables = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    done = batch(name, *WORDS[name], script=copy, **variables)
    assert done.stdout == ("srun 8\n" if name == "train" else "") + ran(name)
    done = batch(name, *WORDS[name], script=copy, cwd=tmp_path, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"no slurm/common.sh in {tmp_path}" in done.stderr


@pytest.mark.parametrize("name", ["process", "evaluate"])
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
def test_array_task_takes_its_share_or_is_refused(batch, name, array, shards, expected):
    names = (f"SLURM_ARRAY_TASK_{k}" for k in ("ID", "MIN", "MAX", "COUNT"))
    variables = dict(zip(names, array.split(), strict=True))
    done = batch(name, **variables, **({"SHARDS": shards} if shards else {}))
    if expected:
        script = "cube_processing.py" if name == "process" else "map_galaxies.py"
        assert done.stdout == f"{ROOT}: python {script} [--shard] [{expected}]\n"
    else:
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "SHARDS=" in done.stderr


@pytest.mark.parametrize(
    ("active", "expected"), [({}, ".venv/bin/python"), ({"VIRTUAL_ENV": "/env"}, "python")]
)
def test_environment_is_the_active_one_else_the_repositorys(tmp_path, active, expected):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch(mode=0o755)
    told = f". {ROOT}/slurm/common.sh; echo $PYTHON"
    bash = [shutil.which("bash"), "-c", told]
    assert subprocess.check_output(bash, cwd=tmp_path, env=active, text=True) == f"{expected}\n"


@pytest.mark.parametrize(
    ("failed", "allowed", "code", "splits"),
    [(0, 0, 0, 0), (2, 0, 1, 0), (2, 1, 1, 0), (2, 2, 0, 2)],
)
def test_splits_follow_unless_more_galaxies_fail_than_allowed(
    batch, tmp_path, failed, allowed, code, splits
):
    (tmp_path / "processed").mkdir()
    rows = [f'8485-190{i},cubes,"cut, in\ntwo"' for i in range(1, failed + 1)]
    made = tmp_path / "processed/failed.csv.made"
    made.write_text("\n".join(["plateifu,stage,reason", *rows]))
    done = batch("split", tmp_path, allowed, CODE="1" if failed else "0", MADE=str(made))
    assert done.returncode == code
    assert done.stdout.count("create_data_splits.py") == splits
    assert (f"error: {failed} galaxies failed" in done.stderr) == bool(code)


def test_another_error_than_failed_galaxies_ends_the_chain(batch, tmp_path):
    """The table of an earlier run does not count."""
    (tmp_path / "processed").mkdir()
    (tmp_path / "processed/failed.csv").write_text("plateifu,stage,reason\n8485-1901,cubes,cut\n")
    done = batch("split", tmp_path, 5, CODE="1")
    assert done.returncode == 1
    assert "create_data_splits.py" not in done.stdout


@pytest.mark.parametrize(
    ("galaxies", "per_task", "most", "array"),
    [(5, "2", "1001", "0-2%50"), (5, "2", "2", "0-1%50"), (5, "100", "1001", None)],
)
def test_pipeline_submits_the_chain_in_few_calls(batch, tmp_path, galaxies, per_task, most, array):
    for i in range(galaxies):
        (folder := tmp_path / f"raw/8485/{1901 + i}").mkdir(parents=True)
        (folder / f"manga-8485-{1901 + i}-LOGCUBE-X.fits.gz").touch()
    words = (tmp_path, "runs/a", "--epochs", "2")
    done = batch(
        "pipeline.sh", *words, PER_TASK=per_task, MOST=most, TRAIN="--nodes=2", MAX_FAILED="3"
    )
    assert done.returncode == 0
    calls = done.stderr.splitlines()
    stages = ["cubes", "splits", "training", *(["maps"] if array else []), "evaluation"]
    assert [call.split("--job-name=manga-")[1].split()[0] for call in calls] == stages
    assert [f"--array={array}" in call for call in calls] == [
        bool(array) and stage in ("cubes", "maps") for stage in stages
    ]
    jobs = [line.split()[2].rstrip(",") for line in done.stdout.splitlines()]
    conditions = [
        None,
        f"afterany:{jobs[0]}",
        f"afterok:{jobs[1]}",
        *([f"afterok:{jobs[2]}"] if array else []),
        f"afterok:{jobs[2]},afterany:{jobs[-2]}",
    ]
    for call, condition in zip(calls, conditions, strict=True):
        assert condition is None or f"--dependency={condition} " in call
    assert calls[1].endswith(f"slurm/split.sbatch {tmp_path} 3")
    assert "--nodes=2 slurm/train.sbatch" in calls[2]
    assert calls[2].endswith(f"--data-dir {tmp_path} --run-dir runs/a --epochs 2")


@pytest.mark.parametrize("words", [(), ("nowhere", "runs/a")])
def test_pipeline_without_galaxies_ends_in_one_line(batch, words):
    done = batch("pipeline.sh", *words)
    assert done.returncode in (1, 2)
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "sbatch" not in done.stderr.replace("slurm/", "")


@pytest.mark.parametrize(("code", "job"), [(75, "7"), (138, "7"), (75, ""), (0, "7"), (1, "7")])
def test_only_a_job_that_was_stopped_early_is_requeued(batch, code, job):
    done = batch("train", CODE=str(code), SLURM_JOB_ID=job)
    assert done.returncode == code
    assert ("scontrol requeue 7" in done.stdout) == (code in (75, 138) and job == "7")


def test_each_task_of_a_job_is_one_process_of_a_training(batch, tmp_path):
    (python := tmp_path / "python").write_text(
        "#!/bin/bash\necho $RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT\n"
    )
    python.chmod(0o755)
    task = {"PROCID": "5", "NTASKS": "8", "LOCALID": "1", "LAUNCH_NODE_IPADDR": "10.0.0.1"}
    variables = {f"SLURM_{name}": value for name, value in task.items()}
    done = batch("train", SLURM_JOB_ID="10007", PYTHON=str(python), **variables)
    assert done.stdout == "srun \n5 8 1 10.0.0.1 20007\n"


def test_job_that_cannot_requeue_itself_says_so_and_keeps_its_code(batch):
    done = batch("train", CODE="75", SLURM_JOB_ID="7", without=("scontrol",))  # as in a container
    assert (done.returncode, done.stderr.count("\n")) == (75, 1)
    assert "not requeued: submit the same command again" in done.stderr


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
