"""Film reviews, a tokenizer learned from them, their true reward r*, and the preferences it makes.

Two worlds. *toy*: a seeded grammar writes the reviews, and r* is exact: the sum of the weights that the grammar gives to
its words. *imdb*: the Large Movie Review Dataset (Maas et al. 2011), and r* is the logit of a sentiment classifier trained
here; it labels and it judges, as in the paper (section 6.1, appendix C.1). Rewards are in nats throughout:
r*(x, y_1) - r*(x, y_2) is the log-odds that y_1 is preferred (Eq. 1).

What this file does not do: touch a GPT. It knows text, ids and numbers.
"""
import base64
import hashlib
import heapq
import json
import math
import os
import random
import re
import tarfile
import urllib.request
import zlib
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


class BadInput(Exception):
    """Something the user gave cannot be used; the message says what and what to do about it."""


# ----------------------------------------------------------------------------- the toy world: a grammar of film reviews

WEIGHT = {  # sentiment of a word, in nats; every other word has none
    "superb": 1.4, "brilliant": 1.2, "moving": .9, "charming": .8, "clever": .8, "good": .6, "honest": .5, "decent": .3,
    "plain": -.3, "odd": -.3, "slow": -.6, "bland": -.6, "weak": -.8, "dull": -.9, "clumsy": -.9, "awful": -1.4,
    "shines": .9, "works": .6, "delights": 1.1, "lingers": .5, "fails": -.9, "drags": -.8, "annoys": -1.1, "wanders": -.5,
    "loved": 1.2, "enjoyed": .8, "liked": .6, "forgot": -.5, "disliked": -.8, "hated": -1.2,
    "gladly": .6, "happily": .5, "sadly": -.5, "barely": -.5, "masterpiece": 1.4, "gem": .9, "mess": -1.1, "bore": -.9,
}
GRAMMAR = {  # a capital name is replaced by one of its alternatives; one that is listed twice is twice as likely
    "REVIEW": ["CLAUSE.", "CLAUSE and CLAUSE.", "CLAUSE but CLAUSE.", "CLAUSE. CLAUSE.", "CLAUSE while CLAUSE."],
    "CLAUSE": ["the PART is HOW QUALITY", "the PART was QUALITY", "the QUALITY PART ACTS", "this FILM ADVERB ACTS",
               "i ADVERB FELT the PART", "we FELT its QUALITY PART", "my FRIEND FELT this FILM", "it is a QUALITY FILM",
               "the PART by this AUTHOR ACTS", "that was HOW QUALITY", "for me it is a VERDICT", "this FILM is a VERDICT"],
    "PART": "plot script story acting cast music score camera pace humour dialogue ending opening hero villain".split(),
    "FILM": "film movie drama comedy thriller western sequel remake".split(),
    "AUTHOR": "director writer actor composer studio".split(),
    "FRIEND": "friend brother mother partner neighbour".split(),
    "HOW": "very quite rather simply truly mostly".split(),
    "ADVERB": "gladly happily sadly barely really often always still".split(),
    "QUALITY": "superb brilliant moving charming clever good honest decent plain odd slow bland weak dull clumsy awful".split(),
    "ACTS": "shines works delights lingers fails drags annoys wanders".split(),
    "FELT": "loved enjoyed liked forgot disliked hated watched saw".split(),
    "VERDICT": "masterpiece gem mess bore".split(),
}


def toy_reviews(n: int, seed: int) -> list[str]:
    """n reviews written by the grammar, the same for the same seed."""
    rng = random.Random(seed)

    def expand(text: str) -> str:
        return re.sub("[A-Z]+", lambda name: expand(rng.choice(GRAMMAR[name[0]])), text)
    return [expand("REVIEW") for _ in range(n)]


def toy_reward(texts: list[str]) -> Tensor:
    """r* of each text: the sum of its words' weights, (n,) nats."""
    return torch.tensor([sum(WEIGHT.get(word, 0.0) for word in re.findall("[a-z]+", text)) for text in texts])


# ----------------------------------------------------------------------------- the real world: IMDb

ARCHIVE = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
ARCHIVE_BYTES, ARCHIVE_MD5 = 84_125_825, "7c2ac02c03563afcf9b574c7e56c153a"
MEMBER = re.compile(r"(?:^|/)(train|test)/(pos|neg|unsup)/(\d+)_\d+\.txt$")


