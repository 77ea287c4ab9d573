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
from tqdm import tqdm

import data
import dpo
from lib import cli, evaluate, report
from lib.checkpoint import load_gpt, read_checkpoint, resize_context, to_checkpoint
from lib.cli import flag
from lib.extension import find, load_loss
from lib.inference import collate, fast_response_logps, generate, score, training_seconds
from lib.io import BadInput, cache_dir, download, open_user_file
from lib.optim import OPTIMIZERS, linear_warmup_decay, random_batches
from lib.stage import Stage
from model import GPT, GPTConfig

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
PI_REF = str(Path(__file__).parent / "lib" / "pi_ref.pt")  # trained by beyond/pretrain.py


@dataclass(frozen=True)
class Config:
    """Settings: defaults for the toy dataset, and for `imdb` and `own` where they differ."""

    # fmt: off
    data: str = flag("toy", "toy, imdb, or a file of your own preferences")
    imdb: Path | None = flag(None, "the IMDb archive or its folder; downloaded if omitted")
    init: str = flag("", "checkpoint to start from, or gpt2", imdb=PI_REF, own=PI_REF)
    from_scratch: bool = flag(False, "use random weights, and the tokenizer of --init")
    loss: str = flag("dpo", "a loss of beyond/losses.py, or FILE.py:FUNCTION")
    loss_args: tuple = flag((), "parameters of the loss, as NAME=VALUE")
    labels: str = flag("bt", "how r* labels a pair", choices=("bt", "soft", "argmax"))
    pairs: str = flag("all", "which pairs of a prompt", choices=("all", "best-worst"))
    beta: tuple = flag((0.5, 1.0, 2.0), "KL penalty", 1e-4, 1e4, imdb=(0.1, 0.3, 1.0), own=(0.1,))
    seed: int = flag(0, "random seed", 0, 2**32 - 1)
    context: int = flag(24, "tokens of prompt and response together", 8, 65536, imdb=48, own=256)
    n_layer: int = flag(2, imdb=4, own=4)
    n_head: int = flag(4, imdb=6, own=6)
    n_embd: int = flag(64, imdb=192, own=192)
    reviews: int = flag(20_000, "reviews to fine-tune pi_ref on", 1, 10**7, imdb=75_000)
    sft_steps: int | None = flag(600, "steps of SFT; own: 3 epochs", 0, 10**7, imdb=0, own=None,
                                 imdb_from_scratch=3000)
    sft_batch_size: int = flag(32, own=16)
    prompts: int = flag(10_000, "prompts to collect preferences on", 1, 10**7, imdb=1600)
    completions: int = flag(4, "completions per prompt", 2, 16, imdb=16)
    optimizer: str = flag("sgd", "DPO optimizer", choices=tuple(OPTIMIZERS))
    lr: float = flag(0.009, "peak learning rate at beta 1", 1e-12, 1e12, imdb=2e-4, own=5e-4)
    epochs: int | None = flag(1, "DPO epochs; own: at least 100 steps", 1, 10**4, own=None)
    batch_size: int = flag(64, "prompts per DPO step", 1, 10**7, imdb=4, own=16)
    eval_prompts: int = flag(100, "evaluation prompts", 2, 10**5, imdb=64, own=64)
    ref_samples: int = flag(512, "samples of pi_ref per prompt", 16, 10**4, own=16)
    eval_samples: int = flag(96, "samples of pi_theta per prompt", 1, 10**4, imdb=48, own=4)
    # fmt: on


# -------------------------------------------------- 1. the dataset


def load_dataset(cfg: Config, stage: Stage, tokens: list[bytes] | None) -> data.Dataset:
    """The toy reviews, IMDb's, or preferences from a file. Raises BadInput if they are unusable."""
    reviews = 0 if cfg.sft_steps == 0 else cfg.reviews
    sizes = data.Sizes(cfg.prompts, cfg.eval_prompts, cfg.context, reviews)
    if cfg.data == "toy":
        with open_user_file(Path("toy"), "a dataset"):
            return stage("dataset", data.load_toy, sizes, cfg.seed, tokens)
    if cfg.data != "imdb":
        load_pairs = find("load_pairs", "beyond.custom_data")
        return stage("dataset", load_pairs, Path(cfg.data), sizes, cfg.seed, tokens)
    shared = Stage(cache_dir() / "imdb", stage.plan)  # used by all runs
    archive = load_archive(cfg.imdb, shared)
    rewards = shared("rewards", data.imdb_rewards, archive)
    with open_user_file(cfg.imdb or Path("imdb"), "a dataset"):
        return stage("dataset", data.load_imdb, archive, rewards, sizes, cfg.seed, tokens)


