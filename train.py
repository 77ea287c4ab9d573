"""The sentiment experiment of the DPO paper (section 6.1, figure 2 left, appendix C.1), at the scale of a laptop.

Question    How much true reward does DPO gain for each nat that it moves away from pi_ref, and how close is that to the
            best that any policy could?
Road        reviews -> tokenizer -> true reward -> pi_ref, a small GPT fine-tuned on reviews -> four completions a prompt
            -> preference triplets -> DPO at several beta -> fresh samples, judged -> the reward-KL frontier.
Prediction  With Bradley-Terry labels each beta has its place on the optimal curve (Eq. 4), which samples of pi_ref can tell.
"""
import argparse
import copy
import dataclasses
import itertools
import random
import sys
import zlib
from collections.abc import Callable
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
from kit import report
from kit.batches import in_groups, joined, like_lengths, longest, must_be_finite, padded, warm_then_linear
from kit.checkpoints import bf16_pays, checkpoint, load, read_checkpoint
from kit.estimates import BETAS, along, best_of_each_n, finite, fraction_of_optimal, mean_se, optimal_curve
from kit.files import BadInput, Stages, checksum, pack, unpack
from kit.own import encode_pairs, own_world
from kit.terminal import check, exit_code, flags, peak_memory
from kit.tokens import gpt2_tokenizer, learn_tokenizer, tokenizer_of, tokens_of
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
    n_layer: int = 2                # the grammar is learned by so small a model, in seconds
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
    samples: int = 512              # of pi_ref for each held-out prompt, which tell the optimal curve
    answers: int = 96               # of pi_theta for each held-out prompt


# A quarter of an hour on two cores with bfloat16 units. 4,096 tokens keep most words whole; small batches take more steps from as
# many tokens; a larger rate gains reward and wastes KL.
IMDB = dict(data="imdb", beta=(0.1, 1.0), vocab_size=4097, context=48, n_layer=4, n_head=6, n_embd=192, reviews=75_000,
            steps=3800, rows=32, prompts=13_000, batch=16, rate=1.6e-3, held_out=64, answers=48)
# Nobody knows how much there is: a few hundred steps, longer texts, the beta that most people use.
OWN = IMDB | dict(beta=(0.1,), context=256, steps=500, rows=16, answers=4)


# ----------------------------------------------------------------------------- pi_ref, and how models are run

def choose_tokenizer(settings: Settings, texts: list[str]) -> tiktoken.Encoding:
    """The checkpoint's of --init, GPT-2's, or one that is learned from the texts."""
    if settings.init:
        return tokenizer_of(read_init(settings)["tokens"])
    return gpt2_tokenizer() if settings.tokenizer == "gpt2" else learn_tokenizer(texts, settings.vocab_size)


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
    pi = GPT(GPTConfig(tokenizer_of(world["tokens"]).n_vocab, settings.context, settings.n_layer, settings.n_head,
                       settings.n_embd)).to(device)
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


def token_nll(pi: GPT, batch: list[list[int]], reduction: str = "mean") -> Tensor:
    """Cross-entropy of the batch's tokens after the first, nats per token."""
    ids = padded(batch).to(pi.wte.weight.device)
    logits = pi(ids[:, :-1].clamp(min=0)).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1, reduction=reduction)


