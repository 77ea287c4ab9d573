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
import itertools
import json
import math
import os
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator
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
    """What a run depends on. The defaults are the toy world's; `IMDB` below changes what the real one needs."""
    data: str = "toy"
    imdb: str | None = None         # the archive or folder of --data imdb; downloaded if not given
    labels: str = "bt"              # each beta has a predicted place with these, and with "soft"; not with the paper's "argmax"
    beta: tuple[float, ...] = (0.5, 1.0, 2.0)
    seed: int = 0
    tokenizer: str = "reviews"      # learned from them; "gpt2" is GPT-2's own, of 50,257 tokens
    vocab_size: int = 1024          # an upper bound: the grammar's words are whole tokens before it is reached
    context: int = 24               # tokens; most reviews of the grammar fit whole
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    reviews: int = 20_000           # that pi_ref is fine-tuned on
    steps: int = 300                # of fine-tuning
    rows: int = 64                  # reviews in a step of fine-tuning
    prompts: int = 10_000           # that preferences are collected on; more prompts help more than more passes over them
    completions: int = 4            # the paper's
    batch: int = 64                 # prompts in a step of DPO
    rate: float = 0.03              # DPO's peak learning rate at beta 1
    held_out: int = 100             # prompts of the evaluation
    samples: int = 512              # of pi_ref for each held-out prompt, which draw the optimal curve
    answers: int = 96               # of pi_theta for each held-out prompt


IMDB = dict(data="imdb", beta=(0.1, 1.0), vocab_size=4097, context=48, n_layer=3, n_head=4, n_embd=128, reviews=75_000,
            steps=2400, rows=32, prompts=8_000, batch=16, rate=1.6e-3, held_out=64, answers=48)


# ----------------------------------------------------------------------------- stages: what is made once, and kept

class Stages:
    """Results by name, each kept in a file together with a key of all it depends on, and made again only if that changed."""

    def __init__(self, out: Path, settings: Settings):
        self.out, self.settings, self.keys = out, settings, {}
        self.log = out / "stages.json"
        self.seconds: dict[str, float] = {}

    def value(self, need: str) -> object:
        if need in self.keys:                               # an earlier stage (before it, a setting of that name)
            return self.keys[need]
        if need.endswith(".py"):
            return Path(__file__).with_name(need).read_text(encoding="utf-8")
        if hasattr(self.settings, need):
            return getattr(self.settings, need)
        return inspect.getsource(globals()[need])           # a function of this file

    def __call__(self, name: str, needs: str, make: Callable[[], object]):
        """The result of make(), which may depend on the settings, sources and earlier stages that `needs` lists."""
        key = self.keys[name] = hashlib.sha256(repr((name, [self.value(need) for need in needs.split()])).encode()).hexdigest()
        done = json.loads(self.log.read_text()) if self.log.exists() else {}
        path = self.out / f"{name}.pt"
        if done.get(name, {}).get("key") != key or not path.exists():
            began = time.perf_counter()
            value = make()
            write(path, lambda part: torch.save(value, part))
            done[name] = dict(key=key, seconds=time.perf_counter() - began)
            write(self.log, lambda part: part.write_text(json.dumps(done, indent=1)))
        self.seconds[name] = done[name]["seconds"]
        return torch.load(path, map_location="cpu", weights_only=True)


def write(path: Path, save: Callable[[Path], object]):
    """Let `save` write a temporary file, which then takes the name `path` whole or not at all."""
    part = path.with_name(path.name + ".part")
    save(part)
    os.replace(part, path)


