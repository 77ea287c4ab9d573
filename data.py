"""Film reviews, a tokenizer learned from them, their true reward r*, and the preferences it makes.

Two worlds. *toy*: a seeded grammar writes the reviews, and r* is exact: the sum of the weights that the grammar gives to
its words. *imdb*: the Large Movie Review Dataset (Maas et al. 2011), and r* is the logit of a sentiment classifier trained
here; it labels and it judges, as in the paper (section 6.1, appendix C.1). Rewards are in nats throughout:
r*(x, y_1) - r*(x, y_2) is the log-odds that y_1 is preferred (Eq. 1).

What this file does not do: touch a GPT. It knows text, ids and numbers.
"""
import gzip
import hashlib
import heapq
import http.client
import json
import math
import os
import random
import re
import tarfile
import urllib.request
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


class BadInput(Exception):
    """Something the user gave cannot be used; the message says what and what to do about it."""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """The door through which every file is read: whatever a missing or damaged one raises becomes a BadInput naming it."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:          # there is no list of what a parser may raise on bytes that somebody made up
        raise BadInput(f"{path}: cannot be read as {what} ({str(e) or type(e).__name__})") from None


def write(path: Path, content: bytes):
    """A file that appears whole or not at all, whatever happens meanwhile: temporary name, fsync, rename. Errors: BadInput."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        if os.name == "posix":                  # the new name, too, must outlast a loss of power
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror}); what was there is kept") from None
    finally:
        part.unlink(missing_ok=True)


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


def cache() -> Path:
    """The folder of what is downloaded, which the environment variable DPO_CACHE can move."""
    return Path(os.environ.get("DPO_CACHE") or Path.home() / ".cache" / "dpo")


def download_imdb(folder: Path) -> Path:
    """Fetch the archive once: to a temporary name, checked, then renamed. Errors: BadInput (no network, wrong bytes)."""
    path = folder / "aclImdb_v1.tar.gz"
    if path.exists():
        if (path.stat().st_size, hashlib.md5(path.read_bytes()).hexdigest()) != (ARCHIVE_BYTES, ARCHIVE_MD5):
            raise BadInput(f"{path}: is not the archive that was downloaded; delete it, and it is fetched again")
        return path
    print(f"downloading {ARCHIVE} ({ARCHIVE_BYTES / 1e6:.0f} MB) into {folder}")
    part = folder / f"{path.name}.{os.getpid()}.part"
    size, md5 = 0, hashlib.md5()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(ARCHIVE, timeout=60) as source, open(part, "wb") as f, \
                tqdm(total=ARCHIVE_BYTES, unit="B", unit_scale=True, desc="downloading") as bar:
            if not source.geturl().startswith("https://"):
                raise OSError(f"it is redirected to {source.geturl()}, which is not https")
            while size <= ARCHIVE_BYTES and (block := source.read(1 << 16)):
                f.write(block)
                md5.update(block)
                size += len(block)
                bar.update(len(block))
            if (size, md5.hexdigest()) != (ARCHIVE_BYTES, ARCHIVE_MD5):
                raise OSError("what arrived is not the archive: its size or md5 differs")
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as e:
        raise BadInput(f"{ARCHIVE} could not be downloaded ({e}); try again, or name a copy of it with --imdb PATH") from None
    finally:
        part.unlink(missing_ok=True)
    return path


