"""Completions of pi_ref and of every trained policy of a run, side by side.

    python -m beyond.sample out "the camera is"
    python -m beyond.sample out                            asks for prompts; end with Ctrl-D
    python -m beyond.sample out/dpo-1.pt "the camera is"   one checkpoint
    python -m beyond.sample out --show                     one preference pair, token by token
    python -m beyond.sample out --pairs                    held-out pairs, extreme margins

Each completion is shown with r*, the true reward of prompt and completion in nats, if the run has
one, and with log pi_theta(y|x) / pi_ref(y|x) in nats, unless only one checkpoint is given or
pi_ref is missing. All policies use the same random numbers.
"""

import argparse
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import tiktoken
import torch

from beyond.custom_model import read_checkpoint
from data import WEIGHT, Reward, WordReward, decode_rows, load_tokenizer
from dpo import dpo, response_logps
from lib import cli
from lib.checkpoint import load_gpt
from lib.inference import compute_logps
from lib.io import BadInput, open_user_file
from lib.stage import Stage
from model import GPT, sample

POLICY = re.compile(r"(?!eval-)(\w+)-(\d+(?:\.\d+)?(?:e[+-]\d+)?)")  # the stem of dpo-0.5.pt


@dataclass(frozen=True)
class Models:
    """The policies of a run by name, and what they share."""

    policies: dict[str, GPT]
    pi_ref: GPT | None
    tokenizer: tiktoken.Encoding
    reward: Reward | None  # r*, if the run has one


@dataclass(frozen=True)
class Completion:
    text: str
    reward: float | None
    log_ratio: float | None  # log pi_theta(y|x) / pi_ref(y|x); None if pi_ref is unknown


# ------------------------------------------------- the models of a run


def load_models(path: Path, device: torch.device) -> Models:
    """All models of a run's folder, or one checkpoint. Raises BadInput if there are none."""
    if path.is_file():
        folder, found = path.parent, {path.stem: read_checkpoint(path)}
    else:
        folder, found = path, read_policies(path)
    if not found:
        raise BadInput(
            f"{path}: there are no models here; python train.py writes them to its --out"
        )
    tokens = next(iter(found.values()))["tokens"]
    for name, checkpoint in found.items():
        if checkpoint["tokens"] != tokens:
            raise BadInput(f"{path}: {name} has a different tokenizer; delete its file")
    policies = {name: load_gpt(checkpoint, device) for name, checkpoint in found.items()}
    return Models(policies, policies.get("pi_ref"), load_tokenizer(tokens), true_reward(folder))


def read_policies(folder: Path) -> dict[str, dict]:
    """The checkpoints of a run by name: pi_ref, if it is found, then those of each beta.

    Policies that are left over from an earlier pi_ref are skipped.
    """
    files, skipped = {}, []
    for path in sorted(folder.glob("*.pt")):
        if match := POLICY.fullmatch(path.stem):
            if is_left_over(path):
                skipped.append(path.name)
            else:
                files[match[1], float(match[2])] = path
    if skipped:
        print(f"skipped, because reference.pt is newer: {', '.join(skipped)}", file=sys.stderr)
    found = {}
    if reference := read_reference(folder):
        found["pi_ref"] = reference
    for (method, beta), path in sorted(files.items()):
        found[f"{method}, beta {beta:g}"] = read_checkpoint(path)
    return found


def read_reference(folder: Path) -> dict | None:
    """pi_ref of a run."""
    path = folder / "reference.pt"
    return read_checkpoint(path) if path.exists() else None


def is_left_over(policy: Path) -> bool:
    """Whether a policy was trained from an earlier pi_ref than the one in its folder.

    A policy's file is newer than that of its pi_ref, unless the run reused a cached policy. Then
    the run's results.json names the policy.
    """
    reference, results = policy.with_name("reference.pt"), policy.with_name("results.json")
    files = [policy, results] if policy.stem in read_results(policy.parent)[1] else [policy]
    newest = max(file.stat().st_mtime for file in files)
    return reference.exists() and newest < reference.stat().st_mtime


