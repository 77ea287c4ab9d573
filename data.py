"""Film reviews, their true reward r*, prompts, and preference pairs.

    reviews -> openings -> prompts -> (completions of pi_ref, see train.py) -> preferences

There are two datasets. *toy*: reviews are sampled from a grammar, and r* is the sum of the weights
of their words. *imdb*: the Large Movie Review Dataset (Maas et al. 2011), and r* is the logit of a
sentiment classifier that beyond/reward.py trained. As in section 6.1 of the paper, r* both labels
the preferences and evaluates the policies. Rewards are in nats: r*(x, y_1) - r*(x, y_2) is the
log-odds that y_1 is preferred.

What this file leaves out: models.
"""

import json
import math
import random
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from dpo import Preferences, bradley_terry

TokenLists = list[list[int]]  # texts or prompts
Reward = Callable[[list[str]], Tensor]  # texts -> rewards (n,) in nats


@dataclass(frozen=True)
class Sizes:
    """How much of a dataset is used."""

    prompts: int  # to collect preferences on
    eval_prompts: int
    context: int  # tokens
    reviews: int = 0  # for fine-tuning


@dataclass(frozen=True)
class Dataset:
    """What an experiment starts from. Texts and prompts are lists of token ids."""

    tokens: list[bytes] | None  # of the tokenizer, see `load_tokenizer`
    eval_prompts: TokenLists  # distinct, and not among `prompts`
    sft_texts: TokenLists  # for supervised fine-tuning
    prompts: TokenLists  # to collect preferences on
    reward: Reward | None = None  # r*
    pairs: Preferences | None = None  # in place of prompts and r*; ref_logps still 0
    eval_pairs: Preferences | None = None


# -------------------------------------------------- the true reward


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[!?]", text.lower())


@dataclass(frozen=True)
class WordReward:
    """r*: the sum of the weights of a text's words. A word without a weight counts as 0.

    For IMDb, the sum over the n known words is divided by sqrt(n), and a bias is added.
    """

    weight: dict[str, float]
    bias: float = 0.0
    divide: bool = False

    def __call__(self, texts: list[str]) -> Tensor:
        rewards = []
        for text in texts:
            found = [self.weight[word] for word in words_of(text) if word in self.weight]
            n = len(found) if found and self.divide else 1
            rewards.append(sum(found) / math.sqrt(n) + self.bias)
        return torch.tensor(rewards)


# -------------------------------------------------- the toy dataset

WORDS = """
superb 1.4  brilliant 1.2  moving .9  charming .8  clever .8  good .6  honest .5  decent .3
plain -.3  odd -.3  slow -.6  bland -.6  weak -.8  dull -.9  clumsy -.9  awful -1.4  shines .9
works .6  delights 1.1  lingers .5  fails -.9  drags -.8  annoys -1.1  wanders -.5  loved 1.2
enjoyed .8  liked .6  forgot -.5  disliked -.8  hated -1.2  gladly .6  happily .5  sadly -.5
barely -.5  masterpiece 1.4  gem .9  mess -1.1  bore -.9
""".split()
WEIGHT = dict(zip(WORDS[::2], map(float, WORDS[1::2]), strict=True))  # nats; other words have none

RULES = """
REVIEW: CLAUSE. | CLAUSE and CLAUSE. | CLAUSE but CLAUSE. | CLAUSE. CLAUSE. | CLAUSE while CLAUSE.
CLAUSE: the PART is HOW QUALITY | the PART was QUALITY | the QUALITY PART ACTS
CLAUSE: this FILM ADVERB ACTS | i ADVERB FELT the PART | we FELT its QUALITY PART
CLAUSE: my FRIEND FELT this FILM | it is a QUALITY FILM | the PART by this AUTHOR ACTS
CLAUSE: that was HOW QUALITY | for me it is a VERDICT | this FILM is a VERDICT
PART: plot | script | story | acting | cast | music | score | camera | pace | humour | dialogue
PART: ending | opening | hero | villain
FILM: film | movie | drama | comedy | thriller | western | sequel | remake
AUTHOR: director | writer | actor | composer | studio
FRIEND: friend | brother | mother | partner | neighbour
HOW: very | quite | rather | simply | truly | mostly
ADVERB: gladly | happily | sadly | barely | really | often | always | still
QUALITY: superb | brilliant | moving | charming | clever | good | honest | decent | plain | odd
QUALITY: slow | bland | weak | dull | clumsy | awful
ACTS: shines | works | delights | lingers | fails | drags | annoys | wanders
FELT: loved | enjoyed | liked | forgot | disliked | hated | watched | saw
VERDICT: masterpiece | gem | mess | bore
"""
GRAMMAR = defaultdict(list)  # a name in capitals is replaced by one of its alternatives
for name, alternatives in re.findall(r"(\w+): (.*)", RULES):
    GRAMMAR[name] += alternatives.split(" | ")