class Bounded:
    """A file that gives no more than `limit` bytes: a small archive can unpack to any size."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.left = file, limit

    def read(self, n: int) -> bytes:
        block = self.file.read(n)
        self.left -= len(block)
        if self.left < 0:
            raise OSError("it unpacks to far more than the reviews of IMDb")
        return block


def read_imdb(path: Path) -> dict[str, list[str]]:
    """The reviews in an archive (read as a stream: nothing is ever unpacked to disk) or in an unpacked folder, by the
    names "train/pos", "train/neg", "train/unsup", "test/pos" and "test/neg", in the order of their numbers.

    Errors: BadInput if there is no such path, it is no archive or a damaged one, or labelled reviews are missing from it.
    """
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)

    def keep(name: str, text: bytes):
        if m := MEMBER.search(name):
            clean = text.decode("utf-8", errors="replace").replace("<br />", " ")
            found[f"{m[1]}/{m[2]}"].append((int(m[3]), " ".join(clean.split())))

    with reading(path, "the IMDb archive or its unpacked folder"):
        if path.is_dir():
            for file in tqdm(path.glob("**/*.txt"), desc="reading reviews", unit=""):
                if MEMBER.search(file.as_posix()):
                    keep(file.as_posix(), file.read_bytes())
        else:
            with open(path, "rb") as file:
                stream = gzip.open(file) if file.peek(2)[:2] == b"\x1f\x8b" else file
                bounded = Bounded(stream, 1 << 30)
                with tarfile.open(fileobj=bounded, mode="r|") as archive:
                    for member in tqdm(archive, desc="reading reviews", unit=""):
                        if not (member.isfile() or member.isdir()) or {"", ".."} & set(member.name.split("/")):
                            raise OSError(f"{member.name!r} is a link, a device, or leads out of its folder")
                        if member.isfile():
                            keep(member.name, archive.extractfile(member).read())
                while bounded.read(1 << 20):                # to gzip's own checksum, which stands at the end
                    pass
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

# Words keep their space, as GPT-2's do. No piece is longer than 40 characters, since learning from one takes the square of it.
PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]{1,40}| ?\d{1,40}| ?(?:[^\s\w]|_){1,40}|\s{1,40}(?!\S)|\s{1,40}"
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


@lru_cache(maxsize=None)
def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding, which tiktoken downloads once. Errors: BadInput without a network or a copy of it."""
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache()))
    print("loading GPT-2's encoding, which tiktoken downloads if it is not in", os.environ["TIKTOKEN_CACHE_DIR"])
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:
        raise BadInput(f"tiktoken could not fetch GPT-2's encoding ({type(e).__name__}); "
                       "name a folder that holds it in TIKTOKEN_CACHE_DIR, or leave --tokenizer out") from None


def tokens_of(tokenizer: tiktoken.Encoding) -> list[bytes] | None:
    """What an encoding is made of, to be saved: its tokens in the order they were learned; None for GPT-2's."""
    if tokenizer.name == "gpt2":
        return None
    return [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab - 1)]


def tokenizer_of(tokens: list[bytes] | None) -> tiktoken.Encoding:
    """`tokens_of` undone: the encoding whose tokens these are; the end token follows them."""
    if tokens is None:
        return gpt2_tokenizer()
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
            p = (1 + math.tanh((r[i] - r[j]) / 2)) / 2          # Eq. 1
            if labels == "soft":
                orders = [(i, j, p), (j, i, 1 - p)]
            elif labels == "bt":
                orders = [(i, j, 1.0) if rng.random() < p else (j, i, 1.0)]
            else:
                orders = [] if tie else [(i, j, 1.0) if r[i] > r[j] else (j, i, 1.0)]
            counts["pairs"] += len(orders) > 0
            triplets += [triplet(x, ys[w], ys[l], tokenizer, weight, number) | dict(reward_chosen=r[w], reward_rejected=r[l])
                         for w, l, weight in orders]
    return triplets, counts


def triplet(x: list[int], y_w: list[int], y_l: list[int], tokenizer: tiktoken.Encoding, weight: float, number: int) -> dict:
    """A preference as it is kept: the texts, which others read; the ids, which are what is scored (a text need not encode
    back to the ids that were sampled); the weight of this order of the pair; and the prompt's number."""
    return dict(prompt=tokenizer.decode(x), chosen=text_of(y_w, tokenizer), rejected=text_of(y_l, tokenizer),
                prompt_ids=x, chosen_ids=y_w, rejected_ids=y_l, weight=weight, number=number)


