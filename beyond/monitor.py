"""A look at a policy while it trains. train.py calls it ten times in each training run."""

import contextlib
import math

import torch
from tqdm import tqdm

import dpo
from data import Dataset
from lib.evaluate import EvalSet, agreement, measure
from lib.inference import LOCAL, Inference
from lib.io import BadInput
from model import GPT


@torch.no_grad()
def monitor(
    pi_theta: GPT,
    pi_ref: GPT,
    loss: dpo.Loss,
    tenth: int,
    dataset: Dataset,
    eval_set: EvalSet,
    seed: int,
    infer: Inference = LOCAL,
) -> dict[str, object]:
    """Metrics of about 128 held-out completions and of fresh samples, and two of the samples.

    The samples are printed after 1, 4, 7 and 10 tenths of the training. The names of the metrics of
    held-out pairs begin with "held_out_". They are missing for losses that take other pairs.
    """
    pairs, found = eval_set.pairs, {}
    n_prompts = int(pairs.prompt.max()) + 1
    some = torch.arange(math.ceil(128 / len(pairs.ids) * n_prompts))
    with contextlib.suppress(BadInput):  # raised by losses that take other pairs
        metrics = agreement(pi_theta, pairs.select(some), None, loss, infer)
        found = {f"held_out_{name}": value for name, value in metrics.items()}
    n = min(32, max(4, 1536 // pi_ref.config.context))  # fewer of longer texts
    how = dataset, seed, "sampling pi_theta", infer
    (ids, mask, _), shown, values = measure(pi_theta, dataset.eval_prompts[:n], 1, *how)
    values["kl"] = infer.mean_kl(pi_theta, pi_ref, ids, mask)
    texts = shown["texts"][:2]
    if "rewards" in shown:
        texts = [f"r* {r:+.2f} | {text}" for r, text in zip(shown["rewards"], texts, strict=False)]
    for text in texts if tenth % 3 == 1 else []:
        tqdm.write(f"{tenth:3}0% | {text}")
    means = {name: value.double().mean().item() for name, value in values.items()}
    return found | means | {"samples": texts}