def toy_reviews(n: int, seed: int) -> list[str]:
    """n reviews written by the grammar."""
    rng = random.Random(seed)

    def expand(text):
        return re.sub("[A-Z]+", lambda match: expand(rng.choice(GRAMMAR[match[0]])), text)

    return [expand("REVIEW") for _ in range(n)]


def toy_tokens() -> list[bytes]:
    """The 256 bytes, and each word of the grammar with and without a space before it.

    BPE encodes a word that is itself a token as that token, so no merges are needed.
    """
    words = sorted(set(re.findall("[a-z]+", RULES)))
    tokens = [bytes([b]) for b in range(256)]
    tokens += [f"{space}{word}".encode() for word in words for space in ("", " ")]
    return list(dict.fromkeys(tokens))  # "a" and "i" are bytes, too


def load_toy(sizes: Sizes, seed: int, tokens: list[bytes]) -> Dataset:
    """Reviews from the grammar: some for pi_ref, some for prompts, and the rest for evaluation."""
    n = sizes.reviews
    m = n + 2 * sizes.prompts  # a surplus, because duplicates are dropped
    texts = toy_reviews(m + 4 * sizes.eval_prompts + 500, seed)
    parts = texts[:n], texts[n:m], texts[m:]
    return make_dataset(*parts, WordReward(WEIGHT), sizes, seed, tokens)


# -------------------------------------------------- the IMDb dataset

MEMBER = re.compile(r"((?:train|test)/(?:pos|neg|unsup))/(\d+)_\d+\.txt$")


def read_imdb(path: Path) -> dict[str, list[str]]:
    """The reviews in the archive, in numerical order. Nothing is unpacked to disk.

    The keys are "train/pos", "train/neg", "train/unsup", "test/pos" and "test/neg". Raises OSError,
    ValueError, EOFError, or an error of tarfile or zlib.
    """
    reviews = defaultdict(list)
    with tarfile.open(path) as archive:
        for member in tqdm(archive, "reading reviews", unit=" files"):
            if member.isfile() and (found := MEMBER.search(member.name)):
                text = archive.extractfile(member).read().decode(errors="replace")
                text = " ".join(text.replace("<br />", " ").split())
                reviews[found[1]].append((int(found[2]), text))
        while archive.fileobj.read(1 << 20):  # read on to gzip's checksum, at the end
            pass
    if len(reviews) < 5:
        raise ValueError("expected aclImdb/train/pos/0_9.txt, ...")
    return {name: [text for _, text in sorted(numbered)] for name, numbered in reviews.items()}


def load_imdb(reviews: dict, reward: Path, sizes: Sizes, seed: int, tokens) -> Dataset:
    """Training reviews for pi_ref, and test reviews, of which a tenth are held out.

    reviews: as `read_imdb` returns them. reward: the file that beyond/reward.py writes.
    """
    rng = random.Random(seed)
    sft_texts = reviews["train/pos"] + reviews["train/neg"] + reviews["train/unsup"]
    texts = reviews["test/pos"] + reviews["test/neg"]
    rng.shuffle(sft_texts)
    rng.shuffle(texts)
    n = len(texts) // 10
    parts = sft_texts[: sizes.reviews], texts[n:], texts[:n]
    found = json.loads(reward.read_text("utf-8"))
    r = WordReward(found["weight"], found["bias"], divide=True)
    return make_dataset(*parts, r, sizes, seed, tokens)


# -------------------------------------------------- tokens, openings and prompts

# How texts are split before BPE. As in GPT-2, a word keeps the space before it.
PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"


def load_tokenizer(tokens: list[bytes] | None) -> tiktoken.Encoding:
    """Byte-level BPE with these tokens, in the order they were learned, and, last, an end token.

    None stands for GPT-2's tokens, which tiktoken downloads once.
    """
    if tokens is None:
        return tiktoken.get_encoding("gpt2")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) < len(tokens) or not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise ValueError("the tokens are not distinct, or do not contain all 256 bytes")
    end = {"<|endoftext|>": len(tokens)}
    return tiktoken.Encoding("reviews", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=end)