def load_archive(path: Path | None, stage: Stage) -> dict[str, list[str]]:
    """The reviews of IMDb, which are downloaded if there is no path."""
    path = path or download(IMDB_URL, cache_dir() / "aclImdb_v1.tar.gz", IMDB_MD5)
    with open_user_file(path, "the IMDb archive"):
        return stage("reviews", data.read_imdb, path)


# -------------------------------------------------- 2. supervised fine-tuning


def initial_model(cfg: Config) -> dict:
    """The checkpoint of --init, or random weights."""
    tokens = data.toy_tokens()
    if cfg.init:
        read = read_checkpoint if Path(cfg.init).is_file() else find("published", "beyond.gpt2")
        found = resize_context(read(cfg.init), cfg.context)
        if not cfg.from_scratch:
            return found
        tokens = found["tokens"]
    vocab_size = data.load_tokenizer(tokens).n_vocab
    torch.manual_seed(cfg.seed)
    config = GPTConfig(vocab_size, cfg.context, cfg.n_layer, cfg.n_head, cfg.n_embd)
    return to_checkpoint(GPT(config), tokens)


def sft(checkpoint: dict, texts: list[list[int]], steps: int | None, batch_size: int, lr: float,
        seed: int, device: torch.device) -> dict:  # fmt: skip
    """Fine-tune a model on texts: AdamW on the mean cross-entropy per token. Returns pi_ref.

    steps: None for three epochs, and at least 50 steps.
    """
    if steps is None:
        steps = max(50, 3 * len(texts) // batch_size)
    pi = load_gpt(checkpoint, device)
    weights = [p for name, p in pi.named_parameters() if name != "bias"]  # which is for DPO
    optimizer = torch.optim.AdamW(weights, lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_warmup_decay(steps))
    rng = np.random.default_rng(seed)
    epochs = (random_batches(len(texts), batch_size, rng) for _ in itertools.count())
    batches = itertools.islice(itertools.chain.from_iterable(epochs), steps)
    bar = tqdm(batches, "fine-tuning pi_ref", steps, disable=steps == 0)
    for batch in bar:
        ids, mask = collate([texts[i] for i in batch], [1] * len(batch))
        loss = -fast_response_logps(pi, ids.to(device), mask.to(device)).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
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
              lr: float, epochs: int | None, batch_size: int, dataset: data.Dataset,
              eval_set: evaluate.EvalSet, seed: int, device: torch.device) -> dict:  # fmt: skip
    """Train pi_theta from pi_ref. Returns its checkpoint, with all steps' metrics as "curves".

    Ten times during training, it also records metrics of held-out pairs and of fresh samples. At
    four of these times, it prints two samples.
    epochs: None for one epoch, or as many as it takes to reach 100 steps.
    """
    if not len(preferences.pairs):
        raise BadInput("there are no pairs: the completions of each prompt are equally good")
    pi_theta, pi_ref = load_gpt(reference, device), load_gpt(reference, device)
    tokenizer = data.load_tokenizer(reference["tokens"])
    batches = make_batches(preferences, epochs, batch_size, seed)
    steps = len(batches)
    print(f"{steps:,} optimizer steps of up to {batch_size} prompts")
    opt = OPTIMIZERS[optimizer](pi_theta.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, linear_warmup_decay(steps))
    args = pi_theta, preferences, loss, opt, map(torch.from_numpy, batches)
    bar = tqdm(dpo.train(*args, logps_fn=fast_response_logps), "training", steps)
    curves = []
    for step, metrics in enumerate(bar, 1):
        schedule.step()
        row = {name: value.item() for name, value in metrics.items()}
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            raise BadInput(f"training diverged at step {step}: lower --lr")
        tenths = step * 10 // steps
        if tenths > (step - 1) * 10 // steps:
            seen = pi_theta, pi_ref, loss, dataset, eval_set, tokenizer, seed
            found, row["samples"] = evaluate.monitor(*seen)
            row |= found
            if tenths % 3 == 1:
                bar.write("\n".join(f"{step / steps:4.0%} | {text}" for text in row["samples"]))
        curves.append(row)
        bar.set_postfix_str("loss {loss:.3f}, accuracy {accuracy:.2f}".format(**row), False)
    return to_checkpoint(pi_theta, reference["tokens"], curves=curves)


