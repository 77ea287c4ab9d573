"""A GPT in GPT-2's exact architecture, and how to draw from it.

    ids (B, T) -> GPT -> logits (B, T, V),   softmax(logits[:, t]) = pi( . | ids[:, :t+1])

Pre-LayerNorm blocks, learned positions, tanh-GELU, biases everywhere, the output matrix tied to the token embedding;
module names are GPT-2's. There is no dropout: `train()` and `eval()` compute the same
function, as DPO needs (the loss must be ln 2 at its first step). There is no padding mask either: sequences are padded on
the right, and a causal model never looks there.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int         # V, the end token included
    context: int = 48       # the most tokens the model can see, prompt and response together
    n_layer: int = 4
    n_head: int = 6
    n_embd: int = 192       # C, a multiple of n_head


def attend(q: Tensor, k: Tensor, v: Tensor, start: int, fused: bool) -> Tensor:
    """softmax(q k' / sqrt(hs)) v, each query seeing the keys up to its own place: q (B, nh, T, hs) at places start, start + 1,
    ...; k and v (B, nh, S, hs). Written out it is faster on a CPU at these lengths, `fused` is so on a GPU."""
    T, S = q.size(-2), k.size(-2)
    if fused and T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                                # (B, nh, T, S)
    future = torch.full((T, S), -torch.inf, device=q.device).triu(start + 1)                # 0 on what was seen
    return (scores + future).softmax(-1).to(v.dtype) @ v                                    # softmax in float32 at least


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)                   # (B, T, 3, nh, hs)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                                # (B, nh, T, hs) each
        if cache is not None:                                                               # (2, B, nh, S, hs)
            cache[:, :, :, start:start + T] = torch.stack((k, v))
            k, v = cache[:, :, :, :start + T + ROOM]            # of a CPU's all, as a part would be copied for each product
        y = attend(q, k, v, start, fused=x.is_cuda)                                         # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """pi(y_t | x, y_<t) as a transformer; weights are drawn at GPT-2's scale, and kept in float32. With `bf16` set, matrix
    products are computed in bfloat16."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.bf16 = config, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:
                scale = math.sqrt(2 * config.n_layer) if "c_proj" in name else 1.0      # two residual adds a block
                nn.init.normal_(p, std=0.02 / scale)

    def forward(self, ids: Tensor, cache: Tensor | None = None, start: int = 0, where=...) -> Tensor:
        """Logits (B, T, V) for ids (B, T) that stand at positions start, start + 1, ...; with a `cache` from
        `new_cache` the start tokens before them are remembered from earlier calls, and ids are remembered for later ones.
        `where` is an index into (B, T), for logits (n, V) at those places alone: they cost as much as V / 12 C blocks."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            return self.features(ids, cache, start)[where] @ self.wte.weight.T

    def features(self, ids: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """What the logits are read off, (B, T, C)."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.wte(ids) + self.wpe.weight[start:start + ids.size(1)]                  # (B, T, C)
            for i, block in enumerate(self.h):
                x = block(x, None if cache is None else cache[i], start)
            return self.ln_f(x)

    def new_cache(self, B: int, S: int) -> Tensor:
        """Room for S keys and values of B sequences, zeros so far: (n_layer, 2, B, nh, S, hs)."""
        c = self.config
        return self.wte.weight.new_zeros((c.n_layer, 2, B, c.n_head, S, c.n_embd // c.n_head),
                                         dtype=torch.bfloat16 if self.bf16 else None)


ROOM = 16                       # more keys that a CPU's cache is given each time it is full; all its room is attended to
ASK_EVERY = dict(cuda=8)        # tokens: to know how many rows have ended, a GPU must be waited for


@torch.no_grad()
def sample(pi: GPT, prompts: list[list[int]], end: int, temperature: float = 1.0,
           generator: torch.Generator | None = None) -> list[list[int]]:
    """Draw one response y ~ pi( . | x) for each prompt x, as lists of ids, at a temperature above 0.

    A response stops with the token `end`, which it then contains, or without it where the context is full. Prompts may
    differ in length: all rows start together at the shortest one's end, and a row still inside its prompt is given its own
    next token in place of a drawn one, so that no row is padded and every position is right.

    Errors: ValueError for an empty prompt, or one that leaves no room for a response.
    """
    device, context = pi.wte.weight.device, pi.config.context
    lengths = torch.tensor([len(x) for x in prompts])
    if lengths.min() < 1 or lengths.max() >= context:
        raise ValueError(f"a prompt needs 1 to {context - 1} tokens, not {int(lengths.min())} to {int(lengths.max())}")
    ids = torch.full((len(prompts), context), end)
    for row, x in zip(ids, prompts):
        row[:len(x)] = torch.tensor(x)
    ids, length = ids.to(device), lengths.to(device)
    rows = torch.arange(len(prompts), device=device)            # the rows still being written
    ended = torch.zeros_like(rows, dtype=torch.bool)
    start, every = int(lengths.min()), ASK_EVERY.get(device.type, 1)
    cache = pi.new_cache(len(prompts), start + ROOM if device.type == "cpu" else context)      # a GPU's is static
    new = ids[:, :start]
    for t in range(start, context):
        if t > cache.size(-2):
            cache = F.pad(cache, (0, 0, 0, ROOM))
        logits = pi(new, cache, t - new.size(1), where=(slice(None), -1)).float()           # (rows, V)
        cdf = logits.div_(temperature).softmax(-1).cumsum(-1)   # inverting it is far faster than torch.multinomial
        u = torch.rand(len(rows), 1, generator=generator, device=device) * cdf[:, -1:]
        y_t = torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=cdf.size(1) - 1)
        y_t = torch.where((t < length[rows]) | ended, ids[rows, t], y_t)
        ids[rows, t] = y_t
        ended |= (y_t == end) & (t >= length[rows])
        done = 0 if t % every else int(ended.sum())
        if done == len(rows):
            break
        if done > len(rows) // 6:                               # finished rows leave; not at once, since copies cost
            rows, cache, y_t, ended = rows[~ended], cache[:, :, ~ended], y_t[~ended], ended[~ended]
        new = y_t[:, None]
    responses = [row[len(x):] for row, x in zip(ids.tolist(), prompts)]
    return [y[:y.index(end) + 1] if end in y else y for y in responses]