def make_dataset(
    sft_texts, prompt_texts, eval_texts, reward: Reward, sizes: Sizes, seed: int, tokens
) -> Dataset:
    """A dataset from three lists of reviews.

    Evaluation prompts are distinct, and no preferences use them. Raises ValueError if too few
    reviews fit in the context.
    """
    tokenizer = load_tokenizer(tokens)
    rng = random.Random(seed)
    seen = set(sft_texts)
    sft = openings(sft_texts, tokenizer, sizes.context)
    asked = openings([t for t in prompt_texts if t not in seen], tokenizer, sizes.context)
    held_out = openings([t for t in eval_texts if t not in seen], tokenizer, sizes.context)
    eval_prompts = dict.fromkeys(map(tuple, cut_prompts(held_out, tokenizer, rng)))
    eval_prompts = [list(x) for x in eval_prompts][: sizes.eval_prompts]
    prompts = [x for x in cut_prompts(asked, tokenizer, rng) if x not in eval_prompts]
    found = f"{len(prompts):,} prompts and {len(eval_prompts)} evaluation prompts"
    if not prompts or len(eval_prompts) < sizes.eval_prompts or (sft_texts and not sft):
        raise ValueError(f"too few reviews fit in --context {sizes.context}: {found}")
    if len(prompts) < sizes.prompts:
        print(f"fewer prompts than --prompts: {found}")
    return Dataset(tokens, eval_prompts, sft, prompts[: sizes.prompts], reward)


def openings(reviews: list[str], tokenizer, context: int) -> TokenLists:
    """The first sentences of each review: as many as fit in the context, then the end token.

    A sentence ends with . ! or ? before a space or the review's end. Reviews in which no sentence
    ends between the fifth token and the end of the context are left out.
    """
    end = tokenizer.eot_token
    found = []
    for review in reviews:
        ids = [*tokenizer.encode_ordinary(review[: 8 * context]), end][:context]
        tokens = tokenizer.decode_tokens_bytes(ids)
        for n in range(len(ids) - 1, 4, -1):
            closes = re.search(rb"[.!?][\"')]*$", tokens[n - 1])
            if closes and (ids[n] == end or tokens[n].startswith(b" ")):
                found.append([*ids[:n], end])
                break
    return found


def cut_prompts(texts: TokenLists, tokenizer, rng: random.Random) -> TokenLists:
    """The first 2 to 8 tokens of each text, cut where a word ends. Texts without such a place are
    left out.
    """
    prompts = []
    for ids in texts:
        tokens = tokenizer.decode_tokens_bytes(ids[:9])
        places = [n for n in range(2, len(tokens)) if tokens[n].startswith(b" ")]
        if places:
            prompts.append(ids[: rng.choice(places)])
    return prompts


# -------------------------------------------------- preferences

Completions = tuple[Tensor, Tensor, Tensor]  # ids, mask, log pi_ref (P K, T), from `model.sample`


def label_pairs(completions: Completions, rewards: Tensor, labels: str, seed: int) -> Preferences:
    """All pairs of the K completions of each prompt, labelled by their rewards (P, K).

    labels: "bt" draws y_w from Bradley-Terry (Eq. 1). "soft" contains both orders, weighted by
        their probability. "argmax" prefers the higher reward, as the paper does; ties are dropped.

    Pairs of identical completions are dropped.
    """
    ids, mask, ref_logps = completions
    P, K = rewards.shape
    columns = torch.combinations(torch.arange(K))
    pairs = (columns + K * torch.arange(P)[:, None, None]).flatten(0, 1)  # (n, 2) rows
    first, second = pairs.T
    r = rewards.flatten()
    p = bradley_terry(r[first], r[second])
    keep = (ids[first] != ids[second]).any(1)
    weight = torch.ones(len(pairs))
    if labels == "argmax":
        p = (r[first] > r[second]).float()
        keep &= r[first] != r[second]
    why = "identical or tied" if labels == "argmax" else "identical"
    print(f"{len(keep) - keep.sum():,} of {len(keep):,} pairs are dropped: {why}")
    if labels == "soft":
        pairs = torch.cat((pairs, pairs.flip(1)))
        weight = torch.cat((p, 1 - p))
        keep = keep.repeat(2)
    else:
        u = torch.rand(len(p), generator=torch.Generator().manual_seed(seed))
        pairs = torch.where((u >= p)[:, None], pairs.flip(1), pairs)

    rows, pairs = pairs[keep].unique(return_inverse=True)  # only rows that belong to a pair
    _, prompt = (rows // K).unique(return_inverse=True)
    return Preferences(ids[rows], mask[rows], ref_logps[rows], prompt, pairs, weight[keep])


def decode_rows(ids: Tensor, tokenizer) -> list[str]:
    """The text of each row of ids (R, T) before its first end token."""
    return [tokenizer.decode(row).split("<|endoftext|>")[0] for row in ids.tolist()]
