"""Pretrain pi_ref, the small GPT that the IMDb experiment starts from.

    python -m beyond.pretrain --imdb aclImdb_v1.tar.gz --out pi_ref

Texts are runs of whole sentences of the 75,000 training reviews of the Large Movie Review Dataset
(Maas et al. 2011), starting at any sentence: as many as fit in the context, then the end token.
The last steps see only openings of reviews, because the experiment uses those. No test reviews
are used for training, because the experiment takes its prompts from them. Muon updates the
matrices of the blocks, AdamW the rest.

A run can be stopped at any time; the same command continues it from its last checkpoint, and ends
with the same weights. The result, pi_ref.pt, has its weights in bfloat16.
"""

import argparse
import io
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from beyond.bpe import learn_tokenizer
from beyond.custom_model import read_checkpoint
from beyond.muon import Muon
from data import cut_prompts, decode_rows, load_tokenizer, openings, read_imdb
from lib import cli
from lib.checkpoint import load_gpt, to_checkpoint
from lib.inference import collate, compute_logps, fast_response_logps, generate
from lib.io import BadInput, atomic_write, open_user_file, sha256
from lib.optim import bf16_supported
from model import GPT, GPTConfig

CONTEXT = 48  # tokens
ROUND = 100  # steps whose texts are drawn together
ROUNDS_PER_CHECKPOINT = 4
TEMPERATURE = 0.85  # of pi_ref, because a small model invents too many words at 1
# An SGD step changes the scaled bias 80^2 times as much as with a scale of 1: docs/imdb.md
BIAS_SCALE = 80.0


@dataclass(frozen=True)
class Settings:
    steps: int = 14_000
    seed: int = 0
    vocab_size: int = 8193  # including the end token
    n_layer: int = 4
    n_head: int = 6
    n_embd: int = 192
    batch_size: int = 48  # texts per step
    muon_lr: float = 0.015
    adamw_lr: float = 3e-3
    openings: float = 0.15  # share of the steps, at the end, that see openings only
    decay: float = 1.0  # share of the steps, at the end, in which the learning rate falls


# -------------------------------------------------- the texts


@dataclass(frozen=True)
class Corpus:
    """The ids of all reviews, one after the other, and the runs of sentences in them."""

    ids: np.ndarray  # (N,) uint16
    start: np.ndarray  # (n,) where a run begins
    stop: np.ndarray  # (n,) the position after its last token
    opening: np.ndarray  # (n,) whether it begins a review

    def texts(self, runs: np.ndarray, end: int) -> list[list[int]]:
        """The ids of these runs, each followed by the end token."""
        return [[*self.ids[self.start[i] : self.stop[i]].tolist(), end] for i in runs]


def read_corpus(reviews: list[str], tokenizer: tiktoken.Encoding) -> Corpus:
    """Encode the reviews, and find the longest run of sentences that starts at each sentence."""
    parts = []
    for i in range(0, len(reviews), 1000):
        for ids in tokenizer.encode_ordinary_batch(reviews[i : i + 1000]):
            parts.append(np.array(ids, dtype=np.uint16))
    ids = np.concatenate(parts)
    review_ends = np.cumsum([len(part) for part in parts])

    tokens = tokenizer.decode_tokens_bytes(range(tokenizer.n_vocab))
    closes = np.array([re.search(rb"[.!?][\"')]*$", token) is not None for token in tokens])
    starts_word = np.array([token.startswith(b" ") for token in tokens])
    is_last = np.zeros(len(ids), dtype=bool)  # of a review
    is_last[review_ends - 1] = True
    before_word = np.append(starts_word[ids[1:]], True) | is_last
    sentence_ends = 1 + np.flatnonzero(closes[ids] & before_word)

    review_starts = np.append(0, review_ends[:-1])
    start = np.union1d(review_starts, sentence_ends[sentence_ends < len(ids)])
    review_end = review_ends[np.searchsorted(review_ends, start, side="right")]
    limit = np.minimum(start + CONTEXT - 1, review_end)
    ends_or_0 = np.append(0, sentence_ends)  # 0 where no sentence ends before the limit
    stop = ends_or_0[np.searchsorted(sentence_ends, limit, side="right")]
    fits = stop - start >= 5
    return Corpus(ids, start[fits], stop[fits], np.isin(start, review_starts)[fits])


