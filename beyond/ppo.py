"""PPO from preferences (Ziegler et al. 1909.08593; Ouyang et al. 2203.02155): what DPO replaces.

    reward model    r_phi = argmin -E log sigma( r_phi(x, y_w) - r_phi(x, y_l) )             (Eq. 2)
    objective       max E r(x, y) - beta KL(pi_theta, pi_ref)                                (Eq. 3)

where r is r_phi, or the true reward ("PPO-GT"). Each iteration:

    1. Sample y ~ pi_old for a batch of prompts.
    2. Reward each token: r_t = -beta log( pi_old(y_t|.) / pi_ref(y_t|.) ); the last adds r(x, y).
    3. Estimate the advantages A_t from r_t and a value model V (GAE, Schulman et al. 1506.02438).
    4. Take some steps that increase min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t ),
       rho_t = pi_theta(y_t|.) / pi_old(y_t|.), and fit V (PPO, Schulman et al. 1707.06347).

Departures from Ziegler et al. (Z) and Ouyang et al. (O):

- The policy's loss is a sum over the tokens of a response and a mean over responses (Z, O: a mean
  over tokens). Advantages are whitened only if `PPOConfig.whiten` is set (Z: always). Without it,
  and with lambda = 1, the gradient at pi_old is an unbiased estimate of the gradient of Eq. 3.
- The value model is a separate network, initialised from the reward model (as in O) or from pi_ref
  (Z: a second head on the policy). Its loss is not clipped (Z, O: it is).
- beta is fixed (as in O), or adapted to a target KL as in Z, but three times as fast.
- Rewards should have mean 0 and standard deviation 1 under pi_ref (as in Z; O: mean 0). The caller
  scales them.
- A response ends with the end token or at the end of the context (Z: a fixed length, and a penalty
  if no sentence ends). Sampling is at temperature 1 (Z: lower), and gamma is 1.
- No pre-training loss (O: "PPO-ptx"), no dropout. Gradients are clipped to norm 1. The logit bias
  of `model.GPT` is not trained.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dpo
from beyond.pairs import Ids, Reward
from dpo import Preferences
from lib.inference import fast_response_logps
from lib.optim import freeze, linear_warmup_decay
from model import GPT, sample

# ------------------------------------------------- models with a scalar output


class ValueModel(nn.Module):
    """A GPT with one number per position: ids (B, T) -> (B, T). The output starts at 0."""

    def __init__(self, pi: GPT):
        super().__init__()
        self.gpt = copy.deepcopy(pi)
        self.value = nn.Linear(pi.config.n_embd, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        self.value.to(pi.wte.weight)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.gpt.hidden(ids)  # (B, T, C)
        return self.value(h.to(self.value.weight.dtype)).squeeze(-1)


def at_last_token(values: Tensor, mask: Tensor) -> Tensor:
    """The value (B,) at the last token of each response, from (B, T)."""
    positions = torch.arange(mask.size(1), device=mask.device)
    last = (mask * positions).argmax(1, keepdim=True)
    return values.gather(1, last).squeeze(1)


def token_values(critic: ValueModel, ids: Tensor, mask: Tensor) -> Tensor:
    """V_t = V(x, y_<t), the value before token t is sampled: (B, T), 0 outside the mask."""
    return F.pad(critic(ids[:, :-1]), (1, 0)).masked_fill(~mask, 0.0)


# ------------------------------------------------- the reward model


def reward_loss(r_phi: ValueModel, batch: Preferences) -> tuple[Tensor, Tensor]:
    """Eq. 2 for each pair, and whether r_phi orders it as labelled (a tie is 1/2), (n,) each."""
    r = at_last_token(r_phi(batch.ids), batch.mask)  # (R,)
    r_w, r_l = r[batch.pairs].T
    margin = r_w - r_l
    return -F.logsigmoid(margin), (margin.sign() + 1) / 2


@torch.no_grad()
def pair_accuracy(r_phi: ValueModel, preferences: Preferences, batch_size: int = 64) -> float:
    """The share of pairs, by weight, that r_phi orders as labelled."""
    total = 0.0
    for prompts in preferences.prompt.unique().split(batch_size):
        batch = preferences.select(prompts).to(r_phi.gpt.device)
        _, correct = reward_loss(r_phi, batch)
        total += (batch.weight * correct).sum().item()
    return total / preferences.weight.sum().item()


def fit_reward(
    pi_ref: GPT,
    preferences: Preferences,
    lrs: tuple[float, ...],
    batch_size: int,
    seed: int,
    epochs: int = 1,
) -> tuple[ValueModel, list[dict]]:
    """Fit r_phi by Eq. 2 from pi_ref's weights, once per learning rate, with AdamW.

    A tenth of the prompts are held out. Each run is evaluated on them after every quarter of an
    epoch. batch_size counts prompts. Returns the r_phi with the best held-out accuracy, and all
    evaluations.
    """
    prompts = preferences.prompt.unique()
    generator = torch.Generator().manual_seed(seed)
    prompts = prompts[torch.randperm(len(prompts), generator=generator)]
    held_out = max(1, len(prompts) // 10)
    validation = preferences.select(prompts[:held_out])
    train = prompts[held_out:]

    evaluations, best = [], None
    for lr in lrs:
        for step, r_phi in reward_steps(pi_ref, preferences, train, lr, batch_size, epochs, seed):
            accuracy = pair_accuracy(r_phi, validation)
            if best is None or accuracy > max(e["accuracy"] for e in evaluations):
                best = copy.deepcopy(r_phi)
            evaluations.append({"lr": lr, "step": step, "accuracy": accuracy})
    return best.requires_grad_(False), evaluations


def reward_steps(
    pi_ref: GPT,
    preferences: Preferences,
    prompts: Tensor,
    lr: float,
    batch_size: int,
    epochs: int,
    seed: int,
) -> Iterator[tuple[int, ValueModel]]:
    """Train r_phi, and yield it with its step after every quarter of an epoch."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(prompts), generator=generator) for _ in range(epochs)]
    batches = [batch for order in orders for batch in prompts[order].split(batch_size)]
    evaluated = {len(batches) * k // (4 * epochs) for k in range(1, 4 * epochs + 1)}

    r_phi = ValueModel(pi_ref).requires_grad_(True)
    optimizer = torch.optim.AdamW(r_phi.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_warmup_decay(len(batches)))
    bar = tqdm(batches, desc=f"reward model, lr {lr:g}", disable=None)
    for step, batch_prompts in enumerate(bar, 1):
        batch = preferences.select(batch_prompts).to(pi_ref.device)
        losses, _ = reward_loss(r_phi, batch)
        optimizer_step(optimizer, r_phi, (dpo.mean_weights(batch.weight) * losses).sum())
        schedule.step()
        if step in evaluated:
            yield step, r_phi


def reward_of(r_phi: ValueModel) -> Reward:
    """r_phi as a reward function of ids and mask (B, T)."""

    @torch.no_grad()
    def reward(ids: Tensor, mask: Tensor) -> Tensor:
        ids, mask = ids.to(r_phi.gpt.device), mask.to(r_phi.gpt.device)
        return at_last_token(r_phi(ids), mask)

    return reward


# ------------------------------------------------- the estimates


def token_rewards(r: Tensor, log_ratio: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t = -beta log( pi_old(y_t|.) / pi_ref(y_t|.) ), plus r at the last token.

    r: (B,). log_ratio, mask: (B, T). Returns (B, T), 0 outside the mask. The sum over T is r - beta
    log( pi_old(y|x) / pi_ref(y|x) ), and its mean over samples estimates Eq. 3.
    """
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return torch.where(is_last, r[:, None], 0.0) - beta * log_ratio.masked_fill(~mask, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> Tensor:
    """A_t = sum_{k >= 0} lam^k delta_{t+k},  delta_t = r_t + V_{t+1} - V_t.  1506.02438, gamma = 1.

    All (B, T), and 0 outside the mask. At lam = 1, A_t is the sum of the rewards from t on minus
    V_t, which is unbiased for every V. A smaller lam reduces the variance, and adds a bias where V
    is wrong.
    """
    delta = rewards + F.pad(values[:, 1:], (0, 1)) - values
    advantages = torch.zeros_like(delta)
    A = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.size(1))):
        A = delta[:, t] + lam * A
        advantages[:, t] = A
    return advantages.masked_fill(~mask, 0.0)


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale the advantages of all tokens under the mask to mean 0 and variance 1."""
    A = advantages[mask]
    scaled = (advantages - A.mean()) / (A.std(correction=0) + 1e-8)
    return scaled.masked_fill(~mask, 0.0)


def surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """sum_t min( rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t ), (B,), to be maximised.

    logps, old_logps, advantages: (B, T). Where pi_theta = pi_old the gradient is the policy
    gradient, sum_t A_t grad log pi_theta(y_t|.).
    """
    rho = (logps - old_logps).exp()
    clipped = rho.clamp(1 - clip, 1 + clip)
    return torch.minimum(rho * advantages, clipped * advantages).sum(-1)


# ------------------------------------------------- the algorithm


@dataclass(frozen=True)
class PPOConfig:
    """beyond/figure2.py sets its own values."""

    iterations: int = 60  # each samples one batch of responses
    batch_size: int = 256  # responses per iteration, one per prompt
    epochs: int = 2  # over each batch of responses
    minibatches: int = 2  # optimizer steps per epoch
    lr: float = 1e-3  # peak, of the policy
    critic_lr: float = 1e-3  # peak, of the value model
    critic_warmup: int = 0  # first iterations, in which only the value model learns
    lam: float = 0.95  # GAE's lambda
    clip: float = 0.2
    whiten: bool = False  # the advantages
    beta: float = 0.5  # initial value; stays fixed without a target KL
    target_kl: float | None = None  # adapt beta to this KL(pi_theta, pi_ref), in nats per response
    frozen: int = 0  # N > 0: the embeddings and first N blocks of both models are not trained
    gain: float = 0.3  # of the controller: beta changes by at most 20% times this per iteration


def initial_beta(target_kl: float) -> float:
    """1 / sqrt(2 KL): the beta at which Eq. 4 has this KL, for a normal reward of variance 1."""
    return 1 / math.sqrt(2 * target_kl)


def adapted_beta(beta: float, kl: float, config: PPOConfig) -> float:
    """The proportional controller of Ziegler et al.: raise beta if the KL exceeds its target.

    It starts after a quarter of the iterations. Before that the KL says little about beta, because
    the policy is still far from its optimum.
    """
    error = min(max(kl / config.target_kl - 1, -0.2), 0.2)
    return beta * (1 + config.gain * error)


@dataclass(frozen=True)
class Rollout:
    """Responses sampled from pi_old, and what an update needs to know about them."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    logps: Tensor  # (B, T) log pi_old
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T) advantages + V, the target of the value model
    r: Tensor  # (B,)
    log_ratio: Tensor  # (B,) log pi_old(y|x) / pi_ref(y|x), an unbiased estimate of the KL


@torch.no_grad()
def rollout(
    pi_theta: GPT,
    pi_ref: GPT,
    critic: ValueModel,
    prompts: list[Ids],
    reward: Reward,
    end: int,
    beta: float,
    config: PPOConfig,
    generator: torch.Generator,
) -> Rollout:
    """Sample one response to each prompt, and estimate its rewards and advantages."""
    ids, mask, logps = sample(pi_theta, prompts, end, generator=generator)
    T = int(mask.any(0).nonzero().max()) + 1
    ids, mask, logps = (rows[:, :T].to(pi_theta.device) for rows in (ids, mask, logps))
    r = reward(ids, mask).to(logps)
    ref_logps = in_chunks(partial(fast_response_logps, pi_ref), ids, mask).to(logps)
    values = in_chunks(partial(token_values, critic), ids, mask).to(logps)
    log_ratio = logps - ref_logps
    advantages = gae(token_rewards(r, log_ratio, mask, beta), values, mask, config.lam)
    returns = values + advantages
    if config.whiten:
        advantages = whiten(advantages, mask)
    return Rollout(ids, mask, logps, advantages, returns, r, log_ratio.sum(-1))


def in_chunks(f: Callable[..., Tensor], *tensors: Tensor, size: int = 256) -> Tensor:
    """f on `size` rows at a time: the logits (B, T, V) of a large batch would not fit in memory."""
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([f(*chunk) for chunk in chunks])


def ppo(
    pi_ref: GPT,
    critic: ValueModel,
    prompts: list[Ids],
    reward: Reward,
    end: int,
    config: PPOConfig,
    seed: int,
) -> Iterator[tuple[GPT, dict[str, float]]]:
    """Train a copy of pi_ref, and yield it with its metrics after each iteration.

    critic: copied; for instance `ValueModel(pi_ref)`, or r_phi. reward: see `Reward`.

    Metrics, over the responses that the iteration sampled before its steps: reward; kl, the mean
    log-ratio, in nats per response; length, in tokens; beta; value_loss; and clip_fraction, the
    share of tokens whose ratio was clipped.
    """
    pi_theta, critic = (copy.deepcopy(m).requires_grad_(True) for m in (pi_ref, critic))
    if pi_theta.bias is not None:
        pi_theta.bias.requires_grad_(False)  # its scale suits SGD; Adam's steps would be too long
    for gpt in (pi_theta, critic.gpt):
        freeze(gpt, config.frozen)
    optimizers = adamw(pi_theta, config.lr), adamw(critic, config.critic_lr)
    multiplier = linear_warmup_decay(config.iterations)
    rng = random.Random(seed)
    generator = torch.Generator(pi_ref.device).manual_seed(seed)
    beta = config.beta
    for i in range(config.iterations):
        batch = draw(prompts, config.batch_size, rng)
        sampled = rollout(pi_theta, pi_ref, critic, batch, reward, end, beta, config, generator)
        for optimizer, lr in zip(optimizers, (config.lr, config.critic_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * multiplier(i)
        learn_policy = i >= config.critic_warmup
        metrics = update(pi_theta, critic, optimizers, sampled, config, learn_policy, generator)
        kl = sampled.log_ratio.mean().item()
        r, length = sampled.r.mean().item(), sampled.mask.sum(1).double().mean().item()
        yield pi_theta, metrics | {"reward": r, "kl": kl, "length": length, "beta": beta}
        if config.target_kl is not None and i >= config.iterations // 4:
            beta = adapted_beta(beta, kl, config)


def update(
    pi_theta: GPT,
    critic: ValueModel,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    sampled: Rollout,
    config: PPOConfig,
    learn_policy: bool,
    generator: torch.Generator,
) -> dict[str, float]:
    """Train both models on one rollout. Returns the means of value_loss and clip_fraction."""
    policy_optimizer, critic_optimizer = optimizers
    value_losses, clip_fractions = [], []
    B, device = len(sampled.ids), sampled.ids.device
    for _ in range(config.epochs):
        order = torch.randperm(B, generator=generator, device=device)
        for rows in order.chunk(config.minibatches):
            ids, mask = sampled.ids[rows], sampled.mask[rows]
            errors = token_values(critic, ids, mask) - sampled.returns[rows]
            value_loss = errors[mask].square().mean() / 2
            optimizer_step(critic_optimizer, critic, value_loss)
            value_losses.append(value_loss.detach())
            if not learn_policy:  # the first iterations only warm up the critic
                continue
            logps = fast_response_logps(pi_theta, ids, mask)  # dpo.response_logps, but faster
            old_logps, advantages = sampled.logps[rows], sampled.advantages[rows]
            gain = surrogate(logps, old_logps, advantages, config.clip).mean()
            optimizer_step(policy_optimizer, pi_theta, -gain)
            rho = (logps.detach() - old_logps)[mask].exp()
            clip_fractions.append(((rho - 1).abs() > config.clip).float().mean())
    return {
        "value_loss": torch.stack(value_losses).mean().item(),
        "clip_fraction": torch.stack(clip_fractions).mean().item() if clip_fractions else 0.0,
    }


def optimizer_step(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor):
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def draw(prompts: list[Ids], n: int, rng: random.Random) -> list[Ids]:
    """n prompts without replacement, or with it if there are fewer."""
    return rng.sample(prompts, n) if n <= len(prompts) else rng.choices(prompts, k=n)
