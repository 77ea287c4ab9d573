"""train.py's experiment with faster steps of DPO and a faster scoring of texts: the same functions, but for rounding.

    python -m beyond.fast [train.py's flags]

Eq. 7 asks for log pi(y_t | x, y_<t) at the tokens of y and for its gradient. model.py computes more than that, to be read:

- *Padding.* Rows of a batch differ in length. Here the tokens of all rows lie one after another, (n, C), and every layer but
  attention treats each by itself. Attention is given rows again, in which the places that hold nothing repeat some token: no
  token looks to its right, so none sees them, and no gradient comes back.
- *Prompts.* For the same reason rows that begin alike, as the completions of a prompt do, are the same up to where they part.
  What a row shares with the one above it is computed once, and attention is given it in both. This needs ids on the CPU: a GPU
  that has them would have to be asked, and waited for.
- *Logits.* Of z = h W', (n, V), autograd keeps log-softmax in float32, and goes over it twice more on the way back. But with
  p = softmax(z) and g_t what comes back for token t,

      L = sum_t g_t log p_t[y_t],   d_t = p_t - onehot(y_t)    =>    dL/dh_t = -g_t d_t W,   dL/dW = -sum_t d_t' g_t h_t

  so that d alone is kept, in the dtype of the products, g meets (n, C) instead of (n, V), and two products are the way back.
  The softmax takes some rows at a time, which stay in a processor's cache, or leave room on a GPU, and d takes the place of z.

`fast` replaces `dpo.response_logps` while it is open. Fine-tuning, whose batches have hardly any padding, is left as it is.
"""
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import dpo
import train
from beyond.distributed import replaced
from kit import files
from model import GPT, Attention, attend

ROWS = dict(cpu=256, cuda=1 << 14)      # of logits and of p at a time, in float32: 4 MB each of 4,097 tokens, 3 GB of 50,257


class LogProbs(torch.autograd.Function):
    """log softmax(h W')[y], (n,), in float32 at least: h (n, C), W (V, C) of one dtype, y (n,) ids. `keep` what the way back
    needs, for which a Function is not told of torch.no_grad."""

    @staticmethod
    def forward(ctx, h: Tensor, W: Tensor, y: Tensor, keep: bool) -> Tensor:
        logps, d, rows = [], h @ W.T, ROWS.get(h.device.type, len(h))                       # z, in whose place comes d
        for z, y_t in zip(d.split(rows), y[:, None].split(rows)):
            z_t = dpo.at_least_float32(z)
            p = z_t.softmax(-1)
            logps.append(z_t.gather(1, y_t) - z_t.amax(1, True) + p.amax(1, True).log())    # the largest p does not underflow
            if keep:
                z.copy_(p.scatter_add_(1, y_t, p.new_full(y_t.shape, -1.0)))
        ctx.save_for_backward(h, W, d)
        return torch.cat(logps)[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        h, W, d = ctx.saved_tensors
        g = -g[:, None].to(h.dtype)
        return g * (d @ W), d.T @ (g * h), None, None


def attention(self: Attention, x: Tensor, shape: tuple[int, int], token_at: Tensor, place_of: Tensor) -> Tensor:
    """model.Attention for tokens x (n, C): `place_of` each token, the first of its places among (B, T) = `shape`; `token_at`
    each place, its token."""
    q, k, v = self.c_attn(x).index_select(0, token_at).view(*shape, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
    y = attend(q, k, v, 0, fused=x.is_cuda)                                                 # (B, nh, T, hs)
    return self.c_proj(y.transpose(1, 2).reshape(len(token_at), -1).index_select(0, place_of))


def new_places(ids: Tensor, mask: Tensor) -> Tensor:
    """True at the tokens to compute, (B, T): of rows ids, mask (B, T) those before the last under the mask, less the beginning
    that the row above has and reads too. If ids and mask are on different devices nothing is compared."""
    place = torch.arange(mask.size(1), device=mask.device)
    read = place < (mask * place).amax(1, keepdim=True)
    if ids.device != mask.device:
        return read
    alike = (read[:-1] & (ids[1:] == ids[:-1])).cumprod(1).bool()
    return torch.cat((read[:1], read[1:] & ~alike))


def response_logps(pi: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """As dpo.response_logps, of a GPT. At least one token after the first is under the mask."""
    new = new_places(ids, mask)
    row, t = new.nonzero(as_tuple=True)                                                     # of the n tokens to compute
    T = int(t.max()) + 1
    new = new[:, :T]
    token_at = (new * (new.flatten().cumsum(0).view(new.shape) - 1)).cummax(0).values       # (B, T)
    y_row, before = mask[:, 1:T + 1].nonzero(as_tuple=True)                                 # of tokens y_t: the place that predicts
    index = row, t, row * T + t, token_at.flatten(), y_row, before, token_at[y_row, before]
    row, t, place_of, token_at, y_row, before, predicts = (dpo.send(i, ids.device) for i in index)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=pi.bf16):
        x = pi.wte(ids[row, t]) + pi.wpe(t)                                                 # (n, C)
        for block in pi.h:
            x = x + attention(block.attn, block.ln_1(x), (len(ids), T), token_at, place_of)
            x = x + block.mlp(block.ln_2(x))
        h, W = pi.ln_f(x.index_select(0, predicts)), pi.wte.weight
        if pi.bf16:
            h, W = h.bfloat16(), W.bfloat16()
        logps = LogProbs.apply(h, W, ids[y_row, before + 1], torch.is_grad_enabled())
    return logps.new_zeros(mask.shape).index_put((y_row, before + 1), logps)


class Stages(files.Stages):
    """train.Stages, for which this file is a part of dpo.py: in a folder of train.py's, pi_ref and its completions are taken,
    scores and policies are made anew."""

    def value(self, need: str) -> object:
        value = super().value(need)
        return value + Path(__file__).read_text(encoding="utf-8") if need == "dpo.py" else value


@contextlib.contextmanager
def fast() -> Iterator[None]:
    """Within, response_logps is this file's, and so are training by DPO and the scoring of texts."""
    with replaced(dpo, response_logps=response_logps), replaced(train, Stages=Stages):
        yield


def main(argv: list[str]) -> int:
    with fast():
        return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