def pack(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Lists of ids as one tensor and their lengths; `unpack` undoes it."""
    return torch.tensor([i for ids in lists for i in ids], dtype=torch.int32), torch.tensor([len(ids) for ids in lists])


def unpack(packed: tuple[Tensor, Tensor]) -> list[list[int]]:
    return [ids.tolist() for ids in packed[0].split(packed[1].tolist())]


# ----------------------------------------------------------------------------- the stages, in the experiment's order

def toy_world(settings: Settings) -> dict:
    """Reviews of the grammar: for pi_ref, for the prompts, and held out."""
    sizes = settings.reviews, settings.prompts + settings.prompts // 4, 4 * settings.held_out + 500
    reviews = data.toy_reviews(sum(sizes), settings.seed)
    tokenizer = choose_tokenizer(settings, reviews[:min(20_000, settings.reviews)])
    ends = np.cumsum(sizes)
    return split(tokenizer, reviews[:ends[0]], reviews[ends[0]:ends[1]], reviews[ends[1]:], settings)


def imdb_world(settings: Settings) -> dict:
    """IMDb's training reviews for pi_ref and the true reward, its test reviews for prompts and for the second judge."""
    folder = Path(os.environ.get("DPO_CACHE", Path.home() / ".cache" / "dpo"))
    reviews = data.read_imdb(Path(settings.imdb) if settings.imdb else data.download_imdb(folder))
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


def choose_tokenizer(settings: Settings, texts: list[str]) -> tiktoken.Encoding:
    return data.gpt2_tokenizer() if settings.tokenizer == "gpt2" else data.learn_tokenizer(texts, settings.vocab_size)


def split(tokenizer, fine_tune: list[str], asked: list[str], held_out: list[str], settings: Settings) -> dict:
    """A world: the tokenizer's tokens, the openings that pi_ref learns from, and prompts from other reviews."""
    rng = random.Random(settings.seed)
    tuned, asked, kept = (data.openings(reviews, tokenizer, settings.context) for reviews in (fine_tune, asked, held_out))
    prompts = data.prompts_of(asked, tokenizer, rng)[:settings.prompts]
    held = data.prompts_of(kept, tokenizer, rng)[:settings.held_out]
    if not tuned or len(held) < settings.held_out:
        raise BadInput(f"too few reviews: {len(tuned)} openings to fine-tune on, {len(held)} of {settings.held_out} held-out "
                       "prompts; lower --held-out, or give more reviews")
    if len(prompts) < settings.prompts:
        print(f"only {len(prompts)} of {settings.prompts} prompts: there are no more reviews")
    return dict(tokens=[tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab - 1)],
                fine_tune=pack(tuned), prompts=pack(prompts), held_out=pack(held), unseen=pack(kept))


def fine_tune(pi: GPT, openings: list[list[int]], settings: Settings) -> GPT:
    """Fit pi to the openings: next-token cross-entropy, a mean over tokens; Muon on the blocks' matrices, AdamW on the rest."""
    rng = np.random.default_rng(settings.seed)
    if pi.config.vocab_size <= 10_000:                  # beyond it, the table of pairs is too large
        pi.wte.weight.data.copy_(embedding_from_counts(openings, pi.config.vocab_size, pi.config.n_embd))
    matrices = [p for p in pi.h.parameters() if p.ndim == 2]
    rest = [p for p in pi.parameters() if not any(p is m for m in matrices)]
    optimizers = (Muon(matrices, lr=0.015),
                  torch.optim.AdamW(rest, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, warm_then_linear(settings.steps)) for o in optimizers]

    lengths = np.array([len(ids) for ids in openings])
    batches = (batch for _ in itertools.count() for batch in like_lengths(lengths, settings.rows, rng))
    bar = tqdm(itertools.islice(batches, settings.steps), total=settings.steps, desc="fine-tuning pi_ref")
    for step, batch in enumerate(bar):
        loss = token_nll(pi, [openings[i] for i in batch])
        loss.backward()
        for each in (*optimizers, *schedules):
            each.step()
        pi.zero_grad()
        if step % 50 == 0:
            bar.set_postfix_str(f"{loss.item():.2f} nats per token")
    return pi


