"""What each method was invented to mend, shown: six small studies of a failure, and of those who claim to mend it.

    python -m beyond.mend [--studies noise certainty ...] [--seed N] [--out DIR]

    noise           a fifth of the labels is turned round           DPO, cDPO, robust DPO, IPO
    certainty       the better response always wins                 DPO, IPO
    verbosity       labels that like length                         DPO, R-DPO, SimPO, LD-DPO
    displacement    log pi(y_w) falls, while the margin grows       DPO, DPO-Positive
    time            many passes over few prompts                    DPO offline, DPO online
    coverage        responses that no pair connects                 DPO, exactly, on four responses

World, pi_ref, rates and evaluation are compare.py's; in one folder with it, what both need is made once.
"""
import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import dpo
import train
from beyond import compare, losses, pairs
from beyond.compare import METHODS, draw_optimum
from dpo import Preferences
from kit import files, report, terminal
from model import GPT
from train import Experiment, Settings

C = 0.3                                 # nats that the labels of `verbosity` pay for a token
REWARDS = -1.0, -3.0, 3.0, 3.0          # of the four responses of `coverage`


# ----------------------------------------------------------------------------- labels of other kinds, and training

def labelled(preferences: Preferences, p: Tensor, seed: int) -> Preferences:
    """The same pairs, each kept in its order with probability p (n,), and turned round otherwise."""
    turn = torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.device) >= p
    x, w, l = preferences.pairs.T
    return dataclasses.replace(preferences, pairs=torch.stack((x, torch.where(turn, l, w), torch.where(turn, w, l)), 1))


def gap(values: Tensor, preferences: Preferences) -> Tensor:
    """values (P, K) of y_w less those of y_l, (n,)."""
    of_w, of_l = losses.of_pairs(values, preferences)
    return of_w - of_l