def download_imdb(folder: Path) -> Path:
    """Fetch the archive once: to a temporary name, checked, then renamed. Errors: BadInput (no network, wrong bytes)."""
    path = folder / "aclImdb_v1.tar.gz"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    md5 = hashlib.md5()
    try:
        with urllib.request.urlopen(ARCHIVE, timeout=60) as source, open(part, "wb") as f, \
                tqdm(total=ARCHIVE_BYTES, unit="B", unit_scale=True, desc="downloading") as bar:
            while block := source.read(1 << 16):
                f.write(block)
                md5.update(block)
                bar.update(len(block))
    except OSError as e:
        part.unlink(missing_ok=True)
        raise BadInput(f"{ARCHIVE} could not be downloaded ({e}); "
                       "fetch it in another way and name it with --imdb PATH") from None
    if part.stat().st_size != ARCHIVE_BYTES or md5.hexdigest() != ARCHIVE_MD5:
        part.unlink()
        raise BadInput(f"{ARCHIVE} did not arrive whole (size or md5 differ); try again, or name a copy with --imdb PATH")
    os.replace(part, path)
    return path


def read_imdb(path: Path) -> dict[str, list[str]]:
    """The reviews in an archive (read as a stream: nothing is ever unpacked to disk) or in an unpacked folder, by the
    names "train/pos", "train/neg", "train/unsup", "test/pos" and "test/neg", in the order of their numbers.

    Errors: BadInput if there is no such path, it is no archive or a damaged one, or no labelled reviews are in it.
    """
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)

    def keep(name: str, text: bytes):
        if m := MEMBER.search(name):
            clean = text.decode("utf-8", errors="replace").replace("<br />", " ")
            found[f"{m[1]}/{m[2]}"].append((int(m[3]), " ".join(clean.split())))
    try:
        if path.is_dir():
            for file in tqdm(path.glob("**/*.txt"), desc="reading reviews", unit=""):
                keep(file.as_posix(), file.read_bytes())
        else:
            with tarfile.open(path, "r|*") as archive:
                for member in tqdm(archive, desc="reading reviews", unit=""):
                    if member.isfile():
                        keep(member.name, archive.extractfile(member).read())
    except (OSError, EOFError, tarfile.TarError, zlib.error) as e:
        raise BadInput(f"{path}: cannot be read as the IMDb archive or folder ({e})") from None
    if missing := [name for name in ("train/pos", "train/neg", "test/pos", "test/neg") if not found[name]]:
        raise BadInput(f"{path}: no reviews under {', '.join(missing)}; expected aclImdb/train/pos/0_9.txt and so on")
    return {name: [text for _, text in sorted(reviews)] for name, reviews in found.items()}


