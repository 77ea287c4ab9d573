"""Convert preferences in common formats to the one that train.py and TRL read.

    python -m beyond.convert IN OUT [--labels {bt,argmax}] [--seed N]

OUT is written as JSON lines with the strings prompt, chosen and rejected. IN is a file of JSON
lines, a JSON array, or a CSV file with a header. Each row has one of these formats:

    pair            prompt, chosen and rejected are strings; other keys are dropped
    conversation    prompt, chosen and rejected are lists of messages {role, content}
    conversations   chosen and rejected are lists of messages that begin alike
    transcripts     chosen and rejected are strings that begin alike, with turns "\\n\\nHuman: "
                    and "\\n\\nAssistant: ", as in HH-RLHF; there is no prompt
    scores          completions are strings, or objects with text or response. The list `scores` has
                    a number for each, or each object has score or overall_score (UltraFeedback).
                    prompt is a string, or instruction is a user's message

Scores are rewards in nats: each pair of completions is labelled by Bradley-Terry (Eq. 1), or by
argmax. Messages become transcripts. The prompt ends with "\\n\\nAssistant:", after the last user
turn that both conversations share.
"""

import argparse
import csv
import io
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import torch

from dpo import bradley_terry
from lib import cli
from lib.io import BadInput, atomic_write

SPEAKER = {"user": "Human", "assistant": "Assistant", "system": "System"}
ASSISTANT = "\n\nAssistant:"
UNLIKE = f"chosen and rejected must begin with the same turn, then {ASSISTANT!r}"
Candidate = tuple[str, str, str, float]  # prompt, y_1, y_2, r_1 - r_2

# ------------------------------------------------- files


def read_rows(path: Path) -> tuple[str, list[tuple[str, object]]]:
    """The kind of file, and each row with its place in the file. Raises BadInput."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: is not UTF-8 text (byte {e.start})") from e
    start = text.lstrip()[:1]
    if start == "[":
        rows = parse(text, f"{path}")
        return "JSON array", [(f"item {i}", row) for i, row in enumerate(rows, 1)]
    if start in ("{", ""):
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        return "JSON lines", [(where, parse(line, f"{path}, {where}")) for where, line in lines]
    return "CSV", read_csv(text)


def parse(text: str, where: str):
    try:
        return json.loads(text, parse_int=float)
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{where}: is not JSON ({e})") from e


def read_csv(text: str) -> list[tuple[str, object]]:
    """Rows of a table that is separated by commas, semicolons or tabs."""
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    csv.field_size_limit(1 << 30)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    return [(f"row {i}", row) for i, row in enumerate(table, 1)]


# ------------------------------------------------- formats


def recognise(row: object) -> tuple[str, list[Candidate]]:
    """The format of a row, and the pairs that it offers. Raises BadInput."""
    if not isinstance(row, dict):
        raise BadInput("is not an object with prompt, chosen and rejected")
    kinds = [type(row.get(name)) for name in ("prompt", "chosen", "rejected")]
    if kinds == [str, str, str]:
        return "pair", certain(row["prompt"], row["chosen"], row["rejected"])
    if kinds == [list, list, list]:
        return "conversation", answers(row)
    if kinds[1:] == [list, list]:
        return "conversations", continuations(row)
    if kinds == [type(None), str, str]:
        return "transcripts", split(row["chosen"], row["rejected"])
    if isinstance(row.get("completions"), list):
        return "scores", scored(row)
    found = ", ".join(f"{k}: {type(v).__name__}" for k, v in row.items() if k)[:150]
    raise BadInput(f"has no known format ({found}); see python -m beyond.convert --help")


def answers(row: dict) -> list[Candidate]:
    """A conversation, and the messages that continue it."""
    prompt, y_w, y_l = (transcript(row[name], name) for name in ("prompt", "chosen", "rejected"))
    if not y_w.startswith(ASSISTANT) or not y_l.startswith(ASSISTANT):
        raise BadInput("chosen and rejected must begin with a message from the assistant")
    return certain(prompt + ASSISTANT, *(y.removeprefix(ASSISTANT) for y in (y_w, y_l)))


def continuations(row: dict) -> list[Candidate]:
    """Split two conversations after the last user turn that they share."""
    w, l = ([transcript([m], name) for m in row[name]] for name in ("chosen", "rejected"))
    n = 0  # messages in the prompt
    for i, (y_w, y_l) in enumerate(zip(w, l, strict=False)):
        if y_w.startswith(ASSISTANT) and y_l.startswith(ASSISTANT):
            n = i
        if y_w != y_l:
            break
    if n == 0:
        raise BadInput(UNLIKE)
    y_w, y_l = ("".join(y[n:]).removeprefix(ASSISTANT) for y in (w, l))
    return certain("".join(w[:n]) + ASSISTANT, y_w, y_l)


def split(chosen: str, rejected: str) -> list[Candidate]:
    """Split two transcripts after the last user turn that they share."""
    w, l = chosen.split(ASSISTANT), rejected.split(ASSISTANT)
    n = 0  # turns that both share
    while n < min(len(w), len(l)) - 1 and w[n] == l[n]:
        n += 1
    if n == 0 or not w[0].strip():
        raise BadInput(UNLIKE)
    prompt = ASSISTANT.join([*w[:n], ""])
    return certain(prompt, ASSISTANT.join(w[n:]), ASSISTANT.join(l[n:]))


def certain(prompt: str, chosen: str, rejected: str) -> list[Candidate]:
    """A pair that has a label already."""
    if chosen == rejected:
        raise BadInput("chosen and rejected are identical")
    return [(prompt, chosen, rejected, math.inf)]


def scored(row: dict) -> list[Candidate]:
    """All pairs of a prompt's completions."""
    found = [c if isinstance(c, dict) else {"text": c} for c in row["completions"]]
    texts = [first(c, "response", "text") for c in found]
    inside = [first(c, "overall_score", "score") for c in found]
    scores = inside if row.get("scores") is None else row["scores"]
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise BadInput(f"needs {len(texts)} scores, one for each completion")
    if not all(isinstance(r, float) and math.isfinite(r) for r in scores):
        raise BadInput("a score is missing, or is not a number")
    prompt = row.get("prompt")
    texts = [checked(text, "a completion") for text in texts]
    if prompt is None:
        question = {"role": "user", "content": row.get("instruction")}
        prompt = transcript([question], "prompt or instruction") + ASSISTANT
        texts = [f" {text}" for text in texts]
    pairs = combinations(zip(texts, scores, strict=True), 2)
    return [(prompt, y_1, y_2, r_1 - r_2) for (y_1, r_1), (y_2, r_2) in pairs]


