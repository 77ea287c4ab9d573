"""The user's own preferences, as a dataset like the others. `train.py --data FILE` uses this.

The file may be in any format that beyond/convert.py reads. Each row becomes one or more pairs:
a prompt, a chosen response and a rejected one.
"""

import dataclasses
import math
import random
import time
from pathlib import Path

import torch

from beyond.convert import convert
from data import Dataset, Sizes, load_tokenizer
from dpo import Preferences
from lib.checkpoint import load_gpt
from lib.inference import LOCAL, Inference, collate, fast_response_logps, row_lengths
from lib.io import BadInput, open_user_file
from train import Training, sft_settings

FIELDS = ("prompt", "chosen", "rejected")
FEW = 30  # with fewer held-out pairs, accuracy says little


def load_pairs(
    path: Path, sizes: Sizes, seed: int, tokens: list[bytes] | None, labels: str = "bt"
) -> Dataset:
    """A tenth of the prompts are held out. pi_ref is fine-tuned on prompt + chosen of the others.

    Prompt and response are encoded separately, so that no token spans both. Responses end with the
    end token. Pairs that do not fit in the context are dropped. `labels` is how scores become
    labels: bt or argmax. Raises BadInput.
    """
    if labels == "soft":
        raise BadInput(f"{path}: --labels soft needs a known r*; use bt or argmax")
    with open_user_file(path, "preferences"):
        found, recognised = convert(path, labels, seed)
    print(recognised)
    if not any(p["prompt"][-1:].isspace() or p["chosen"][:1].isspace() for p in found):
        print("no space separates prompt and response: they are concatenated as they are")
    tokenizer = load_tokenizer(tokens)
    end = (tokenizer.eot_token,)
    pairs = []
    for pair in found:
        x, y_w, y_l = (tuple(tokenizer.encode_ordinary(pair[name])) for name in FIELDS)
        if len(x) + max(len(y_w), len(y_l)) < sizes.context:
            pairs.append((x, y_w + end, y_l + end))
    if len(pairs) < len(found):
        dropped = f"{len(found) - len(pairs):,} of {len(found):,} pairs"
        print(f"{dropped} do not fit in --context {sizes.context} and are dropped")
    prompts = sorted({x for x, _, _ in pairs})
    if len(prompts) < 3:
        few = "fewer than three different prompts"
        raise BadInput(f"{path}: {few} fit in --context {sizes.context}")
    n = min(len(prompts) - 1, max(2, math.ceil(len(prompts) / 10)))
    held_out = {x: i for i, x in enumerate(random.Random(seed).sample(prompts, n))}  # random order
    train = [pair for pair in pairs if pair[0] not in held_out]
    held = [pair for pair in pairs if pair[0] in held_out]
    held.sort(key=lambda pair: held_out[pair[0]])
    if len(held) < FEW:
        print(f"only {len(held)} pairs are held out: accuracy on them says little")
    return Dataset(
        tokens,
        eval_prompts=[list(x) for x in held_out][: sizes.eval_prompts],
        sft_texts=[[*x, *y_w] for x, y_w, _ in train],
        prompts=[],
        pairs=to_preferences(train),
        eval_pairs=to_preferences(held),
    )


def with_ref_logps(
    dataset: Dataset, reference: dict, device: torch.device, infer: Inference = LOCAL
) -> list[Preferences]:
    """dataset.pairs and dataset.eval_pairs with the log-probabilities under pi_ref."""
    pi_ref, found = infer.load(reference, device), []
    for pairs in (dataset.pairs, dataset.eval_pairs):
        logps = infer.compute_logps(pi_ref, pairs.ids, pairs.mask)
        found.append(dataclasses.replace(pairs, ref_logps=logps))
    return found


def to_preferences(pairs: list[tuple]) -> Preferences:
    """Encoded pairs as tensors. Their log-probabilities under pi_ref are still 0.

    Prompts keep their order. A response that occurs in several pairs of a prompt is one row.
    """
    numbers = {x: i for i, x in enumerate(dict.fromkeys(x for x, _, _ in pairs))}
    rows: dict[tuple, int] = {}
    for x, y_w, y_l in sorted(pairs, key=lambda pair: numbers[pair[0]]):
        for y in (y_w, y_l):
            rows.setdefault((x, y), len(rows))
    index = [[rows[x, y_w], rows[x, y_l]] for x, y_w, y_l in pairs]
    prompt = torch.tensor([numbers[x] for x, _ in rows])
    ids, mask = collate([[*x, *y] for x, y in rows], [len(x) for x, _ in rows])
    ref_logps, weight = torch.zeros(ids.shape), torch.ones(len(pairs))
    return Preferences(ids, mask, ref_logps, prompt, torch.tensor(index), weight)


def accuracy_line(point: dict) -> str:
    """The accuracy of a policy on the held-out pairs, with its interval."""
    p, pairs, prompts = (point[key] for key in ("pair_accuracy", "pairs", "pair_prompts"))
    low, high = wilson_interval(p, prompts)  # pairs of one prompt are not independent
    on = f"{pairs} pairs" if pairs == prompts else f"{pairs} pairs of {prompts} prompts"
    interval = f"95% interval {low:.2f} to {high:.2f}"
    return f"beta {point['beta']:g}: held-out accuracy {p:.2f} on {on}, {interval}"


def wilson_interval(p: float, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion p observed in n cases (Wilson 1927). It contains p."""
    z2 = 1.96**2
    half = 1.96 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = ((p + z2 / (2 * n) + side) / (1 + z2 / n) for side in (-half, half))
    return min(p, low), max(p, high)  # rounding can exclude a p of 0 or 1


def expected_time(cfg, dataset: Dataset, checkpoint: dict, device: torch.device) -> str:
    """How long training and scoring will take, estimated from one step on random tokens.

    A small step comes first, so that the time does not include start-up.
    """
    pi = load_gpt(checkpoint, device)
    ids = torch.randint(256, (8, min(pi.config.context, 256)), device=device)
    for some in (ids[:1, :32], ids):
        start = time.perf_counter()
        mask = torch.arange(some.size(1)).expand_as(some) > 0
        fast_response_logps(pi, some, mask).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - start) / ids.numel() * tokens_to_train(cfg, dataset)
    time_ = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return f"training takes about {time_} if no stage is cached"


def tokens_to_train(cfg, dataset: Dataset) -> int:
    """The approximate number of tokens in all training steps.

    Scoring the pairs with pi_ref is a forward pass, which takes a third of the time of a step.
    """
    texts, pairs = dataset.sft_texts, dataset.pairs
    steps, _, _ = sft_settings(cfg, len(texts))
    sft_epochs = steps * cfg.sft_batch_size / len(texts)
    how = Training(cfg.frozen, cfg.optimizer, cfg.lr, cfg.epochs, cfg.batch_size, cfg.seed)
    dpo_epochs = sum(map(len, how.batches(pairs))) / (int(pairs.prompt.max()) + 1)
    in_pairs = row_lengths(pairs.mask).sum()
    passes = len(cfg.beta) * dpo_epochs + 1 / 3
    return int(sft_epochs * sum(map(len, texts)) + passes * in_pairs)
