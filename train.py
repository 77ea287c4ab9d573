"""The sentiment experiment of the DPO paper (section 6.1, figure 2 left, appendix C.1), at the scale of a laptop.

Question    How much true reward does DPO gain for each nat that it moves away from pi_ref, and how close is that to the
            best that any policy could?
Road        reviews -> tokenizer -> true reward -> pi_ref, a small GPT fine-tuned on reviews -> four completions a prompt
            -> preference triplets -> DPO at several beta -> fresh samples, judged -> the reward-KL frontier.
Prediction  With Bradley-Terry labels each beta has its place on the optimal curve (Eq. 4), which samples of pi_ref can draw.
"""
import argparse
import copy
import ctypes
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import dpo
from data import BadInput
from model import GPT, GPTConfig, sample


@dataclass(frozen=True)
class Settings:
    """What a run depends on. The defaults are the toy world's; `IMDB` and `OWN` below change what the others need."""
    data: str = "toy"
    imdb: str | None = None         # the archive or folder of --data imdb; downloaded if not given
    init: str | None = None         # a checkpoint to start from, with its tokenizer
    labels: str = "bt"              # each beta has a predicted place with these, and with "soft"; not with the paper's "argmax"
    beta: tuple[float, ...] = (0.5, 1.0, 2.0)       # where 512 samples can tell the optimum
    seed: int = 0
    tokenizer: str = "reviews"      # learned from them; "gpt2" is GPT-2's own, of 50,257 tokens
    vocab_size: int = 1024          # an upper bound: the grammar's words are whole tokens before it is reached
    context: int = 24               # tokens; most reviews of the grammar fit whole
    n_layer: int = 2                # the grammar is learned by so small a model, in half a minute
    n_head: int = 4
    n_embd: int = 64
    reviews: int = 20_000           # that pi_ref is fine-tuned on
    steps: int = 300                # of fine-tuning
    rows: int = 64                  # reviews in a step of fine-tuning
    prompts: int = 10_000           # that preferences are collected on; more prompts help more than more passes over them
    completions: int = 4            # the paper's
    batch: int = 64                 # prompts in a step of DPO
    rate: float = 0.03              # DPO's peak learning rate at beta 1; a larger one wastes KL
    held_out: int = 100             # prompts of the evaluation; standard errors are over them
    samples: int = 512              # of pi_ref for each held-out prompt, which draw the optimal curve
    answers: int = 96               # of pi_theta for each held-out prompt


# Eleven minutes on two cores with bfloat16 units. 4,096 tokens keep most words whole; small batches take more steps from as
# many tokens; a larger rate gains reward and wastes KL.
IMDB = dict(data="imdb", beta=(0.1, 1.0), vocab_size=4097, context=48, n_layer=4, n_head=6, n_embd=192, reviews=75_000,
            steps=3800, rows=32, prompts=13_000, batch=16, rate=1.6e-3, held_out=64, answers=48)
# Nobody knows how much there is: a few hundred steps, longer texts, the beta that most people use.
OWN = IMDB | dict(beta=(0.1,), context=256, steps=500, rows=16, answers=4)


# ----------------------------------------------------------------------------- stages: what is made once, and kept

@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One run at a time in a folder: the operating system's lock, which ends with the process, however that ends."""
    with open(folder / ".lock", "ab") as f:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BadInput(f"{folder}: another run is at work there; let it end, or name another folder with --out") from None
        yield


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fingerprint(name: str | None) -> object:
    """What tells that a file, or a folder of files, is not what it was; the name itself if there is none."""
    path = Path(name or "")
    if not name or not path.exists():
        return name
    if path.is_file():
        return checksum(path.read_bytes())
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in path.glob("**/*.txt"))


class Stages:
    """Results by name, each kept in a file. Each is made again only if something that it depends on has changed: a
    setting, an earlier stage's file, or source. A file that is not the one this run wrote is an error."""

    def __init__(self, out: Path, settings: Settings, **known: object):
        self.out, self.settings, self.known = out, settings, known
        self.log = out / "stages.json"
        self.seconds: dict[str, float] = {}

    def value(self, need: str) -> object:
        if need in self.known:                              # an earlier stage, or what the run knows besides
            return self.known[need]
        if need.endswith(".py"):
            return Path(__file__).with_name(need).read_text(encoding="utf-8")
        if need in ("data", "imdb", "init"):
            return fingerprint(getattr(self.settings, need))
        if hasattr(self.settings, need):
            return getattr(self.settings, need)
        return inspect.getsource(globals()[need])           # a function of this file

    def __call__(self, name: str, needs: str, make: Callable[[], object]):
        """The result of make(), which may depend on the settings, sources and earlier stages that `needs` lists."""
        key = checksum(repr((name, [self.value(need) for need in needs.split()])).encode())
        path, done, entry = self.out / f"{name}.pt", {}, {}
        if self.log.exists():
            with data.reading(self.log, "the list of stages; delete it to start anew"):
                done = json.loads(self.log.read_bytes())
                entry = dict(done.pop(name, {}))
        if entry.get("key") == key and path.exists():
            content = path.read_bytes()
            if checksum(content) != entry.get("checksum"):
                raise BadInput(f"{path}: is not the file that was written here; delete it, and it is made again")
        else:
            if entry:                                       # taken out first, so that a new file never meets an old key
                data.write(self.log, json.dumps(done, indent=1).encode())
            began = time.perf_counter()
            torch.save(make(), buffer := io.BytesIO())
            content = buffer.getvalue()
            data.write(path, content)
            entry = dict(key=key, checksum=checksum(content), seconds=time.perf_counter() - began)
            data.write(self.log, json.dumps(done | {name: entry}, indent=1).encode())
        self.seconds[name] = entry.get("seconds")
        self.known[name] = key + checksum(content)          # what a stage is made from reaches all that depend on it
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def checkpoint(pi: GPT, tokens: list[bytes] | None, **more: object) -> dict:
    """A model with its tokenizer, to be saved; `tokens` is None for GPT-2's encoding."""
    return dict(config=dataclasses.asdict(pi.config), tokens=tokens, weights=pi.state_dict(), **more)


