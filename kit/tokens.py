"""Byte-level BPE, learned here and run by tiktoken; or GPT-2's own encoding."""
import heapq
import os
import re
from collections import Counter, defaultdict
from functools import lru_cache

import tiktoken

from kit.files import BadInput, cache

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
