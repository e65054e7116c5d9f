#!/usr/bin/env bash
# The whole pipeline on simulated galaxies; the same commands serve real ones.
#   simulate -> cubes and labels -> splits -> statistics -> patches -> train -> evaluate -> maps
# Writes data/demo/ (a data folder) and results/demo/ (runs, figures, summary.json). Deletes nothing: it
# makes its own galaxies in data/demo/ again, leaves yours there alone, and moves an earlier results/demo/
# to results/demo-before-<time>/. Seeded: on one machine, every run gives the same numbers.
#   PYTHON=.venv/bin/python bash demo.sh
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}
data=data/demo
out=results/demo
galaxies=36   # one of them twice; 19-fibre bundles, the smallest: 34 x 34 spaxels per galaxy
seed=1

problem=$("$python" -c 'import mock_manga, run_SSFTT_training, vis_fns' 2>&1) || {
    echo "error: PYTHON=$python does not run the demo (${problem##*$'\n'}). Expected Python 3.11 or newer with" \
        "the packages of requirements.txt: activate the environment, or create one with make setup." >&2
    exit 1
}
if [ -e "$out" ]; then
    before=$out-before-$(date +%Y%m%dT%H%M%S)
    mv "$out" "$before"
    echo "The results of the previous demo are now in $before/."
fi
mkdir -p "$out"
export MANGA_DATA_DIR=$data
step() { printf '\n== %s\n' "$*"; }
run() { printf '$ python %s\n' "$*"; "$python" "$@"; }

for plate in $(seq 13001 $((13000 + galaxies / 2))); do
    printf '%s-1901\n%s-1902\n' "$plate" "$plate"
done > $out/galaxies.txt
mine="--galaxy-list $out/galaxies.txt"   # and none that you have put into data/demo/

step "1/8 simulate $galaxies galaxies in the archive's format"
run mock_manga.py --n-galaxies $galaxies --bundles 19 --seed $seed --jobs 2 --overwrite

step "2/8 FITS -> H5 cubes and label maps (gas velocity removed: lines at rest in every spaxel)"
run cube_processing.py $mine --no-splits --overwrite

step "3/8 splits: whole galaxies held out (hard); spaxels of training galaxies (easy, to compare)"
for task in logOH BPT; do
    run create_data_splits.py --label-task $task $mine --fractions 0.6 0.15 0.25 --seed $seed --overwrite
done
run create_easy_data_splits.py --label-task logOH $mine --fractions 0.6 0.15 0.25 --seed $seed --overwrite

step "4/8 statistics for SSFTT: principal components of the training spectra"
run calc_data_stats.py --split-dir hard_logOH --n-components 10 --overwrite

step "5/8 patch files for SSFTT (optional: by default, training packs the cubes and reads those)"
run cube_patch_processing.py $mine --label-tasks logOH --patch-norms PCA --patch-size 7 \
    --split-dir hard_logOH --overwrite

step "6/8 train: the recommended network and, to compare, the published one from patch files"
train() { run run_SSFTT_training.py "$@"; }
train --label-task logOH --split-dir hard_logOH --run-dir $out/logOH_hard
train --label-task logOH --split-dir easy_logOH --run-dir $out/logOH_easy
train --label-task BPT --split-dir hard_BPT --run-dir $out/BPT_hard
train --label-task logOH --split-dir hard_logOH --run-dir $out/logOH_ssftt \
    --network ssftt --source patches --epochs 20 --patience 0

step "7/8 evaluate on galaxies (easy split: spaxels) that training never saw"
for name in logOH_hard logOH_easy BPT_hard logOH_ssftt; do
    run eval_fns.py --run-dir $out/$name --part test
done

step "8/8 maps of all galaxies, figures and summary"
run map_galaxies.py --run-dir $out/logOH_hard $mine
tested=$out/logOH_hard/split/test.csv
run vis_fns.py --run-dir $out/logOH_hard \
    --plateifu $(awk -F, '!/^#/ && $1 != "plateifu" && ++n <= 3 {print $1}' $tested)
tested=$out/BPT_hard/split/test.csv
most() {  # the test galaxy with the most spaxels of a class, which has a column from the fifth on
    awk -F, -v column=$((5 + $1)) '!/^#/ && $column + 0 > n {n = $column; name = $1} END {print name}' $tested
}
run vis_fns.py --run-dir $out/BPT_hard --plateifu $(most 0) $(most 1) $(most 2)  # star-forming, composite, AGN
run -m mock.demo_summary --results $out --seconds $SECONDS
