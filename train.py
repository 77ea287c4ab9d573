"""The sentiment experiment of the DPO paper (section 6.1, figure 2 left), at the scale of a laptop.

    reviews -> pi_ref -> completions, labelled by a known reward r* -> DPO at several beta
            -> reward and KL of fresh samples, compared with the optimum of Eq. 4

How much reward does DPO gain for each nat of KL from pi_ref, and how close is that to the best
that any policy can do? Because r* is known, the optimum is known too.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import dpo
from lib import cli, custom_data, evaluate, report
from lib.checkpoint import load_gpt, read_checkpoint, resize_context, to_checkpoint
from lib.inference import fast_response_logps, generate, row_lengths
from lib.io import BadInput, cache_dir, download, open_user_file
from lib.loss import load_loss
from lib.optim import OPTIMIZERS, length_bucketed_batches, linear_warmup_decay
from lib.stage import Stage
from model import GPT, GPTConfig

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
PI_REF = Path(__file__).parent / "lib" / "pi_ref.pt"  # trained by beyond/pretrain.py
flag = cli.flag


@dataclass(frozen=True)
class Config:
    """Settings: defaults for the toy dataset, and for `imdb` and `own` where they differ."""

    # fmt: off
    data: str = flag("toy", "toy, imdb, or a file of your own preferences")
    imdb: Path | None = flag(None, "the IMDb archive or its folder; downloaded if omitted")
    init: Path | None = flag(None, "checkpoint to start from", imdb=PI_REF, own=PI_REF)
    from_scratch: bool = flag(False, "use random weights, and the tokenizer of --init")
    loss: str = flag("dpo", "a loss of beyond/losses.py, or FILE.py:FUNCTION")
    loss_args: tuple = flag((), "parameters of the loss, as NAME=VALUE")
    labels: str = flag("bt", "how r* labels a pair", choices=("bt", "soft", "argmax"))
    pairs: str = flag("all", "which pairs of a prompt", choices=("all", "best-worst"))
    beta: tuple = flag((0.5, 1.0, 2.0), "KL penalty", 1e-4, 1e4, imdb=(0.1, 1.0), own=(0.1,))
    seed: int = flag(0, "random seed", 0, 2**32 - 1)
    context: int = flag(24, "tokens of prompt and response together", 8, 65536, imdb=48, own=256)
    n_layer: int = flag(2, imdb=4, own=4)
    n_head: int = flag(4, imdb=6, own=6)
    n_embd: int = flag(64, imdb=192, own=192)
    reviews: int = flag(20_000, "reviews to fine-tune pi_ref on", 1, 10**7, imdb=75_000)
    sft_steps: int | None = flag(600, "steps of SFT; own: 3 epochs", 0, 10**7, imdb=0, own=None)
    sft_batch_size: int = flag(32, own=16)
    prompts: int = flag(10_000, "prompts to collect preferences on", 1, 10**7, imdb=13_000)
    completions: int = flag(4, "completions per prompt", 2, 16)
    optimizer: str = flag("sgd", "DPO optimizer", choices=tuple(OPTIMIZERS))
    lr: float = flag(0.009, "peak learning rate at beta 1", 1e-12, 1e12, imdb=5e-4, own=5e-4)
    epochs: int | None = flag(1, "DPO epochs; own: at least 100 steps", 1, 10**4, own=None)
    batch_size: int = flag(64, "prompts per DPO step", 1, 10**7, imdb=16, own=16)
    eval_prompts: int = flag(100, "evaluation prompts", 2, 10**5, imdb=64, own=64)
    ref_samples: int = flag(512, "samples of pi_ref per prompt", 16, 10**4, own=16)
    eval_samples: int = flag(96, "samples of pi_theta per prompt", 1, 10**4, imdb=48, own=4)
    # fmt: on


# -------------------------------------------------- 1. the dataset


def load_dataset(cfg: Config, stage: Stage, tokens: list[bytes] | None) -> data.Dataset:
    """The toy reviews, IMDb's, or preferences from a file. Raises BadInput if they are unusable."""
    reviews = 0 if cfg.sft_steps == 0 else cfg.reviews
    sizes = data.Sizes(cfg.prompts, cfg.eval_prompts, cfg.context, reviews)
    with open_user_file(cfg.imdb or Path(cfg.data), "a dataset"):
        if cfg.data == "toy":
            return stage("dataset", data.load_toy, sizes, cfg.seed, tokens)
        if cfg.data != "imdb":
            path = Path(cfg.data)
            return stage("dataset", custom_data.load_pairs, path, sizes, cfg.seed, tokens)
        path = cfg.imdb or download(IMDB_URL, cache_dir() / "aclImdb_v1.tar.gz", IMDB_MD5)
        shared = Stage(cache_dir() / "imdb", stage.plan)  # used by all runs
        archive = shared("reviews", data.read_imdb, path)
        rewards = shared("rewards", data.imdb_rewards, archive)
        return stage("dataset", data.load_imdb, archive, rewards, sizes, cfg.seed, tokens)


