"""PPO for preferences (Ziegler et al. 2019, 1909.08593; Ouyang et al. 2022, 2203.02155): what DPO does without.

    a reward model      r_phi = argmin -E log s(r_phi(x, y_w) - r_phi(x, y_l))                                      (Eq. 2)
    and the objective   E r(x, y) - beta KL(pi_theta, pi_ref),   r = r_phi, or the true reward: "PPO-GT"            (Eq. 3)

climbed by policy gradients: draw y ~ pi_old; pay each token t  r_t = -beta log pi_old(y_t|.) / pi_ref(y_t|.),  and the last
one r(x, y) more; estimate by how much the token was better than expected, A_t (GAE, Schulman et al. 2016); then raise
min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t),  rho_t = pi_theta(y_t|.) / pi_old(y_t|.)  (Schulman et al. 2017).

Departures, from Ziegler et al. (Z) and from Ouyang et al. (O):
  - The policy's loss is a sum over a response's tokens and a mean over responses (Z, O: a mean over tokens), and advantages are
    not whitened (Z: they are): so at pi_old its gradient is an unbiased estimate of Eq. 3's.
  - The critic is a model of its own, from the reward model's weights, as O's; where the reward is given, from pi_ref's (Z: a
    second head on the policy). Its loss is not clipped (Z, O: it is).
  - beta starts where the tilt of a normal reward has the target KL, 1 / sqrt(2 KL), and is held for a quarter of the iterations, since
    the KL of a policy on its way says little about beta; then it is adapted as in Z, three times as fast. (O: fixed.)
  - The reward is made mean 0 and deviation 1 over pi_ref's completions (Z: the same, of the reward model; O: mean 0).
  - A response ends with the end token or where the context is full, and is judged as it is. (Z: a fixed length, and a penalty where
    no sentence ends.) Sampling is at temperature 1 (Z: lower), gamma is 1.
  - No mixing with the fine-tuning loss (O: "PPO-ptx"), no dropout, gradients clipped at norm 1.
"""
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpo
import train
from dpo import Preferences
from model import GPT, sample

Ids = list[int]
Reward = Callable[[list[Ids], list[Ids]], Tensor]       # prompts and responses -> (B,) nats


class Scalar(GPT):
    """A GPT that says one number at each token in the place of logits: ids (B, T) -> (B, T). It starts as 0."""

    def __init__(self, pi: GPT):
        super().__init__(pi.config)
        self.head = nn.Linear(pi.config.n_embd, 1)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)
        self.to(pi.wte.weight).bf16 = pi.bf16
        self.load_state_dict(pi.state_dict(), strict=False)         # whose head, if it has one, is taken over

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids).to(self.head.weight.dtype)).squeeze(-1)


# ----------------------------------------------------------------------------- the reward model

def last(values: Tensor, mask: Tensor) -> Tensor:
    """The value at each response's last token: (..., T) -> (...)."""
    end = (mask * torch.arange(mask.size(-1), device=mask.device)).argmax(-1)
    return values.gather(-1, end[..., None]).squeeze(-1)


def reward_loss(r_phi: Scalar, batch: Preferences) -> tuple[Tensor, Tensor]:
    """Eq. 2 for each pair, and whether r_phi orders it as labelled, a tie counting one half: (n,) each."""
    batch = batch.to(r_phi.wte.weight.device)
    real = batch.mask.any(-1)
    r = last(r_phi(batch.ids[real]), batch.mask[real])
    r = r.new_zeros(real.shape).masked_scatter(real, r)             # (P, K)
    x, w, l = batch.pairs.T
    margin = r[x, w] - r[x, l]
    return -F.logsigmoid(margin), (margin.sign() + 1) / 2


def accuracy(r_phi: Scalar, preferences: Preferences) -> float:
    """The share of pairs, by weight, that r_phi orders as labelled."""
    right = 0.0
    with torch.no_grad():
        for prompts in torch.arange(len(preferences.ids)).split(64):
            batch = preferences[prompts]
            right += (batch.weight * reward_loss(r_phi, batch)[1].cpu()).sum().item()
    return right / preferences.weight.sum().item()


