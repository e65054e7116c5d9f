#!/usr/bin/env bash
# The whole pipeline, top to bottom, on simulated galaxies: the same commands serve real ones.
#   simulate -> cubes and labels -> splits -> statistics -> patches -> train -> evaluate -> maps and figures
# Writes data/demo/ (a data folder) and results/demo/ (runs, figures, summary.json).
# Re-running starts over; everything is seeded.   Usage: PYTHON=.venv/bin/python bash demo.sh
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}
data=data/demo
out=results/demo
galaxies=36   # 19-fibre bundles, the smallest: 34 x 34 spaxels each
seed=1

rm -rf "$data" "$out"
mkdir -p "$out"
export MANGA_DATA_DIR=$data
step() { printf '\n== %s\n' "$*"; }
run() { printf '$ python %s\n' "$*"; "$python" "$@"; }

step "1/8 simulate $galaxies galaxies in the archive's format"
run mock_manga.py --n-galaxies $galaxies --bundles 19 --seed $seed --jobs 2

step "2/8 FITS -> H5 cubes and label maps (gas velocity removed, so that lines stand still)"
run cube_processing.py --remove-gas-velocity --no-splits

step "3/8 splits: whole galaxies held out (hard), and spaxels of shown galaxies (easy, for comparison)"
for task in logOH BPT; do
    run create_data_splits.py --label-task $task --fractions 0.6 0.15 0.25 --seed $seed
done
run create_easy_data_splits.py --label-task logOH --fractions 0.6 0.15 0.25 --seed $seed

step "4/8 principal components of each split's training spectra"
for split in hard_logOH hard_BPT easy_logOH; do
    run calc_data_stats.py --split-dir $split --n-components 10
done

step "5/8 patch files (training also cuts patches from cubes; this run reads the files)"
run cube_patch_processing.py --label-tasks logOH --patch-norms PCA --patch-size 7 \
    --split-dir hard_logOH

step "6/8 train"
train() { run run_SSFTT_training.py --patch-norm PCA --patch-size 7 --augment --epochs 20 "$@"; }
train --label-task logOH --split-dir hard_logOH --source patches --run-dir $out/logOH_hard
train --label-task logOH --split-dir easy_logOH --run-dir $out/logOH_easy
train --label-task BPT --split-dir hard_BPT --run-dir $out/BPT_hard

step "7/8 evaluate on galaxies (easy: spaxels) that training never saw"
for name in logOH_hard logOH_easy BPT_hard; do
    run eval_fns.py --run-dir $out/$name --part test
done

step "8/8 maps of all galaxies, figures and summary"
run map_galaxies.py --run-dir $out/logOH_hard
for name in logOH_hard BPT_hard; do
    shown=$(awk -F, '!/^#/ && $1 != "plateifu" {print $1; if (++n == 2) exit}' \
        $out/$name/split/test.csv)
    run vis_fns.py --run-dir $out/$name --plateifu $shown
done
run demo_summary.py --results $out --seconds $SECONDS