def prepare(reviews: list[str], settings: Settings, path: Path) -> tuple[list[bytes], Corpus]:
    """The tokens and the corpus, which are made once and kept at `path`.

    Raises BadInput if those at `path` were made from other reviews, or with another vocab_size.
    """
    made_from = [sha256("\n".join(reviews).encode()), settings.vocab_size]
    if path.exists():
        with open_user_file(path, "a prepared corpus; delete it to prepare it again"):
            kept = torch.load(path, weights_only=True)
            if kept["made_from"] != made_from:
                raise BadInput(f"{path}: was made from other reviews; use another --out")
            arrays = [kept[name].numpy() for name in ("ids", "start", "stop", "opening")]
            return kept["tokens"], Corpus(*arrays)
    print("learning the tokenizer")
    tokens = learn_tokenizer(reviews, settings.vocab_size)
    print("encoding the reviews")
    corpus = read_corpus(reviews, load_tokenizer(tokens))
    arrays = {name: torch.from_numpy(array) for name, array in vars(corpus).items()}
    save(path, arrays | {"tokens": tokens, "made_from": made_from})
    return tokens, corpus


def save(path: Path, value: object):
    torch.save(value, buffer := io.BytesIO())
    atomic_write(path, buffer.getvalue())


def shuffled(pool: np.ndarray, first: int, n: int, seed: int) -> np.ndarray:
    """n entries, from number `first` on, of an endless list: the pool, shuffled for each pass."""
    found = []
    while n > 0:
        epoch, place = divmod(first, len(pool))
        order = np.random.default_rng((seed, epoch)).permutation(pool)
        found.append(order[place : place + n])
        first, n = first + len(found[-1]), n - len(found[-1])
    return np.concatenate(found)


def round_batches(number: int, corpus: Corpus, settings: Settings) -> list[np.ndarray]:
    """The batches of a round, each of runs with similar lengths."""
    only_openings = round(settings.steps * (1 - settings.openings) / ROUND)  # from this round on
    pool, first = np.arange(len(corpus.start)), number
    if number >= only_openings:
        pool, first = np.flatnonzero(corpus.opening), number - only_openings
    size = ROUND * settings.batch_size
    runs = shuffled(pool, first * size, size, settings.seed)
    runs = runs[np.argsort(corpus.stop[runs] - corpus.start[runs], kind="stable")]
    order = np.random.default_rng((settings.seed, number)).permutation(ROUND)
    return [np.split(runs, ROUND)[i] for i in order]


# -------------------------------------------------- training


class Training:
    """The model, its optimizers, and the number of steps taken."""

    def __init__(self, config: GPTConfig, settings: Settings):
        torch.manual_seed(settings.seed)
        self.settings, self.step = settings, 0
        self.pi = GPT(config)
        self.pi.bf16 = bf16_supported(torch.device("cpu"))
        named = list(self.pi.named_parameters())
        matrices = [p for name, p in named if name.startswith("h.") and p.ndim == 2]
        others = [p for name, p in named if not (name.startswith("h.") and p.ndim == 2)]
        how = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
        self.muon = Muon(matrices, settings.muon_lr)
        self.adamw = torch.optim.AdamW(others, settings.adamw_lr, **how)

    def take_step(self, texts: list[list[int]]) -> Tensor:
        """One step on a batch of texts. Returns its loss in nats per token."""
        left = 1 - self.step / self.settings.steps
        scale = min(1.0, (1 - left) / 0.01 + 0.01, left / self.settings.decay)
        self.muon.param_groups[0]["lr"] = scale * self.settings.muon_lr
        self.adamw.param_groups[0]["lr"] = scale * self.settings.adamw_lr
        ids, mask = collate(texts, [1] * len(texts))
        loss = -fast_response_logps(self.pi, ids, mask).sum() / mask.sum()
        loss.backward()
        for optimizer in (self.muon, self.adamw):
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    def save(self, path: Path):
        parts = {"pi": self.pi, "muon": self.muon, "adamw": self.adamw}
        state = {name: part.state_dict() for name, part in parts.items()}
        save(path, state | {"step": self.step, "settings": vars(self.settings)})

    def load(self, path: Path):
        """Continue from a checkpoint. Raises BadInput if it has other settings."""
        with open_user_file(path, "a checkpoint of pretraining; delete it to start again"):
            state = torch.load(path, weights_only=True)
            if state["settings"] != vars(self.settings):
                raise BadInput(f"{path}: was made with other settings; use another --out")
            for name in ("pi", "muon", "adamw"):
                getattr(self, name).load_state_dict(state[name])
            self.step = state["step"]


