"""Learn a byte-level BPE vocabulary. `data.load_tokenizer` builds the tokenizer from it."""

import heapq
import re
from collections import Counter, defaultdict
from itertools import pairwise

from data import PATTERN
from lib.io import BadInput

PIECES = PATTERN.replace("+", "{1,40}")  # the cost is quadratic in the length of a piece


def learn_tokenizer(texts: list[str], vocab_size: int) -> list[bytes]:
    """Byte-level BPE: the most frequent pair of neighbouring tokens becomes a token, repeatedly.

    Returns at most `vocab_size` - 1 tokens; `data.load_tokenizer` adds the end token. Each distinct
    word is stored once, and its pairs count as often as it occurs. The heap may hold outdated
    counts, which are corrected when they are popped. Raises BadInput if there is no room for the
    256 bytes and the end token.
    """
    if vocab_size < 257:
        raise BadInput(f"vocab_size {vocab_size}: must be at least 257 (bytes and end token)")
    word_counts = Counter(word for text in texts for word in re.findall(PIECES, text))
    words = [list(word.encode()) for word in word_counts]  # a word is a list of token ids
    counts = list(word_counts.values())
    ids = {bytes([b]): b for b in range(256)}
    tokens = list(ids)

    pair_counts: Counter = Counter()
    words_with = defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[i]
            words_with[pair].add(i)
    heap = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)

    while heap and len(tokens) < vocab_size - 1:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ids:
            ids[token] = len(tokens)
            tokens.append(token)
        new_pairs = set()
        for i in words_with.pop(pair):
            merged = merge(words[i], pair, ids[token])
            for p in pairwise(words[i]):
                pair_counts[p] -= counts[i]
            for p in pairwise(merged):
                pair_counts[p] += counts[i]
                words_with[p].add(i)
                new_pairs.add(p)
            words[i] = merged
        for p in new_pairs:
            heapq.heappush(heap, (-pair_counts[p], p))
    return tokens


def merge(word: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace each occurrence of the pair in a word, from left to right."""
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new_id
        else:
            merged.append(token)
    return merged
