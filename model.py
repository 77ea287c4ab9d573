"""A GPT with GPT-2's architecture, and sampling from it.

    ids (B, T) -> GPT -> logits (B, T, V),   softmax(logits[:, t]) = pi( . | ids[:, :t+1])

Pre-LayerNorm blocks, learned positions, tanh-GELU, biases everywhere, and an output matrix tied to
the token embedding. Module names are GPT-2's. A bias for each token's logit, which GPT-2 lacks, is
optional (docs/imdb.md).

What this file leaves out: dropout, because DPO needs `train()` and `eval()` to compute the same
function (the loss must start at ln 2); and padding masks, because sequences are padded on the
right, where a causal model never looks.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int  # V, including the end token
    context: int  # maximum number of tokens, prompt and response together
    n_layer: int
    n_head: int  # nh
    n_embd: int  # C = nh * hs
    bias_scale: float = 0  # logits += bias_scale * bias; 0: no bias, as in GPT-2


def causal_attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """softmax(q k' / sqrt(hs)) v, where each query sees the keys up to its own position.

    q: (B, nh, T, hs), at positions start to start + T - 1. k, v: (B, nh, S, hs). Returns
    (B, nh, T, hs).
    """
    T, S = q.size(2), k.size(2)
    if T == S and (q.is_cuda or q.dtype == torch.float32):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # With a cache, or in bfloat16 on a CPU, explicit matmuls are faster at these lengths.
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))  # (B, nh, T, S)
    future = torch.full((T, S), -torch.inf, device=q.device).triu(start + 1)
    return (scores + future).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        q, k, v = qkv = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if cache is not None:  # (2, B, nh, context, hs)
            cache[:, :, :, start : start + T] = qkv[1:]
            k, v = cache  # the whole cache: matmuls with a slice are slower
        y = causal_attention(q, k, v, start)  # (B, nh, T, hs)
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
    """pi(y_t | x, y_<t) as a transformer, initialised as GPT-2 is.

    Weights are float32. With `bf16` set, matrix products are computed in bfloat16.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.bf16 = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.bias_scale else None
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:
                residual = "c_proj" in name  # two residual additions in each block
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer if residual else 1))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) for ids (B, T)."""
        return self.head(self.hidden(ids))

    def hidden(self, ids: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """The final hidden states (B, T, C) of ids (B, T).

        With a cache from `new_cache`, the ids are at positions start, start + 1, ... of sequences
        whose first `start` tokens were passed in earlier calls.
        """
        with self.autocast():
            x = self.wte(ids) + self.wpe.weight[start : start + ids.size(1)]  # (B, T, C)
            for i, block in enumerate(self.h):
                x = block(x, None if cache is None else cache[i], start)
            return self.ln_f(x)

    def head(self, h: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        with self.autocast():
            logits = h @ self.wte.weight.T
            return logits if self.bias is None else logits + self.config.bias_scale * self.bias

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def new_cache(self, B: int) -> Tensor:
        """An empty key-value cache for B sequences: (n_layer, 2, B, nh, context, hs)."""
        c = self.config
        dtype = torch.bfloat16 if self.bf16 else self.wte.weight.dtype
        shape = (c.n_layer, 2, B, c.n_head, c.context, c.n_embd // c.n_head)
        return torch.zeros(shape, dtype=dtype, device=self.device)


@torch.no_grad()
def sample(
    pi: GPT, prompts: list[list[int]], end: int, temperature: float = 1.0, generator=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one response y ~ pi( . | x) for each prompt x, token by token.

    A response ends with the token `end`, or is cut off when the context is full. Returns ids, mask
    and logps, (B, context) each and on the CPU: prompt and response, padded on the right; True on
    the response; and log pi(y_t | x, y_<t) at temperature 1 on the response, 0 elsewhere.
    Raises ValueError for an empty prompt, or one that leaves no room for a response.
    """
    lengths = torch.tensor([len(x) for x in prompts], device=pi.device)
    start = int(lengths.min())
    context = pi.config.context
    if start < 1 or lengths.max() >= context:
        raise ValueError(f"prompts need 1 to {context - 1} tokens, not {start} to {lengths.max()}")
    ids = torch.tensor([x + [end] * (context - len(x)) for x in prompts], device=pi.device)
    logps = torch.zeros(ids.shape, device=pi.device)
    rows = torch.arange(len(prompts), device=pi.device)  # those that have not ended
    cache = pi.new_cache(len(prompts))
    new = ids[:, :start]
    response = torch.arange(context, device=pi.device) >= lengths[:, None]  # (B, context)
    for t in range(start, context):
        h = pi.hidden(new, cache, t - new.size(1))[:, -1]  # (rows, C) at t - 1, which predicts t
        logp = pi.head(h).float().log_softmax(-1)  # (rows, V)
        y = draw((logp / temperature).softmax(-1), generator)  # (rows, 1)
        new = torch.where((t < lengths[rows])[:, None], ids[rows, t, None], y)  # prompt or sample
        ids[rows, t] = new[:, 0]
        logps[rows, t] = logp.gather(1, new)[:, 0]
        if t % 8 == 0:  # drop rows that have ended; not at every token, as that copies the cache
            ended = (response & (ids == end))[rows, : t + 1].any(1)
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                break
            rows = rows[going]
            new = new[going]
            cache = cache.index_select(2, going)
    # Shifted right by one, the count of end tokens is positive only after the first end token.
    after = F.pad((response & (ids == end)).cumsum(1), (1, -1)) > 0
    mask = response & ~after
    return ids.masked_fill(after, end).cpu(), mask.cpu(), logps.masked_fill(~mask, 0).cpu()


def draw(p: Tensor, generator=None) -> Tensor:
    """One index for each row of probabilities (B, V), by inverting their cumulative sum: (B, 1).

    This is much faster than `torch.multinomial`.
    """
    cdf = p.cumsum(-1)
    u = torch.rand(len(p), 1, generator=generator, device=p.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).clamp(max=p.size(1) - 1)