# -------------------------------------------------- 2. supervised fine-tuning


def initial_model(cfg: Config) -> dict:
    """The checkpoint of --init, or random weights."""
    found = resize_context(read_checkpoint(cfg.init), cfg.context) if cfg.init else None
    if found and not cfg.from_scratch:
        return found
    tokens = found["tokens"] if found else data.toy_tokens()
    vocab_size = data.load_tokenizer(tokens).n_vocab
    torch.manual_seed(cfg.seed)
    config = GPTConfig(vocab_size, cfg.context, cfg.n_layer, cfg.n_head, cfg.n_embd)
    return to_checkpoint(GPT(config), tokens)


def sft(checkpoint: dict, texts: list[list[int]], steps: int | None, batch_size: int, lr: float,
        seed: int, device: torch.device) -> dict:  # fmt: skip
    """Fine-tune a model on texts: AdamW on the mean cross-entropy per token. Returns pi_ref.

    steps: None for three epochs, and at least 50 steps.
    """
    steps = steps or max(50, 3 * len(texts) // batch_size)
    pi = load_gpt(checkpoint, device)
    optimizer = torch.optim.AdamW(pi.parameters(), lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_warmup_decay(steps))
    rng = np.random.default_rng(seed)
    lengths = np.array([len(ids) for ids in texts])
    epochs = (length_bucketed_batches(lengths, batch_size, rng) for _ in itertools.count())
    batches = itertools.islice(itertools.chain.from_iterable(epochs), steps)
    bar = tqdm(batches, "fine-tuning pi_ref", steps)
    for batch in bar:
        loss = evaluate.token_nll(pi, [texts[i] for i in batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if bar.n % 50 == 0:
            bar.set_postfix_str(f"{loss:.2f} nats per token", refresh=False)
    if not all(p.isfinite().all() for p in pi.parameters()):
        raise BadInput("fine-tuning diverged")
    return to_checkpoint(pi, checkpoint["tokens"])


# -------------------------------------------------- 3. completions and preferences


def complete(reference: dict, dataset: data.Dataset, K: int, seed: int, device: torch.device):
    """K completions of pi_ref for each prompt: ids, mask, logps (P K, T), and rewards (P, K)."""
    pi_ref = load_gpt(reference, device)
    tokenizer = data.load_tokenizer(reference["tokens"])
    prompts = [x for x in dataset.prompts for _ in range(K)]
    completions = generate(pi_ref, prompts, tokenizer.eot_token, seed, "sampling completions")
    texts = data.decode_rows(*completions[:2], tokenizer)
    return {"completions": completions, "rewards": dataset.reward(texts).view(-1, K)}


# -------------------------------------------------- 4. DPO


def train_dpo(reference: dict, preferences: dpo.Preferences, loss: dpo.Loss, optimizer: str,
              lr: float, epochs: int | None, batch_size: int, prompts: list[list[int]], seed: int,
              device: torch.device) -> dict:  # fmt: skip
    """Train pi_theta from pi_ref. Returns its checkpoint, with all steps' metrics as "curves".

    Ten times, it adds the KL of fresh samples on `prompts`.
    epochs: None for one epoch, or more if there are fewer than 100 steps in one.
    """
    if not len(preferences.pairs):
        raise BadInput("there are no pairs: the completions of each prompt are equally good")
    pi_theta, pi_ref = load_gpt(reference, device), load_gpt(reference, device)
    rng, lengths = np.random.default_rng(seed), longest_rows(preferences).numpy()
    epochs = epochs or math.ceil(100 * batch_size / len(lengths))
    batches = []
    for _ in range(epochs):
        batches += map(torch.from_numpy, length_bucketed_batches(lengths, batch_size, rng))
    steps = len(batches)
    opt = OPTIMIZERS[optimizer](pi_theta.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, linear_warmup_decay(steps))
    how = {"logps_fn": fast_response_logps}
    bar = tqdm(dpo.train(pi_theta, preferences, loss, opt, batches, **how), "training", steps)
    curves = []
    for step, metrics in enumerate(bar, 1):
        schedule.step()
        row = {name: value.item() for name, value in metrics.items()}
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            raise BadInput(f"training diverged at step {step}: lower --lr")
        if step * 10 // steps > (step - 1) * 10 // steps:
            row |= evaluate.monitor(pi_theta, pi_ref, prompts, seed)
        curves.append(row)
        bar.set_postfix_str("loss {loss:.3f}, accuracy {accuracy:.2f}".format(**row), False)
    return to_checkpoint(pi_theta, reference["tokens"], curves=curves)


def longest_rows(preferences: dpo.Preferences) -> Tensor:
    """The number of tokens of each prompt's longest row, (P,)."""
    lengths = row_lengths(preferences.mask)
    longest = lengths.new_zeros(int(preferences.prompt.max()) + 1)
    return longest.scatter_reduce(0, preferences.prompt, lengths, "amax")


# -------------------------------------------------- the experiment


def run(cfg: Config, stage: Stage, device: torch.device) -> dict:
    """The experiment. Returns the contents of results.json."""
    loss = load_loss(cfg.loss, cfg.loss_args)
    seed, reference = cfg.seed, initial_model(cfg)
    dataset = load_dataset(cfg, stage, reference["tokens"])
    if cfg.sft_steps != 0:
        lr = 5e-4 if cfg.init and not cfg.from_scratch else 6e-3
        args = dataset.sft_texts, cfg.sft_steps, cfg.sft_batch_size, lr, seed, device
        reference = stage("reference", sft, reference, *args)

    eval_pairs = None
    if cfg.data in ("toy", "imdb"):
        made = stage("completions", complete, reference, dataset, cfg.completions, seed, device)
        args = made["completions"], made["rewards"], cfg.labels, cfg.pairs, seed
        preferences, counts = stage("preferences", data.label_pairs, *args)
    else:
        score = custom_data.to_preferences
        preferences, counts = stage("preferences", score, dataset.pairs, reference, device)
        eval_pairs, _ = stage("eval_pairs", score, dataset.eval_pairs, reference, device)

    sizes = cfg.ref_samples, min(cfg.eval_samples, cfg.ref_samples), cfg.completions
    ev = evaluate.EvalConfig(*sizes, cfg.labels, seed)
    eval_set = stage("eval_set", evaluate.make_eval_set, dataset, eval_pairs, reference, ev, device)

    runs = {}
    for beta in cfg.beta:
        lr = cfg.lr * beta**-1.25  # the optimum's log-ratios grow as beta falls
        how = cfg.optimizer, lr, cfg.epochs, cfg.batch_size, dataset.eval_prompts, seed, device
        policy = stage(
            f"dpo-{beta:g}", train_dpo, reference, preferences, partial(loss, beta=beta), *how
        )
        args = policy, reference, dataset, eval_set, beta, ev, device
        runs[beta] = policy, stage(f"eval-{beta:g}", evaluate.evaluate_policy, *args)
    if stage.plan:
        return {}
    results = collect(dataset, eval_set, reference["tokens"], runs)
    config = {name: getattr(value, "name", value) for name, value in vars(cfg).items()}
    about = {"config": config, "labels": counts, "seconds": stage.seconds}
    about |= {"notes": dataset.notes, "machine": cli.machine(device)}
    title = f"{Path(cfg.data).name}, {cfg.labels} labels, {counts['pairs']:,} pairs, seed {seed}"
    method = cfg.loss.split(":")[-1] if ":" in cfg.loss else cfg.loss.upper()
    return {"method": method, "title": title} | about | results


def collect(dataset: data.Dataset, eval_set: evaluate.EvalSet, tokens, runs: dict) -> dict:
    """What was measured, as the rows of results.json."""
    r = eval_set.rewards
    first = {"texts": eval_set.texts, "rewards": None if r is None else r[:, 0]}
    shown = [first, *(evaluation for _, evaluation in runs.values())]
    tokenizer = data.load_tokenizer(tokens)
    samples = []
    for i, x in enumerate(dataset.eval_prompts[:12]):
        rewards = [None if r is None else each["rewards"][i].item() for each in shown]
        texts = [each["texts"][i] for each in shown]
        samples.append({"prompt": tokenizer.decode(x), "texts": texts, "rewards": rewards})
    return {
        "reference": eval_set.about,
        "points": [evaluation["point"] for _, evaluation in runs.values()],
        "frontier": [] if r is None else evaluate.frontier_rows(r),
        "columns": ["pi_ref", *(f"beta {beta:g}" for beta in runs)],
        "samples": samples,
        "curves": {f"{beta:g}": policy["curves"] for beta, (policy, _) in runs.items()},
    }


def main(argv: list[str]) -> int:
    args, cfg = cli.parse("train.py", __doc__, Config, argv)

    def work() -> str:
        plan = Stage(args.out, plan=True)
        run(cfg, plan, args.device)
        print(plan.describe())
        results = run(cfg, Stage(args.out), args.device)
        report.write_report(args.out, results)
        see = f"see {args.out / 'figure.png'}; next: python -m beyond.sample {args.out}"
        return f"{report.summary(results)}\n{see}, or another --loss or --beta"

    return cli.run_cli("train.py", args.out, args.debug, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
