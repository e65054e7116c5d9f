#!/usr/bin/env bash
# The whole pipeline on simulated galaxies; the same commands serve real ones.
#   simulate -> cubes and labels -> splits -> statistics -> patches -> train -> evaluate -> maps
# Writes data/demo/ (a data folder) and results/demo/ (runs, figures, summary.json). Deletes nothing: it
# makes its own galaxies in data/demo/ again and moves an earlier results/demo/ aside. Seeded: on one
# machine, every run gives the same numbers, unless you have put galaxies of your own into data/demo/.
#   PYTHON=.venv/bin/python bash demo.sh
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}
data=data/demo
out=results/demo
galaxies=36   # 19-fibre bundles, the smallest: 34 x 34 spaxels per galaxy
seed=1

if [ -e "$out" ]; then
    mv "$out" "$out-before-$(date +%Y%m%dT%H%M%S)"
fi
mkdir -p "$out"
export MANGA_DATA_DIR=$data
step() { printf '\n== %s\n' "$*"; }
run() { printf '$ python %s\n' "$*"; "$python" "$@"; }

step "1/8 simulate $galaxies galaxies in the archive's format"
run mock_manga.py --n-galaxies $galaxies --bundles 19 --seed $seed --jobs 2 --overwrite

step "2/8 FITS -> H5 cubes and label maps (gas velocity removed: lines at rest in every spaxel)"
for plate in $(seq 13001 $((13000 + galaxies / 2))); do
    printf '%s-1901\n%s-1902\n' "$plate" "$plate"
done > $out/galaxies.txt
run cube_processing.py --galaxy-list $out/galaxies.txt --no-splits --overwrite

step "3/8 splits: whole galaxies held out (hard); spaxels of training galaxies (easy, to compare)"
for task in logOH BPT; do
    run create_data_splits.py --label-task $task --fractions 0.6 0.15 0.25 --seed $seed --overwrite
done
run create_easy_data_splits.py --label-task logOH --fractions 0.6 0.15 0.25 --seed $seed --overwrite

step "4/8 statistics: principal components of the training spectra of each split"
for split in hard_logOH hard_BPT easy_logOH; do
    run calc_data_stats.py --split-dir $split --n-components 10 --overwrite
done

step "5/8 patch files (optional: by default, training packs the cubes and reads those)"
run cube_patch_processing.py --label-tasks logOH --patch-norms PCA --patch-size 7 \
    --split-dir hard_logOH --overwrite

step "6/8 train, patch by patch (the first run from patch files, the others from packed cubes)"
train() { run run_SSFTT_training.py --cutout 1 --epochs 20 --patience 0 "$@"; }
train --label-task logOH --split-dir hard_logOH --source patches --run-dir $out/logOH_hard
train --label-task logOH --split-dir easy_logOH --run-dir $out/logOH_easy
train --label-task BPT --split-dir hard_BPT --run-dir $out/BPT_hard

step "7/8 evaluate on galaxies (easy split: spaxels) that training never saw"
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
run -m mock.demo_summary --results $out --seconds $SECONDS
