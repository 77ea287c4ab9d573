"""Preferences of the user's own, as a dataset like the others."""

import json
import math
import random
from pathlib import Path

import torch
from torch import Tensor

from data import Dataset, Sizes, load_tokenizer
from dpo import Preferences
from lib.checkpoint import load_gpt
from lib.inference import compute_logps
from lib.io import BadInput

FIELDS = ("prompt", "chosen", "rejected")


def read_pairs(path: Path) -> list[dict]:
    """Preferences from a file with one JSON object per line: strings prompt, chosen and rejected.

    Raises BadInput, which names the line.
    """
    pairs = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            json.dumps(pair, ensure_ascii=False).encode()  # fails for half a surrogate pair
        except (ValueError, RecursionError) as e:
            raise BadInput(f"{where}: is not JSON in UTF-8 ({e})") from e
        if not isinstance(pair, dict) or not all(isinstance(pair.get(n), str) for n in FIELDS):
            wanted = "the strings prompt, chosen and rejected; see python -m beyond.convert"
            raise BadInput(f"{where}: needs {wanted}")
        if not all(pair[name] for name in FIELDS) or pair["chosen"] == pair["rejected"]:
            raise BadInput(f"{where}: a string is empty, or chosen and rejected are identical")
        pairs.append({name: pair[name] for name in FIELDS})
    if not pairs:
        raise BadInput(f"{path}: is empty; expected JSON lines with prompt, chosen and rejected")
    return pairs


def load_pairs(path: Path, sizes: Sizes, seed: int, tokens: list[bytes] | None) -> Dataset:
    """A tenth of the prompts is held out. pi_ref is fine-tuned on prompt + chosen of the others.

    Prompt and response are encoded separately, so that no token spans both. Responses end with the
    end token. Pairs that do not fit in the context are dropped. Raises BadInput.
    """
    tokenizer = load_tokenizer(tokens)
    end = [tokenizer.eot_token]
    pairs = []
    for pair in (all_pairs := read_pairs(path)):
        x, y_w, y_l = (tokenizer.encode_ordinary(pair[name]) for name in FIELDS)
        if len(x) + max(len(y_w), len(y_l)) < sizes.context:
            pairs.append({"x": x, "y_w": y_w + end, "y_l": y_l + end})
    if len(pairs) < len(all_pairs):
        dropped = f"{len(all_pairs) - len(pairs):,} of {len(all_pairs):,} pairs"
        print(f"{dropped} do not fit in --context {sizes.context} and are dropped")
    prompts = sorted({tuple(p["x"]) for p in pairs})
    if len(prompts) < 2:
        raise BadInput(f"{path}: needs two different prompts that fit in --context {sizes.context}")
    held_out = set(random.Random(seed).sample(prompts, math.ceil(len(prompts) / 10)))
    train = [p for p in pairs if tuple(p["x"]) not in held_out]
    held = [p for p in pairs if tuple(p["x"]) in held_out]
    return Dataset(
        eval_prompts=[list(x) for x in prompts if x in held_out][: sizes.eval_prompts],
        unseen_texts=[p["x"] + p["y_w"] for p in held][:1000],
        sft_texts=[p["x"] + p["y_w"] for p in train],
        pairs=train,
        eval_pairs=held,
    )


def to_preferences(
    pairs: list[dict], reference: dict, device: torch.device
) -> tuple[Preferences, dict[str, int]]:
    """Encoded pairs as tensors, with log-probabilities under pi_ref, and their number.

    A response that occurs in several pairs of a prompt is one row.
    """
    rows: dict[tuple, int] = {}
    for pair in sorted(pairs, key=lambda pair: pair["x"]):
        for y in (pair["y_w"], pair["y_l"]):
            rows.setdefault((tuple(pair["x"]), tuple(y)), len(rows))
    index = [[rows[tuple(p["x"]), tuple(p[y])] for y in ("y_w", "y_l")] for p in pairs]
    numbers = {x: i for i, x in enumerate(dict.fromkeys(x for x, _ in rows))}
    prompt = torch.tensor([numbers[x] for x, _ in rows])
    ids, mask = collate(list(rows))
    ref_logps = compute_logps(load_gpt(reference, device), ids, mask)
    weight = torch.ones(len(pairs))
    preferences = Preferences(ids, mask, ref_logps, prompt, torch.tensor(index), weight)
    return preferences, {"pairs": len(pairs)}


def collate(rows: list[tuple]) -> tuple[Tensor, Tensor]:
    """Prompts and responses as ids and mask (R, T), padded on the right with 0."""
    T = max(len(x) + len(y) for x, y in rows)
    ids = torch.tensor([[*x, *y, *[0] * (T - len(x) - len(y))] for x, y in rows])
    start, stop = torch.tensor([[len(x), len(x) + len(y)] for x, y in rows]).T[..., None]
    return ids, (torch.arange(T) >= start) & (torch.arange(T) < stop)
