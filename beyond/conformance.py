"""Check any DPO implementation against the theorems of the paper.

    python -m beyond.conformance my_dpo.py      a file NAME.py, or the name of an importable module

The file offers some of the functions in `OFFERS`. docs/conformance.md has a template. The theorems
are those of tests/theorems/, which our own test suite points at dpo.py. A theorem takes the offered
functions as arguments by name, so it applies to every implementation that offers them.

The exit code is 0 if no theorem fails, 1 if one fails, and 2 if the file cannot be used.
"""

import argparse
import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from lib.io import BadInput

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "theorems"))  # theorems import each other by name
FOUR = "logp_w, logp_l, ref_logp_w, ref_logp_l"
SINGLE_PRECISION = 2e-4  # tolerance for results in float32, whose inputs reach 600 nats

# What a file may offer: name, arguments and result. Where the result is (loss), it is optional.
OFFERS = {
    "response_logps": "(model, ids, mask) -> log pi(y|x), (B,), or one value per token, (B, T)",
    "logps_from_logits": "(logits, ids, mask) -> the same, for models called elsewhere",
    "sequence_kl": "(model, reference, ids, mask) -> (B,), or a tuple of estimates",
    "dpo_loss": f"({FOUR}, beta) -> losses (B,), or their mean, or (losses, r_hat_w, r_hat_l)",
    "metrics": f"({FOUR}, beta) -> dict with some of r_hat_w, r_hat_l, margin, accuracy, logp_w, "
    "logp_l",
    "training_step": "(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer) -> (loss)",
    "accumulated_step": "(model, reference, micro_batches, beta, optimizer) -> (loss)",
    "implicit_reward": "(logp, ref_logp, beta) -> r_hat",
    "optimal_policy": "(ref_logp, r, beta) -> log pi_r, or (log pi_r, log Z)",
    "frontier": "(r, beta) -> (E r, KL, effective sample size)",
    "bradley_terry": "(r_1, r_2) -> probability",
    "plackett_luce": "(r) -> log-probability of the ranking",
    "make_model": "(vocab_size, context) -> module: ids -> logits",
    "make_reference": "(model) -> frozen copy",
    "reference_logps": "(reference, ids, mask) -> log pi_ref(y|x), (B,) or (B, T)",
    "sample": "(model, prompts, end) -> (ids, mask), or a list of responses as lists of tokens",
    "collate": "(prompts, responses, pad, max_length) -> (ids, mask)",
    "tokenize": "(encode, prompt, response) -> (prompt_ids, response_ids)",
    "sft_loss": "(model, ids, mask) -> scalar",
    "cdpo_loss": f"({FOUR}, beta, epsilon) -> losses",
    "robust_loss": f"({FOUR}, beta, epsilon) -> losses",
    "ipo_loss": f"({FOUR}, tau) -> losses",
    "hinge_loss": f"({FOUR}, beta) -> losses",
    "sppo_loss": f"({FOUR}, beta) -> losses",
    "dpop_loss": f"({FOUR}, beta, lam) -> losses",
    "r_dpo_loss": f"({FOUR}, length_w, length_l, beta, alpha) -> losses",
    "simpo_loss": "(logp_w, logp_l, length_w, length_l, beta, gamma) -> losses",
    "orpo_loss": "(logp_w, logp_l, length_w, length_l) -> the odds-ratio losses",
    "kto_reference_point": "(logp, ref_logp, mismatched_logp, mismatched_ref_logp) -> scalar",
}
BASIC = ("response_logps", "dpo_loss")  # other functions are usually built on these
DERIVED = ("implicit_rewards", "log_partition")  # further outputs of dpo_loss and optimal_policy
THEOREMS = (  # modules in tests/theorems/, in the order of the report
    "test_logps",
    "test_loss",
    "test_population",
    "test_training",
    "test_handling",
    "test_model",
    "test_preferences",
    "test_optimum",
    "test_named_losses",
)


