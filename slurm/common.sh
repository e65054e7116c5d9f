# Sourced by the batch scripts, in the repository's folder: Python's environment, and parts of arrays.

# The environment of every job: load modules or activate an environment here, and only here.
# As it is: $PYTHON, else the environment that is active at submission, else the repository's .venv.
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi

# Set `shard` to the flag for this task's part of the galaxies; empty outside of arrays.
# Task k of an array 0 to n-1 works on galaxies k, k+n, ...; of part of an array, SHARDS is n.
find_shard() {
    shard=()
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    local n=${SLURM_ARRAY_TASK_COUNT:-1} whole=
    [ "$n" -gt 1 ] && [ "$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX" = "0-$((n - 1))" ] && whole=yes
    if [ -z "$whole${SHARDS:-}" ]; then
        echo "error: not a whole array 0-N: state its number of tasks: SHARDS=100 sbatch ..." >&2
        exit 2
    elif [ -n "$whole" ] && [ "${SHARDS:-$n}" -lt "$n" ]; then
        echo "error: SHARDS=$SHARDS is less than the array's $n tasks" >&2
        exit 2
    fi
    shard=(--shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$n}")
}