def train(training: Training, corpus: Corpus, end: int, path: Path):
    """Train to the last step, and keep a checkpoint at `path`."""
    steps = training.settings.steps
    bar = tqdm(total=steps, initial=training.step, desc="pretraining pi_ref")
    while training.step < steps:
        losses = []
        for runs in round_batches(training.step // ROUND, corpus, training.settings):
            losses.append(training.take_step(corpus.texts(runs, end)))
            bar.update()
        mean = torch.stack(losses).mean().item()
        if not np.isfinite(mean):
            raise BadInput(f"pretraining diverged before step {training.step}")
        bar.set_postfix_str(f"{mean:.3f} nats per token")
        if training.step == steps or training.step // ROUND % ROUNDS_PER_CHECKPOINT == 0:
            training.save(path)
    bar.close()


# -------------------------------------------------- evaluation


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def report(pi: GPT, tokens: list[bytes], reviews: dict[str, list[str]], out: Path):
    """Print how well pi predicts openings of test reviews, and how many words it invents."""
    tokenizer = load_tokenizer(tokens)
    known = Counter(word for review in training_reviews(reviews) for word in words_of(review))
    seen = set(training_reviews(reviews))
    unseen = [text for text in reviews["test/pos"] + reviews["test/neg"] if text not in seen]
    rng = random.Random(0)
    rng.shuffle(unseen)
    texts = openings(unseen[:3000], tokenizer, CONTEXT)
    prompts = cut_prompts(texts, tokenizer, rng)
    _, samples = generate(pi, prompts, 1, tokenizer, 0, "sampling")
    words = [
        word
        for prompt, sample in zip(prompts, samples, strict=True)
        for word in words_of(sample.removeprefix(tokenizer.decode(prompt)))
    ]
    invented = [word for word in words if known[word] < 2]
    atomic_write(out / "samples.txt", "\n".join(samples[:40]).encode())
    loss = nats_per_byte(pi, texts, tokenizer)
    print(f"{loss:.4f} nats per byte on {len(texts):,} openings of test reviews")
    print(f"{len(invented) / len(words):.2%} of the words of {len(samples):,} samples are invented")


def nats_per_byte(pi: GPT, texts: list[list[int]], tokenizer) -> float:
    """How well a model predicts texts, in nats per byte."""
    ids, mask = collate(texts, [1] * len(texts))
    n_bytes = sum(len(text.encode()) for text in decode_rows(ids[:, 1:], tokenizer))
    return -compute_logps(pi, ids, mask).double().sum().item() / n_bytes


def training_reviews(reviews: dict[str, list[str]]) -> list[str]:
    return [text for part in ("pos", "neg", "unsup") for text in reviews.get(f"train/{part}", [])]


def finished(pi: GPT, tokens: list[bytes], temperature: float) -> dict:
    """The checkpoint of softmax(logits / temperature), in bfloat16, with a logit bias of 0."""
    checkpoint = to_checkpoint(pi, tokens)
    weights = checkpoint["weights"] | {"bias": torch.zeros(pi.config.vocab_size)}
    for name in ("ln_f.weight", "ln_f.bias"):
        weights[name] = weights[name] / temperature
    checkpoint["weights"] = {name: weight.bfloat16() for name, weight in weights.items()}
    checkpoint["config"]["bias_scale"] = BIAS_SCALE
    return checkpoint


def run(imdb: Path, out: Path, settings: Settings):
    out.mkdir(parents=True, exist_ok=True)
    if not imdb.exists():
        raise BadInput(f"{imdb}: there is no such file")
    with open_user_file(imdb, "the IMDb archive"):
        reviews = read_imdb(imdb)
    tokens, corpus = prepare(training_reviews(reviews), settings, out / "corpus.pt")
    tokenizer = load_tokenizer(tokens)
    shape = CONTEXT, settings.n_layer, settings.n_head, settings.n_embd
    training = Training(GPTConfig(tokenizer.n_vocab, *shape), settings)
    if (out / "training.pt").exists():
        training.load(out / "training.pt")
    train(training, corpus, tokenizer.eot_token, out / "training.pt")
    for temperature in (1.0, TEMPERATURE):
        save(out / "pi_ref.pt", finished(training.pi, tokens, temperature))
        print(f"at temperature {temperature:g}:")
        pi = load_gpt(read_checkpoint(out / "pi_ref.pt"), torch.device("cpu"))
        report(pi, tokens, reviews, out)
    print(f"{out / 'pi_ref.pt'}: sha256 {sha256((out / 'pi_ref.pt').read_bytes())}")


def main(argv: list[str]) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="beyond.pretrain", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--imdb", type=Path, required=True, help="the IMDb archive")
    add("--out", type=Path, default=Path("pi_ref"), help="the output folder")
    steps = "rounded up to a multiple of 100"
    add("--steps", type=cli.at_least(1), default=Settings.steps, metavar="N", help=steps)
    add("--seed", type=cli.at_least(0), default=Settings.seed, metavar="N")
    args = parser.parse_args(argv)
    settings = Settings(steps=-(-args.steps // ROUND) * ROUND, seed=args.seed)
    try:
        run(args.imdb, args.out, settings)
    except (BadInput, OSError) as e:
        print(f"beyond.pretrain: {' '.join(str(e).split())[:500]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("beyond.pretrain: interrupted; repeat the command to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