class Sentiment:
    """A logistic regression on hashed words and pairs of neighbouring words; its logit is r*, in nats.

    logit(text) = b + sum of the weights of its n features / sqrt(n).  Trained on whole reviews and, mostly, on snippets of
    8 to 64 words, since openings of reviews are what it will judge.
    """

    SIZE = 1 << 21

    def __init__(self, weight: Tensor, bias: float):
        self.weight, self.bias = weight, bias

    @staticmethod
    @lru_cache(maxsize=None)
    def _hash(word: str) -> int:
        return zlib.crc32(word.encode())

    @classmethod
    def words(cls, text: str) -> np.ndarray:
        """The hash of each word and mark of a text, (n,)."""
        return np.array([cls._hash(w) for w in re.findall(r"[a-z']+|[!?]", text.lower())], dtype=np.int64)

    @classmethod
    def _features(cls, texts: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """Feature ids of all texts in a row, where each text starts, and each feature's share 1/sqrt(n)."""
        each = [np.concatenate((w, w[:-1] * 31 + w[1:] * 17 + 7)) % cls.SIZE if len(w) else np.zeros(1, np.int64)
                for w in texts]
        n = np.array([len(f) for f in each])
        return (torch.from_numpy(np.concatenate(each)), torch.from_numpy(np.cumsum(n) - n),
                torch.from_numpy(np.repeat(1 / np.sqrt(n), n)).float())

    @classmethod
    def train(cls, texts: list[str], positive: list[bool], seed: int = 0, epochs: int = 10) -> "Sentiment":
        rng = np.random.default_rng(seed)
        words = [cls.words(text) for text in texts]
        target = torch.tensor(positive, dtype=torch.float32)
        weight, bias = torch.zeros(cls.SIZE, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
        torch.sparse.check_sparse_tensor_invariants.disable()       # the default, which torch wants said
        optimizer = torch.optim.Adagrad([weight, bias], lr=0.3)
        for _ in tqdm(range(epochs), desc="training the reward"):
            for rows in np.array_split(rng.permutation(len(words)), max(1, len(words) // 256)):
                batch = []
                for i in rows:
                    n = len(words[i]) if rng.random() < 0.25 else int(rng.integers(8, 65))
                    start = int(rng.integers(0, max(1, len(words[i]) - n + 1)))
                    batch.append(words[i][start:start + n])
                ids, offsets, share = cls._features(batch)
                logit = F.embedding_bag(ids, weight, offsets, mode="sum", per_sample_weights=share, sparse=True)
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(logit.squeeze(1) + bias, target[rows]).backward()
                optimizer.step()
        return cls(weight.detach(), bias.item())

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """r* of each text, (n,) nats."""
        ids, offsets, share = self._features([self.words(text) for text in texts])
        return F.embedding_bag(ids, self.weight, offsets, mode="sum", per_sample_weights=share).squeeze(1) + self.bias


# ----------------------------------------------------------------------------- byte-level BPE, run by tiktoken

PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+"    # words keep their space
END = "<|endoftext|>"


def learn_tokenizer(texts: list[str], vocab_size: int) -> tiktoken.Encoding:
    """Byte-level BPE with at most vocab_size tokens, the end token last: the most frequent neighbouring pair becomes a
    token, again and again. Pairs are counted over distinct words, and a heap remembers counts that may be out of date:
    a popped count that is no longer true is put back corrected.

    Errors: BadInput if vocab_size has no room for the 256 bytes and the end token.
    """
    if vocab_size < 257:
        raise BadInput(f"a vocabulary of {vocab_size} is smaller than the 256 bytes and the end token: give at least 257")
    counts = Counter(word for text in texts for word in re.findall(PATTERN, text))
    words, times = [list(word.encode()) for word in counts], list(counts.values())      # a word is a list of token ids
    tokens = [bytes([b]) for b in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    pairs, where = Counter(), defaultdict(set)          # how often a pair occurs, and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += times[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - 1:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        a, b = pair
        if (joined := tokens[a] + tokens[b]) not in ids:
            ids[joined] = len(tokens)
            tokens.append(joined)
        c, born = ids[joined], set()
        for i in where.pop(pair):
            word, k = words[i], 0
            while k < len(word) - 1:
                if word[k] == a and word[k + 1] == b:
                    left = [((y, a), (y, c)) for y in word[max(0, k - 1):k]]          # the pairs that end and begin here
                    right = [((b, y), (c, y)) for y in word[k + 2:k + 3]]
                    for before, after in left + right:
                        pairs[before] -= times[i]
                        pairs[after] += times[i]
                        where[after].add(i)
                        born.add(after)
                    word[k:k + 2] = [c]
                k += 1
        del pairs[pair]
        for pair in born:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
    return tokenizer_of(tokens)


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding, which tiktoken downloads once. Errors: BadInput without a network or a cache of it."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as e:
        raise BadInput(f"tiktoken could not fetch GPT-2's encoding ({type(e).__name__}); "
                       "name a folder that holds it in TIKTOKEN_CACHE_DIR, or leave --tokenizer out") from None


def tokenizer_of(tokens: list[bytes]) -> tiktoken.Encoding:
    """The encoding whose tokens, in the order they were learned, are these; the end token follows them."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("reviews", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def openings(reviews: list[str], tokenizer: tiktoken.Encoding, context: int) -> list[list[int]]:
    """The ids of each review's first sentences, as many as fit in the context with the end token that closes them.
    Reviews whose first sentence is too long, or that are shorter than 5 tokens, are left out."""
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab)]
    closes = [re.search(rb"[.!?][\"')]*$", token) is not None for token in tokens]
    found = []
    for ids in tokenizer.encode_ordinary_batch([review[:8 * context] for review in reviews]):
        ids.append(tokenizer.eot_token)                 # in the place of what follows the last sentence
        for n in range(min(len(ids), context) - 1, 4, -1):
            if closes[ids[n - 1]] and (tokens[ids[n]].startswith(b" ") or ids[n] == tokenizer.eot_token):
                found.append(ids[:n] + [tokenizer.eot_token])
                break
    return found


# ----------------------------------------------------------------------------- prompts and preference triplets

def prompts_of(openings: list[list[int]], tokenizer: tiktoken.Encoding, rng: random.Random) -> list[list[int]]:
    """A prompt for each opening: its first 2 to 8 tokens, ending where a word does (the next token starts with a space).
    Openings that offer no such place are left out."""
    spaced = [tokenizer.decode_single_token_bytes(i).startswith(b" ") for i in range(tokenizer.n_vocab)]
    places = [[n for n in range(2, min(9, len(ids))) if spaced[ids[n]]] for ids in openings]
    return [ids[:rng.choice(place)] for ids, place in zip(openings, places) if place]


def preferences(prompts: list[list[int]], completions: list[list[list[int]]], rewards: Tensor, tokenizer: tiktoken.Encoding,
                labels: str, rng: random.Random) -> tuple[list[dict], dict[str, int]]:
    """All pairs of each prompt's completions, labelled by the true reward, as triplets (x, y_w, y_l) for `write_triplets`.

    rewards (P, K) nats.  labels: "bt" draws y_w from Bradley-Terry (Eq. 1); "soft" gives both orders, each with its
    probability as weight, which is the expectation of "bt"; "argmax" prefers the higher reward, as the paper does.
    A pair of identical completions says nothing and is dropped, and so is a tie under "argmax"; all are counted.
    """
    triplets, counts = [], dict(pairs=0, ties=0, identical=0)
    for number, (x, ys, r) in enumerate(zip(prompts, completions, rewards.tolist())):
        for i, j in combinations(range(len(ys)), 2):
            if ys[i] == ys[j]:
                counts["identical"] += 1
                continue
            tie = r[i] == r[j]
            counts["ties"] += tie
            p = 1 / (1 + math.exp(r[j] - r[i]))
            if labels == "soft":
                orders = [(i, j, p), (j, i, 1 - p)]
            elif labels == "bt":
                orders = [(i, j, 1.0) if rng.random() < p else (j, i, 1.0)]
            else:
                orders = [] if tie else [(i, j, 1.0) if r[i] > r[j] else (j, i, 1.0)]
            counts["pairs"] += len(orders) > 0
            for w, l, weight in orders:
                triplets.append(dict(
                    prompt=tokenizer.decode(x), chosen=text_of(ys[w], tokenizer), rejected=text_of(ys[l], tokenizer),
                    prompt_ids=x, chosen_ids=ys[w], rejected_ids=ys[l],
                    reward_chosen=r[w], reward_rejected=r[l], weight=weight, number=number))
    return triplets, counts


def text_of(ids: list[int], tokenizer: tiktoken.Encoding) -> str:
    """The text of ids, without the end token."""
    return tokenizer.decode([i for i in ids if i != tokenizer.eot_token])


def write_triplets(triplets: list[dict], path: Path):
    """One JSON object a line: the texts as `prompt`, `chosen`, `rejected`; the ids that were sampled (what is scored: a
    text need not encode back to them); both rewards; the weight; the prompt's number."""
    with open(path, "w", encoding="utf-8") as f:
        for triplet in triplets:
            f.write(json.dumps(triplet) + "\n")


def read_triplets(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def group(triplets: list[dict]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Triplets as tensors, each prompt's distinct completions once: ids (P, K, T), mask (P, K, T) over the responses'
    tokens, pairs (n, 3) of prompt, y_w, y_l, and weight (n,). Prompts come in the order of their first triplet."""
    prompts: dict[int, tuple[list[int], dict[tuple, int]]] = {}
    pairs = []
    for t in triplets:
        _, ys = prompts.setdefault(t["number"], (t["prompt_ids"], {}))
        w, l = (ys.setdefault(tuple(t[name]), len(ys)) for name in ("chosen_ids", "rejected_ids"))
        pairs.append((t["number"], w, l))
    place = {number: p for p, number in enumerate(prompts)}
    K = max(len(ys) for _, ys in prompts.values())
    T = max(len(x) + len(y) for x, ys in prompts.values() for y in ys)
    rows = [[(x, y) for y in ys] + [((), ())] * (K - len(ys)) for x, ys in prompts.values()]        # K of each prompt
    ids = torch.tensor([[[*x, *y] + [0] * (T - len(x) - len(y)) for x, y in row] for row in rows])
    start, end = torch.tensor([[(len(x), len(x) + len(y)) for x, y in row] for row in rows])[..., None].unbind(2)
    mask = (start <= torch.arange(T)) & (torch.arange(T) < end)
    return (ids, mask, torch.tensor([(place[number], w, l) for number, w, l in pairs]),
            torch.tensor([t["weight"] for t in triplets]))


def show(triplet: dict, tokenizer: tiktoken.Encoding) -> str:
    """A triplet token by token; those that count towards log pi(y|x), the mask, in brackets."""
    def line(name: str) -> str:
        x = "|".join(tokenizer.decode([i]) for i in triplet["prompt_ids"])
        y = "".join(f"[{tokenizer.decode([i])}]" for i in triplet[name + "_ids"])
        return f"{name:>8} {triplet['reward_' + name]:+6.2f} nats   {x} {y}"
    return line("chosen") + "\n" + line("rejected")