class Result(NamedTuple):
    theorem: Callable
    outcome: str  # "holds", "fails" or "not offered"
    error: Exception | None = None
    call: str = (
        ""  # the last call of the function: Hypothesis ends with the smallest counterexample
    )

    @property
    def name(self) -> str:
        return self.theorem.__name__

    @property
    def function(self) -> str:
        """The offered function that the theorem is about."""
        return next(iter(inspect.signature(self.theorem).parameters))


# ------------------------------------------------- what a file offers


def load(target: str) -> dict[str, Callable]:
    """The functions that a file or module offers, adapted. Raises BadInput."""
    path = Path(target)
    try:
        if path.suffix == ".py":
            module = import_file(path)
        else:
            module = importlib.import_module(target)
    except Exception as e:
        raise BadInput(f"{target}: cannot be imported ({type(e).__name__}: {e})") from e
    offered = adapt(module)
    if not offered:
        raise BadInput(f"{target}: offers none of {', '.join(OFFERS)}")
    return offered


def import_file(path: Path) -> ModuleType:
    """The file as a module of its own. Its folder is importable, as it is for `python path`.

    While it is imported, modules of ours are hidden if its folder has others of the same name.
    """
    folder = path.resolve().parent
    sys.path.insert(0, str(folder))
    theirs = {found.stem for found in folder.iterdir()}
    names = [name for name in sys.modules if name.partition(".")[0] in theirs]
    hidden = {name: sys.modules.pop(name) for name in names if is_ours(name, folder)}
    spec = importlib.util.spec_from_file_location(f"offered_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.update(hidden)
    return module


def is_ours(name: str, folder: Path) -> bool:
    """Whether an imported module is part of this project, but not of `folder`."""
    file = Path(getattr(sys.modules[name], "__file__", None) or "")
    return file.is_relative_to(ROOT) and not file.is_relative_to(folder)


def adapt(module) -> dict[str, Callable]:
    """The offered functions of a module, each in the one form that the theorems use."""
    offered = {}
    for name in OFFERS:
        function = getattr(module, name, None)
        if callable(function):
            offered[name] = follow_dtype(function)
    if "logps_from_logits" in offered:
        from_logits = offered.pop("logps_from_logits")
        offered.setdefault(
            "response_logps", lambda model, ids, mask: from_logits(model(ids), ids, mask)
        )
    for name in ("response_logps", "reference_logps"):
        if name in offered:
            offered[name] = one_per_response(offered[name])
    if "sequence_kl" in offered:
        offered["sequence_kl"] = as_tuple(offered["sequence_kl"])
    if "dpo_loss" in offered:
        plain = offered["dpo_loss"]
        offered["dpo_loss"] = one_per_pair(plain)
        offered |= further_outputs(plain, {"implicit_rewards": slice(1, 3)}, pair_of_zeros())
    if "optimal_policy" in offered:
        plain = offered["optimal_policy"]
        offered["optimal_policy"] = first_output(plain)
        zeros = torch.zeros(2, dtype=torch.float64)
        offered |= further_outputs(plain, {"log_partition": 1}, (zeros - 0.7, zeros, 1.0))
    for name in [name for name in offered if name.endswith("_loss") and name != "sft_loss"]:
        offered[name] = one_per_pair(offered[name])
    return offered


def pair_of_zeros() -> tuple:
    zero = torch.zeros(2, dtype=torch.float64)
    return zero, zero, zero, zero, 1.0


def follow_dtype(function: Callable) -> Callable:
    """A float32 result loosens the tolerance for the rest of the current theorem."""
    from worlds import tolerance_in_use

    def call(*args):
        result = function(*args)
        outputs = result if isinstance(result, tuple | list) else [result]
        outputs = list(result.values()) if isinstance(result, dict) else outputs
        dtypes = {x.dtype if isinstance(x, torch.Tensor) else type(x) for x in outputs}
        if dtypes & {torch.float32, torch.bfloat16, torch.float16, float}:
            tolerance_in_use.set(SINGLE_PRECISION)
        return result

    return call


def reset_tolerance():
    from worlds import tolerance_in_use

    tolerance_in_use.set(1e-9)


def one_per_response(function: Callable) -> Callable:
    """log pi(y|x), (B,), from a function that returns it or one value per token, (B, T)."""

    def call(*args):
        logps = function(*args)
        return logps.sum(-1) if logps.ndim == 2 else logps

    return call


def first_output(function: Callable) -> Callable:
    def call(*args):
        result = function(*args)
        return result[0] if isinstance(result, tuple | list) else result

    return call


def as_tuple(function: Callable) -> Callable:
    def call(*args):
        result = function(*args)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    return call


def one_per_pair(function: Callable) -> Callable:
    """Losses (B,), from a function that returns them, or their mean over a batch."""
    first = first_output(function)

    def call(*args):
        losses = first(*args)
        if losses.ndim > 0:
            return losses
        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.ndim > 0]
        pairs = range(len(tensors[0]))
        single = [[x[i : i + 1] if is_batch(x) else x for x in args] for i in pairs]
        return torch.stack([first(*each) for each in single])

    return call