def fit_reward(pi_ref: GPT, preferences: Preferences, rates: tuple[float, ...], size: int, seed: int
               ) -> tuple[Scalar, list[dict]]:
    """r_phi from pi_ref's weights: one pass over the prompts at each rate, `size` of them a step, AdamW. The one of the best
    accuracy on a tenth of the prompts, which is not trained on, looked at after each quarter of a pass, and all that was
    looked at."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(preferences.ids)))
    kept, others = preferences[order[:max(1, len(order) // 10)]], order[len(order) // 10:]
    best, looked = None, []
    for rate in rates:
        r_phi, batches = Scalar(pi_ref).requires_grad_(True), others.split(size)
        optimizer = torch.optim.AdamW(r_phi.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, train.warm_then_linear(len(batches)))
        for step, prompts in enumerate(train.tqdm(batches, desc=f"the reward model at rate {rate:g}"), 1):
            batch = preferences[prompts]
            losses, _ = reward_loss(r_phi, batch)
            optimizer.zero_grad()
            (batch.weight.to(losses) / batch.weight.sum() * losses).sum().backward()
            nn.utils.clip_grad_norm_(r_phi.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step in {len(batches) * k // 4 for k in (1, 2, 3, 4)}:
                looked.append(dict(rate=rate, step=step, accuracy=accuracy(r_phi, kept)))
                if best is None or looked[-1]["accuracy"] > best[0]:
                    best = looked[-1]["accuracy"], copy.deepcopy(r_phi)
    return best[1].requires_grad_(False), looked


def reward_of(r_phi: Scalar) -> Reward:
    """r_phi as PPO asks it."""
    @torch.no_grad()
    def reward(prompts: list[Ids], responses: list[Ids]) -> Tensor:
        ids, mask = train.joined(prompts, responses, r_phi.wte.weight.device)
        return last(r_phi(ids), mask)
    return reward


# ----------------------------------------------------------------------------- the estimates that PPO is made of

def token_rewards(r: Tensor, log_ratio: Tensor, mask: Tensor, beta: float) -> Tensor:
    """-beta log pi_old(y_t|.) / pi_ref(y_t|.) at each token of the response, and r (B,) at its last, 0 elsewhere: their sum over
    (B, T) is r - beta log pi_old(y|x) / pi_ref(y|x), whose mean is Eq. 3."""
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return torch.where(is_last, r[:, None], 0.0) - beta * log_ratio.masked_fill(~mask, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> Tensor:
    """A_t = sum_{k >= 0} lam^k delta_{t+k},  delta_t = r_t + V_{t+1} - V_t:  (B, T), 0 outside the mask, as r and V are. At lam = 1
    it is what is still to come, less V_t: unbiased whatever V is. Less of lam is steadier, and biased where V is wrong."""
    delta = rewards + F.pad(values[:, 1:], (0, 1)) - values
    ahead = torch.arange(mask.size(1), device=mask.device)
    ahead = ahead[:, None] - ahead                                                      # k = (t + k) - t
    powers = torch.where(ahead >= 0, lam ** ahead.clamp(min=0).to(delta.dtype), 0.0)    # (T, T)
    return (delta @ powers).masked_fill(~mask, 0.0)


def surrogate(pi_theta: Tensor, pi_old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """sum_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t) of each response, to be raised: token log-probabilities (B, T) ->
    (B,). Where pi_theta = pi_old its gradient is sum_t A_t grad log pi_theta(y_t|.), the policy gradient."""
    rho = (pi_theta - pi_old).exp()
    return torch.minimum(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages).sum(-1)


def values_of(critic: Scalar, ids: Tensor, mask: Tensor) -> Tensor:
    """V_t = V(x, y_<t), what is expected before token t is drawn: (B, T), 0 outside the mask."""
    return F.pad(critic(ids[:, :-1]), (1, 0)).masked_fill(~mask, 0.0)


@torch.no_grad()
def judged(pi_old: GPT, pi_ref: GPT, critic: Scalar, ids: Tensor, mask: Tensor, r: Tensor, beta: float, lam: float
           ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What PPO wants to know of responses that pi_old drew and the reward judged, r (B,): token log-probabilities under pi_old,
    advantages and returns, (B, T) each, and log pi_old(y|x) / pi_ref(y|x), (B,)."""
    old, ref = (dpo.response_logps(pi, ids, mask) for pi in (pi_old, pi_ref))
    values = values_of(critic, ids, mask)
    advantages = gae(token_rewards(r.to(old), old - ref, mask, beta), values, mask, lam)
    return old, advantages, values + advantages, (old - ref).sum(-1)