def read_checkpoint(path: Path) -> dict:
    """What `checkpoint` made. Nothing in the file is executed. Errors: BadInput for a file that does not hold a whole model."""
    with data.reading(path, "a checkpoint of this project"):
        content = path.read_bytes()
        if content[:2] != b"PK":
            raise ValueError("it is not a file of torch.save")
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        config, weights = GPTConfig(**found["config"]), found["weights"]
        if config.n_layer > len(weights) or sum(w.nbytes for w in weights.values()) > len(content):
            raise ValueError("its sizes are not those of its weights")
        if min(config.n_layer, config.n_head) < 1 or config.n_embd % config.n_head:
            raise ValueError("its n_layer or n_head cannot be")
        with torch.device("meta"):
            wanted = GPT(config).state_dict()
        if {name: (w.shape, w.dtype) for name, w in weights.items()} != {name: (w.shape, w.dtype) for name, w in wanted.items()}:
            raise ValueError("its weights are not those of its config")
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("its weights are not finite")
        if (tokens := found["tokens"]) is not None and (
                len(set(tokens)) < len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens)):
            raise ValueError("its tokenizer needs each of the 256 bytes, and no token twice")
        if data.tokenizer_of(tokens).n_vocab != config.vocab_size:
            raise ValueError("its tokenizer is of another size than the model")
        return found


