"""Film reviews, their true reward r*, prompts from them, and the preferences it makes.

Two worlds. *toy*: a seeded grammar writes the reviews, and r* is exact: the sum of the weights that the grammar gives to
its words. *imdb*: the Large Movie Review Dataset (Maas et al. 2011), and r* is the logit of a sentiment classifier trained
here; it labels and it judges, as in the paper (section 6.1, appendix C.1). Rewards are in nats throughout:
r*(x, y_1) - r*(x, y_2) is the log-odds that y_1 is preferred (Eq. 1).

What this file does not do: touch a GPT. It knows text, ids and numbers.
"""
import gzip
import json
import math
import random
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kit.files import BadInput, Bounded, cache, download_imdb, pack, reading, write
from kit.tokens import tokens_of


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

MEMBER = re.compile(r"(?:^|/)(train|test)/(pos|neg|unsup)/(\d+)_\d+\.txt$")


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
        """Cross-entropy on texts and whether each is positive, by Adagrad."""
        rng = np.random.default_rng(seed)
        words = [cls.words(text) for text in texts]
        target = torch.tensor(positive, dtype=torch.float32)
        weight, bias = torch.zeros(cls.SIZE, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
        torch.sparse.check_sparse_tensor_invariants.disable()       # as it is; said, or torch warns
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


def openings(reviews: list[str], tokenizer: tiktoken.Encoding, context: int) -> list[list[int]]:
    """The ids of each review's first sentences, as many as fit in the context with the end token that closes them.
    Reviews of which no 5 tokens or more can be kept so are left out."""
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

def prompts_of(texts: list[list[int]], tokenizer: tiktoken.Encoding, rng: random.Random) -> list[list[int]]:
    """A prompt for each opening: its first 2 to 8 tokens, ending where a word does (the next token starts with a space).
    Openings that offer no such place are left out."""
    spaced = [tokenizer.decode_single_token_bytes(i).startswith(b" ") for i in range(tokenizer.n_vocab)]
    places = [[n for n in range(2, min(9, len(ids))) if spaced[ids[n]]] for ids in texts]
    return [ids[:rng.choice(place)] for ids, place in zip(texts, places) if place]


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
            p = (1 + math.tanh((r[i] - r[j]) / 2)) / 2          # Eq. 1, where exp could overflow
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
    """A triplet token by token; those that count towards log pi(y|x), the mask, in brackets, the others parted by bars."""
    def line(name: str) -> str:
        x = "|".join(tokenizer.decode([i]) for i in triplet["prompt_ids"])
        y = "".join(f"[{tokenizer.decode([i])}]" for i in triplet[name + "_ids"])
        r = f"{triplet['reward_' + name]:+6.2f} nats   " if "reward_" + name in triplet else ""
        return f"{name:>8} {r}{x} {y}"
    return f"{line('chosen')}\n{line('rejected')}\nparted by |: the prompt's tokens; in []: the response's, which alone count"


# ----------------------------------------------------------------------------- worlds: what an experiment starts from

Choose = Callable[[list[str]], tiktoken.Encoding]       # a tokenizer for these texts

def toy_world(settings, choose: Choose) -> dict:
    """Reviews of the grammar: for pi_ref, for the prompts, and held out."""
    sizes = settings.reviews, 2 * settings.prompts, 4 * settings.held_out + 500
    reviews = toy_reviews(sum(sizes), settings.seed)
    tokenizer = choose(reviews[:min(20_000, settings.reviews)])
    ends = np.cumsum(sizes)
    return split(tokenizer, reviews[:ends[0]], reviews[ends[0]:ends[1]], reviews[ends[1]:], settings)


def imdb_world(settings, choose: Choose) -> dict:
    """IMDb's training reviews for pi_ref and the true reward, its test reviews for prompts and for the second judge."""
    reviews = read_imdb(Path(settings.imdb) if settings.imdb else download_imdb(cache()))
    rng = random.Random(settings.seed)
    judges, accuracy = {}, {}
    for name, trained_on in dict(reward="train", judge="test").items():
        texts = reviews[f"{trained_on}/pos"] + reviews[f"{trained_on}/neg"]
        positive = [True] * len(reviews[f"{trained_on}/pos"]) + [False] * len(reviews[f"{trained_on}/neg"])
        judges[name] = Sentiment.train(texts, positive, settings.seed)
    texts = reviews["test/pos"] + reviews["test/neg"]
    positive = torch.arange(len(texts)) < len(reviews["test/pos"])
    words = [text.split() for text in texts]
    starts = [rng.randrange(max(1, len(w) - 19)) for w in words]
    for name, snippets in dict(whole=texts, words_20=[" ".join(w[s:s + 20]) for w, s in zip(words, starts)]).items():
        accuracy[name] = ((judges["reward"](snippets) > 0) == positive).float().mean().item()
    print("the true reward's accuracy on test reviews: {whole:.3f} whole, {words_20:.3f} on 20 words".format(**accuracy))
    fine_tune = reviews["train/pos"] + reviews["train/neg"] + reviews.get("train/unsup", [])
    rng.shuffle(fine_tune)
    rng.shuffle(texts)
    tokenizer = choose(fine_tune[:8_000])
    n = len(texts) // 10
    world = split(tokenizer, fine_tune[:settings.reviews], texts[n:], texts[:n], settings)
    return world | dict(accuracy=accuracy, judges={name: (j.weight, j.bias) for name, j in judges.items()})


def split(tokenizer, fine_tune: list[str], asked: list[str], held_out: list[str], settings) -> dict:
    """A world: the tokenizer's tokens, the openings that pi_ref learns from, and prompts from reviews that are not among
    them. The held-out prompts are distinct, and no preferences are collected on them."""
    rng, seen = random.Random(settings.seed), set(fine_tune)
    tuned, asked, kept = (openings(reviews, tokenizer, settings.context) for reviews in (
        fine_tune, [r for r in asked if r not in seen], [r for r in held_out if r not in seen]))
    held = list(dict.fromkeys(map(tuple, prompts_of(kept, tokenizer, rng))))[:settings.held_out]
    taken = set(held)
    prompts = [x for x in prompts_of(asked, tokenizer, rng) if tuple(x) not in taken][:settings.prompts]
    if not tuned or not prompts or len(held) < settings.held_out:
        raise BadInput(f"too few reviews that fit in --context {settings.context}: {len(tuned)} openings to fine-tune on, "
                       f"{len(prompts)} prompts, {len(held)} of {settings.held_out} held-out ones; "
                       "lower --held-out, or give more reviews")
    if len(prompts) < settings.prompts:
        print(f"only {len(prompts):,} of {settings.prompts:,} prompts: there are no more reviews")
    return dict(tokens=tokens_of(tokenizer), fine_tune=pack(tuned), prompts=pack(prompts), held_out=pack(held),
                unseen=pack(kept))