# ----------------------------------------------------------------------------- the algorithm

@dataclass(frozen=True)
class Tuning:
    """PPO's dials; the toy world's; how they were chosen is told in README.md."""
    iterations: int = 60            # of sampling, each followed by `epochs` passes over what was drawn
    batch: int = 256                # responses an iteration, one for each prompt
    minibatches: int = 2            # steps in a pass
    epochs: int = 2
    rate: float = 1e-3              # AdamW's peak, of the policy
    critic_rate: float = 1e-3
    lam: float = 0.95
    clip: float = 0.2
    gain: float = 0.3               # of the controller: beta changes by at most a fifth of it in an iteration


def ppo(pi_ref: GPT, critic: Scalar, prompts: list[Ids], reward: Reward, end: int, target_kl: float, tuning: Tuning,
        seed: int, beta: float | None = None) -> Iterator[tuple[GPT, dict[str, float]]]:
    """pi_theta, from pi_ref, after each iteration, and what was seen in it: the mean reward and KL (log-ratio, nats per response) of
    its samples, beta, and the share of tokens whose ratio was clipped. `reward` should have mean 0 and deviation 1 under
    pi_ref. The target is a KL, for which beta is adapted; or beta is given, and kept."""
    device, controlled = pi_ref.wte.weight.device, beta is None
    beta = (2 * target_kl) ** -0.5 if controlled else beta
    pi_theta, critic = (copy.deepcopy(model).requires_grad_(True) for model in (pi_ref, critic))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
                  for model, rate in ((pi_theta, tuning.rate), (critic, tuning.critic_rate))]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, train.warm_then_linear(tuning.iterations)) for o in optimizers]
    rng, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
    for iteration in range(tuning.iterations):
        xs = [prompts[i] for i in (rng.sample(range(len(prompts)), tuning.batch) if tuning.batch <= len(prompts)
                                   else rng.choices(range(len(prompts)), k=tuning.batch))]
        ys = sample(pi_theta, xs, end, generator=generator)
        ids, mask = train.joined(xs, ys, device)
        r = reward(xs, ys)
        old, advantages, returns, log_ratio = judged(pi_theta, pi_ref, critic, ids, mask, r, beta, tuning.lam)
        clipped = []
        for rows in (rows for _ in range(tuning.epochs)
                     for rows in torch.randperm(len(xs), generator=generator, device=device).chunk(tuning.minibatches)):
            logps = dpo.response_logps(pi_theta, ids[rows], mask[rows])
            policy_loss = -surrogate(logps, old[rows], advantages[rows], tuning.clip).mean()
            value_loss = (values_of(critic, ids[rows], mask[rows]) - returns[rows]).square()[mask[rows]].mean() / 2
            for optimizer, loss, model in zip(optimizers, (policy_loss, value_loss), (pi_theta, critic)):
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            ratio = (logps - old[rows]).detach()[mask[rows]].exp()
            clipped.append(((ratio - 1).abs() > tuning.clip).float().mean())
        for schedule in schedules:
            schedule.step()
        kl = log_ratio.mean().item()
        yield pi_theta, dict(reward=r.mean().item(), kl=kl, beta=beta, clipped=torch.stack(clipped).mean().item())
        if controlled and iteration >= tuning.iterations // 4:
            beta *= 1 + tuning.gain * min(max(kl / target_kl - 1, -0.2), 0.2)