def read_config(folder: Path) -> dict:
    """The settings in results.json, or {} before the first beta is done."""
    return read_results(folder)[0]


def read_results(folder: Path) -> tuple[dict, set[str]]:
    """The settings in results.json, and the names of its policies, such as dpo-0.5.

    Both are empty before the first beta is done.
    """
    path = folder / "results.json"
    if not path.exists():
        return {}, set()
    with open_user_file(path, "the results of a run"):
        results = json.loads(path.read_bytes())
        config = dict(results["config"])
        loss = str(config.get("loss")).split(":")[-1]
        return config, {f"{loss}-{beta}" for beta in results.get("curves", {})}


def true_reward(folder: Path) -> Reward | None:
    """r* of a run: that of the toy grammar, or the one in the stage `dataset`. None if unknown."""
    if read_config(folder).get("data") == "toy":
        return WordReward(WEIGHT)
    path = folder / "dataset.pt"
    return load_stage(path).reward if path.exists() else None


def load_stage(path: Path):
    with open_user_file(path, "a cached stage"):
        return Stage(path.parent).read(path)["value"]


# ------------------------------------------------- completions


@torch.no_grad()
def complete(models: Models, prompt: str, n: int, temperature: float, seed: int) -> dict:
    """n completions of a prompt by each policy: name -> list of Completion. Raises BadInput."""
    x, end = models.tokenizer.encode_ordinary(prompt), models.tokenizer.eot_token
    room = min(pi.config.context for pi in models.policies.values()) - 1
    if not prompt.strip():
        raise BadInput("the prompt is empty; enter some text")
    if len(x) > room:
        raise BadInput(f"the prompt has {len(x)} tokens; the context has room for {room}")
    completions = {}
    for name, pi in models.policies.items():
        generator = torch.Generator(pi.device).manual_seed(seed)
        ids, mask, _ = sample(pi, [x] * n, end, temperature, generator)
        texts = decode_rows(ids, models.tokenizer)
        rewards = models.reward(texts).tolist() if models.reward else [None] * n
        ratios = [None] * n
        if models.pi_ref:
            batch = ids.to(pi.device), mask.to(pi.device)
            log_ratio = response_logps(pi, *batch) - response_logps(models.pi_ref, *batch)
            ratios = log_ratio.sum(-1).tolist()
        y = [text.removeprefix(prompt) for text in texts]
        completions[name] = list(map(Completion, y, rewards, ratios))
    return completions