def pack(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Lists of ids as one tensor and their lengths; `unpack` undoes it."""
    return torch.tensor([i for ids in lists for i in ids], dtype=torch.int32), torch.tensor([len(ids) for ids in lists])


def unpack(packed: tuple[Tensor, Tensor]) -> list[list[int]]:
    return [ids.tolist() for ids in packed[0].split(packed[1].tolist())]


# ----------------------------------------------------------------------------- the stages, in the experiment's order

def toy_world(settings: Settings) -> dict:
    """Reviews of the grammar: for pi_ref, for the prompts, and held out."""
    sizes = settings.reviews, 2 * settings.prompts, 4 * settings.held_out + 500
    reviews = data.toy_reviews(sum(sizes), settings.seed)
    tokenizer = choose_tokenizer(settings, reviews[:min(20_000, settings.reviews)])
    ends = np.cumsum(sizes)
    return split(tokenizer, reviews[:ends[0]], reviews[ends[0]:ends[1]], reviews[ends[1]:], settings)


def imdb_world(settings: Settings) -> dict:
    """IMDb's training reviews for pi_ref and the true reward, its test reviews for prompts and for the second judge."""
    reviews = data.read_imdb(Path(settings.imdb) if settings.imdb else data.download_imdb(data.cache()))
    rng = random.Random(settings.seed)
    judges, accuracy = {}, {}
    for name, trained_on in dict(reward="train", judge="test").items():
        texts = reviews[f"{trained_on}/pos"] + reviews[f"{trained_on}/neg"]
        judges[name] = data.Sentiment.train(texts, [i < len(reviews[f"{trained_on}/pos"]) for i in range(len(texts))],
                                            settings.seed)
    texts = reviews["test/pos"] + reviews["test/neg"]
    positive = torch.arange(len(texts)) < len(reviews["test/pos"])
    words = [text.split() for text in texts]
    starts = [rng.randrange(max(1, len(w) - 19)) for w in words]
    for name, snippets in dict(whole=texts, words_20=[" ".join(w[s:s + 20]) for w, s in zip(words, starts)]).items():
        accuracy[name] = ((judges["reward"](snippets) > 0) == positive).float().mean().item()
    print("the true reward's accuracy on test reviews: {whole:.3f} whole, {words_20:.3f} on 20 words".format(**accuracy))
    fine_tune = reviews["train/pos"] + reviews["train/neg"] + reviews.get("train/unsup", [])
    rng.shuffle(fine_tune), rng.shuffle(texts)
    tokenizer = choose_tokenizer(settings, fine_tune[:8_000])
    n = len(texts) // 10
    world = split(tokenizer, fine_tune[:settings.reviews], texts[n:], texts[:n], settings)
    return world | dict(accuracy=accuracy, judges={name: (j.weight, j.bias) for name, j in judges.items()})


def split(tokenizer, fine_tune: list[str], asked: list[str], held_out: list[str], settings: Settings) -> dict:
    """A world: the tokenizer's tokens, the openings that pi_ref learns from, and prompts from reviews that are not among
    them. The held-out prompts are distinct, and no preferences are collected on them."""
    rng, seen = random.Random(settings.seed), set(fine_tune)
    tuned, asked, kept = (data.openings(reviews, tokenizer, settings.context) for reviews in (
        fine_tune, [r for r in asked if r not in seen], [r for r in held_out if r not in seen]))
    held = list(dict.fromkeys(map(tuple, data.prompts_of(kept, tokenizer, rng))))[:settings.held_out]
    taken = set(held)
    prompts = [x for x in data.prompts_of(asked, tokenizer, rng) if tuple(x) not in taken][:settings.prompts]
    if not tuned or not prompts or len(held) < settings.held_out:
        raise BadInput(f"too few reviews that fit in --context {settings.context}: {len(tuned)} openings to fine-tune on, "
                       f"{len(prompts)} prompts, {len(held)} of {settings.held_out} held-out ones; lower --held-out, or give more reviews")
    if len(prompts) < settings.prompts:
        print(f"only {len(prompts):,} of {settings.prompts:,} prompts: there are no more reviews")
    return dict(tokens=data.tokens_of(tokenizer), fine_tune=pack(tuned), prompts=pack(prompts), held_out=pack(held),
                unseen=pack(kept))


def own_world(settings: Settings) -> dict:
    """Preferences from a file. A tenth of the prompts is held out; pi_ref learns from prompt + chosen of the others."""
    pairs = data.read_pairs(Path(settings.data))
    tokenizer = choose_tokenizer(settings, [pair[name] for pair in pairs for name in ("prompt", "chosen", "rejected")])
    prompts = sorted({pair["prompt"] for pair in pairs})
    chosen = set(random.Random(settings.seed).sample(prompts, math.ceil(len(prompts) / 10)))
    both = [[pair for pair in pairs if (pair["prompt"] in chosen) == held] for held in (False, True)]
    tuned, held = (data.encode_pairs(some, tokenizer, settings.context) for some in both)
    if fell := len(pairs) - len(tuned) - len(held):
        print(f"{fell:,} of {len(pairs):,} pairs do not fit in {settings.context} tokens and are left out (see --context)")
    if not tuned or not held:
        raise BadInput(f"{settings.data}: {len(tuned)} pairs to train on and {len(held)} with other prompts to hold out; both "
                       "need at least one" + f", so --context must be more than {settings.context}" * (fell > 0))
    asked = list(dict.fromkeys(tuple(t["prompt_ids"]) for t in held))[:settings.held_out]
    fine_tune, unseen = (pack([t["prompt_ids"] + t["chosen_ids"] for t in some]) for some in (tuned, held))
    return dict(tokens=data.tokens_of(tokenizer), fine_tune=fine_tune, held_out=pack(asked), unseen=unseen,
                pairs=both[0], held_pairs=both[1])


def choose_tokenizer(settings: Settings, texts: list[str]) -> tiktoken.Encoding:
    if settings.init:
        return data.tokenizer_of(read_init(settings)["tokens"])
    return data.gpt2_tokenizer() if settings.tokenizer == "gpt2" else data.learn_tokenizer(texts, settings.vocab_size)


def read_init(settings: Settings) -> dict:
    """The checkpoint of --init, its positions cut to the context. Errors: BadInput if it has fewer."""
    found = read_checkpoint(Path(settings.init))
    if (context := found["config"]["context"]) < settings.context:
        raise BadInput(f"{settings.init}: sees {context} tokens, not {settings.context}; say --context {context}, or less")
    found["config"]["context"] = settings.context
    found["weights"]["wpe.weight"] = found["weights"]["wpe.weight"][:settings.context]
    return found


def start(world: dict, settings: Settings, device: torch.device) -> GPT:
    """The model that fine-tuning begins with: the checkpoint of --init, or one drawn at random."""
    if settings.init:
        return load(read_init(settings), device)
    torch.manual_seed(settings.seed)
    pi = GPT(GPTConfig(data.tokenizer_of(world["tokens"]).n_vocab, settings.context, settings.n_layer, settings.n_head,
                       settings.n_embd)).to(device)
    pi.bf16 = bf16_pays(device)
    return pi


def load(found: dict, device: torch.device) -> GPT:
    """The model of a checkpoint."""
    pi = GPT(GPTConfig(**found["config"])).to(device)
    pi.load_state_dict(found["weights"])
    pi.bf16 = bf16_pays(device)
    return pi


def fine_tune(pi: GPT, texts: list[list[int]], settings: Settings) -> GPT:
    """Fit pi to the texts' ids: next-token cross-entropy, a mean over tokens; Muon (Jordan et al. 2024) on the blocks'
    matrices, AdamW on the rest. Weights that were trained before are moved a hundred times more gently."""
    rng = np.random.default_rng(settings.seed)
    matrices = [p for p in pi.h.parameters() if p.ndim == 2]
    rest = [p for p in pi.parameters() if not any(p is m for m in matrices)]
    gentle = 0.01 if settings.init else 1.0
    optimizers = (torch.optim.Muon(matrices, lr=gentle * 0.015, weight_decay=0.1),
                  torch.optim.AdamW(rest, lr=gentle * 6e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, warm_then_linear(settings.steps)) for o in optimizers]

    lengths = np.array([len(ids) for ids in texts])
    batches = (batch for _ in itertools.count() for batch in like_lengths(lengths, settings.rows, rng))
    bar, losses = tqdm(itertools.islice(batches, settings.steps), total=settings.steps, desc="fine-tuning pi_ref"), []
    for batch in bar:
        loss = token_nll(pi, [texts[i] for i in batch])
        loss.backward()
        for each in (*optimizers, *schedules):
            each.step()
        pi.zero_grad()
        losses.append(loss.detach())
        if len(losses) % 50 == 0 or len(losses) == settings.steps:
            bar.set_postfix_str(f"{loss.item():.2f} nats per token")
            must_be_finite(losses, "fine-tuning")
    if not all(p.isfinite().all() for p in pi.parameters()):
        raise BadInput("fine-tuning diverged at its last step; what was made before is kept")
    return pi


def must_be_finite(values: list[Tensor], purpose: str):
    """Errors: BadInput, which names the first step whose value is not."""
    finite = torch.stack(values).isfinite()
    if not finite.all():
        raise BadInput(f"{purpose} diverged: not finite at step {int(finite.int().argmin())}; lower --rate, if it is DPO; "
                       "what was made before is kept")


def like_lengths(lengths: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """One pass over the rows in random batches whose rows are of like length, so that little of them is padding: rows are
    sorted within random chunks of 20 batches."""
    for chunk in np.array_split(rng.permutation(len(lengths)), math.ceil(len(lengths) / (20 * size))):
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches = np.array_split(chunk, math.ceil(len(chunk) / size))
        for i in rng.permutation(len(batches)):
            yield batches[i]


def warm_then_linear(steps: int) -> Callable[[int], float]:
    return lambda step: min(1.0, (step + 1) / (0.02 * steps + 1)) * (1 - step / steps)


def padded(lists: list[list[int]]) -> Tensor:
    """(B, T) ids, -1 after each one's end."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in lists], True, -1)


def joined(prompts: list[list[int]], responses: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each prompt with its response: ids and mask (B, T), padded on the right."""
    ids = padded([x + y for x, y in zip(prompts, responses)]).to(device)
    starts = torch.tensor([len(x) for x in prompts], device=device)[:, None]
    return ids.clamp(min=0), (torch.arange(ids.size(1), device=device) >= starts) & (ids >= 0)


def token_nll(pi: GPT, batch: list[list[int]], reduction: str = "mean") -> Tensor:
    """Cross-entropy of the batch's tokens after the first, nats per token."""
    ids = padded(batch).to(pi.wte.weight.device)
    logits = pi(ids[:, :-1].clamp(min=0)).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1, reduction=reduction)


def draw(pi: GPT, prompts: list[list[int]], settings: Settings, tokenizer, purpose: str) -> list[list[int]]:
    """One response for each prompt, in batches of prompts of like length; each purpose has its own random numbers. A GPT this
    small leaves a GPU idle unless batches are large."""
    seed = zlib.crc32(f"{settings.seed} {purpose}".encode())
    generator = torch.Generator(pi.wte.weight.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses, size = [[]] * len(prompts), 8192 if pi.wte.weight.is_cuda else 1024
    with tqdm(total=len(prompts), desc=purpose) as bar:
        for rows in in_groups(order, size):
            for i, y in zip(rows, sample(pi, [prompts[i] for i in rows], tokenizer.eot_token, generator=generator)):
                responses[i] = y
            bar.update(len(rows))
    return responses


def in_groups(values: list, size: int) -> list[list]:
    return [values[i:i + size] for i in range(0, len(values), size)]


def score(pi_ref: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi_ref at the tokens of the responses, (P, K, T) nats: once, before training."""
    device = pi_ref.wte.weight.device
    with torch.no_grad():
        logps = torch.zeros(ids.shape, dtype=pi_ref.wte.weight.dtype)
        lengths = (mask.any(1) * torch.arange(mask.size(-1))).amax(-1) + 1
        for rows in tqdm(lengths.argsort().split(32), desc="scoring under pi_ref"):
            T = int(lengths[rows[-1]])
            some = dpo.response_logps(pi_ref, ids[rows, :, :T].flatten(0, 1).to(device), mask[rows, :, :T].flatten(0, 1))
            logps[rows, :, :T] = some.view(len(rows), -1, T).cpu()
    return logps


def peak_rate(beta: float, settings: Settings) -> float:
    """Larger as beta falls, since log-ratios are; the power was found by trial."""
    return settings.rate * beta ** -1.25


def optimise(pi_ref: GPT, preferences: dpo.Preferences, loss: dpo.Loss, rate: float, settings: Settings,
             purpose: str = "training", watch: Callable[[GPT, int, int], None] | None = None) -> tuple[GPT, dict[str, Tensor]]:
    """pi_theta, trained from pi_ref in one pass over the prompts, and what each step saw, (steps,) each. After each step
    watch(pi_theta, steps taken, steps in all) may look.

    Plain gradient descent with momentum, since Adam's steps are as large for a token seldom seen as for a frequent one.
    What single words are worth is learned in the token vectors, at the full rate; the rest moves at a sixteenth of it. Errors: BadInput if the loss or the gradient is no longer finite."""
    pi_theta = copy.deepcopy(pi_ref).requires_grad_(True)
    lengths = (preferences.mask.any(1) * torch.arange(preferences.mask.size(-1))).amax(-1).numpy()
    batches = [*map(torch.from_numpy, like_lengths(lengths, settings.batch, np.random.default_rng(settings.seed)))]
    rest = [p for p in pi_theta.parameters() if p is not pi_theta.wte.weight]
    optimizer = torch.optim.SGD([dict(params=[pi_theta.wte.weight], lr=rate), dict(params=rest, lr=rate / 16)], momentum=0.9,
                                fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_then_linear(len(batches)))
    records = []
    bar = tqdm(dpo.train(pi_theta, preferences, loss, optimizer, batches), total=len(batches), desc=purpose)
    for record in bar:
        schedule.step()
        records.append(record)
        if watch:
            watch(pi_theta, len(records), len(batches))
        if len(records) % 20 == 0 or len(records) == len(batches):
            bar.set_postfix_str("loss {loss:.3f}, accuracy {accuracy:.2f}".format(**record))
            must_be_finite([r["loss"] + r["grad_norm"] for r in records], purpose)
    return pi_theta, {name: torch.stack([r[name] for r in records]).cpu() for name in records[0]}


# ----------------------------------------------------------------------------- evaluation, and the optimum beside it

BETAS = np.geomspace(20, 0.05, 80)     # where the optimal curve is computed


def optimal_curve(r: Tensor) -> dict[str, np.ndarray]:
    """Eq. 4 from pi_ref's rewards r (P, N): for each of BETAS the reward and KL of each prompt (80, P), and whether their
    mean can be trusted: effective sample size at least 40, and the curve from N/2 samples agreeing within 2 %."""
    betas = torch.from_numpy(BETAS)[:, None, None]
    reward, kl, size = (v.numpy() for v in dpo.frontier(r.double(), betas))
    halves = []
    for half in r.double().chunk(2, dim=1):
        half_reward, half_kl, _ = (v.mean(1).numpy() for v in dpo.frontier(half, betas))
        halves.append(np.interp(kl.mean(1), half_kl, half_reward - half.mean().item(), right=np.nan))
    gain = reward.mean(1) - r.mean().item()
    agree = np.abs(np.mean(halves, 0) - gain) <= 0.02 * gain
    trusted = np.logical_and.accumulate((size.mean(1) >= 40) & agree)
    return dict(reward=reward, kl=kl, trusted=trusted)


def fraction_of_optimal(curve: dict, r_ref: np.ndarray, r: np.ndarray, kl: np.ndarray) -> tuple[float | None, float | None]:
    """(E r - r_ref) / (E*(KL) - r_ref) with its standard error over prompts (bootstrap), from per-prompt means (P,); None
    where the curve cannot be trusted."""
    if not kl.mean() <= curve["kl"].mean(1)[curve["trusted"]].max(initial=0.0):
        return None, None
    rng = np.random.default_rng(0)

    def fraction(p: np.ndarray) -> float:
        best = np.interp(kl[p].mean(), [0, *curve["kl"][:, p].mean(1)], [r_ref[p].mean(), *curve["reward"][:, p].mean(1)])
        return float((r[p].mean() - r_ref[p].mean()) / (best - r_ref[p].mean()))
    every = np.arange(len(r))
    return fraction(every), float(np.std([fraction(rng.choice(every, len(every))) for _ in range(200)]))


def mean_se(values: Tensor) -> tuple[float, float]:
    """Mean and standard error over prompts of values (P, M): the prompts are what is drawn independently."""
    each = values.double().mean(1)
    return each.mean().item(), (each.std() / math.sqrt(len(each))).item() if len(each) > 1 else math.nan


def best_of_n(r: Tensor, N: int) -> float:
    """E max of N of a prompt's M rewards, unbiased: sum_i C(i-1, N-1) / C(M, N) r_(i), averaged over prompts; r (P, M)."""
    M = r.size(1)
    weight = torch.tensor([math.comb(i, N - 1) / math.comb(M, N) for i in range(M)], dtype=torch.double)
    return (r.double().sort(1).values * weight).sum(1).mean().item()


@dataclass(frozen=True)
class Experiment:
    """All that the methods share: what they start from, and what they are judged by."""
    settings: Settings
    stage: Stages
    tokenizer: tiktoken.Encoding
    rewards_of: dict[str, Callable[[list[str]], Tensor]]    # by name: "reward" is r*, "judge" judges only; none for own data
    pi_ref: GPT
    preferences: dpo.Preferences
    counts: dict[str, int]
    accuracy: dict[str, float] | None                       # of r*, on IMDb
    held: dict                                              # as `hold_out` makes it
    pairs: dpo.Preferences                                  # held out
    curve: dict[str, np.ndarray] | None


def hold_out(pi_ref: GPT, world: dict, tokenizer: tiktoken.Encoding, settings: Settings, rewards_of: dict) -> dict:
    """pi_ref on the held-out prompts: N samples of each and their rewards, preference pairs (those of the world, or among
    the first 16 samples), and how well it predicts texts it never saw."""
    prompts = unpack(world["held_out"])
    P, N, K = len(prompts), settings.samples if rewards_of else settings.answers, settings.completions
    each = [x for x in prompts for _ in range(N)]
    responses = draw(pi_ref, each, settings, tokenizer, "sampling pi_ref on held-out prompts")
    texts = [data.text_of(x + y, tokenizer) for x, y in zip(each, responses)]
    rewards = {name: reward(texts).view(P, N) for name, reward in rewards_of.items()}
    if rewards_of:
        n = min(16, N)
        groups = [ys for of_x in in_groups(responses, N) for ys in in_groups(of_x[:n], K)]
        triplets, _ = data.preferences([x for x in prompts for _ in range(n // K)], groups,
                                       rewards["reward"][:, :n].reshape(-1, K), tokenizer, settings.labels,
                                       random.Random(settings.seed))
        if not triplets:
            raise BadInput("no preferences on the held-out prompts: raise --held-out or --steps")
    else:
        triplets = data.encode_pairs(world["held_pairs"], tokenizer, settings.context)
    ids, mask, pairs, weight = data.group(triplets)
    unseen = unpack(world["unseen"])[:1000]
    with torch.no_grad():
        nats = sum(token_nll(pi_ref, some, "sum").item() for some in tqdm(in_groups(unseen, 50), desc="predicting unseen texts"))
    return dict(prompts=prompts, rewards=rewards, lengths=torch.tensor([len(y) for y in responses]), texts=texts[::N],
                pairs=(ids, mask, score(pi_ref, ids, mask), pairs, weight),
                gap=torch.tensor([t["reward_chosen"] - t["reward_rejected"] for t in triplets]) if rewards_of else None,
                nats_per_byte=nats / sum(len(tokenizer.decode_bytes([i for i in ids[1:] if i != tokenizer.eot_token]))
                                         for ids in unseen))


def evaluate(e: Experiment, pi_theta: GPT, beta: float, method: str = "DPO") -> dict:
    """Fresh samples of pi_theta on the held-out prompts, judged, beside pi_ref's and the optimum's: a row of results.json."""
    P, M = len(e.held["prompts"]), min(e.settings.answers, e.settings.samples)
    prompts = [x for x in e.held["prompts"] for _ in range(M)]
    responses = draw(pi_theta, prompts, e.settings, e.tokenizer, f"sampling {method}, beta {beta:g}")
    texts = [data.text_of(x + y, e.tokenizer) for x, y in zip(prompts, responses)]
    point = dict(method=method, beta=beta, seed=e.settings.seed, length=sum(map(len, responses)) / len(responses))

    kls = []
    for xs, ys in zip(tqdm(in_groups(prompts, 64), desc="measuring the KL"), in_groups(responses, 64)):
        kls.append(torch.stack(dpo.sequence_kl(pi_theta, e.pi_ref, *joined(xs, ys, e.pi_ref.wte.weight.device))).cpu())
    log_ratio, kl = torch.cat(kls, 1).view(2, P, M)
    point["kl"], point["kl_se"] = mean_se(kl)
    point["kl_log_ratio"], point["kl_log_ratio_se"] = mean_se(log_ratio)
    point |= dict(kl_median=kl.median().item(), kl_p99=kl.flatten().quantile(0.99).item())

    theta = score(pi_theta, e.pairs.ids, e.pairs.mask).sum(-1)
    x, w, l = e.pairs.pairs.T
    r_hat = dpo.implicit_reward(theta, e.pairs.pi_ref.sum(-1), beta)
    gap_hat = (r_hat[x, w] - r_hat[x, l]).double()
    share = e.pairs.weight.double() / e.pairs.weight.double().sum()
    point |= {name: (share * v).sum().item() for name, v in dict(
        r_hat_w=r_hat[x, w], r_hat_l=r_hat[x, l], margin=gap_hat, pair_accuracy=(gap_hat.sign() + 1) / 2).items()}

    if not e.rewards_of:
        return dict(point=finite(point), texts=texts[::M], rewards=None)
    ref, gap, r = e.held["rewards"]["reward"], e.held["gap"].double(), e.rewards_of["reward"](texts).view(P, M)
    point["reward"], point["reward_se"] = mean_se(r)
    if "judge" in e.rewards_of:
        point["judge_reward"], point["judge_reward_se"] = mean_se(e.rewards_of["judge"](texts).view(P, M))
    ceiling = 1.0 if e.settings.labels == "argmax" else torch.sigmoid(gap.abs()).mean().item()
    point |= dict(win_rate=((r - ref[:, :M]).sign() + 1).mean().item() / 2, comparisons=r.numel(),
                  pair_accuracy_ceiling=ceiling,
                  reward_slope=((gap_hat * gap).sum() / gap.square().sum()).item(),
                  reward_r2=((gap_hat * gap).sum().square() / (gap.square().sum() * gap_hat.square().sum())).item())
    point["fraction_of_optimal"], point["fraction_of_optimal_se"] = fraction_of_optimal(
        e.curve, *(v.double().mean(1).numpy() for v in (ref, r, kl)))
    at = np.searchsorted(-BETAS, -beta)
    if at < len(BETAS) and e.curve["trusted"][at] and e.settings.labels != "argmax":
        log_Z = dpo.optimal_policy(torch.full_like(ref, -math.log(ref.size(1))).double(), ref.double(), beta)[1]
        regret = mean_se(beta * log_Z[:, None] - (r - beta * kl).double().mean(1, keepdim=True))
        best = [t.mean().item() for t in dpo.frontier(ref.double(), beta)[:2]]
    else:
        regret = best = None, None
    point |= dict(zip(("optimal_reward", "optimal_kl", "regret", "regret_se"), (*best, *regret)))
    return dict(point=finite(point), texts=texts[::M], rewards=r[:, 0])


def finite(point: dict) -> dict:
    """None for what is 0 / 0: the deviation of one number, a slope without differences."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in point.items()}


# ----------------------------------------------------------------------------- what is written for people

THETA, REF = "#d95f02", "#1b6ca8"      # one colour for pi_theta and one for pi_ref, here and in the notebook


def draw_figure(results: dict, curves: list[dict[str, Tensor]], title: str) -> bytes:
    """A PNG: reward against KL, with the optimal curve, theory's place for each beta and DPO's (for one's own data, whose
    reward nobody knows, accuracy against KL); beside it each run's training, step by step."""
    os.environ.setdefault("MPLCONFIGDIR", str(data.cache()))
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig = plt.figure(figsize=(10.5, 5), layout="constrained")
    grid = fig.add_gridspec(3, 2, width_ratios=(2.3, 1))
    ax, points = fig.add_subplot(grid[:, 0]), results["points"]
    if results["frontier"]:
        draw_frontier(ax, results)
    else:
        ax.plot([p["kl"] for p in points], [p["pair_accuracy"] for p in points], "o", color=THETA, label="DPO")
        ax.plot(0, 0.5, "D", color=REF, ms=8, label=r"$\pi_\mathrm{ref}$")
        ax.set_ylabel("held-out pairs that the implicit reward orders as labelled")
        ax.margins(x=0.15)
    for p in points:
        ax.annotate(f"$\\beta$ = {p['beta']:g}", (p["kl"], p.get("reward", p["pair_accuracy"])), xytext=(8, -12),
                    textcoords="offset points")
    ax.set(xlabel=r"KL($\pi_\theta$, $\pi_\mathrm{ref}$), nats per response", title=title)
    ax.legend(loc="lower right", frameon=False, fontsize="small")
    for row, names, label in ((0, ["loss"], "loss, nats"), (1, ["accuracy"], "accuracy on pairs"),
                              (2, ["r_hat_w", "r_hat_l"], r"$\hat r$ of $y_w$ (solid), $y_l$")):
        small = fig.add_subplot(grid[row, 1])
        for p, curve, line in zip(points, curves, np.linspace(1, 0.35, len(points))):
            for name, style in zip(names, ("-", "--")):
                window = max(1, len(curve[name]) // 20)
                smooth = np.convolve(curve[name].numpy(), np.ones(window) / window, "valid")
                small.plot(np.arange(len(smooth)) + window, smooth, style, color=THETA, alpha=line, lw=1.2,
                           label=f"$\\beta$ = {p['beta']:g}" if name == names[0] else None)
        small.set_ylabel(label, fontsize="small")
        small.tick_params(labelsize="small", labelbottom=row == 2)
    small.set_xlabel("step (running means)", fontsize="small")
    fig.axes[1].legend(frameon=False, fontsize="x-small")
    fig.savefig(buffer := io.BytesIO(), format="png", dpi=130)
    plt.close(fig)
    return buffer.getvalue()


def draw_frontier(ax, results: dict):
    kl, reward, trusted = (np.array([f[name] for f in results["frontier"]]) for name in ("kl", "reward", "trusted"))
    n, points, r_ref = int(trusted.sum()), results["points"], results["reference"]["reward"]
    right, top = (max(p[name] for p in points) for name in ("kl", "reward"))
    ax.plot([0, *kl[:n]], [r_ref, *reward[:n]], color="0.25", label="the best of all policies (Eq. 4)")
    if n == 0 or kl[n - 1] < 1.15 * right:
        ax.plot(kl[max(n - 1, 0):], reward[max(n - 1, 0):], ":", color="0.25",
                label=f"beyond what {results['config']['samples']} samples a prompt can tell")
    ax.plot(*zip(*[(b["kl_bound"], b["reward"]) for b in results["best_of_n"]]), "s-", color="0.6", ms=4, lw=1,
            label="best of N, at an upper bound on its KL")
    if predicted := [p for p in points if p["optimal_kl"] is not None]:
        ax.plot([p["optimal_kl"] for p in predicted], [p["optimal_reward"] for p in predicted], "o", mfc="white", mec=THETA,
                ms=10, label="where theory puts each $\\beta$")
    ax.errorbar([p["kl"] for p in points], [p["reward"] for p in points], [2 * p["reward_se"] for p in points],
                [2 * p["kl_se"] for p in points], fmt="o", color=THETA, ms=5, label="DPO, with two standard errors")
    ax.plot(0, r_ref, "D", color=REF, ms=8, label=r"$\pi_\mathrm{ref}$")
    ax.set_xlim(-0.04 * right, 1.15 * right)
    rise = max(top - r_ref, 0.1)
    ax.set_ylim(r_ref - 0.15 * rise, r_ref + 1.35 * rise)
    ax.set_ylabel("mean true reward, nats")


def samples_text(results: dict, held: dict, evaluations: list[dict], rows: int = 12) -> str:
    """The first completion of some held-out prompts, before and after, each with its true reward where it is known."""
    def line(reward: Tensor | None, name: str, text: str) -> str:
        return (f"{reward:+6.2f}  " if reward is not None else "") + f"{name:<10} " + " ".join(text.split())
    lines = []
    for i, text in enumerate(held["texts"][:rows]):
        lines.append(line(held["rewards"]["reward"][i, 0] if held["rewards"] else None, "pi_ref", text))
        lines += [line(e["rewards"][i] if held["rewards"] else None, f"beta {p['beta']:g}", e["texts"][i])
                  for p, e in zip(results["points"], evaluations)]
        lines.append("")
    return "\n".join(lines)


def summary(results: dict) -> str:
    """The table of the run, and in a sentence whether what the paper predicts was seen."""
    points, ref, known = results["points"], results["reference"], bool(results["frontier"])
    columns = {"beta": "g", "kl": ".2f", "length": ".1f"} | (
        {"reward": ".2f", "optimal_reward": ".2f", "optimal_kl": ".2f", "win_rate": ".2f", "fraction_of_optimal": ".2f"} if known
        else {"r_hat_w": ".2f", "r_hat_l": ".2f", "margin": ".2f"}) | {"pair_accuracy": ".3f"}
    rows = [[format(p[name], form) if p[name] is not None else "-" for name, form in columns.items()] for p in points]
    lines = ["  ".join(f"{cell:>{len(name)}}" for cell, name in zip(row, columns)) for row in ([*columns], *rows)]
    counted = ", ".join(f"{n:,} {what}" for what, n in results["labels"].items())
    lines.insert(0, f"pi_ref: {ref['nats_per_byte']:.3f} nats per byte on unseen texts" +
                 (f", reward {ref['reward']:.2f}" if known else "") + f"; preferences: {counted}")
    ordered = sorted(points, key=lambda p: p["beta"])
    falls = all(a["kl"] > b["kl"] for a, b in zip(ordered, ordered[1:]))
    direction = f"KL falls as beta rises: {'seen' if falls else 'not seen'}. " * (len(points) > 1)
    if not known:
        return "\n".join((*lines, direction + f"Held-out pairs ordered as labelled: {max(p['pair_accuracy'] for p in points):.0%}."))
    fractions = [p["fraction_of_optimal"] for p in points if p["fraction_of_optimal"] is not None]
    return "\n".join((*lines, direction + (
        f"Of the gain that is possible at its KL, DPO reached {min(fractions):.0%} to {max(fractions):.0%}." if fractions
        else f"No KL is within what {results['config']['samples']} samples can tell of the optimum.")))


# ----------------------------------------------------------------------------- the experiment

def bf16_pays(device: torch.device) -> bool:
    """Whether matrix products are much faster in bfloat16 here: on GPUs, and on CPUs with units for it."""
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


def prepare(settings: Settings, out: Path, device: torch.device, show: bool = False) -> Experiment | None:
    """World, reference, preferences, held-out samples and the optimal curve: each made once and kept in `out`. With `show`
    it ends at the preferences, and prints one."""
    stage = Stages(out, settings, device=device.type, bf16=bf16_pays(device))
    make_world = dict(toy=toy_world, imdb=imdb_world).get(settings.data, own_world)
    world = stage("world", "data imdb init seed tokenizer vocab_size context reviews prompts held_out data.py toy_world "
                  "imdb_world own_world split choose_tokenizer", lambda: make_world(settings))
    stage.known["texts"] = checksum(repr((world["tokens"], world["fine_tune"][0].tolist())).encode())
    tokenizer = data.tokenizer_of(world["tokens"])
    rewards_of = {name: data.Sentiment(*judge) for name, judge in world.get("judges", {}).items()}
    if settings.data == "toy":
        rewards_of = {"reward": data.toy_reward}

    def reference() -> dict:
        pi = start(world, settings, device)
        return checkpoint(fine_tune(pi, unpack(world["fine_tune"]), settings) if settings.steps else pi, world["tokens"])
    made = stage("reference", "texts init seed context n_layer n_head n_embd steps rows device bf16 model.py read_init start "
                 "fine_tune token_nll padded like_lengths warm_then_linear", reference)
    pi_ref = load(made, device).requires_grad_(False)

    if rewards_of:
        K, prompts = settings.completions, unpack(world["prompts"])

        def completions() -> dict:
            each = [x for x in prompts for _ in range(K)]
            responses = draw(pi_ref, each, settings, tokenizer, "sampling completions")
            rewards = rewards_of["reward"]([data.text_of(x + y, tokenizer) for x, y in zip(each, responses)])
            return dict(responses=pack(responses), rewards=rewards.view(-1, K))
        completed = stage("completions", "world reference completions seed draw", completions)
        triplets, counts = data.preferences(prompts, in_groups(unpack(completed["responses"]), K), completed["rewards"],
                                            tokenizer, settings.labels, random.Random(settings.seed))
    else:
        triplets = data.encode_pairs(world["pairs"], tokenizer, settings.context)
        counts, stage.known["completions"] = dict(pairs=len(triplets)), None
    if not triplets:
        raise BadInput("no preferences: all pairs are identical or tied; raise --prompts or --steps")
    data.write_triplets(triplets, out / "triplets.jsonl")
    if show:
        print(data.show(triplets[0], tokenizer))
        return None

    def scored() -> dict:
        ids, mask, pairs, weight = data.group(triplets)
        return dict(ids=ids, mask=mask, pi_ref=score(pi_ref, ids, mask), pairs=pairs, weight=weight)
    scores = stage("scores", "world reference completions labels seed dpo.py score", scored)
    held = stage("held_out", "world reference held_out samples answers labels seed dpo.py hold_out draw score token_nll",
                 lambda: hold_out(pi_ref, world, tokenizer, settings, rewards_of))
    return Experiment(settings, stage, tokenizer, rewards_of, pi_ref,
                      dpo.Preferences(**scores), counts, world.get("accuracy"), held, dpo.Preferences(*held["pairs"]),
                      optimal_curve(held["rewards"]["reward"]) if rewards_of else None)


def run(settings: Settings, out: Path, device: torch.device) -> dict:
    """The experiment: `prepare`, then DPO and its evaluation for each beta, results, samples and figure."""
    e = prepare(settings, out, device)
    policies, evaluations = [], []
    for beta in settings.beta:
        def policy() -> dict:
            pi_theta, records = optimise(e.pi_ref, e.preferences, partial(dpo.dpo, beta=beta), peak_rate(beta, settings),
                                         settings, f"DPO, beta {beta:g}")
            return checkpoint(pi_theta, data.tokens_of(e.tokenizer), records=records)
        policies.append(e.stage(f"dpo-{beta}", "scores batch rate seed peak_rate optimise like_lengths warm_then_linear", policy))
        pi_theta = load(policies[-1], device)
        evaluations.append(e.stage(
            f"evaluation-{beta}", f"dpo-{beta} held_out answers seed evaluate joined draw optimal_curve "
            "fraction_of_optimal mean_se",
            lambda: evaluate(e, pi_theta, beta)))

    name_only = {name: value and Path(value).name for name, value in
                 dict(data=settings.data, imdb=settings.imdb, init=settings.init).items()}
    results = dict(config=dataclasses.asdict(settings) | dataclasses.asdict(e.pi_ref.config) | name_only, device=str(device), bf16=e.pi_ref.bf16,
                   seconds=e.stage.seconds, peak_memory_bytes=peak_memory(device), labels=e.counts, classifier=e.accuracy,
                   reference=dict(nats_per_byte=e.held["nats_per_byte"], length=e.held["lengths"].double().mean().item()),
                   frontier=[], best_of_n=[], points=[evaluation["point"] for evaluation in evaluations])
    if e.rewards_of:
        r = e.held["rewards"]["reward"]
        first, second = r.chunk(2, dim=1)
        reward, reward_se = mean_se(r)
        results["reference"] |= dict(reward=reward, reward_se=reward_se, comparisons=first.numel(),
                                     win_rate=((first - second).sign() + 1).mean().item() / 2)
        if "judge" in e.rewards_of:
            results["reference"]["judge_reward"] = e.held["rewards"]["judge"].mean().item()
        results["frontier"] = [dict(beta=b, reward=reward, kl=kl, trusted=bool(trusted)) for b, reward, kl, trusted in zip(
            BETAS.tolist(), e.curve["reward"].mean(1).tolist(), e.curve["kl"].mean(1).tolist(), e.curve["trusted"])]
        results["best_of_n"] = [dict(n=n, reward=best_of_n(r, n), kl_bound=math.log(n) - (n - 1) / n)
                                for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= settings.samples]
    data.write(out / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    data.write(out / "samples.txt", samples_text(results, e.held, evaluations).encode())
    labels = f"{settings.labels} labels, " if e.rewards_of else ""
    title = f"{name_only['data']}, {labels}{e.counts['pairs']:,} pairs, seed {settings.seed}"
    data.write(out / "figure.png", draw_figure(results, [policy["records"] for policy in policies], title))
    return results


def peak_memory(device: torch.device) -> int | None:
    """Bytes, of the GPU or else of the process, where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------- the command line

def between(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """A number from low to high, or an error that names the flag."""
    def parse_number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number from {low:g} to {high:g}")
        return value
    return parse_number


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")         # one line, without the usage


def usable_device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).cpu().to(name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"{name!r} is no device of this machine; try cpu") from None


def parse(argv: list[str]) -> tuple[argparse.Namespace, Settings]:
    parser = Parser(
        prog="train.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="Run again, finished stages are kept; a changed setting redoes what depends on it. Nothing is written outside\n"
               "--out but downloads and matplotlib's list of fonts, which go to ~/.cache/dpo, or the folder that the environment variable DPO_CACHE names.")
    add, count = parser.add_argument, between(1, 10 ** 7, int)
    add("--data", default="toy", metavar="{toy,imdb,PATH}", help="the grammar's reviews (default), IMDb's, or preferences of your "
        "own: one JSON object a line with the strings prompt, chosen, rejected")
    add("--imdb", metavar="PATH", help="the IMDb archive or its unpacked folder; if not given, it is downloaded once (84 MB)")
    add("--init", metavar="PATH", help="a checkpoint to start from: out/reference.pt or out/dpo-BETA.pt of another run. With "
        "preferences of your own it is pi_ref as it is, unless --steps asks for fine-tuning")
    add("--tokenizer", choices=("reviews", "gpt2"), help="learned from the texts (default), or GPT-2's, which tiktoken downloads once")
    add("--vocab-size", type=between(257, 10 ** 6, int), metavar="N", help="of the tokenizer that is learned: 256 bytes, "
        "the end token, and what is merged")
    add("--context", type=between(8, 65536, int), metavar="N", help="tokens that the model sees, prompt and response together")
    add("--labels", choices=("bt", "soft", "argmax"), help="drawn from Bradley-Terry (default), their expectation, the paper's")
    add("--beta", type=between(1e-4, 1e4), nargs="+", metavar="B", help="the price of a nat of KL; one DPO run each")
    add("--seed", type=between(0, 2 ** 32 - 1, int), metavar="N", help="of everything that is drawn (default 0)")
    add("--reviews", type=count, metavar="N", help="that pi_ref is fine-tuned on")
    add("--steps", type=between(0, 10 ** 7, int), metavar="N", help="of fine-tuning")
    add("--prompts", type=count, metavar="N", help="that preferences are collected on")
    add("--rate", type=between(1e-12, 1e12), help="DPO's peak learning rate at beta 1; it is scaled by beta^-1.25")
    add("--batch", type=count, metavar="N", help="prompts in a step of DPO")
    add("--held-out", type=between(2, 10 ** 5, int), metavar="N", help="prompts of the evaluation")
    add("--samples", type=between(8, 10 ** 4, int), metavar="N", help="of pi_ref for each held-out prompt, a multiple of 4; "
        "more extend the trusted curve")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps (default: "
        "%(default)s)")
    add("--out", type=Path, default=Path("out"), help="the folder of everything that is written (default: %(default)s)")
    add("--show", action="store_true", help="print one triplet token by token, its mask in brackets, and stop")
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if getattr(args, f.name, None) is not None}
    own = args.data not in ("toy", "imdb")
    if args.imdb and args.data != "imdb":
        parser.error("--imdb PATH needs --data imdb")
    for name in ("labels", "reviews", "prompts", "samples"):
        if own and name in given:
            parser.error(f"--{name} has no meaning for preferences of your own: leave it out")
    for name in ("tokenizer", "vocab_size"):
        if args.init and name in given:
            parser.error(f"--{name.replace('_', '-')} has no meaning beside --init, which brings its tokenizer: leave it out")
    defaults = (OWN | dict(data=args.data) | ({"steps": 0} if args.init else {})) if own else IMDB if args.data == "imdb" else {}
    settings = Settings(**defaults | given)
    if settings.samples % settings.completions:
        parser.error(f"--samples needs a multiple of {settings.completions}")
    if settings.steps == 0 and not args.init:
        parser.error("--steps 0 leaves pi_ref untrained: it needs --init")
    return args, dataclasses.replace(settings, beta=tuple(dict.fromkeys(settings.beta)))


def keep_freed_memory():
    """Ask glibc not to hand large freed blocks back to the system, so that each logits tensor need not be paged in anew: a
    fifth of a DPO step on CPU. Other systems are left as they are."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter in (-1, -2, -3):                  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)


def main(argv: list[str]) -> int:
    args, settings = parse(argv)
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")   # a terminal need not know every character
    began = time.perf_counter()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with alone_in(args.out):
            if args.show:
                prepare(settings, args.out, args.device, show=True)
                return 0
            results = run(settings, args.out, args.device)
    except (BadInput, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("alloc|out of memory", str(e)):
            raise                                           # torch's way to say that memory ran out, and much else
        print("train.py:", " ".join(str(e).split())[:500] or "out of memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"train.py: interrupted; the stages that ended are kept in {args.out}, run again to go on", file=sys.stderr)
        return 130
    print(summary(results))
    print(f"{time.perf_counter() - began:.0f} s; see {args.out / 'figure.png'}, results.json and samples.txt beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