def draw(pi: GPT, prompts: list[list[int]], settings: Settings, tokenizer, purpose: str) -> list[list[int]]:
    """One response for each prompt, in batches of prompts of like length. The purpose is what the bar says, and it seeds the
    random numbers, so that each has its own. A GPT this small leaves a GPU idle unless batches are large: half a million
    places, whose cache takes 19 GB for GPT-2's smallest size, and nearly twice that when rows leave it."""
    seed = zlib.crc32(f"{settings.seed} {purpose}".encode())
    generator = torch.Generator(pi.wte.weight.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses, size = [[]] * len(prompts), 2 ** 19 // pi.config.context if pi.wte.weight.is_cuda else 1024
    with tqdm(total=len(prompts), desc=purpose) as bar:
        for rows in in_groups(order, size):
            for i, y in zip(rows, sample(pi, [prompts[i] for i in rows], tokenizer.eot_token, generator=generator)):
                responses[i] = y
            bar.update(len(rows))
    return responses


def score(pi: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(y_t | x, y_<t) at the tokens of the completions, (P, K, T) nats, without gradient."""
    device = pi.wte.weight.device
    with torch.no_grad():
        logps = torch.zeros(ids.shape, dtype=pi.wte.weight.dtype)
        lengths = longest(mask)
        for rows in tqdm(lengths.argsort().split(32), desc="scoring completions"):
            T = int(lengths[rows[-1]])
            some = dpo.response_logps(pi, ids[rows, :, :T].flatten(0, 1).to(device), mask[rows, :, :T].flatten(0, 1))
            logps[rows, :, :T] = some.view(len(rows), -1, T).cpu()
    return logps


def peak_rate(beta: float, settings: Settings) -> float:
    """It grows as beta falls, since the optimum's log-ratios do; the power was found by trial."""
    return settings.rate * beta ** -1.25


def optimise(pi_ref: GPT, preferences: dpo.Preferences, loss: dpo.Loss, rate: float, settings: Settings,
             purpose: str = "training", watch: Callable[[GPT, int, int], None] | None = None) -> tuple[GPT, dict[str, Tensor]]:
    """pi_theta, trained from pi_ref in one pass over the prompts, and what each step saw, (steps,) each. After each step
    watch(pi_theta, steps taken, steps in all) may look.

    Plain gradient descent with momentum, since Adam's steps are as large for a token seldom seen as for a frequent one.
    What single words are worth is learned in the token vectors, at the full rate; the rest moves at a sixteenth of it.

    Errors: BadInput if the loss or the gradient is no longer finite."""
    pi_theta = copy.deepcopy(pi_ref).requires_grad_(True)
    rng = np.random.default_rng(settings.seed)
    batches = [*map(torch.from_numpy, like_lengths(longest(preferences.mask).numpy(), settings.batch, rng))]
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

# What a stage that trains depends on, and one that evaluates.
TRAINS = "optimise kit/batches.py"
JUDGES = "evaluate agreement beside_the_optimum draw score kit/batches.py kit/estimates.py"


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
    held_pairs: dpo.Preferences
    curve: dict[str, np.ndarray] | None


def hold_out(pi_ref: GPT, world: dict, tokenizer: tiktoken.Encoding, settings: Settings, rewards_of: dict) -> dict:
    """pi_ref on the P held-out prompts: prompts, N samples of each with their rewards (P, N) and lengths (P N,), the texts of
    the first of each, pairs of preferences (those of the world, or among each K of the first 16 samples) as `Preferences` has
    them, with the gap of their true rewards (n,), and nats_per_byte, how well it predicts texts it never saw."""
    prompts = unpack(world["held_out"])
    P, N, K = len(prompts), settings.samples if rewards_of else settings.answers, settings.completions
    each = [x for x in prompts for _ in range(N)]
    responses = draw(pi_ref, each, settings, tokenizer, "sampling pi_ref on held-out prompts")
    texts = [data.text_of(x + y, tokenizer) for x, y in zip(each, responses)]
    rewards = {name: reward(texts).view(P, N) for name, reward in rewards_of.items()}
    if rewards_of:
        n = min(16, N) // K * K
        groups = [ys for of_x in in_groups(responses, N) for ys in in_groups(of_x[:n], K)]
        triplets, _ = data.preferences([x for x in prompts for _ in range(n // K)], groups,
                                       rewards["reward"][:, :n].reshape(-1, K), tokenizer, settings.labels,
                                       random.Random(settings.seed))
        if not triplets:
            raise BadInput("no preferences on the held-out prompts: raise --held-out or --steps")
    else:
        triplets = encode_pairs(world["held_pairs"], tokenizer, settings.context)
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
    """Fresh samples of pi_theta on the held-out prompts, judged, beside pi_ref's and the optimum's: `point`, a row of
    results.json, and the first text and reward of each prompt."""
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

    point |= agreement(e, pi_theta, beta)
    if not e.rewards_of:
        return dict(point=finite(point), texts=texts[::M], rewards=None)

    ref, r = e.held["rewards"]["reward"], e.rewards_of["reward"](texts).view(P, M)
    point["reward"], point["reward_se"] = mean_se(r)
    if "judge" in e.rewards_of:
        point["judge_reward"], point["judge_reward_se"] = mean_se(e.rewards_of["judge"](texts).view(P, M))
    point |= dict(win_rate=((r - ref[:, :M]).sign() + 1).mean().item() / 2, comparisons=r.numel())
    return dict(point=finite(point | beside_the_optimum(e, r, kl, beta)), texts=texts[::M], rewards=r[:, 0])


def agreement(e: Experiment, pi_theta: GPT, beta: float) -> dict[str, float]:
    """The implicit reward on the held-out pairs: how it orders them, and how its differences follow the true reward's."""
    theta = score(pi_theta, e.held_pairs.ids, e.held_pairs.mask).sum(-1)
    x, w, l = e.held_pairs.pairs.T
    r_hat = dpo.implicit_reward(theta, e.held_pairs.pi_ref.sum(-1), beta)
    gap_hat = (r_hat[x, w] - r_hat[x, l]).double()
    share = e.held_pairs.weight.double() / e.held_pairs.weight.double().sum()
    found = {name: (share * v).sum().item() for name, v in dict(
        r_hat_w=r_hat[x, w], r_hat_l=r_hat[x, l], margin=gap_hat, pair_accuracy=(gap_hat.sign() + 1) / 2).items()}
    if not e.rewards_of:
        return found
    gap = e.held["gap"].double()
    ceiling = 1.0 if e.settings.labels == "argmax" else torch.sigmoid(gap.abs()).mean().item()      # the accuracy of r* itself
    return found | dict(pair_accuracy_ceiling=ceiling, reward_slope=((gap_hat * gap).sum() / gap.square().sum()).item(),
                        reward_r2=((gap_hat * gap).sum().square() / (gap.square().sum() * gap_hat.square().sum())).item())


def beside_the_optimum(e: Experiment, r: Tensor, kl: Tensor, beta: float) -> dict[str, float | None]:
    """Rewards and KL of pi_theta's samples, (P, M) each, beside the best policy with as much KL, and the best at this beta."""
    ref = e.held["rewards"]["reward"]
    fraction, fraction_se = fraction_of_optimal(e.curve, *(v.double().mean(1).numpy() for v in (ref, r, kl)))
    found = dict(fraction_of_optimal=fraction, fraction_of_optimal_se=fraction_se)
    names = "optimal_reward", "optimal_kl", "regret", "regret_se"
    at = np.searchsorted(-BETAS, -beta)                             # the next of BETAS that is no larger
    if at == len(BETAS) or not e.curve["trusted"][at] or e.settings.labels == "argmax":
        return found | dict.fromkeys(names)
    best_r, best_kl, _ = dpo.frontier(ref.double(), beta)           # (P,) each
    regret = (best_r - beta * best_kl)[:, None] - (r - beta * kl).double()          # how far Eq. 3 stays below its maximum
    return found | dict(zip(names, (best_r.mean().item(), best_kl.mean().item(), *mean_se(regret))))


# ----------------------------------------------------------------------------- the experiment


def prepare(settings: Settings, out: Path, device: torch.device, show: bool = False) -> Experiment | None:
    """World, reference, completions, scores and held-out samples, each made once and kept in `out`, and what follows from
    them. With `show` it ends at the preferences, and prints one."""
    stage = Stages(out, settings, globals(), device=device.type, bf16=bf16_pays(device))
    make_world = dict(toy=data.toy_world, imdb=data.imdb_world).get(settings.data, own_world)
    world = stage("world", "data imdb init seed tokenizer vocab_size context reviews prompts held_out data.py kit/own.py "
                  "kit/tokens.py choose_tokenizer read_init", lambda: make_world(settings, partial(choose_tokenizer, settings)))
    stage.known["texts"] = checksum(repr((world["tokens"], world["fine_tune"][0].tolist())).encode())
    tokenizer = tokenizer_of(world["tokens"])
    rewards_of = {name: data.Sentiment(*judge) for name, judge in world.get("judges", {}).items()}
    if settings.data == "toy":
        rewards_of = {"reward": data.toy_reward}

    def reference() -> dict:
        pi = start(world, settings, device)
        return checkpoint(fine_tune(pi, unpack(world["fine_tune"]), settings) if settings.steps else pi, world["tokens"])
    made = stage("reference", "texts init seed context n_layer n_head n_embd steps rows device bf16 model.py read_init start "
                 "fine_tune token_nll kit/batches.py", reference)
    pi_ref = load(made, device).requires_grad_(False)

    triplets, counts = collect(stage, world, pi_ref, tokenizer, settings, rewards_of)
    if not triplets:
        raise BadInput("no preferences: all pairs are identical or tied; raise --prompts or --steps")
    data.write_triplets(triplets, out / "triplets.jsonl")
    if show:
        print(data.show(triplets[0], tokenizer))
        return None

    def scored() -> dict:
        ids, mask, pairs, weight = data.group(triplets)
        return dict(ids=ids, mask=mask, pi_ref=score(pi_ref, ids, mask), pairs=pairs, weight=weight)
    scores = stage("scores", "world reference completions labels seed dpo.py score kit/batches.py", scored)
    held = stage("held_out", "world reference held_out samples answers labels seed dpo.py hold_out draw score token_nll "
                 "kit/batches.py", lambda: hold_out(pi_ref, world, tokenizer, settings, rewards_of))
    return Experiment(settings, stage, tokenizer, rewards_of, pi_ref,
                      dpo.Preferences(**scores), counts, world.get("accuracy"), held, dpo.Preferences(*held["pairs"]),
                      optimal_curve(held["rewards"]["reward"]) if rewards_of else None)


def collect(stage: Stages, world: dict, pi_ref: GPT, tokenizer: tiktoken.Encoding, settings: Settings,
            rewards_of: dict) -> tuple[list[dict], dict[str, int]]:
    """Preference triplets among pi_ref's completions of the prompts, or those of --data PATH; and counts of pairs."""
    if not rewards_of:
        stage.known["completions"] = None
        triplets = encode_pairs(world["pairs"], tokenizer, settings.context)
        return triplets, {"pairs": len(triplets), "held-out pairs": len(world["held_pairs"])}
    K, prompts = settings.completions, unpack(world["prompts"])

    def completions() -> dict:
        each = [x for x in prompts for _ in range(K)]
        responses = draw(pi_ref, each, settings, tokenizer, "sampling completions")
        rewards = rewards_of["reward"]([data.text_of(x + y, tokenizer) for x, y in zip(each, responses)])
        return dict(responses=pack(responses), rewards=rewards.view(-1, K))
    completed = stage("completions", "world reference completions seed draw kit/batches.py", completions)
    return data.preferences(prompts, in_groups(unpack(completed["responses"]), K), completed["rewards"], tokenizer,
                            settings.labels, random.Random(settings.seed))


def run(settings: Settings, out: Path, device: torch.device) -> dict:
    """The experiment: `prepare`, then DPO and its evaluation for each beta, and the report."""
    e = prepare(settings, out, device)
    policies, evaluations = [], []
    for beta in settings.beta:
        def policy() -> dict:
            kl = {}

            def watch(pi_theta: GPT, step: int, steps: int):
                if step * 10 // steps > (step - 1) * 10 // steps:               # ten times
                    kl[step] = kl_so_far(e, pi_theta)
            pi_theta, records = optimise(e.pi_ref, e.preferences, partial(dpo.dpo, beta=beta), peak_rate(beta, settings),
                                         settings, f"DPO, beta {beta:g}", watch)
            records |= dict(kl_step=torch.tensor([*kl]), kl=torch.tensor([*kl.values()]))
            return checkpoint(pi_theta, tokens_of(e.tokenizer), records=records)
        policies.append(e.stage(f"dpo-{beta}", f"scores batch rate seed peak_rate kl_so_far {TRAINS}", policy))
        pi_theta = load(policies[-1], device)
        evaluations.append(e.stage(f"evaluation-{beta}", f"dpo-{beta} held_out answers seed {JUDGES}",
                                   lambda: evaluate(e, pi_theta, beta)))
    results = results_of(e, [each["point"] for each in evaluations])
    shown = [dict(texts=e.held["texts"], rewards=e.held["rewards"]["reward"][:, 0] if e.rewards_of else None), *evaluations]
    cells = [[(each["texts"][i], each["rewards"][i].item() if e.rewards_of else None) for each in shown]
             for i in range(min(12, len(e.held["prompts"])))]
    report.write_report(out, results, cells, [data.text_of(x, e.tokenizer) for x in e.held["prompts"]],
                        e.rewards_of.get("reward"), [policy["records"] for policy in policies])
    return results


def kl_so_far(e: Experiment, pi_theta: GPT, rows: int = 256) -> float:
    """KL(pi_theta, pi_ref) in nats, from fresh responses to the held-out prompts, round and round: enough for a curve."""
    prompts = [*itertools.islice(itertools.cycle(e.held["prompts"]), rows)]
    device = pi_theta.wte.weight.device
    responses = sample(pi_theta, prompts, e.tokenizer.eot_token, generator=torch.Generator(device).manual_seed(e.settings.seed))
    return dpo.sequence_kl(pi_theta, e.pi_ref, *joined(prompts, responses, device))[1].mean().item()


def results_of(e: Experiment, points: list[dict]) -> dict:
    """results.json: what was run, what it took, the reference, the optimum and best of N beside it, and a point for each beta."""
    name_only = {name: (path := getattr(e.settings, name)) and Path(path).name for name in ("data", "imdb", "init")}
    config = dataclasses.asdict(e.settings) | dataclasses.asdict(e.pi_ref.config) | name_only
    device = e.pi_ref.wte.weight.device
    results = dict(config=config, device=str(device), bf16=e.pi_ref.bf16, seconds=e.stage.seconds,
                   peak_memory_bytes=peak_memory(device), labels=e.counts, classifier=e.accuracy,
                   reference=dict(nats_per_byte=e.held["nats_per_byte"], length=e.held["lengths"].double().mean().item()),
                   frontier=[], best_of_n=[], points=points)
    if e.rewards_of:
        r = e.held["rewards"]["reward"]
        first, second = r.chunk(2, dim=1)
        reward, reward_se = mean_se(r)
        results["reference"] |= dict(reward=reward, reward_se=reward_se, comparisons=first.numel(),
                                     win_rate=((first - second).sign() + 1).mean().item() / 2)
        if "judge" in e.rewards_of:
            results["reference"]["judge_reward"] = e.held["rewards"]["judge"].mean().item()
        results |= dict(frontier=along(e.curve), best_of_n=best_of_each_n(r))
    return results


# ----------------------------------------------------------------------------- the command line


def parse(argv: list[str]) -> tuple[argparse.Namespace, Settings]:
    """Errors: SystemExit 2 with one line, for flags that have no meaning together."""
    parser = flags(__doc__, Settings(), Settings(**IMDB))
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if getattr(args, f.name, None) is not None}
    own = args.data not in ("toy", "imdb")
    check(parser, args, own)
    defaults = (OWN | dict(data=args.data) | ({"steps": 0} if args.init else {})) if own else IMDB if args.data == "imdb" else {}
    settings = Settings(**defaults | given)
    if settings.samples % settings.completions:
        parser.error(f"--samples needs a multiple of {settings.completions}")
    if settings.steps == 0 and not args.init:
        parser.error("--steps 0 leaves pi_ref untrained: it needs --init")
    return args, dataclasses.replace(settings, beta=tuple(dict.fromkeys(settings.beta)))


def main(argv: list[str]) -> int:
    args, settings = parse(argv)

    def work() -> str:
        if args.show:
            return prepare(settings, args.out, args.device, show=True)
        return report.summary(run(settings, args.out, args.device))
    return exit_code("train.py", args.out, work, "figure.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