def embedding_from_counts(openings: list[list[int]], vocab_size: int, n_embd: int) -> Tensor:
    """Token vectors (V, C) to start from, instead of noise: the leading singular vectors of the positive pointwise mutual
    information of tokens at most two places apart (Levy and Goldberg 2014). They cost seconds, and are a head start."""
    ids = torch.tensor([i for opening in openings for i in opening])
    counts = torch.zeros(vocab_size, vocab_size)
    for apart in (1, 2):
        pairs = ids[:-apart] * vocab_size + ids[apart:]
        counts += torch.bincount(pairs, minlength=vocab_size ** 2).view_as(counts) / apart
    counts = counts + counts.T
    often = counts.sum(1) + 1
    chance = often ** 0.75 / (often ** 0.75).sum()
    pmi = (counts / (often[:, None] * chance)).clamp(min=1).log()
    U, S, _ = torch.svd_lowrank(pmi, q=n_embd + 16, niter=3)
    vectors = (U * S.sqrt())[:, :n_embd]
    vectors = (vectors - vectors.mean(0)) @ torch.linalg.qr(torch.randn(n_embd, n_embd))[0]     # no axis is special
    return 0.05 * math.sqrt(n_embd) * F.normalize(vectors)


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all brought near 1 before each step (Jordan et al. 2024), for matrices. As
    `torch.optim.Muon`, but in float32: that one iterates in bfloat16, which is slow on a CPU without units
    for it."""

    def __init__(self, params, lr: float):
        super().__init__(params, dict(lr=lr, momentum=0.95, weight_decay=0.1))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"])
                tall = x.size(0) > x.size(1)
                x = F.normalize(x.T if tall else x, dim=(0, 1))
                for _ in range(5):                                  # a Newton-Schulz iteration for U V^T of x = U S V^T
                    gram = x @ x.T
                    x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(x.T if tall else x, alpha=group["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5)


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


def padded(lists: list[list[int]], device: torch.device) -> Tensor:
    """(B, T) ids, -1 after each one's end."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in lists], True, -1).to(device)


def token_nll(pi: GPT, batch: list[list[int]], reduction: str = "mean") -> Tensor:
    """Cross-entropy of the batch's tokens after the first, nats per token."""
    ids = padded(batch, pi.wte.weight.device)
    logits = pi(ids[:, :-1].clamp(min=0)).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1, reduction=reduction)


def draw(pi: GPT, prompts: list[list[int]], settings: Settings, tokenizer, purpose: str) -> list[list[int]]:
    """One response for each prompt, in batches of prompts of like length; each purpose has its own random numbers."""
    seed = zlib.crc32(f"{settings.seed} {purpose}".encode())
    generator = torch.Generator(pi.wte.weight.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[]] * len(prompts)
    with tqdm(total=len(prompts), desc=purpose) as bar:
        for start in range(0, len(order), 1024):
            rows = order[start:start + 1024]
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
            some = dpo.response_logps(pi_ref, *(v[rows, :, :T].flatten(0, 1).to(device) for v in (ids, mask)))
            logps[rows, :, :T] = some.view(len(rows), -1, T).cpu()
    return logps


def optimise(pi_ref: GPT, preferences: dpo.Preferences, beta: float, settings: Settings) -> tuple[GPT, dict[str, Tensor]]:
    """pi_theta, trained by DPO from pi_ref in one pass over the prompts, and what each step saw.

    Plain gradient descent with momentum: Adam did worse here at equal KL, as its steps are as large for a token seldom
    seen as for a frequent one. What single words are worth is learned in the
    token vectors, at the full rate; the rest moves at a sixteenth of it. The rate falls as beta rises, since
    log-ratios do; its power was found by trial."""
    pi_theta = copy.deepcopy(pi_ref).requires_grad_(True)
    places = torch.arange(preferences.mask.size(-1), device=preferences.mask.device)
    lengths = (preferences.mask.any(1) * places).amax(-1).cpu().numpy()
    batches = [torch.from_numpy(batch).to(preferences.ids.device)
               for batch in like_lengths(lengths, settings.batch, np.random.default_rng(settings.seed))]
    rate = settings.rate * beta ** -1.25
    rest = [p for p in pi_theta.parameters() if p is not pi_theta.wte.weight]
    optimizer = torch.optim.SGD([dict(params=[pi_theta.wte.weight], lr=rate), dict(params=rest, lr=rate / 16)], momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_then_linear(len(batches)))
    records = []
    steps = dpo.train(pi_theta, preferences, partial(dpo.dpo, beta=beta), optimizer, batches)
    bar = tqdm(steps, total=len(batches), desc=f"DPO, beta {beta:g}")
    for record in bar:
        schedule.step()
        records.append(record)
        if len(records) % 20 == 0:
            bar.set_postfix_str("loss {loss:.3f}, accuracy {accuracy:.2f}".format(**record))
    seen = {name: torch.stack([r[name] for r in records]).cpu() for name in records[0]}
    if not all(values.isfinite().all() for values in seen.values()):
        raise BadInput(f"DPO diverged at beta {beta:g}: lower --rate")
    return pi_theta, seen


# ----------------------------------------------------------------------------- evaluation, and the optimum beside it

