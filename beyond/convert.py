"""Preferences in the ecosystem's shapes, made the standard one that this project and TRL read: one JSON object a line
with the strings `prompt`, `chosen` and `rejected`.

    python -m beyond.convert IN OUT [--labels {bt,argmax}] [--seed N]

IN is a file of JSON lines, or one JSON array. What stands under the keys tells each row's shape:

    prompt      chosen, rejected
    string      strings             standard: kept as it is, without its other keys
    list        lists               conversations: messages {role, content} that ask, and those that answer
    (any)       lists               whole conversations that begin alike: what asks is within them
    -           strings             HH-RLHF: transcripts that begin alike
    string      -                   UltraFeedback: `completions` with `scores`, or with a score inside each; every pair
                                    of them is labelled by Bradley-Terry, the scores being rewards in nats, or argmax
    -           -                   the same with an `instruction`: a user's message, which the completions answer

Messages become text as in HH-RLHF: "\\n\\nHuman: " or "\\n\\nSystem: " and what is said; the prompt ends with
"\\n\\nAssistant:", and the response is a space and what is said. Conversations are split at the last such turn that both
share, not where they begin to differ: words with which both answers begin belong to the answers.
"""
import argparse
import json
import math
import os
import random
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations, takewhile
from pathlib import Path
from types import NoneType

from kit.files import BadInput
from kit.terminal import Parser

LIMIT, ARRAY_LIMIT = 4_000_000, 64_000_000          # bytes that are held at once: of a line, of a file that is one array
COMPLETIONS = 100                                   # of one prompt, at most: pairs grow with their square
SPEAKER = dict(user="Human", assistant="Assistant", system="System")
ASSISTANT = "\n\nAssistant:"

Candidate = tuple[str, str, str, float]             # prompt, y_1, y_2, and the log-odds that y_1 is preferred


# ----------------------------------------------------------------------------- reading

def lines(path: Path) -> Iterator[tuple[str, object]]:
    """("line 3", what it holds) of each line that is not blank; ("item 3", it) if the file is one JSON array.

    Errors: BadInput if it cannot be read, is not UTF-8 or not JSON, or exceeds what is ever held at once."""
    try:
        with open(path, "rb") as f:
            if f.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":        # peeked, since a pipe cannot be opened twice
                if len(whole := f.read(ARRAY_LIMIT + 1)) > ARRAY_LIMIT:
                    raise BadInput(f"{path}: an array above {ARRAY_LIMIT:,} bytes; write one object a line (jq -c '.[]')")
                yield from ((f"item {k}", row) for k, row in enumerate(parse(whole, f"{path}"), 1))
                return
            for k, line in enumerate(iter(lambda: f.readline(LIMIT + 1), b""), 1):
                if len(line) > LIMIT:
                    raise BadInput(f"{path}, line {k}: longer than {LIMIT:,} bytes; shorten or remove it")
                if line.strip():
                    yield f"line {k}", parse(line, f"{path}, line {k}")
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror}); name a file of JSON lines") from None


def parse(raw: bytes, where: str):
    """The JSON value in raw; all its numbers are floats, so that none is too large to compare."""
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_int=float)
    except UnicodeDecodeError as e:
        raise BadInput(f"{where}: byte {e.start + 1} is not UTF-8; save the file as UTF-8 text, unpacked") from None
    except json.JSONDecodeError as e:
        raise BadInput(f"{where}: malformed JSON ({e.msg} at character {e.pos + 1}); write one object a line") from None
    except RecursionError:
        raise BadInput(f"{where}: JSON nested too deeply; write one flat object a line") from None


# ----------------------------------------------------------------------------- shapes: each gives a row's candidates

def candidates(row: object) -> list[Candidate]:
    """The pairs that a row of any shape offers. Errors: BadInput if it has none of the shapes, or is not whole."""
    if not isinstance(row, dict):
        raise BadInput("not an object; write {...} with prompt, chosen and rejected")
    kinds = {name: type(row.get(name)) for name in ("prompt", "chosen", "rejected")}
    if tuple(kinds.values()) not in SHAPES:
        found = ", ".join(f"{name} {'missing' if kind is NoneType else kind.__name__}" for name, kind in kinds.items())
        raise BadInput(f"a row of no known shape ({found}); --help lists the shapes")
    return SHAPES[tuple(kinds.values())](row)


def conversation(row: dict) -> list[Candidate]:
    prompt, *answers = (transcript(row[name], name) for name in ("prompt", "chosen", "rejected"))
    if not all(answer.startswith(ASSISTANT) for answer in answers):
        raise BadInput("chosen or rejected does not begin with an assistant's message; leave the user's to the prompt")
    return certain(prompt + ASSISTANT, *(answer.removeprefix(ASSISTANT) for answer in answers))


def whole_conversations(row: dict) -> list[Candidate]:
    return split(transcript(row["chosen"], "chosen"), transcript(row["rejected"], "rejected"))


def split(chosen: str, rejected: str) -> list[Candidate]:
    """Two transcripts as prompt and responses: the responses begin with the last turn that both give to the assistant
    after the same words."""
    w, l = chosen.split(ASSISTANT), rejected.split(ASSISTANT)
    n = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(w[:-1], l[:-1])))
    if not "".join(w[:n]).strip():
        raise BadInput(f"chosen and rejected share no turn; both must begin with one prompt that ends in {ASSISTANT!r}")
    return certain(*(ASSISTANT.join(turns) for turns in (w[:n] + [""], w[n:], l[n:])))


def certain(prompt: str, chosen: str, rejected: str) -> list[Candidate]:
    """A pair that is labelled already."""
    if chosen == rejected:
        raise BadInput("chosen and rejected are identical, which prefers nothing; remove the row")
    return [(prompt, chosen, rejected, math.inf)]


