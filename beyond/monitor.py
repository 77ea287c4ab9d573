"""Metrics of the policy during training. train.py records them after each tenth of the steps."""

import contextlib
import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import dpo
from data import Dataset
from lib.evaluate import EvalSet, agreement, measure
from lib.inference import LOCAL, Inference
from lib.io import BadInput, atomic_write
from model import GPT


@dataclass(frozen=True)
class Monitor:
    """Measures a policy on held-out prompts and pairs, and keeps the curves in a CSV file."""

    dataset: Dataset
    eval_set: EvalSet
    seed: int
    path: Path  # of the curves

    def __getstate__(self) -> dict:
        """What a stage's key depends on: not the path, which changes no result."""
        return {name: value for name, value in vars(self).items() if name != "path"}

    def __call__(self, pi_theta: GPT, pi_ref: GPT, loss: dpo.Loss, rows: list[dict], steps: int):
        """After each tenth of the steps, add metrics to the last row, and write the curves so far.

        Each row is a step. Two samples are printed after 10, 40, 70 and 100% of training.
        """
        tenth = tenth_ending(len(rows), steps)
        if not tenth:
            return
        found, texts = self.look(pi_theta, pi_ref, loss)
        for text in texts if tenth % 3 == 1 else []:
            tqdm.write(f"{tenth:3}0% | KL {found['kl']:.2f} | {' '.join(text.split())[:200]}")
        rows[-1] |= found
        names = ["step", *rows[-1]]
        writer = csv.DictWriter(file := io.StringIO(newline=""), names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"step": step} | row for step, row in enumerate(rows, 1))
        atomic_write(self.path, file.getvalue().encode())
        rows[-1]["samples"] = texts

    @torch.no_grad()
    def look(
        self, pi_theta: GPT, pi_ref: GPT, loss: dpo.Loss, infer: Inference = LOCAL
    ) -> tuple[dict[str, float], list[str]]:
        """Metrics of about 128 held-out completions and of fresh samples, and two of the samples.

        The names of the metrics of held-out pairs begin with "held_out_". They are missing for
        losses that raise BadInput for these pairs.
        """
        pairs, found = self.eval_set.pairs, {}
        n_prompts = int(pairs.prompt.max()) + 1
        some = torch.arange(math.ceil(128 / len(pairs.ids) * n_prompts))
        with contextlib.suppress(BadInput):  # raised by losses that take other pairs
            metrics = agreement(pi_theta, pairs.select(some), None, loss, infer)
            found = {f"held_out_{name}": value for name, value in metrics.items()}
        n = min(32, max(4, 1536 // pi_ref.config.context))  # fewer if texts are longer
        how = self.dataset, self.seed, "sampling pi_theta", infer
        (ids, mask, _), shown, values = measure(pi_theta, self.dataset.eval_prompts[:n], 1, *how)
        values["kl"] = infer.mean_kl(pi_theta, pi_ref, ids, mask)
        texts = shown["texts"][:2]
        if "rewards" in shown:
            texts = [f"r* {r:+.2f} | {text}" for r, text in zip(shown["rewards"], texts)]  # noqa: B905
        return found | {name: v.double().mean().item() for name, v in values.items()}, texts


def tenth_ending(step: int, steps: int) -> int:
    """The tenth of the training, 1 to 10, that ends with this step, or 0."""
    tenth = step * 10 // steps
    return tenth if tenth > (step - 1) * 10 // steps else 0