BETAS = np.geomspace(20, 0.05, 80)     # where the optimal curve is computed


def optimal_curve(r: Tensor) -> dict[str, np.ndarray]:
    """Eq. 4 from pi_ref's rewards r (P, N): for each of BETAS the reward and KL of each prompt (80, P), and whether their
    mean can be trusted: effective sample size at least 40, and the curve from N/2 samples agreeing within 2 %."""
    reward, kl, size = (np.stack(v) for v in zip(*[[t.numpy() for t in dpo.frontier(r.double(), b)] for b in BETAS]))
    halves = []
    for half in r.double().chunk(2, dim=1):
        h = np.stack([[t.mean().item() for t in dpo.frontier(half, b)[:2]] for b in BETAS])
        halves.append(np.interp(kl.mean(1), h[:, 1], h[:, 0] - half.mean().item(), right=np.nan))
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
    return each.mean().item(), (each.std() / math.sqrt(len(each))).item()


def best_of_n(r: Tensor, N: int) -> float:
    """E max of N of a prompt's M rewards, unbiased: sum_i C(i-1, N-1) / C(M, N) r_(i), averaged over prompts; r (P, M)."""
    M = r.size(1)
    weight = torch.tensor([math.comb(i, N - 1) / math.comb(M, N) for i in range(M)], dtype=torch.double)
    return (r.double().sort(1).values * weight).sum(1).mean().item()


def evaluate(pi_theta: GPT, pi_ref: GPT, beta: float, held: dict, pairs: dpo.Preferences, curve: dict, tokenizer, settings: Settings,
             rewards_of: dict[str, Callable]) -> dict:
    """Fresh samples of pi_theta on the held-out prompts, judged, beside pi_ref's and the optimum's: a row of results.json."""
    P, M = settings.held_out, min(settings.answers, settings.samples)
    prompts = [x for x in unpack(held["prompts"]) for _ in range(M)]
    responses = draw(pi_theta, prompts, settings, tokenizer, f"sampling, beta {beta:g}")
    texts = [data.text_of(x + y, tokenizer) for x, y in zip(prompts, responses)]
    r = rewards_of["reward"](texts).view(P, M)
    kls = []
    for xs, ys in zip(tqdm(in_groups(prompts, 64), desc="measuring the KL"), in_groups(responses, 64)):
        ids = padded([x + y for x, y in zip(xs, ys)], pi_ref.wte.weight.device)
        starts = torch.tensor([len(x) for x in xs], device=ids.device)[:, None]
        mask = (torch.arange(ids.size(1), device=ids.device) >= starts) & (ids >= 0)
        kls.append(torch.stack(dpo.sequence_kl(pi_theta, pi_ref, ids.clamp(min=0), mask)).cpu())
    log_ratio, kl = torch.cat(kls, 1).view(2, P, M)

    ref = held["rewards"]
    wins = ((r - ref[:, :M]).sign() + 1) / 2
    theta = score(pi_theta, pairs.ids, pairs.mask).sum(-1)
    x, w, l = pairs.pairs.T
    r_hat = dpo.implicit_reward(theta, pairs.pi_ref.sum(-1), beta)
    gap_hat, gap = (r_hat[x, w] - r_hat[x, l]).double(), held["gap"].double()
    share = pairs.weight / pairs.weight.sum()
    ceiling = {"bt": torch.sigmoid(gap.abs()).mean(), "soft": torch.sigmoid(gap.abs()).mean(), "argmax": torch.ones(())}

    marks = [t.mean().item() for t in dpo.frontier(ref.double(), beta)[:2]]
    predicted = beta >= BETAS[-1] and bool(curve["trusted"][np.searchsorted(-BETAS, -beta).clip(max=len(BETAS) - 1)]) and settings.labels != "argmax"
    fraction, fraction_se = fraction_of_optimal(curve, *(v.double().mean(1).numpy() for v in (ref, r, kl)))
    _, log_Z = dpo.optimal_policy(torch.full_like(ref, -math.log(ref.size(1))).double(), ref.double(), beta)
    regret, regret_se = mean_se(beta * log_Z[:, None] - (r - beta * kl).double().mean(1, keepdim=True))
    point = dict(method="DPO", beta=beta, seed=settings.seed)
    point["reward"], point["reward_se"] = mean_se(r)
    point["kl"], point["kl_se"] = mean_se(kl)
    point["kl_log_ratio"], point["kl_log_ratio_se"] = mean_se(log_ratio)
    point |= dict(kl_median=kl.median().item(), kl_p99=kl.flatten().quantile(0.99).item(),
                  win_rate=wins.mean().item(), comparisons=wins.numel(),
                  pair_accuracy=(share * ((gap_hat.sign() + 1) / 2)).sum().item(),
                  pair_accuracy_ceiling=ceiling[settings.labels].item(),
                  reward_slope=((gap_hat * gap).sum() / gap.square().sum()).item(),
                  reward_r2=((gap_hat * gap).sum().square() / (gap.square().sum() * gap_hat.square().sum())).item(),
                  length=sum(map(len, responses)) / len(responses),
                  optimal_reward=marks[0] if predicted else None, optimal_kl=marks[1] if predicted else None,
                  fraction_of_optimal=fraction, fraction_of_optimal_se=fraction_se,
                  regret=regret if predicted else None, regret_se=regret_se if predicted else None)
    if "judge" in rewards_of:
        point["judge_reward"], point["judge_reward_se"] = mean_se(rewards_of["judge"](texts).view(P, M))
    point = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in point.items()}     # 0 / 0
    return dict(point=point, texts=texts[::M], rewards=r[:, 0])