def first(values: dict, *names: str) -> object:
    """The first of these values that is not None, if any."""
    return next((values[name] for name in names if values.get(name) is not None), None)


def transcript(messages: list, name: str) -> str:
    """Messages as text, each after the name of its speaker."""
    text = ""
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in SPEAKER:
            raise BadInput(f"{name} has the role {role!r}, which is not one of {list(SPEAKER)}")
        content = checked(message.get("content"), f"a message in {name}")
        text += f"\n\n{SPEAKER[role]}: {content}"
    return checked(text, name)


def checked(text: object, name: str) -> str:
    """A text that is not blank and can be written as UTF-8. Raises BadInput."""
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f"{name} is missing, empty, or not a string")
    if re.search("[\ud800-\udfff]", text):
        raise BadInput(f"{name} contains half of a surrogate pair, which is not a character")
    return text


# ------------------------------------------------- labels


def convert(path: Path, labels: str, seed: int) -> tuple[list[dict], str]:
    """The pairs of a file, and what was recognised. Raises BadInput, which names the row."""
    kind, rows = read_rows(path)
    formats, dropped, pairs = Counter(), Counter(), []
    generator = random.Random(seed)
    for where, row in rows:
        try:
            name, candidates = recognise(row)
            formats[name] += 1
            pairs += label(candidates, labels, generator, dropped)
        except BadInput as e:
            raise BadInput(f"{path}, {where}: {e}") from e
    found = ", ".join(f"{n} x {name}" for name, n in formats.items()) or "no rows"
    recognised = f"{path}: {kind}, {found}"
    lost = f"{dropped['identical']} pairs of identical completions, {dropped['tie']} ties"
    if not pairs:
        raise BadInput(f"{recognised}; no pairs ({lost})")
    return pairs, f"{recognised}\n{len(pairs)} pairs; dropped: {lost}"


def label(
    candidates: list[Candidate], labels: str, generator: random.Random, dropped: Counter
) -> Iterator[dict]:
    """Pairs in which one response is preferred. Counts those that are dropped."""
    for prompt, y_1, y_2, gap in candidates:
        if y_1 == y_2 or (gap == 0 and labels == "argmax"):
            dropped["identical" if y_1 == y_2 else "tie"] += 1
            continue
        p = bradley_terry(torch.tensor(gap, dtype=torch.float64), torch.tensor(0.0)).item()
        first = gap > 0 if labels == "argmax" else generator.random() < p
        y_w, y_l = (y_1, y_2) if first else (y_2, y_1)
        pair = {"prompt": prompt, "chosen": y_w, "rejected": y_l}
        yield {name: checked(text, name) for name, text in pair.items()}


def main(argv: list[str]) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="beyond.convert", description=__doc__, formatter_class=style)
    parser.add_argument("source", metavar="IN", type=Path, help="JSON lines, JSON array or CSV")
    parser.add_argument("out", metavar="OUT", type=Path, help="the new file; it must not exist")
    parser.add_argument(
        "--labels", choices=("bt", "argmax"), default="bt", help="how scores become labels (bt)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the labels (0)")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise BadInput(f"{args.out}: already exists; choose another name")
        pairs, recognised = convert(args.source, args.labels, args.seed)
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
        atomic_write(args.out, "".join(lines).encode())
        print(f"{recognised}\nnext: python train.py --data {args.out}")
    except (BadInput, OSError) as e:
        print(f"beyond.convert: {' '.join(str(e).split())[:500]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