def completions(row: dict) -> list[Candidate]:
    """All pairs of the row's completions; the log-odds that y_1 is preferred are r_1 - r_2 (Eq. 1)."""
    answers, scores = row.get("completions"), row.get("scores")
    if not isinstance(answers, list) or not 2 <= len(answers) <= COMPLETIONS:
        raise BadInput(f"no chosen and rejected, and no list of 2 to {COMPLETIONS} completions; give either")
    answers = [answer if isinstance(answer, dict) else {"text": answer} for answer in answers]
    if scores is None:
        scores = [answer.get("overall_score", answer.get("score")) for answer in answers]
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise BadInput(f"scores is no list of {len(answers)} numbers; give each completion one")
    if not all(isinstance(score, float) and math.isfinite(score) for score in scores):
        raise BadInput("a score is missing, or not a finite number; give each completion one")
    prompt, texts = row.get("prompt"), [checked(a.get("response", a.get("text")), "a completion") for a in answers]
    if prompt is None:
        prompt = transcript([dict(role="user", content=row.get("instruction"))], "prompt or instruction") + ASSISTANT
        texts = [f" {text}" for text in texts]
    return [(prompt, y_1, y_2, r_1 - r_2) for (y_1, r_1), (y_2, r_2) in combinations(zip(texts, scores), 2)]


SHAPES = {      # by the types of what stands under prompt, chosen and rejected
    (str, str, str): lambda row: certain(row["prompt"], row["chosen"], row["rejected"]),
    (list, list, list): conversation,
    (str, list, list): whole_conversations,
    (NoneType, list, list): whole_conversations,
    (NoneType, str, str): lambda row: split(row["chosen"], row["rejected"]),
    (str, NoneType, NoneType): completions,
    (NoneType, NoneType, NoneType): completions,
}


def transcript(messages: list, name: str) -> str:
    """Messages as text, each after its speaker."""
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise BadInput(f"{name} is no list of messages; write [{{\"role\": ..., \"content\": ...}}]")
    if unknown := [role for message in messages if (role := message.get("role")) not in list(SPEAKER)]:
        raise BadInput(f"unknown role {unknown[0]!r:.40} in {name}; the roles are {', '.join(SPEAKER)}")
    return "".join(f"\n\n{SPEAKER[m['role']]}: {checked(m.get('content'), f'a message of {name}')}" for m in messages)


def checked(text: object, name: str) -> str:
    """text, which says something in Unicode. Errors: BadInput if it does not."""
    if not isinstance(text, str):
        raise BadInput(f"{name} is {'missing' if text is None else 'not text'}; give a string")
    if not text.strip():
        raise BadInput(f"{name} is empty; fill it, or remove the row")
    if re.search(r"[\ud800-\udfff]", text):
        raise BadInput(f"{name} holds half of a surrogate pair, which is no character; remove it")
    return text


# ----------------------------------------------------------------------------- labels, and writing

def pairs(path: Path, labels: str, seed: int, counts: Counter) -> Iterator[dict]:
    """The labelled pairs of a file, one after another; counts says, when all are drawn, what was read and left out.

    Errors: BadInput, which names the line."""
    rng = random.Random(seed)
    for where, row in lines(path):
        counts["rows"] += 1
        try:
            for prompt, y_1, y_2, log_odds in candidates(row):
                kind = "identical" if y_1 == y_2 else "ties" if log_odds == 0 and labels == "argmax" else "pairs"
                counts[kind] += 1
                if kind != "pairs":
                    continue
                p = 0.5 + 0.5 * math.tanh(log_odds / 2)         # the sigmoid, which overflows for no log-odds
                first = log_odds > 0 if labels == "argmax" else rng.random() < p
                chosen, rejected = (y_1, y_2) if first else (y_2, y_1)
                pair = dict(prompt=prompt, chosen=chosen, rejected=rejected)
                yield {name: checked(text, name) for name, text in pair.items()}
        except BadInput as e:
            raise BadInput(f"{path}, {where}: {e}") from None
    if not counts["pairs"]:
        raise BadInput(f"{path}: no pairs ({counts['rows']} rows, {counts['identical']} pairs of identical completions, "
                       f"{counts['ties']} ties); give rows that prefer one response to another")


def write(path: Path, rows: Iterable[dict]):
    """One JSON object a line, in a new file that is there whole or not at all. Errors: BadInput."""
    if os.path.lexists(path):
        raise BadInput(f"{path}: exists already; name another file, or remove it")
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "x", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            f.flush()
            os.fsync(f.fileno())
        os.rename(part, path)
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror}); name one in a folder that has room") from None
    finally:
        if os.path.exists(part):                        # an error left it; after the renaming there is none
            part.unlink()


def main(argv: list[str]) -> int:
    parser = Parser(prog="convert.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help="JSON lines, or a JSON array")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write; it must not exist")
    parser.add_argument("--labels", choices=("bt", "argmax"), default="bt",
                        help="of completions with scores: drawn from Bradley-Terry (default), or the higher score's")
    parser.add_argument("--seed", type=int, default=0, help="of the labels that are drawn (default: 0)")
    args = parser.parse_args(argv)
    counts = Counter()
    try:
        write(args.out, pairs(args.source, args.labels, args.seed, counts))
    except BadInput as e:
        print(f"convert.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"convert.py: interrupted; {args.out} was not written", file=sys.stderr)
        return 130
    print(f"{args.out}: {counts['pairs']} pairs of {counts['rows']} rows; left out {counts['identical']} pairs of "
          f"identical completions and {counts['ties']} ties")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