def hold_out(pi_ref: GPT, world: dict, tokenizer, settings: Settings, rewards_of: dict[str, Callable]) -> dict:
    """pi_ref on the held-out prompts: N samples of each and their rewards, preference pairs among the first 16, and how well
    it predicts reviews it never saw."""
    P, N = settings.held_out, settings.samples
    prompts = unpack(world["held_out"])
    each = [x for x in prompts for _ in range(N)]
    responses = draw(pi_ref, each, settings, tokenizer, "sampling pi_ref on held-out prompts")
    texts = [data.text_of(x + y, tokenizer) for x, y in zip(each, responses)]
    rewards = rewards_of["reward"](texts)
    first = [i for p in range(P) for i in range(p * N, p * N + min(16, N))]
    K = settings.completions
    triplets, _ = data.preferences([each[i] for i in first[::K]], in_groups([responses[i] for i in first], K),
                                   rewards[first].view(-1, K), tokenizer, settings.labels, random.Random(settings.seed))
    ids, mask, pairs, weight = data.group(triplets)
    unseen = unpack(world["unseen"])[:1000]
    tokens = world["tokens"] + [b""]
    with torch.no_grad():
        nats = sum(token_nll(pi_ref, some, "sum").item() for some in in_groups(unseen, 100))
    return dict(prompts=world["held_out"], rewards=rewards.view(P, N), lengths=torch.tensor([len(y) for y in responses]),
                texts=texts[::N], pairs=(ids, mask, score(pi_ref, ids, mask), pairs, weight),
                gap=torch.tensor([t["reward_chosen"] - t["reward_rejected"] for t in triplets]),
                nats_per_byte=nats / sum(len(tokens[i]) for ids in unseen for i in ids[1:]),
                judge=rewards_of["judge"](texts).mean().item() if "judge" in rewards_of else None)


# ----------------------------------------------------------------------------- what is written for people

THETA, REF = "#d95f02", "#1b6ca8"      # one colour for pi_theta and one for pi_ref, here and in the notebook


