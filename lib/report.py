"""The results of a run as JSON, table, figures and page.

python -m lib.report out        # makes them again for a finished run
"""

import json
import sys
from pathlib import Path

from data import Dataset, load_tokenizer
from lib.evaluate import EvalSet, frontier_rows
from lib.extension import find
from lib.io import BadInput, atomic_write, open_user_file

TABLE = {  # the column of each metric in results.json
    "beta": "beta", "kl": "KL", "optimal_kl": "optimal KL", "gain": "gain", "reward": "reward",
    "optimal_reward": "optimal reward", "p_positive": "P(positive)", "win_rate": "win rate",
    "length": "length", "pair_accuracy": "accuracy", "reward_slope": "slope", "reward_r2": "R2",
    "fraction_of_optimal": "fraction",
}  # fmt: skip


def results(cfg, dataset: Dataset, eval_set: EvalSet, tokens, runs: dict) -> dict:
    """What was measured, as in results.json. runs: {beta: (policy, evaluation)}."""
    known, tokenizer = dataset.reward is not None, load_tokenizer(tokens)
    rewards = eval_set.rewards[:, 0].tolist() if known else [None] * len(eval_set.texts)
    columns = {"pi_ref": {"texts": eval_set.texts, "rewards": rewards}}
    columns |= {f"beta {beta:g}": evaluation for beta, (_, evaluation) in runs.items()}
    return {
        "config": vars(cfg) | {"init": Path(cfg.init).name, "imdb": cfg.imdb and cfg.imdb.name},
        "method": cfg.loss.split(":")[-1] if ":" in cfg.loss else cfg.loss.upper(),
        "title": ", ".join([Path(cfg.data).name, *[f"{cfg.labels} labels"] * known]),
        "reference": eval_set.about,
        "points": [evaluation["point"] for _, evaluation in runs.values()],
        "frontier": frontier_rows(eval_set.rewards) if known else [],
        "columns": list(columns),
        "samples": [
            {"prompt": tokenizer.decode(x)}
            | {
                name: [column[name][i] for column in columns.values()]
                for name in ("texts", "rewards")
            }
            for i, x in enumerate(dataset.eval_prompts[:12])
        ],
        "curves": {f"{beta:g}": policy["curves"] for beta, (policy, _) in runs.items()},
    }


def write_report(out: Path, results: dict):
    """Write results.json, and the figures, page and samples that beyond/page.py makes of it."""
    plain = json.loads(json.dumps(results, default=str), parse_constant=lambda name: None)  # no NaN
    atomic_write(out / "results.json", json.dumps(plain, indent=1).encode())
    find("write_page", "beyond.page")(out, plain)


def summary(results: dict) -> str:
    """The table of a run, and how close it came to the optimum."""
    points = results["points"]
    names = [name for name in TABLE if name in points[0]]
    rows = [[TABLE[name] for name in names]]
    rows += [["-" if p[name] is None else f"{p[name]:.3g}" for name in names] for p in points]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    fractions = [p["fraction_of_optimal"] for p in points if p.get("fraction_of_optimal")]
    if fractions:
        low, high = f"{min(fractions):.0%}", f"{max(fractions):.0%}"
        share = low if low == high else f"{low} to {high}"
        table.append(f"{results['method']} attains {share} of the largest possible gain at its KL.")
    if not results["frontier"]:
        table += map(find("accuracy_line", "beyond.custom_data"), points)
    return "\n".join(table)


def main(argv: list[str]) -> int:
    folder = Path(argv[-1] if argv else "out")
    try:
        with open_user_file(folder / "results.json", "the results of a run"):
            results = json.loads((folder / "results.json").read_text("utf-8"))
            write_report(folder, results)
        print(summary(results))
    except BadInput as e:
        print(f"lib.report: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