def side_by_side(completions: dict[str, list[Completion]], width: int) -> str:
    """A column for each policy, `width` characters wide in total."""
    width = max(20, width // len(completions) - 3)
    rows = [list(completions)]
    for one_of_each in zip(*completions.values(), strict=True):
        cells = [[*numbers(c), *textwrap.wrap(printable(c.text), width)] for c in one_of_each]
        rows += [[], *zip_longest(*cells, fillvalue="")]
    return "\n".join(" | ".join(f"{cell:{width}}" for cell in row).rstrip() for row in rows)


def numbers(completion: Completion) -> list[str]:
    """The line above a completion, if there is anything to say."""
    reward, ratio = completion.reward, completion.log_ratio
    parts = [] if reward is None else [f"r* {reward:+.2f}"]
    parts += [] if ratio is None else [f"log-ratio {ratio:+.2f}"]
    return [", ".join(parts)] if parts else []


def printable(text: str) -> str:
    """Escapes control characters, but leaves spaces and newlines."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def show_pair(path: Path, models: Models, number: int) -> str:
    """A preference pair, token by token: the tokens of the responses, under the mask, in [ ]."""
    found = load_stage(path / "preferences.pt")
    preferences = found[0] if isinstance(found, list) else found  # your own data: a list
    rows = preferences.pairs[number % len(preferences.pairs)]
    ids, mask = preferences.ids[rows], preferences.mask[rows]
    reward = models.reward(decode_rows(ids, models.tokenizer)) if models.reward else [None] * 2
    lines = []
    for name, r, tokens, inside in zip(("chosen", "rejected"), reward, ids, mask, strict=True):
        end = int(inside.nonzero().max()) + 1
        words = [models.tokenizer.decode([i]) for i in tokens[:end].tolist()]
        words = [repr(word)[1:-1] for word in words]  # so that a newline is visible
        marked = [f"[{w}]" if m else f"{w}|" for w, m in zip(words, inside[:end], strict=True)]
        value = "" if r is None else f"r* {r:+.2f}  "
        lines.append(f"{name:>8}  {value}{''.join(marked)}")
    lines.append("[ ]: tokens of the response, which the loss sums over.  |: ends a prompt token.")
    return "\n".join(lines)


@torch.no_grad()
def order_pairs(path: Path, models: Models, n: int) -> str:
    """The held-out pairs with the largest and the smallest margin of each policy, n of each.

    Soft labels contain each pair in both orders; only the likelier order is shown.
    """
    pairs = load_stage(path / "eval_set.pt").pairs
    likelier = pairs.weight >= 0.5
    pairs = replace(pairs, pairs=pairs.pairs[likelier], weight=pairs.weight[likelier])
    texts = decode_rows(pairs.ids, models.tokenizer)
    lines, n = [], min(n, max(1, len(pairs.pairs) // 2))
    for name, pi in models.policies.items():
        if name == "pi_ref":
            continue
        beta = float(name.split(" ")[-1])
        logps = compute_logps(pi, pairs.ids, pairs.mask)
        _, r_hat_w, r_hat_l = dpo(logps, pairs, beta)
        order = (r_hat_w - r_hat_l).argsort(descending=True).tolist()
        for title, chosen in (("largest", order[:n]), ("smallest", order[-n:][::-1])):
            wrong = int((r_hat_w < r_hat_l).sum())
            about = f"{len(order)} held-out pairs, {wrong} misordered"
            lines.append(f"{name}: the {title} margins ({about})")
            for i in chosen:
                w, l = pairs.pairs[i].tolist()
                lines.append(f"  chosen    r_hat {r_hat_w[i]:+7.2f}  {printable(texts[w])}")
                lines.append(f"  rejected  r_hat {r_hat_l[i]:+7.2f}  {printable(texts[l])}")
    return "\n".join(lines)


# ------------------------------------------------- the command line


def read_prompts() -> Iterator[str]:
    """Prompts from the terminal or a pipe, until its end."""
    while True:
        try:
            yield input("prompt> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def main(argv: list[str]) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="beyond.sample", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("run", type=Path, help="the folder of a run, or a checkpoint")
    add("prompt", nargs="?", help="the beginning of a text; without it, prompts are asked for")
    add(
        "--n",
        type=cli.at_least(1),
        default=4,
        help="completions per policy, or pairs at each end (4)",
    )
    add("--seed", type=cli.at_least(0), default=0, help="random seed (0)")
    add("--temperature", type=cli.at_least(0.01), default=1.0, help="sampling temperature (1)")
    add("--device", type=cli.usable_device, default="cpu", help="cpu, cuda or mps (cpu)")
    add("--show", action="store_true", help="show one preference pair, chosen by --seed")
    add("--pairs", action="store_true", help="show held-out pairs with their implicit rewards")
    args = parser.parse_args(argv)
    width = shutil.get_terminal_size((120, 0)).columns
    try:
        models = load_models(args.run, args.device)
        if args.show:
            print(show_pair(args.run, models, args.seed))
            return 0
        if args.pairs:
            print(order_pairs(args.run, models, args.n))
            return 0
        for prompt in [args.prompt] if args.prompt is not None else read_prompts():
            try:
                found = complete(models, prompt, args.n, args.temperature, args.seed)
                print(side_by_side(found, width))
            except BadInput as e:
                if args.prompt is not None:
                    raise
                print(e)
    except BadInput as e:
        print(f"beyond.sample: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