def text_of(ids: list[int], tokenizer: tiktoken.Encoding) -> str:
    """The text of ids, without the end token."""
    return tokenizer.decode([i for i in ids if i != tokenizer.eot_token])


def write_triplets(triplets: list[dict], path: Path):
    """One JSON object a line, with the texts as `prompt`, `chosen`, `rejected`."""
    write(path, "".join(json.dumps(triplet) + "\n" for triplet in triplets).encode())


def read_pairs(path: Path) -> list[dict]:
    """Anybody's preferences: one JSON object a line with `prompt`, `chosen` and `rejected` as strings (TRL's standard
    format, and what `write_triplets` writes), and perhaps a `weight`; whatever else is there is left alone.

    Errors: BadInput, which names the line.
    """
    pairs = []
    with reading(path, "preferences"), open(path, "rb") as f:
        if not path.is_file():
            raise OSError("it is not a file, which a later run could read again")
        for k, line in enumerate(iter(lambda: f.readline(LONGEST_LINE + 1), b""), 1):
            if line.strip():
                pairs.append(pair_of(line, f"{path}, line {k}"))
    if not pairs:
        raise BadInput(f"{path}: is empty; expected one JSON object a line with prompt, chosen and rejected")
    return pairs


LONGEST_LINE = 4 << 20          # bytes


def pair_of(line: bytes, place: str) -> dict:
    """One line of `read_pairs`, checked."""
    if len(line) > LONGEST_LINE:
        raise BadInput(f"{place}: longer than {LONGEST_LINE >> 20} MB")
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()                # half of a surrogate pair is no text
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{place}: not JSON in UTF-8 ({e})") from None
    if not isinstance(row, dict):
        raise BadInput(f"{place}: not a JSON object with prompt, chosen and rejected")
    for name in ("prompt", "chosen", "rejected"):
        if name not in row:
            raise BadInput(f"{place}: has no {name}; python -m beyond.convert makes this format of others")
        if not isinstance(row[name], str):
            raise BadInput(f"{place}: {name} is not a string; python -m beyond.convert makes this format of others")
        if not row[name] and not row.get(f"{name}_ids"):                # ours may be the end token alone, which was sampled
            raise BadInput(f"{place}: {name} is empty")
    if row["chosen"] == row["rejected"]:
        raise BadInput(f"{place}: chosen and rejected are identical, which says nothing; leave the pair out")
    weight = row.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise BadInput(f"{place}: weight is not a number above zero")
    return {name: row[name] for name in ("prompt", "chosen", "rejected")} | dict(weight=float(weight))


def encode_pairs(pairs: list[dict], tokenizer: tiktoken.Encoding, context: int, K: int = 4) -> list[dict]:
    """Pairs of `read_pairs` as triplets, without those that do not fit in the context. Prompt and response are encoded
    apart, since their ids are what is joined: no token may reach across. Each response ends with the end token. Pairs of
    one prompt share a number, and so their forward rows, as long as they have no more than K distinct responses."""
    groups: dict[str, tuple[int, set[str]]] = {}        # each prompt's last number, and what responses have it
    triplets, numbers = [], 0
    for pair in pairs:
        x, y_w, y_l = (tokenizer.encode_ordinary(pair[name]) for name in ("prompt", "chosen", "rejected"))
        if len(x) + max(len(y_w), len(y_l)) < context:
            new = {pair["chosen"], pair["rejected"]}
            number, ys = groups.get(pair["prompt"], (None, set()))
            if number is None or len(ys | new) > K:
                number, ys, numbers = numbers, set(), numbers + 1
            groups[pair["prompt"]] = number, ys | new
            triplets.append(triplet(x, y_w + [tokenizer.eot_token], y_l + [tokenizer.eot_token], tokenizer, pair["weight"], number))
    return triplets


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
        r = f"{triplet['reward_' + name]:+6.2f} nats   " if "reward_" + name in triplet else ""
        return f"{name:>8} {r}{x} {y}"
    return line("chosen") + "\n" + line("rejected")
