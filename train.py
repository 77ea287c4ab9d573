"""The sentiment experiment of the DPO paper (section 6.1, figure 2 left), at the scale of a laptop.

    reviews -> pi_ref -> completions, labelled by a known reward r* -> DPO at several betas
            -> reward and KL of fresh samples, compared with the optimum of Eq. 4

How much reward does DPO gain for each nat of KL from pi_ref, and how close is that to the best
that any policy can do? Because r* is known, the optimum can be estimated too.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

import data
import dpo
from lib import cli
from lib.checkpoint import load_gpt, to_checkpoint
from lib.cli import flag
from lib.evaluate import EvalConfig, evaluate_policy, make_eval_set, measure
from lib.inference import LOCAL, collate, fast_response_logps
from lib.io import BadInput, cache_dir, open_user_file
from lib.optim import OPTIMIZERS, freeze, linear_warmup_decay, random_batches
from lib.stage import Stage
from model import GPT, GPTConfig

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
PI_REF = str(Path(__file__).parent / "lib/pi_ref.pt")  # made by beyond/pretrain.py
REWARD = Path(__file__).parent / "lib/imdb_reward.json"  # made by beyond/reward.py


@dataclass(frozen=True)
class Config:
    """Settings, with the defaults of the toy dataset."""

    # fmt: off; flag(default, help, the smallest value allowed)
    data: str = flag("toy", "toy, imdb, or a file of your own preferences")
    imdb: Path | None = flag(None, "the IMDb archive; downloaded if omitted", type=Path)
    init: str = flag("", "checkpoint to start from (--sft-steps 0 keeps it as it is), or gpt2")
    from_scratch: bool = flag(False, "use random weights, and the tokenizer of --init")
    loss: str = flag("dpo", "dpo, a loss named in beyond/losses.py, or FILE.py:FUNCTION")
    loss_args: tuple = flag((), "parameters of the loss, as NAME=VALUE")
    labels: str = flag("bt", "how r* labels a pair", choices=("bt", "soft", "argmax"))
    pairs: str = flag("all", "pairs of each prompt; toy, imdb only", choices=("all", "best-worst"))
    beta: tuple = flag((0.5, 1.0, 2.0), "weights of the KL penalty, one policy each", 1e-4)
    seed: int = flag(0, "random seed", 0)
    context: int = flag(24, "tokens of prompt and response together", 8)
    shape: tuple = (2, 4, 64)  # blocks, heads and width of a model with random weights
    reviews: int = flag(12_000, "reviews to fine-tune pi_ref on", 1)
    sft_steps: int | None = flag(300, "fine-tuning steps; your own data: 2 epochs", 0)
    sft_batch_size: int = 32
    prompts: int = flag(2_000, "prompts to collect preferences on", 1)
    completions: int = flag(8, "completions per prompt", 2)
    frozen: int = flag(0, "N > 0: DPO freezes the embeddings and first N blocks", 0)
    optimizer: str = flag("sgd", "DPO optimizer", choices=tuple(OPTIMIZERS))
    lr: float = flag(0.009, "peak learning rate at beta 1 (times beta^-1.25), tuned for sgd", 1e-12)
    epochs: int | None = flag(1, "DPO epochs; your own data: enough for 100 steps", 1)
    batch_size: int = flag(32, "prompts per DPO step", 1)
    eval_prompts: int = flag(100, "evaluation prompts", 2)
    ref_samples: int = flag(256, "samples of pi_ref per evaluation prompt", 16)
    eval_samples: int = flag(80, "samples of pi_theta per prompt, at most --ref-samples", 1)
    # fmt: on


PRESETS = {  # what differs for the other datasets
    "imdb": {
        "init": PI_REF,
        "shape": (4, 6, 192),
        "context": 48,
        "reviews": 75_000,
        "sft_steps": None,
        "prompts": 1450,
        "completions": 16,
        "beta": (0.1, 0.3, 1.0),
        "frozen": 3,
        "lr": 1.2e-4,
        "batch_size": 4,
        "eval_prompts": 64,
        "ref_samples": 192,
        "eval_samples": 24,
    },
    "own": {
        "init": PI_REF,
        "shape": (4, 6, 192),
        "context": 256,
        "sft_steps": None,
        "sft_batch_size": 16,
        "beta": (0.1,),
        "lr": 1e-5,
        "epochs": None,
        "batch_size": 16,
        "eval_prompts": 64,
        "ref_samples": 16,
        "eval_samples": 4,
    },
}

# `stage("name", f, *args)` returns f(*args), and keeps the result in the output folder, so that a
# stopped run can continue (lib/stage.py). Modules of beyond/ are imported where they are used.

# -------------------------------------------------- 1. the dataset


def load_dataset(cfg: Config, stage: Stage, tokens) -> data.Dataset:
    """The toy reviews, IMDb's, or preferences from a file. Raises BadInput if they are unusable."""
    # IMDb's training reviews are only encoded if the number of fine-tuning steps is not 0.
    reviews = cfg.reviews if cfg.data != "imdb" or sft_settings(cfg, 0)[0] else 0
    sizes = data.Sizes(cfg.prompts, cfg.eval_prompts, cfg.context, reviews)
    with open_user_file(Path(cfg.data), "a dataset"):
        if cfg.data == "toy":
            load = data.load_toy
        elif cfg.data == "imdb":
            found = load_reviews(cfg.imdb, Stage(cache_dir() / "imdb"))  # shared by all runs
            load = partial(data.load_imdb, found, REWARD)
        else:
            custom_data = import_module("beyond.custom_data")
            load = partial(custom_data.load_pairs, Path(cfg.data), labels=cfg.labels)
        return stage("dataset", load, sizes, cfg.seed, tokens)


