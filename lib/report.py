"""The results of a run, as results.json. beyond/page.py makes the table, figures and page of it.

python -m lib.report out        # makes them again for a finished run
"""

import json
import sys
from pathlib import Path

from data import Dataset, load_tokenizer
from lib.evaluate import EvalSet, optimal_frontier
from lib.extension import find
from lib.io import BadInput, atomic_write, open_user_file


def write_results(folder: Path, cfg, dataset: Dataset, eval_set: EvalSet, runs: dict, more: dict):
    """Write results.json. runs: {beta: (policy, evaluation)}."""
    tokenizer = load_tokenizer(dataset.tokens)
    frontier = {} if dataset.reward is None else optimal_frontier(eval_set.rewards)
    results = {
        "config": vars(cfg) | {"init": Path(cfg.init).name, "imdb": cfg.imdb and cfg.imdb.name},
        "reference": eval_set.about,
        "points": [evaluation["point"] for _, evaluation in runs.values()],
        "frontier": {
            name: values.reshape(len(values), -1).mean(1).tolist()
            for name, values in frontier.items()
        },
        "prompts": [tokenizer.decode(x) for x in dataset.eval_prompts[:12]],
        "samples": {"pi_ref": eval_set.shown}
        | {f"beta {beta:g}": evaluation["shown"] for beta, (_, evaluation) in runs.items()},
        "curves": {f"{beta:g}": policy["curves"] for beta, (policy, _) in runs.items()},
    }
    text = json.dumps(results | more, default=str, indent=1)
    atomic_write(folder / "results.json", text.encode())


def draw(folder: Path) -> str:
    """Draw the figures and the page of results.json. Returns the table. Raises BadInput."""
    with open_user_file(folder / "results.json", "the results of a run"):
        results = json.loads((folder / "results.json").read_text("utf-8"))
        return find("write_page", "beyond.page")(folder, results)


def main(argv) -> int:
    try:
        print(draw(Path(argv[-1] if argv else "out")))
    except BadInput as e:
        print(f"lib.report: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
