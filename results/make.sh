#!/usr/bin/env bash
# Runs the commands behind the results in README.md and beyond/README.md, one after the other, except
# the searches for hyperparameters, the timed runs and the comparison of processors (docs/speed.md).
# It can be interrupted and run again.
# Set IMDB to the path of the archive to skip the download.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 0 1 2 3 4 5 6 7 8 9; do
    python train.py --seed $seed --out results/toy-$seed
    python train.py --seed $seed --completions 4 --prompts 4000 --batch-size 64 --out results/four-toy-$seed
done
for seed in 0 1 2; do
    python train.py --data imdb ${IMDB:+--imdb "$IMDB"} --seed $seed --beta 0.1 0.18 0.3 0.55 1 2 \
        --ref-samples 384 --out results/imdb-$seed
    python -m beyond.judge results/imdb-$seed ${IMDB:+--imdb "$IMDB"}
    python -m beyond.explain --seed $seed --out results/explain-$seed
    python -m beyond.compare --seed $seed --out results/compare-$seed
    python -m beyond.ablations --seed $seed --out results/ablations-$seed
    python -m beyond.figure2 --seed $seed --out results/figure2-$seed
    for labels in bt argmax; do
        python -m beyond.figure2 --data imdb ${IMDB:+--imdb "$IMDB"} --labels $labels --seed $seed \
            --out results/figure2-imdb-$labels-$seed
    done
done
for name in figure2 figure2-imdb-bt figure2-imdb-argmax explain compare ablations; do
    python -m beyond.${name%%-*} --summary results/$name-[0-9]   # the tables of results/$name.md, and $name.png
done