def load_reviews(path: Path | None, stage: Stage) -> dict[str, list[str]]:
    """The reviews of IMDb, which are downloaded if there is no path."""
    archive = path or cache_dir() / "aclImdb_v1.tar.gz"
    with open_user_file(archive, "the IMDb archive"):
        if not path and not archive.exists():
            print(f"downloading {IMDB_URL}; if you have this file, stop and use --imdb")
            torch.hub.download_url_to_file(IMDB_URL, archive, IMDB_SHA256)
        return stage("reviews", data.read_imdb, archive)


# -------------------------------------------------- 2. supervised fine-tuning


def initial_model(cfg: Config) -> dict:
    """The checkpoint of --init, or random weights."""
    tokens = data.toy_tokens()
    if cfg.init:
        gpt2 = import_module("beyond.gpt2")
        found = gpt2.load_model(cfg.init)
        if not cfg.from_scratch:
            return gpt2.resize_context(found, cfg.context)
        tokens = found["tokens"]
    vocab_size = data.load_tokenizer(tokens).n_vocab
    torch.manual_seed(cfg.seed)
    return to_checkpoint(GPT(GPTConfig(vocab_size, cfg.context, *cfg.shape)), tokens)


def sft_settings(cfg: Config, n: int) -> tuple[int, int, float]:
    """Steps, batch size and learning rate of fine-tuning on n texts.

    If sft_steps is None: two epochs, but at least 50 and at most 2,000 steps; none on IMDb with the
    shipped pi_ref.
    """
    random = cfg.from_scratch or not cfg.init
    shipped = not random and Path(cfg.init).resolve() == Path(PI_REF).resolve()
    ready = cfg.data == "imdb" and shipped
    steps = 0 if ready else min(2000, max(50, 2 * n // cfg.sft_batch_size))
    steps = steps if cfg.sft_steps is None else cfg.sft_steps
    return steps, cfg.sft_batch_size, 6e-3 if random else 5e-4


def sft(checkpoint: dict, texts, steps: int, batch_size: int, lr: float, seed: int, device) -> dict:
    """Fine-tune a model on texts: AdamW on the mean cross-entropy per token. Returns pi_ref."""
    pi = load_gpt(checkpoint, device)
    weights = [p for name, p in pi.named_parameters() if name != "bias"]  # GPT.bias is for DPO
    optimizer = torch.optim.AdamW(weights, lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_warmup_decay(steps))
    epochs = math.ceil(steps * batch_size / max(1, len(texts)))
    batches = random_batches(len(texts), batch_size, epochs, seed)[:steps]
    bar = tqdm(batches, "fine-tuning pi_ref", disable=steps == 0)
    for batch in bar:
        ids, mask = collate([texts[i] for i in batch], [1] * len(batch))
        loss = -fast_response_logps(pi, ids, mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{loss:.2f} nats per token", refresh=False)
    if not all(p.isfinite().all() for p in pi.parameters()):
        raise BadInput("fine-tuning diverged: choose another --init or --seed")
    return to_checkpoint(pi, checkpoint["tokens"])


# -------------------------------------------------- 3. completions and preferences


def complete(reference: dict, dataset: data.Dataset, K: int, seed: int, device, infer=LOCAL):
    """Sample K completions of pi_ref for each prompt, and rate them.

    Returns (ids, mask, logps) (P K, T) and r* (P, K). infer: how to run models, see lib/inference.
    """
    how = dataset, seed, "sampling completions", infer
    completions, _, values = measure(infer.load(reference, device), dataset.prompts, K, *how)
    return completions, values["reward"]


# -------------------------------------------------- 4. DPO


@dataclass(frozen=True)
class Training:
    """How one policy is trained."""

    frozen: int  # blocks
    optimizer: str
    lr: float  # the peak
    epochs: int | None  # None: enough for 100 steps, and at least one
    batch_size: int  # prompts
    seed: int

    def batches(self, preferences: dpo.Preferences) -> list[torch.Tensor]:
        """The prompts of each step."""
        n = int(preferences.prompt.max()) + 1
        epochs = self.epochs or math.ceil(100 / math.ceil(n / self.batch_size))
        return random_batches(n, self.batch_size, epochs, self.seed)


def train_dpo(reference: dict, preferences, loss, how: Training, look, device) -> dict:
    """Train pi_theta from pi_ref. Returns its checkpoint, with all steps' metrics as "curves".

    After each step, look(pi_theta, pi_ref, loss, curves, steps) may add metrics to the last row of
    the curves; see beyond/monitor.py. It may be None. Training itself needs pi_ref only through
    preferences.ref_logps.
    """
    if not len(preferences.pairs):
        raise BadInput("there are no pairs: all completions are equally good or identical")
    pi_theta = load_gpt(reference, device)
    pi_ref = load_gpt(reference, device)
    batches = how.batches(preferences)
    steps = len(batches)
    curves = []
    print(f"{steps:,} optimizer steps of up to {how.batch_size} prompts")
    freeze(pi_theta, how.frozen)
    optimizer = OPTIMIZERS[how.optimizer](pi_theta.parameters(), how.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_warmup_decay(steps))
    log = dpo.train(pi_theta, preferences, loss, optimizer, batches, logps_fn=fast_response_logps)
    bar = tqdm(log, "training", steps)
    for step, metrics in enumerate(bar, 1):
        schedule.step()
        row = {name: value.item() for name, value in metrics.items()}
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            raise BadInput(f"training diverged at step {step}: lower --lr")
        curves.append(row)
        if look:
            look(pi_theta, pi_ref, loss, curves, steps)
        bar.set_postfix_str("loss {loss:.3f}, accuracy {accuracy:.2f}".format(**row), False)
    return to_checkpoint(pi_theta, reference["tokens"]) | {"curves": curves}


# -------------------------------------------------- the experiment


def run(cfg: Config, stage: Stage, device) -> str:
    """The experiment. Writes results.json after each beta, and returns its table."""
    loss = import_module("beyond.custom_loss").load_loss(cfg.loss, cfg.loss_args)
    if cfg.pairs == "best-worst":  # the best is y_w
        cfg = replace(cfg, labels="argmax")
    seed = cfg.seed
    start = initial_model(cfg)
    dataset = load_dataset(cfg, stage, start["tokens"])
    if dataset.pairs:
        print(import_module("beyond.custom_data").expected_time(cfg, dataset, start, device))
    settings = sft_settings(cfg, len(dataset.sft_texts))
    reference = stage("reference", sft, start, dataset.sft_texts, *settings, seed, device)

    eval_pairs = None
    if dataset.pairs:
        score = import_module("beyond.custom_data").with_ref_logps
        preferences, eval_pairs = stage("preferences", score, dataset, reference, device)
    else:
        made = stage("completions", complete, reference, dataset, cfg.completions, seed, device)
        if cfg.pairs == "best-worst":
            made = import_module("beyond.pairs").best_worst(*made)
        preferences = stage("preferences", data.label_pairs, *made, cfg.labels, seed)
    samples = min(cfg.eval_samples, cfg.ref_samples)
    ev = EvalConfig(cfg.ref_samples, samples, cfg.completions, cfg.labels, seed)
    eval_set = stage("eval_set", make_eval_set, dataset, eval_pairs, reference, ev, device)

    monitor = import_module("beyond.monitor").Monitor
    page = import_module("beyond.page")
    runs = {}
    for beta in cfg.beta:
        lr = cfg.lr * beta**-1.25  # log-ratios grow as beta falls; -1.25 is empirical
        training = Training(cfg.frozen, cfg.optimizer, lr, cfg.epochs, cfg.batch_size, seed)
        name = f"{cfg.loss.split(':')[-1]}-{beta:g}"
        look = monitor(dataset, eval_set, seed, stage.folder / f"curves-{name}.csv")
        args = preferences, partial(loss, beta=beta), training, look, device
        policy = stage(name, train_dpo, reference, *args)
        args = reference, dataset, eval_set, beta, ev, device
        runs[beta] = policy, stage(f"eval-{beta:g}", evaluate_policy, policy, *args)
        page.write_results(stage, cfg, dataset, eval_set, preferences, runs, device)
    return page.write_page(stage.folder)


def main(argv) -> int:
    args, cfg = cli.parse("train.py", __doc__, Config, PRESETS, argv)

    def work():
        table = run(cfg, Stage(args.out), args.device)
        see = f"see {args.out / 'figure.png'}; next: python -m beyond.sample {args.out}"
        return f"{table}\n{see} (or train.py with another --loss or --beta)"

    return cli.run_cli("train.py", args.out, args.debug, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
