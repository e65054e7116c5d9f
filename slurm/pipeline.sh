#!/usr/bin/env bash
# Submit the whole chain: cubes and labels -> splits -> training -> maps -> evaluation.
#   SBATCH_ACCOUNT=astro bash slurm/pipeline.sh DATA_DIR RUN_DIR --label-task logOH
# Further arguments are passed on to run_SSFTT_training.py. Run again after a failure, it repeats only
# what is missing; it prints the jobs, and docs/slurm.md how to see their state. Variables:
#   PER_TASK=100      galaxies per array task (20 to 100 are sensible)
#   LIMIT=50          array tasks that run at the same time
#   MAX_FAILED=0      galaxies that may fail without stopping the chain
#   CUBES, TRAIN, MAPS   flags of sbatch for these stages, e.g. TRAIN="--gres=gpu:a100:4 --ntasks-per-node=4"
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
    echo "error: expected a data folder and a run folder: bash slurm/pipeline.sh DATA_DIR RUN_DIR ..." >&2
    exit 2
fi
data=$1 run=$2
shift 2
galaxies=$({ find "$data/raw" -name 'manga-*-LOGCUBE*.fits*' 2> /dev/null || true; } | wc -l)
if [ "$galaxies" -eq 0 ]; then
    echo "error: no LOGCUBE in $data/raw. Download with download_utils.py, or simulate with mock_manga.py" >&2
    exit 1
fi
most=$({ scontrol show config || true; } | awk '$1 == "MaxArraySize" {print $3}')
tasks=$(((galaxies + ${PER_TASK:-100} - 1) / ${PER_TASK:-100}))
tasks=$((tasks > ${most:-1001} ? ${most:-1001} : tasks))
array=
[ "$tasks" -gt 1 ] && array=--array=0-$((tasks - 1))%${LIMIT:-50}
mkdir -p logs
submit() {  # a stage: its name, the condition on which it starts, flags and arguments of sbatch
    local name=$1 condition=$2
    shift 2
    job=$(sbatch --parsable --job-name="manga-$name" --kill-on-invalid-dep=yes \
        ${condition:+"--dependency=$condition"} "$@")
    job=${job%%;*}
    echo "$name: job $job${condition:+, starts $condition}"
}
submit cubes "" $array ${CUBES:-} slurm/process.sbatch --data-dir "$data"
submit splits "afterany:$job" ${CUBES:-} slurm/split.sbatch "$data" "${MAX_FAILED:-0}"
submit training "afterok:$job" ${TRAIN:-} slurm/train.sbatch --data-dir "$data" --run-dir "$run" "$@"
trained=afterok:$job
[ -n "$array" ] &&  # else one job maps and evaluates
    submit maps "$trained" $array ${MAPS:-} slurm/evaluate.sbatch --data-dir "$data" --run-dir "$run"
submit evaluation "$trained,afterany:$job" ${MAPS:-} slurm/evaluate.sbatch --data-dir "$data" --run-dir "$run"
