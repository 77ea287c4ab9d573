#!/usr/bin/env bash
# Runs the commands behind the results in README.md and beyond/README.md, except the searches for
# hyperparameters, the timed runs and the comparison of processors (docs/speed.md). Runs one command
# per core at a time, each with one thread (JOBS=1: one at a time). results/NAME.log has the output of a run.
# You can interrupt the script and run it again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

commands() { # a line for each run: the name of its folder, and the arguments of python
    for seed in 0 1 2; do
        echo figure2-imdb-bt-$seed -m beyond.figure2 --data imdb --seed $seed
        # without label noise, each beta leads to a larger KL
        echo figure2-imdb-argmax-$seed -m beyond.figure2 --data imdb --labels argmax --seed $seed \
            --beta 2.6 2.05 1.62 1.28 1 0.78 0.61 0.47 0.37 0.29 \
            --ppo-beta 4.3 3.3 2.5 1.9 1.45 1.1 0.73 0.48 0.27
        # PPO with four times as many samples
        echo figure2-imdb-long-$seed -m beyond.figure2 --data imdb --labels argmax --seed $seed \
            --methods DPO PPO --beta 2.6 2.05 1.62 1.28 1 \
            --ppo-beta 4 3 2.25 1.65 --ppo-iterations 120 --ppo-lr 7.5e-5
        echo figure2-long-$seed -m beyond.figure2 --seed $seed --methods DPO PPO \
            --ppo-iterations 160 --ppo-lr 5e-4
    done
    for seed in 0 1 2; do
        echo imdb-$seed train.py --data imdb --seed $seed --beta 0.1 0.18 0.3 0.55 1 2 \
            --ref-samples 384 --eval-samples 40
        for module in figure2 explain compare ablations; do
            echo $module-$seed -m beyond.$module --seed $seed
        done
    done
    echo toy-six-0 train.py --beta 0.35 0.5 0.7 1 1.4 2 # the README's figure
    for seed in 0 1 2 3 4 5 6 7 8 9; do
        echo toy-$seed train.py --seed $seed
        echo four-toy-$seed train.py --seed $seed --completions 4 --prompts 4000 --batch-size 64
    done
}

commands | xargs -L 1 -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" bash -c \
    'echo "$0"; python "$@" --out "results/$0" >"results/$0.log" 2>&1 || { tail -n 1 "results/$0.log"; false; }'
for seed in 0 1 2; do
    python -m beyond.judge results/imdb-$seed
done
for name in figure2 figure2-long figure2-imdb-bt figure2-imdb-argmax figure2-imdb-long explain compare ablations; do
    python -m beyond.${name%%-*} --summary results/$name-[0-9]   # prints the tables of results/$name.md, draws $name.png
done