def draw_figure(path: Path, results: dict, settings: Settings):
    """Reward against KL: the optimal curve, theory's place for each beta and DPO's, best-of-N, and pi_ref."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, ax = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    kl, reward, trusted = (np.array([f[name] for f in results["frontier"]]) for name in ("kl", "reward", "trusted"))
    n, points, r_ref = int(trusted.sum()), results["points"], results["reference"]["reward"]
    ax.plot([0, *kl[:n]], [r_ref, *reward[:n]], color="0.25", label="the best of all policies (Eq. 4)")
    ax.plot(kl[max(n - 1, 0):], reward[max(n - 1, 0):], ":", color="0.25",
            label=f"beyond what {settings.samples} samples a prompt can tell")
    ax.plot(*zip(*[(b["kl_bound"], b["reward"]) for b in results["best_of_n"]]), "s-", color="0.6", ms=4, lw=1,
            label="best of N, at an upper bound on its KL")
    predicted = [p for p in points if p["optimal_kl"] is not None]
    ax.plot([p["optimal_kl"] for p in predicted], [p["optimal_reward"] for p in predicted], "o", mfc="white", mec=THETA, ms=10,
            label="where theory puts each $\\beta$" if predicted else None)
    ax.errorbar([p["kl"] for p in points], [p["reward"] for p in points], [2 * p["reward_se"] for p in points],
                [2 * p["kl_se"] for p in points], "o", color=THETA, ms=5, label="DPO, with two standard errors")
    for p in points:
        ax.annotate(f"$\\beta$ = {p['beta']:g}", (p["kl"], p["reward"]), xytext=(8, -12), textcoords="offset points")
    ax.plot(0, r_ref, "D", color=REF, ms=8, label=r"$\pi_\mathrm{ref}$")
    right, top = (max(p[name] for p in points) for name in ("kl", "reward"))
    ax.set_xlim(-0.04 * right, 1.15 * right)
    ax.set_ylim(r_ref - 0.15 * (top - r_ref), top + 0.35 * (top - r_ref))
    ax.set(xlabel=r"KL($\pi_\theta$, $\pi_\mathrm{ref}$), nats per response", ylabel="mean true reward, nats",
           title=f"{settings.data}, {settings.labels} labels, {settings.prompts:,} prompts, seed {settings.seed}")
    ax.legend(loc="lower right", frameon=False, fontsize="small")
    write(path, lambda part: fig.savefig(part, format="png", dpi=150))
    plt.close(fig)


def samples_text(results: dict, held: dict, evaluations: list[dict], rows: int = 12) -> str:
    """The first completion of some held-out prompts, before and after, each with its true reward."""
    lines = []
    for i in range(min(rows, len(held["texts"]))):
        lines.append(f"{held['rewards'][i, 0]:+6.2f}  pi_ref     {held['texts'][i]}")
        for p, e in zip(results["points"], evaluations):
            lines.append(f"{e['rewards'][i]:+6.2f}  beta {p['beta']:<5g} {e['texts'][i]}")
        lines.append("")
    return "\n".join(lines)


def summary(results: dict) -> str:
    """The table of the run, and in a sentence whether what the paper predicts was seen."""
    points, r_ref = results["points"], results["reference"]
    columns = {"beta": "g", "reward": ".2f", "optimal_reward": ".2f", "kl": ".2f", "optimal_kl": ".2f", "win_rate": ".2f",
               "pair_accuracy": ".3f", "pair_accuracy_ceiling": ".3f", "fraction_of_optimal": ".2f"}
    rows = [[format(p[name], form) if p[name] is not None else "-" for name, form in columns.items()] for p in points]
    lines = ["  ".join(f"{cell:>{len(name)}}" for cell, name in zip(row, columns)) for row in ([*columns], *rows)]
    fractions = [p["fraction_of_optimal"] for p in points if p["fraction_of_optimal"] is not None]
    ordered = sorted(points, key=lambda p: p["beta"])
    falls = all(a["kl"] > b["kl"] for a, b in zip(ordered, ordered[1:]))
    direction = f"KL falls as beta rises: {'seen' if falls else 'not seen'}. " * (len(points) > 1)
    return "\n".join((f"pi_ref: reward {r_ref['reward']:.2f}, {r_ref['nats_per_byte']:.3f} nats per byte on unseen openings",
                      *lines, direction +
                      (f"Of the gain that is possible at its KL, DPO reached {min(fractions):.0%} to {max(fractions):.0%}."
                       if fractions else f"No KL is within what {results['config']['samples']} samples can tell of the optimum.")))


# ----------------------------------------------------------------------------- the experiment

def bf16_pays(device: torch.device) -> bool:
    """Whether matrix products are much faster in bfloat16 here: on GPUs, and on CPUs with units for it (measured)."""
    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(1024, 1024, dtype=dtype)
        began = time.perf_counter()
        for _ in range(4):
            x @ x
        return time.perf_counter() - began
    return device.type == "cuda" or (device.type == "cpu" and
                                     min(seconds(torch.float32) for _ in range(3)) > 2 * min(seconds(torch.bfloat16) for _ in range(3)))


def run(settings: Settings, out: Path, device: torch.device, show: bool = False) -> dict | None:
    """World, reference, preferences, DPO, evaluation, figure: each made once and kept in `out`. With `show` it ends at the
    preferences, and prints one."""
    stage = Stages(out, settings)

    make_world = toy_world if settings.data == "toy" else imdb_world
    world = stage("world", "data imdb seed tokenizer vocab_size context reviews prompts held_out data.py toy_world imdb_world split", lambda: make_world(settings))
    tokenizer = data.gpt2_tokenizer() if settings.tokenizer == "gpt2" else data.tokenizer_of(world["tokens"])
    rewards_of = ({name: data.Sentiment(*judge) for name, judge in world["judges"].items()} if "judges" in world
                  else {"reward": data.toy_reward})

    pi_ref = GPT(GPTConfig(tokenizer.n_vocab, settings.context, settings.n_layer, settings.n_head, settings.n_embd))
    pi_ref.to(device).bf16 = stage("bf16", "", lambda: bf16_pays(device))      # decided once: stages do not mix precisions

    def reference() -> dict:
        torch.manual_seed(settings.seed)
        pi = GPT(pi_ref.config).to(device)
        pi.bf16 = pi_ref.bf16
        return fine_tune(pi, unpack(world["fine_tune"]), settings).state_dict()
    pi_ref.load_state_dict(stage("reference", "world n_layer n_head n_embd steps rows model.py fine_tune Muon embedding_from_counts token_nll padded like_lengths warm_then_linear bf16", reference))
    pi_ref.requires_grad_(False)
    prompts, K = unpack(world["prompts"]), settings.completions
    def completions() -> dict:
        each = [x for x in prompts for _ in range(K)]
        responses = draw(pi_ref, each, settings, tokenizer, "sampling completions")
        rewards = rewards_of["reward"]([data.text_of(x + y, tokenizer) for x, y in zip(each, responses)])
        return dict(responses=pack(responses), rewards=rewards.view(-1, K))
    completed = stage("completions", "reference prompts completions draw", completions)

    def label() -> dict:
        responses = in_groups(unpack(completed["responses"]), K)
        triplets, counts = data.preferences(prompts, responses, completed["rewards"], tokenizer, settings.labels,
                                            random.Random(settings.seed))
        if not triplets:
            raise BadInput("no preferences: all pairs are identical or tied; raise --prompts or --steps")
        write(out / "triplets.jsonl", lambda part: data.write_triplets(triplets, part))
        return counts
    counts = stage("triplets", "completions labels", label)

    if show:
        print(data.show(data.read_triplets(out / "triplets.jsonl")[0], tokenizer))
        return None

    def scored() -> dict:
        ids, mask, pairs, weight = data.group(data.read_triplets(out / "triplets.jsonl"))
        return dict(ids=ids, mask=mask, pi_ref=score(pi_ref, ids, mask), pairs=pairs, weight=weight)
    preferences = dpo.Preferences(**{name: t.to(device) for name, t in stage("scores", "triplets dpo.py score", scored).items()})
    held = stage("held_out", "reference held_out samples labels completions dpo.py hold_out draw score token_nll",
                 lambda: hold_out(pi_ref, world, tokenizer, settings, rewards_of))

    pairs = dpo.Preferences(*held["pairs"])
    curve = optimal_curve(held["rewards"])

    evaluations = []
    for beta in settings.beta:
        pi_theta = copy.deepcopy(pi_ref)
        def train_policy() -> dict:
            trained, records = optimise(pi_ref, preferences, beta, settings)
            return dict(weights=trained.state_dict(), records=records)
        policy = stage(f"dpo-{beta}", "scores batch rate optimise like_lengths warm_then_linear", train_policy)
        pi_theta.load_state_dict(policy["weights"])
        evaluations.append(stage(f"evaluation-{beta}", f"dpo-{beta} held_out answers evaluate draw optimal_curve fraction_of_optimal", lambda: evaluate(
            pi_theta, pi_ref, beta, held, pairs, curve, tokenizer, settings, rewards_of)))

    r_ref = held["rewards"]
    reward, reward_se = mean_se(r_ref)
    first, second = r_ref.chunk(2, dim=1)
    results = dict(
        config=dataclasses.asdict(settings) | dict(imdb=settings.imdb and Path(settings.imdb).name), device=str(device), bf16=pi_ref.bf16, seconds=stage.seconds,
        reference=dict(reward=reward, reward_se=reward_se, win_rate=((first - second).sign() + 1).mean().item() / 2,
                       comparisons=first.numel(), nats_per_byte=held["nats_per_byte"],
                       length=held["lengths"].double().mean().item(), judge_reward=held["judge"]),
        classifier=world.get("accuracy"), labels=counts,
        frontier=[dict(beta=b, reward=e, kl=k, trusted=bool(t)) for b, e, k, t in
                  zip(BETAS.tolist(), curve["reward"].mean(1).tolist(), curve["kl"].mean(1).tolist(), curve["trusted"])],
        best_of_n=[dict(n=n, reward=best_of_n(r_ref, n), kl_bound=math.log(n) - (n - 1) / n)
                   for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= settings.samples],
        points=[e["point"] for e in evaluations])
    write(out / "results.json", lambda part: part.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n"))
    write(out / "samples.txt", lambda part: part.write_text(samples_text(results, held, evaluations), encoding="utf-8"))
    draw_figure(out / "figure.png", results, settings)
    return results


def positive(kind: type) -> Callable[[str], float]:
    """A number that is finite and above zero, or an error that names the flag."""
    def parse_number(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value
    parse_number.__name__ = f"{kind.__name__} above zero"
    return parse_number


def seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2 ** 63:
        raise ValueError
    return value


def usable_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{name!r} is no device of this machine; try cpu") from None


def parse(argv: list[str]) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, number, count = parser.add_argument, positive(float), positive(int)
    add("--data", choices=("toy", "imdb"), default="toy", help="the world: the grammar's reviews (default), or IMDb's")
    add("--imdb", metavar="PATH", help="the IMDb archive or its unpacked folder; if not given, it is downloaded once into "
        "~/.cache/dpo, or the folder that the environment variable DPO_CACHE names")
    add("--tokenizer", choices=("reviews", "gpt2"), help="learned from the reviews (default), or GPT-2's, which tiktoken "
        "downloads once")
    add("--labels", choices=("bt", "soft", "argmax"), help="drawn from Bradley-Terry (default), their expectation, the paper's")
    add("--beta", type=number, nargs="+", metavar="B", help="the price of a nat of KL; one DPO run each")
    add("--seed", type=seed, help="of everything that is drawn (default 0)")
    add("--reviews", type=count, metavar="N", help="that pi_ref is fine-tuned on")
    add("--steps", type=count, metavar="N", help="of fine-tuning")
    add("--prompts", type=count, metavar="N", help="that preferences are collected on")
    add("--rate", type=number, help="DPO's peak learning rate at beta 1; it is scaled by beta^-1.25")
    add("--batch", type=count, metavar="N", help="prompts in a step of DPO")
    add("--held-out", type=count, metavar="N", help="prompts of the evaluation")
    add("--samples", type=count, metavar="N", help="of pi_ref for each held-out prompt; more extend the trusted curve")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), help="the folder of everything that is written (default: %(default)s)")
    add("--show", action="store_true", help="print one triplet token by token, its mask in brackets, and stop")
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if getattr(args, f.name, None) is not None}
    if args.imdb and args.data != "imdb":
        parser.error("--imdb PATH needs --data imdb")
    settings = Settings(**(IMDB if args.data == "imdb" else {}) | given)
    if settings.held_out < 2 or settings.samples < 8 or settings.samples % settings.completions:
        parser.error(f"--held-out needs at least 2, --samples a multiple of {settings.completions} from 8")
    return args, dataclasses.replace(settings, beta=tuple(dict.fromkeys(settings.beta)))


def keep_freed_memory():
    """Ask glibc not to hand large freed blocks back to the system, so that each logits tensor need not be paged in
    anew. Other systems are left as they are."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter in (-1, -2, -3):                  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)


def main(argv: list[str]) -> int:
    args, settings = parse(argv)
    keep_freed_memory()
    began = time.perf_counter()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        results = run(settings, args.out, args.device, args.show)
    except (BadInput, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"train.py: interrupted; the stages that ended are kept in {args.out}, run again to go on", file=sys.stderr)
        return 130
    if results:
        print(summary(results))
        print(f"{time.perf_counter() - began:.0f} s; see {args.out / 'figure.png'}, results.json and samples.txt beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
