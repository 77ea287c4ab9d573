"""Preferences of the user's own, as a dataset like the others. `train.py --data FILE` uses this.

The file has any format that beyond/convert.py reads. Each row becomes pairs of a prompt, a chosen
and a rejected response.
"""

import math
import random
from pathlib import Path

import torch

from beyond.convert import convert
from data import Dataset, Sizes, load_tokenizer
from dpo import Preferences
from lib.inference import collate
from lib.io import BadInput, open_user_file

FIELDS = ("prompt", "chosen", "rejected")
FEW = 30  # with fewer held-out pairs, accuracy says little


def load_pairs(path: Path, sizes: Sizes, seed: int, tokens: list[bytes] | None) -> Dataset:
    """A tenth of the prompts is held out. pi_ref is fine-tuned on prompt + chosen of the others.

    Prompt and response are encoded separately, so that no token spans both. Responses end with the
    end token. Pairs that do not fit in the context are dropped. Raises BadInput.
    """
    with open_user_file(path, "preferences"):
        found, recognised = convert(path, "bt", seed)
    print(recognised)
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
    if len(prompts) < 2:
        raise BadInput(f"{path}: needs two different prompts that fit in --context {sizes.context}")
    held_out = set(random.Random(seed).sample(prompts, math.ceil(len(prompts) / 10)))
    train = [pair for pair in pairs if pair[0] not in held_out]
    held = [pair for pair in pairs if pair[0] in held_out]
    if len(held) < FEW:
        print(f"only {len(held)} pairs are held out: their accuracy says little")
    return Dataset(
        eval_prompts=[list(x) for x in prompts if x in held_out][: sizes.eval_prompts],
        unseen_texts=[[*x, *y_w] for x, y_w, _ in held][:1000],
        sft_texts=[[*x, *y_w] for x, y_w, _ in train],
        pairs=to_preferences(train),
        eval_pairs=to_preferences(held),
    )


def to_preferences(pairs: list[tuple]) -> Preferences:
    """Encoded pairs as tensors. Their log-probabilities under pi_ref are still 0.

    A response that occurs in several pairs of a prompt is one row.
    """
    rows: dict[tuple, int] = {}
    for x, y_w, y_l in sorted(pairs, key=lambda pair: pair[0]):
        for y in (y_w, y_l):
            rows.setdefault((x, y), len(rows))
    index = [[rows[x, y_w], rows[x, y_l]] for x, y_w, y_l in pairs]
    numbers = {x: i for i, x in enumerate(dict.fromkeys(x for x, _ in rows))}
    prompt = torch.tensor([numbers[x] for x, _ in rows])
    ids, mask = collate([[*x, *y] for x, y in rows], [len(x) for x, _ in rows])
    ref_logps, weight = torch.zeros(ids.shape), torch.ones(len(pairs))
    return Preferences(ids, mask, ref_logps, prompt, torch.tensor(index), weight)
