"""Preferences of your own: one JSON object a line, checked, encoded, and made a world."""
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import tiktoken

from data import triplet
from kit.files import BadInput, pack, reading
from kit.tokens import tokens_of


def read_pairs(path: Path) -> list[dict]:
    """Anybody's preferences: one JSON object a line with `prompt`, `chosen` and `rejected` as strings (TRL's standard
    format, and what `write_triplets` writes), and perhaps a `weight`; whatever else is there is left alone.

    Errors: BadInput, which names the line.
    """
    pairs = []
    with reading(path, "preferences"), open(path, "rb") as f:
        if not path.is_file():
            raise OSError("it is not a file, which a later run could read again")
        for k, line in enumerate(iter(lambda: f.readline(LONGEST_LINE + 1), b""), 1):
            if line.strip():
                pairs.append(pair_of(line, f"{path}, line {k}"))
    if not pairs:
        raise BadInput(f"{path}: is empty; expected one JSON object a line with prompt, chosen and rejected")
    return pairs


LONGEST_LINE = 4 << 20          # bytes


def pair_of(line: bytes, place: str) -> dict:
    """One line of `read_pairs`, checked."""
    if len(line) > LONGEST_LINE:
        raise BadInput(f"{place}: longer than {LONGEST_LINE >> 20} MB")
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()                # half of a surrogate pair is no text
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{place}: not JSON in UTF-8 ({e})") from None
    if not isinstance(row, dict):
        raise BadInput(f"{place}: not a JSON object with prompt, chosen and rejected")
    for name in ("prompt", "chosen", "rejected"):
        if name not in row:
            raise BadInput(f"{place}: has no {name}; python -m beyond.convert makes this format of others")
        if not isinstance(row[name], str):
            raise BadInput(f"{place}: {name} is not a string; python -m beyond.convert makes this format of others")
        if not row[name] and (name == "prompt" or not row.get(f"{name}_ids")):      # ours may be the end token alone
            raise BadInput(f"{place}: {name} is empty")
    if row["chosen"] == row["rejected"]:
        raise BadInput(f"{place}: chosen and rejected are identical, which says nothing; leave the pair out")
    weight = row.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise BadInput(f"{place}: weight is not a number above zero")
    return {name: row[name] for name in ("prompt", "chosen", "rejected")} | dict(weight=float(weight))


def encode_pairs(pairs: list[dict], tokenizer: tiktoken.Encoding, context: int, K: int = 4) -> list[dict]:
    """Pairs of `read_pairs` as triplets, without those that do not fit in the context. Prompt and response are encoded
    apart, since their ids are what is joined: no token may reach across. Each response ends with the end token. Pairs of
    one prompt share a number, and so their forward rows, as long as they have no more than K distinct responses."""
    groups: dict[str, tuple[int, set[str]]] = {}        # each prompt's last number, and what responses have it
    triplets, numbers = [], 0
    for pair in pairs:
        x, y_w, y_l = (tokenizer.encode_ordinary(pair[name]) for name in ("prompt", "chosen", "rejected"))
        if len(x) + max(len(y_w), len(y_l)) < context:
            new = {pair["chosen"], pair["rejected"]}
            number, ys = groups.get(pair["prompt"], (None, set()))
            if number is None or len(ys | new) > K:
                number, ys, numbers = numbers, set(), numbers + 1
            groups[pair["prompt"]] = number, ys | new
            y_w, y_l = y_w + [tokenizer.eot_token], y_l + [tokenizer.eot_token]
            triplets.append(triplet(x, y_w, y_l, tokenizer, pair["weight"], number))
    return triplets


def own_world(settings, choose: Callable[[list[str]], tiktoken.Encoding]) -> dict:
    """Preferences from a file. A tenth of the prompts is held out; pi_ref learns from prompt + chosen of the others."""
    pairs = read_pairs(Path(settings.data))
    tokenizer = choose([pair[name] for pair in pairs for name in ("prompt", "chosen", "rejected")])
    prompts = sorted({pair["prompt"] for pair in pairs})
    held_prompts = set(random.Random(settings.seed).sample(prompts, math.ceil(len(prompts) / 10)))
    both = [[pair for pair in pairs if (pair["prompt"] in held_prompts) == held] for held in (False, True)]
    tuned, held = (encode_pairs(some, tokenizer, settings.context) for some in both)
    if fell := len(pairs) - len(tuned) - len(held):
        print(f"{fell:,} of {len(pairs):,} pairs do not fit in {settings.context} tokens and are left out (see --context)")
    if not tuned or not held:
        raise BadInput(f"{settings.data}: {len(tuned)} pairs to train on and {len(held)} with other prompts to hold out; both "
                       "need at least one" + f", so --context must be more than {settings.context}" * (fell > 0))
    asked = list(dict.fromkeys(tuple(t["prompt_ids"]) for t in held))[:settings.held_out]
    fine_tune, unseen = (pack([t["prompt_ids"] + t["chosen_ids"] for t in some]) for some in (tuned, held))
    return dict(tokens=tokens_of(tokenizer), fine_tune=fine_tune, held_out=pack(asked), unseen=unseen,
                pairs=both[0], held_pairs=both[1])
