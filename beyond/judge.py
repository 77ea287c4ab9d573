"""Judge the policies of an IMDb run with a different kind of classifier from r*.

    python -m beyond.judge out [--imdb aclImdb_v1.tar.gz] [--samples 16]

r* labelled the preferences, so a policy could exploit its errors. The judge is used only for
this comparison. It shares no features, tokens or training recipe with r*: it is naive Bayes on the
presence of n-grams of one to three of pi_ref's BPE tokens, reweighted by logistic regression on
the log-count ratios (NB-SVM, Wang and Manning 2012). It is trained on whole reviews and on their
first 40 tokens, and tested on test reviews.

For pi_ref and each policy, the table has the correlation between r* and the judge's logit over
samples, the mean of each in nats, and P(positive) and the win rate over pi_ref by each. It
is also written to out/judge.json, with the judge's accuracy on test reviews.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from beyond.common import markdown
from beyond.sample import load_models, load_stage, read_config
from data import load_tokenizer
from lib import cli
from lib.inference import generate
from lib.io import BadInput, atomic_write, cache_dir, open_user_file
from lib.stage import Stage
from train import load_reviews

N_FEATURES = 1 << 20
SHORT = 40  # tokens


def ngrams(ids: list[int]) -> np.ndarray:
    """The hashed n-grams (n = 1 to 3) of a text, each once."""
    a = np.array([*ids, 0, 0], dtype=np.int64) + 1
    two = a[:-1] * 8191 + a[1:]
    runs = np.concatenate((a[:-2], two[:-1] * 3 + 1, (two[:-1] * 131071 + a[2:]) * 3 + 2))
    return np.unique(runs * 2654435761 % N_FEATURES)


def bag(texts: list[np.ndarray], weight: Tensor) -> Tensor:
    """The sum of the weights of each text's features, (n,)."""
    n = np.array([len(text) for text in texts])
    offsets, ids = torch.from_numpy(np.cumsum(n) - n), torch.from_numpy(np.concatenate(texts))
    return F.embedding_bag(ids, weight[:, None], offsets, mode="sum")[:, 0]


def train_judge(reviews: dict[str, list[str]], tokens: list[bytes]) -> dict:
    """Returns the weights of the features, the bias, and the accuracy on test reviews."""
    tokenizer = load_tokenizer(tokens)

    def encode(texts: list[str], length: int | None) -> list[np.ndarray]:
        return [ngrams(ids[:length]) for ids in tokenizer.encode_ordinary_batch(texts)]

    texts, target = [], []
    for length in (None, SHORT):
        for name, y in (("train/pos", 1.0), ("train/neg", 0.0)):
            texts += encode(reviews[name], length)
            target += [y] * len(reviews[name])
    target = torch.tensor(target)
    counts = []
    for y in (1, 0):
        found = [text for text, t in zip(texts, target, strict=True) if t == y]
        counts.append(torch.from_numpy(np.bincount(np.concatenate(found), minlength=N_FEATURES)))
    p, q = (1 + count for count in counts)
    ratio = (p / p.sum()).log() - (q / q.sum()).log()
    ratio[(counts[0] + counts[1]) < 5] = 0  # too rare to tell

    scale = torch.full((N_FEATURES,), 0.1, requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([scale, bias], lr=0.003)
    rng = np.random.default_rng(0)
    for _ in tqdm(range(3), "training the judge"):
        for rows in np.array_split(rng.permutation(len(texts)), max(1, len(texts) // 500)):
            logits = bag([texts[i] for i in rows], (scale * ratio).float()) + bias
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits, target[rows]).backward()
            optimizer.step()
    weight, bias = (scale * ratio).float().detach(), bias.item()
    found = {"weight": weight, "bias": bias}
    for name, length in (("accuracy", None), ("accuracy_short", SHORT)):
        positive = bag(encode(reviews["test/pos"], length), weight) + bias > 0
        negative = bag(encode(reviews["test/neg"], length), weight) + bias < 0
        found[name] = torch.cat((positive, negative)).double().mean().item()
    return found


def judge(folder: Path, imdb: Path | None, samples: int) -> dict:
    """The judge's accuracy, and a row for each policy, from new samples. Raises BadInput."""
    config = read_config(folder)
    if config.get("data") != "imdb" or not config.get("beta"):
        raise BadInput(f"{folder}: is not a finished run with --data imdb")
    models = load_models(folder, torch.device("cpu"))
    shared = Stage(cache_dir() / "imdb")
    tokens = load_stage(folder / "reference.pt")["tokens"]
    made = shared("judge", train_judge, load_reviews(imdb, shared), tokens)
    about = "accuracy {accuracy:.3f} on test reviews, {accuracy_short:.3f} on their first 40 tokens"
    print("the judge:", about.format(**made))
    prompts = load_stage(folder / "dataset.pt").eval_prompts
    rows, first = [], None
    for name, pi in models.policies.items():
        _, texts = generate(pi, prompts, samples, models.tokenizer, 0, f"judging {name}")
        grams = [ngrams(ids) for ids in models.tokenizer.encode_ordinary_batch(texts)]
        r, other = models.reward(texts), bag(grams, made["weight"]) + made["bias"]
        first = first or (r, other)
        row = {"policy": name, "correlation": torch.corrcoef(torch.stack((r, other)))[0, 1].item()}
        for judge, value, ref in (("r*", r, first[0]), ("judge", other, first[1])):
            row[judge] = value.mean().item()
            row[f"P(positive) by {judge}"] = value.sigmoid().mean().item()
            row[f"win rate by {judge}"] = ((value - ref).sign() + 1).mean().item() / 2
        rows.append(row)
    return {"accuracy": made["accuracy"], "accuracy_short": made["accuracy_short"], "rows": rows}


def table(rows: list[dict]) -> str:
    cells = [[v if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in rows]
    return markdown(list(rows[0]), cells)


def main(argv: list[str]) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="beyond.judge", description=__doc__, formatter_class=style)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--imdb", type=Path, help="the IMDb archive")
    parser.add_argument("--samples", type=cli.at_least(1), default=16, metavar="N")
    args = parser.parse_args(argv)
    try:
        with open_user_file(args.run, "a run of train.py"):
            found = judge(args.run, args.imdb, args.samples)
        atomic_write(args.run / "judge.json", json.dumps(found, indent=1).encode())
        print(table(found["rows"]))
    except (BadInput, OSError) as e:
        print(f"beyond.judge: {' '.join(str(e).split())[:500]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