def few(e: Experiment) -> Preferences:
    """The preferences of a tenth of the prompts, to be passed over again and again."""
    return e.preferences[torch.arange(len(e.preferences.ids) // 10, device=e.preferences.ids.device)]


def certain(e: Experiment, preferences: Preferences) -> Preferences:
    """The better response always wins, the paper's labels; ties are left out."""
    r = gap(compare.rewards(e, preferences), preferences)
    untied = dataclasses.replace(preferences, pairs=preferences.pairs[r != 0], weight=preferences.weight[r != 0])
    return labelled(untied, (r[r != 0] > 0).float(), e.settings.seed)


def method(e: Experiment, name: str, strength: int, **hyper: float) -> tuple[dpo.Loss, float]:
    """A loss and its rate, those of compare.py but for the hyperparameters given."""
    m = METHODS[name]
    return partial(losses.LOSSES[name], **m.strengths()[strength] | hyper), m.rates[strength] * e.settings.rate


def landed(e: Experiment, pi_theta: GPT, label: str) -> dict[str, float]:
    seen = train.evaluate(e, pi_theta, 1.0, label)["point"]
    return {name: seen[name] for name in ("reward", "reward_se", "kl", "kl_se", "length", "fraction_of_optimal")}


def trained(e: Experiment, preferences: Preferences, label: str, loss: dpo.Loss, rate: float) -> dict[str, float]:
    return landed(e, train.optimise(e.pi_ref, preferences, loss, rate, e.settings, label)[0], label)


def passes(e: Experiment, preferences: Preferences, label: str, loss: dpo.Loss, rate: float, n: int = 8) -> Iterator[GPT]:
    """pi_theta after each of n passes over the same prompts; each pass has the schedule of train.py's one."""
    pi_theta = e.pi_ref
    for k in range(1, n + 1):
        pi_theta, _ = train.optimise(pi_theta, preferences, loss, rate, e.settings, f"{label}, pass {k}")
        yield pi_theta


def walk(e: Experiment, preferences: Preferences, label: str, loss: dpo.Loss, rate: float) -> dict:
    """Where eight passes lead, and after each the mean over the trained pairs of A and of B, log pi_theta / pi_ref."""
    A, B = [0.0], [0.0]
    for pi_theta in passes(e, preferences, label, loss, rate):
        theta = train.score(pi_theta, preferences.ids, preferences.mask).to(preferences.pi_ref)
        for means, values in zip((A, B), losses.log_ratios(theta, preferences)):
            means.append(values.mean().item())
    return landed(e, pi_theta, label) | dict(A=A, B=B)


# ----------------------------------------------------------------------------- the studies

def noise(e: Experiment) -> dict:
    """Each label turned round with probability 0.2; beta 0.5."""
    noisy = labelled(e.preferences, torch.full_like(e.preferences.weight, 0.8), e.settings.seed)
    hyper = {"dpo": {}, "cdpo": dict(epsilon=0.2), "robust": dict(epsilon=0.2), "ipo": {}}
    return {"dpo, clean labels": trained(e, e.preferences, "dpo, clean labels", *method(e, "dpo", 1))} | {
        name: trained(e, noisy, f"{name}, noisy labels", *method(e, name, 1, **more)) for name, more in hyper.items()}


def certainty(e: Experiment) -> dict:
    """The better response always wins; beta 1, and tau 0.25."""
    pairs_ = certain(e, few(e))
    return {name: walk(e, pairs_, f"{name}, certain labels", *method(e, name, 0)) for name in ("dpo", "ipo")}


def verbosity(e: Experiment) -> dict:
    """Labels from Bradley-Terry under r* + C length; beta 1. Beside them the optima of r* and of what the labels say."""
    said = compare.rewards(e, e.preferences) + C * e.preferences.mask.sum(-1)
    verbose = labelled(e.preferences, torch.sigmoid(gap(said, e.preferences)), e.settings.seed)
    hyper = {"dpo": {}, "r_dpo": dict(alpha=C), "simpo": {}, "ld_dpo": {}}
    found = {name: trained(e, verbose, f"{name}, verbose labels", *method(e, name, 0, **more)) for name, more in hyper.items()}
    r, length = e.held["rewards"]["reward"].double(), e.held["lengths"].view_as(e.held["rewards"]["reward"])
    for name, liked in (("optimum of r*", r), ("optimum of the labels", r + C * length), ("pi_ref", 0 * r)):
        share = liked.softmax(-1)                       # Eq. 4 over pi_ref's samples, beta 1
        found[name] = {key: (share * v).sum(-1).mean().item() for key, v in dict(reward=r, length=length).items()}
    return found


def displacement(e: Experiment) -> dict:
    """The same pairs as for certainty; the penalty for falling is DPO-Positive's, lambda 5."""
    pairs_ = certain(e, few(e))
    return {name: walk(e, pairs_, f"{name}, displacement", *method(e, name, 0, **more))
            for name, more in {"dpo": {}, "dpop": dict(lam=5.0)}.items()}


def over_time(e: Experiment) -> dict:
    """After 1, 2, 4 and 8 passes, beta 0.5: over the same pairs of a tenth of the prompts, or over pairs of these prompts
    that pi_theta completes anew for each pass."""
    loss, rate = method(e, "dpo", 1)
    runs = dict(offline=passes(e, few(e), "offline", loss, rate), online=compare.in_rounds(
        e, compare.online, [compare.prompts_in(few(e))] * 8, loss, rate, 0.5, "online"))
    return {name: [landed(e, pi_theta, f"{name}, pass {k}") | {"pass": k} for k, pi_theta in enumerate(run, 1)
                   if k in (1, 2, 4, 8)] for name, run in runs.items()}


def coverage(e: Experiment) -> dict:
    """Four responses, of which pairs compare the first two, and the last two: Eq. 7's expectation over Bradley-Terry labels
    at beta 1, descended from a uniform pi_ref to where its gradient vanishes."""
    r, pi_ref = torch.tensor(REWARDS).double(), torch.full((4,), 0.25).double().log()

    def descended(compared: list[tuple[int, int]]) -> Tensor:
        w, l = torch.tensor([both for i, j in compared for both in ((i, j), (j, i))]).T
        logits = torch.zeros(4, dtype=torch.double, requires_grad=True)
        for _ in range(3000):
            pi = logits.log_softmax(-1)
            loss = (dpo.bradley_terry(r[w], r[l]) * dpo.dpo_loss(pi[w], pi[l], pi_ref[w], pi_ref[l], 1.0)[0]).sum()
            slope, = torch.autograd.grad(loss, logits)
            logits = (logits - 1.5 * slope).detach().requires_grad_()
        return logits.log_softmax(-1).detach()
    policies = {"pi_ref": pi_ref, "two islands": descended([(0, 1), (2, 3)]),
                "one bridge": descended([(0, 1), (2, 3), (1, 2)]), "optimum": dpo.optimal_policy(pi_ref, r, 1.0)[0]}
    return {label: dict(p=pi.exp().tolist(), reward=(pi.exp() @ r).item()) for label, pi in policies.items()}


# ----------------------------------------------------------------------------- one small figure each

def colour(name: str) -> str:
    return report.THETA if name in ("dpo", "dpo, clean labels", "offline") else report.REF if name == "pi_ref" else "0.35"


def scatter(ax, found: dict, x: str, hollow: tuple[str, ...]):
    for (name, p), marker in zip(found.items(), "osv^*PD"):
        ax.plot(p[x], p["reward"], marker, color=colour(name), mfc="white" if name in hollow else None, ms=8, label=name)


def draw_noise(ax, e: Experiment, found: dict):
    draw_optimum(ax, e)
    scatter(ax, found, "kl", ("dpo, clean labels",))
    ax.set_title("a fifth of the labels turned round")


def draw_certainty(ax, e: Experiment, found: dict):
    tau = METHODS["ipo"].strengths()[0]["tau"]
    ax.axhline(1 / (2 * tau), color="0.6", ls=":", label=r"1/(2$\tau$)")
    for (name, p), marker in zip(found.items(), "os"):
        ax.plot([a - b for a, b in zip(p["A"], p["B"])], marker + "-", color=colour(name), label=name)
    ax.set(xlabel="pass", ylabel="h, mean over the pairs, nats", title="the better response always wins")


def draw_verbosity(ax, e: Experiment, found: dict):
    scatter(ax, found, "length", ("optimum of r*", "optimum of the labels"))
    ax.set(xlabel="mean length, tokens", ylabel="mean true reward, nats", title="labels that like length")


def draw_displacement(ax, e: Experiment, found: dict):
    ax.axhline(0, color="0.8", lw=0.8)
    for (name, p), marker in zip(found.items(), "os"):
        for key, style, y in (("A", "-", "y_w"), ("B", "--", "y_l")):
            ax.plot(p[key], marker + style, color=colour(name), ms=4, label=f"{name}, ${y}$")
    ax.set(xlabel="pass", ylabel=r"change of log $\pi$, mean over the pairs", title="what happens to either response")


def draw_over_time(ax, e: Experiment, found: dict):
    draw_optimum(ax, e, 0.5)
    for (name, points), marker in zip(found.items(), "os"):
        path = [(0.5 * p["kl"], p["reward"]) for p in points]
        ax.plot(*zip(*path), marker + "-", color=colour(name), ms=5, label=name)
        for p, place in zip(points, path):
            ax.annotate(p["pass"], place, xytext=(4, -10), textcoords="offset points", fontsize="x-small")
    ax.set(xlabel=r"implicit reward of its own samples, $\beta$ KL, nats", ylabel="their true reward, nats",
           title="1, 2, 4, 8 passes over few prompts")


def draw_coverage(ax, e: Experiment, found: dict):
    looks = ((report.REF, ""), (report.THETA, ""), (report.THETA, "//"), ("white", ""))
    for k, ((label, policy), (fill, hatch)) in enumerate(zip(found.items(), looks)):
        ax.bar([i + 0.2 * k for i in range(4)], policy["p"], 0.2, color=fill, hatch=hatch, edgecolor="0.2", lw=0.6,
               label=f"{label}: reward {policy['reward']:.2f}")
    ax.set_xticks([i + 0.3 for i in range(4)], [f"$y_{i + 1}$, r = {r:g}" for i, r in enumerate(REWARDS)], fontsize="small")
    ax.set(ylim=(0, 0.8), ylabel="probability", title="pairs ($y_1$, $y_2$) and ($y_3$, $y_4$)")


STUDIES = dict(noise=(noise, draw_noise), certainty=(certainty, draw_certainty), verbosity=(verbosity, draw_verbosity),
               displacement=(displacement, draw_displacement), time=(over_time, draw_over_time),
               coverage=(coverage, draw_coverage))


def run(settings: Settings, names: list[str], out: Path, device: torch.device) -> str:
    """`train.prepare`, then each study, a stage each; its figure, and the results of all."""
    e, found = train.prepare(settings, out, device), {}
    helpers = labelled, few, certain, method, landed, walk, passes, compare.rewards, compare.in_rounds, compare.online, losses, pairs
    e.stage.known["beyond"] = repr([inspect.getsource(of) for of in helpers] + [(m.hyper, m.rates) for m in METHODS.values()])
    for name in names:
        study, draw = STUDIES[name]
        e.stage.known["study"] = inspect.getsource(study)
        found[name] = e.stage(f"mend-{name}", f"study beyond scores held_out batch seed answers rate dpo.py {train.TRAINS} "
                              f"{train.JUDGES}", lambda: study(e))
        fig = report.new_figure(4.8, 3.6)
        ax = fig.add_subplot()
        draw(ax, e, found[name])
        ax.legend(frameon=False, fontsize="x-small")
        files.write(out / f"mend-{name}.png", report.png(fig))
    results = dict(config=compare.config(settings), device=str(device), bf16=e.pi_ref.bf16, seconds=e.stage.seconds, studies=found)
    files.write(out / "mend.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return "\n".join(f"{name}: mend-{name}.png" for name in found)


def main(argv: list[str]) -> int:
    parser = compare.parser_for("mend.py", __doc__)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=[*STUDIES], metavar="NAME",
                        help="of " + ", ".join(STUDIES) + " (all)")
    args = parser.parse_args(argv)
    settings = compare.settings_from(args, compare.SMALLER)
    return terminal.exit_code("mend.py", args.out, lambda: run(settings, args.studies, args.out, args.device))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