def is_batch(x) -> bool:
    return isinstance(x, torch.Tensor) and x.ndim > 0


def further_outputs(function: Callable, where: dict, example: tuple) -> dict[str, Callable]:
    """The outputs after the first as functions of their own, where there are any."""
    try:
        has_more = isinstance(function(*example), tuple | list)
    except Exception:
        return {}  # the theorems about the function itself report the error
    if not has_more:
        return {}
    return {name: lambda *args, at=at: function(*args)[at] for name, at in where.items()}


# ------------------------------------------------- the theorems


def theorems() -> list[Callable]:
    """All theorems whose arguments are all in OFFERS or DERIVED, in the order of the report."""
    modules = [importlib.import_module(name) for name in THEOREMS]
    tests = [f for module in modules for key, f in vars(module).items() if key.startswith("test_")]
    return [test for test in tests if needs(test) and set(needs(test)) <= {*OFFERS, *DERIVED}]


def needs(theorem: Callable) -> list[str]:
    return list(inspect.signature(theorem).parameters)


def check(theorem: Callable, offered: dict[str, Callable]) -> Result:
    """Run one theorem on the offered functions."""
    if not set(needs(theorem)) <= set(offered):
        return Result(theorem, "not offered")
    reset_tolerance()
    calls = {}
    arguments = {name: recorded(name, offered[name], calls) for name in needs(theorem)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theorem(**arguments)
    except Exception as e:
        return Result(theorem, "fails", e, calls.get(needs(theorem)[0], ""))
    return Result(theorem, "holds")


def recorded(name: str, function: Callable, calls: dict[str, str]) -> Callable:
    """The function, which writes its last call into `calls`."""

    def call(*args):
        calls[name] = f"{name}({', '.join(map(shown, args))})"
        result = function(*args)
        calls[name] += f" returned {shown(result)}"
        return result

    return call


def shown(x) -> str:
    """A short form of an argument or result."""
    if isinstance(x, torch.Tensor):
        values = x.detach().double() if x.is_floating_point() else x.int()
        return str(rounded(values.tolist()))
    if isinstance(x, tuple | list):
        return f"({', '.join(map(shown, x))})"
    if isinstance(x, dict):
        return ", ".join(f"{key}={shown(value)}" for key, value in x.items())
    if isinstance(x, torch.nn.Module):
        kinds = {"Positional": "logits by position", "Bigram": "logits by the current token"}
        return f"<a model: {kinds.get(type(x).__name__, type(x).__name__)}>"
    simple = isinstance(x, int | float | str)
    return str(rounded(x)) if simple else f"<{type(x).__name__}>"


def rounded(x):
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return round(x, 6) if isinstance(x, float) else x


def run(offered: dict[str, Callable]) -> list[Result]:
    return [check(theorem, offered) for theorem in theorems()]


@contextmanager
def hypothesis_profile(examples: int, shrink: bool = True):
    """Settings for theorems imported in the `with` block: reproducible, `examples` of each."""
    from hypothesis import HealthCheck, Phase, settings

    before = settings.get_current_profile_name()
    settings.register_profile(
        "conformance",
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("conformance")
    try:
        yield
    finally:
        settings.load_profile(before)


# ------------------------------------------------- the report


def diagnoses(results: list[Result]) -> list[Result]:
    """The first failure of each function: it names the likely mistake."""
    first = {}
    for result in results:
        if result.outcome == "fails":
            first.setdefault(result.function, result)
    return list(first.values())


def report(results: list[Result]) -> str:
    """The diagnoses, one block per function that is offered, and a summary."""
    offered = list(dict.fromkeys(r.function for r in results if r.outcome != "not offered"))
    others = dict.fromkeys(r.function for r in results if r.function not in offered)
    blocks = [listing(name, [r for r in results if r.function == name]) for name in offered]
    if others:
        line = f"Not offered, so not checked: {', '.join(others)}"
        blocks.append(textwrap.fill(line, 100, subsequent_indent="    "))
    found = diagnoses(results)
    causes = [r.function for r in found if r.function in BASIC]
    explained = [explanation(r, results, causes) for r in found]
    counts = {
        outcome: sum(r.outcome == outcome for r in results)
        for outcome in ("holds", "fails", "not offered")
    }
    summary = f"{counts['holds']} hold, {counts['fails']} fail, {counts['not offered']} not offered"
    return "\n\n".join([*explained, *blocks, summary])


def listing(function: str, results: list[Result]) -> str:
    """Each statement about a function, failures first."""
    ordered = sorted(results, key=lambda result: result.outcome)
    lines = [f"  {result.outcome:12}{statement(result.name)}" for result in ordered]
    return "\n".join([f"{function}{OFFERS.get(function, '')}", *lines])


def statement(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")


def explanation(result: Result, results: list[Result], causes: list[str]) -> str:
    """A failure in the user's terms: mistake, equation, counterexample, fix.

    causes: functions that fail and that the others are usually built on.
    """
    others = [r for r in results if r.outcome == "fails" and r.function == result.function]
    found = getattr(result.theorem, "mistake", None)
    if causes and result.function not in BASIC:
        count = f"{len(others)} statement{'s' * (len(others) > 1)} fail{'s' * (len(others) == 1)}"
        return f"== {result.function}: {count}. Fix {' and '.join(causes)} first, and run again."
    lines = [f"== {result.function}: {found.name if found else statement(result.name)}"]
    if found and found.pitfall:
        lines.append(f"Pitfall {found.pitfall} of the list in tests/README.md.")
    lines.append(f"Statement that fails: {statement(result.name)}")
    lines.append(f"Equation: {' '.join((result.theorem.__doc__ or '').split())}")
    lines.append(f"What happened: {message(result.error)}")
    if result.call:
        lines.append(f"Smallest counterexample found: {result.call}")
    if found:
        lines.append(f"Fix: {found.fix}")
    if len(others) > 1:
        names = "; ".join(statement(other.name) for other in others if other is not result)
        lines.append(f"Other statements that fail, usually for the same reason: {names}")
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="    ") for line in lines)


def message(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return kind + (text[:300] or "the two sides differ")


# ------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m beyond.conformance", description=__doc__.split("\n")[0]
    )
    parser.add_argument("implementation", help="a file NAME.py, or the name of a module")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the theorems use small tensors
    with hypothesis_profile(examples=60):
        theorems()  # imports them before the file, whose folder may have modules of the same names
        try:
            offered = load(args.implementation)
        except BadInput as e:
            print(" ".join(str(e).split()), file=sys.stderr)
            return 2
        results = run(offered)
    print(report(results))
    return int(any(result.outcome == "fails" for result in results))


if __name__ == "__main__":
    sys.exit(main())