def make_batches(preferences: dpo.Preferences, epochs: int | None, batch_size: int, seed: int):
    """The prompts of each step."""
    n, rng = int(preferences.prompt.max()) + 1, np.random.default_rng(seed)
    epochs = epochs or math.ceil(100 / math.ceil(n / batch_size))
    return [batch for _ in range(epochs) for batch in random_batches(n, batch_size, rng)]


# -------------------------------------------------- the experiment


def run(cfg: Config, stage: Stage, device: torch.device) -> dict:
    """The experiment. Writes the report after each beta, and returns what is in results.json."""
    loss = load_loss(cfg.loss, cfg.loss_args)
    seed, start = cfg.seed, initial_model(cfg)
    dataset = load_dataset(cfg, stage, start["tokens"])
    if not stage.plan and cfg.data not in ("toy", "imdb"):
        seconds = training_seconds(start, tokens_to_train(cfg, dataset), device)
        print(f"training takes about {seconds / 60:.1f} minutes if no stage is cached")
    lr = 5e-4 if cfg.init and not cfg.from_scratch else 6e-3
    args = dataset.sft_texts, cfg.sft_steps, cfg.sft_batch_size, lr, seed, device
    reference = stage("reference", sft, start, *args)

    eval_pairs, counts = None, {}
    if cfg.data in ("toy", "imdb"):
        made = stage("completions", complete, reference, dataset, cfg.completions, seed, device)
        args = made["completions"], made["rewards"], cfg.labels, cfg.pairs, seed
        preferences, counts = stage("preferences", data.label_pairs, *args)
    else:
        preferences = stage("preferences", score, dataset.pairs, reference, device)
        eval_pairs = stage("eval_pairs", score, dataset.eval_pairs, reference, device)

    sizes = cfg.ref_samples, min(cfg.eval_samples, cfg.ref_samples), cfg.completions
    labels = "argmax" if cfg.pairs == "best-worst" else cfg.labels  # which decide on an optimum
    ev = evaluate.EvalConfig(*sizes, labels, seed)
    eval_set = stage("eval_set", evaluate.make_eval_set, dataset, eval_pairs, reference, ev, device)

    runs, results = {}, {}
    for beta in cfg.beta:
        lr = cfg.lr * beta**-1.25  # the optimum's log-ratios grow as beta falls
        how = cfg.optimizer, lr, cfg.epochs, cfg.batch_size, dataset, eval_set, seed, device
        goal = partial(loss, beta=beta)
        policy = stage(f"dpo-{beta:g}", train_dpo, reference, preferences, goal, *how)
        args = policy, reference, dataset, eval_set, beta, ev, device
        runs[beta] = policy, stage(f"eval-{beta:g}", evaluate.evaluate_policy, *args)
        if not stage.plan:
            config = vars(cfg) | {"init": Path(cfg.init).name, "imdb": cfg.imdb and cfg.imdb.name}
            about = {"config": config, "labels": {"pairs": len(preferences.pairs)} | counts}
            about |= {"notes": dataset.notes, "seconds": stage.seconds}
            about |= {"machine": cli.machine(device)}
            results = about | report.results(cfg, dataset, eval_set, start["tokens"], runs)
            report.write_report(stage.folder, results)
    return results


def tokens_to_train(cfg: Config, dataset: data.Dataset) -> int:
    """The approximate number of tokens in all training steps on the user's own preferences."""
    texts, pairs = dataset.sft_texts, dataset.pairs
    sft_epochs = max(3, 50 * cfg.sft_batch_size / len(texts))
    if cfg.sft_steps is not None:
        sft_epochs = cfg.sft_steps * cfg.sft_batch_size / len(texts)
    steps = make_batches(pairs, cfg.epochs, cfg.batch_size, cfg.seed)
    dpo_epochs = len(cfg.beta) * sum(map(len, steps)) / (int(pairs.prompt.max()) + 1)
    row_lengths = (pairs.mask * torch.arange(1, pairs.mask.size(1) + 1)).amax(1)
    return int(sft_epochs * sum(map(len, texts)) + dpo_epochs * row_lengths.sum())


def main(argv: list[str]) -> int:
    args, cfg = cli.parse("train.py", __doc__, Config, argv)

    def work() -> str:
        plan = Stage(args.out, plan=True)
        run(cfg, plan, args.device)
        print(plan.describe())
        results = run(cfg, Stage(args.out), args.device)
        see = f"see {args.out / 'figure.png'}; next: python -m beyond.sample {args.out}"
        return f"{report.summary(results)}\n{see}, or another --loss or --beta"

    return cli.run_cli("train.py", args.out, args.debug, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
