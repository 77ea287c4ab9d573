"""Train r* of the IMDb dataset, a sentiment classifier, and write lib/imdb_reward.json.

    python -m beyond.reward [--imdb aclImdb_v1.tar.gz]

Logistic regression on the words of the 25,000 labelled training reviews takes five seconds. The
file also has the accuracy on the 25,000 test reviews. The file is committed, so train.py does not
need this command.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import WordReward, words_of
from lib import cli
from lib.io import BadInput, atomic_write, cache_dir
from lib.stage import Stage
from train import REWARD, load_reviews


def train_classifier(positive: list[str], negative: list[str], epochs: int = 6) -> WordReward:
    """Minimise the cross-entropy with Adagrad. Words in fewer than 20 reviews are ignored.

    A quarter of the examples are whole reviews. The others are snippets of 8 to 64 words, because
    r* will judge openings of reviews. The logit is the sum of the weights of the n known words,
    divided by sqrt(n), plus a bias.
    """
    rng = np.random.default_rng(0)
    texts = [words_of(text) for text in positive + negative]
    counts = Counter(word for words in texts for word in set(words))
    known = sorted(word for word, n in counts.items() if n >= 20)
    index = {word: i for i, word in enumerate(known)}
    weight = torch.zeros(len(known), 1, requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    target = (torch.arange(len(texts)) < len(positive)).float()
    optimizer = torch.optim.Adagrad([weight, bias], lr=0.3)
    for _ in tqdm(range(epochs), "training a sentiment classifier"):
        for rows in np.array_split(rng.permutation(len(texts)), max(1, len(texts) // 256)):
            snippets = [snippet(texts[i], rng) for i in rows]
            found = [[index[word] for word in words if word in index] for words in snippets]
            logits = scaled_sum(found, weight) + bias
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits, target[rows]).backward()
            optimizer.step()
    weights = (round(value, 4) for value in weight[:, 0].tolist())
    return WordReward(dict(zip(known, weights, strict=True)), round(bias.item(), 4), True)


def scaled_sum(texts: list[list[int]], weight: Tensor) -> Tensor:
    """The sum of the weights of each text's n words, divided by sqrt(n)."""
    n = torch.tensor([len(ids) for ids in texts])
    ids = torch.tensor([i for ids in texts for i in ids], dtype=torch.long)
    return F.embedding_bag(ids, weight, n.cumsum(0) - n, mode="sum")[:, 0] / n.clamp(min=1).sqrt()


def snippet(words: list[str], rng: np.random.Generator) -> list[str]:
    n = len(words) if rng.random() < 0.25 else int(rng.integers(8, 65))
    start = int(rng.integers(0, max(1, len(words) - n + 1)))
    return words[start : start + n]


def accuracy(reward: WordReward, reviews: dict[str, list[str]]) -> float:
    """On the test reviews."""
    right = torch.cat((reward(reviews["test/pos"]) > 0, reward(reviews["test/neg"]) < 0))
    return right.double().mean().item()


def main(argv: list[str]) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="beyond.reward", description=__doc__, formatter_class=style)
    parser.add_argument("--imdb", type=Path, help="the IMDb archive")
    args = parser.parse_args(argv)
    try:
        reviews = load_reviews(args.imdb, Stage(cache_dir() / "imdb"))
        reward = train_classifier(reviews["train/pos"], reviews["train/neg"])
        found = {"accuracy": accuracy(reward, reviews), **vars(reward)}
        atomic_write(REWARD, json.dumps(found, indent=0).encode())
        print(f"accuracy on test reviews {found['accuracy']:.4f}; {REWARD.name} was written")
    except (BadInput, OSError) as e:
        print(f"beyond.reward: {' '.join(str(e).split())[:500]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
