"""lib/stage.py: a result is reused exactly while nothing that can influence it changes."""

import ast
import dataclasses
import functools
import inspect
import platform
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import beyond.losses
import data
import dpo
import train
from beyond import page
from lib import stage
from lib.stage import Stage, stage_key
import tiny
from tiny import CPU, ROOT, Executed, saved, target

DEFINITIONS = {
    (str(path), node.name)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("beyond/*.py")]
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
}


@pytest.fixture
def edit(monkeypatch):
    """edit(definitions, change) changes the sources of definitions, as `inspect` shows them.

    The files stay as they are.
    """
    unedited = stage.code_of

    def edit(definitions: set[tuple[str, str]], change: Callable[[str], str]):
        def code_of(definition):
            if (inspect.getsourcefile(definition), definition.__qualname__) not in definitions:
                return unedited(definition)
            source = change(inspect.getsource(definition))
            with monkeypatch.context() as patch:
                patch.setattr(inspect, "getsource", lambda definition: source)
                return unedited.__wrapped__(definition)

        monkeypatch.setattr(stage, "code_of", code_of)

    return edit


def semantic(source: str) -> str:
    return source + "    0\n"


def cosmetic(source: str) -> str:
    return source.replace('"""\n', ' Edited."""  # edited\n') + "    # edited\n"


@pytest.fixture(params=["toy", "imdb", "own"])
def calls(request, toy):
    """A run, and its stages by name. Stages of a function that the toy
    run or an earlier beta has already run are left out."""
    run = request.getfixturevalue(request.param)
    found = {target(function): name for name, (function, _) in reversed(run.calls.items())}
    known = {target(function) for function, _ in toy.calls.values() if run is not toy}
    return run, {name: run.calls[name] for code, name in found.items() if code not in known}


def test_editing_any_definition_a_stage_executes_changes_its_key(calls, edit):
    """A profiler records the functions of the project that a run executes, stage by stage."""
    run, stages = calls
    missed, count = [], 0
    for name, (function, args) in stages.items():
        before = stage_key(function, args)
        executed = {(c.co_filename, c.co_qualname.split(".")[0]) for c in run.executed[name]}
        for definition in executed & DEFINITIONS:
            edit({definition}, semantic)
            count += 1
            if stage_key(function, args) == before:
                missed.append((name, definition[1]))
        edit(set(), semantic)
        assert stage_key(function, args) == before
    assert not missed and count > 5


def test_changing_any_constant_a_stage_reads_changes_its_key(calls, toy, edit, monkeypatch):
    run, stages = calls
    missed, seen = [], set()
    for name, (function, args) in stages.items():
        before = stage_key(function, args)
        for code, names in run.executed[name].items():
            for constant in set(code.co_names) & names.keys():
                value = names[constant]
                if callable(value) or isinstance(value, ModuleType) or constant.startswith("__"):
                    continue
                seen.add(constant)
                with monkeypatch.context() as patch:
                    patch.setitem(names, constant, ("changed", constant))
                    if stage_key(function, args) == before:
                        missed.append((name, constant))
    assert not missed
    if run is toy:
        assert seen >= {"BETAS", "GRAMMAR", "OPTIMIZERS", "PATTERN"}


def test_comments_and_docstrings_change_no_key(calls, edit):
    _, stages = calls
    before = {name: stage_key(*call) for name, call in stages.items()}
    edit(DEFINITIONS, cosmetic)
    assert {name: stage_key(*call) for name, call in stages.items()} == before


DPO, EVAL = ["dpo-0.5", "dpo-2"], ["eval-0.5", "eval-2"]
MODEL = ["reference", "completions", "eval_set", *DPO, *EVAL]
DEPENDENTS = {  # all stages of the toy run that depend on a definition
    "frontier": EVAL,
    "bradley_terry": ["preferences", "eval_set"],
    "Attention": MODEL,
    "toy_reviews": ["dataset"],
    "read_imdb": [],
    "sft": ["reference"],
    "train_dpo": DPO,
    "Monitor": DPO,
    "fast_response_logps": MODEL,  # and completions, by way of `Inference`
    "run": [],
}


@pytest.mark.parametrize("name", DEPENDENTS)
def test_editing_a_definition_changes_the_keys_of_its_dependents_only(name, toy, edit):
    before = {stage: stage_key(*call) for stage, call in toy.calls.items()}
    edit({definition for definition in DEFINITIONS if definition[1] == name}, semantic)
    after = {stage: stage_key(*call) for stage, call in toy.calls.items()}
    assert different(before, after) == [stage for stage in after if stage in DEPENDENTS[name]]


# ------------------------------------------------- settings


LOSS = """import dpo

def my_loss(logps, batch, beta, scale=1.0):
    losses, r_hat_w, r_hat_l = dpo.dpo(logps, batch, beta)
    return scale * losses, r_hat_w, r_hat_l
"""


def keys_with(run, **settings) -> dict[str, str]:
    """The keys of a run's stages with other settings, if all results stayed the same."""
    keys = {}

    def stage(name, function, *args):
        keys[name] = stage_key(function, args)
        if name in run.returned:
            return run.returned[name]
        kind, beta = "eval" if name.startswith("eval") else "dpo", name.split("-")[-1]
        return run.returned.get(f"{kind}-{beta}", run.returned[f"{kind}-0.5"])

    stage.seconds, stage.folder = {}, Path()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_results", "write_page"):
            patch.setattr(page, name, lambda *args: None)
        patch.setattr(train, "Stage", lambda folder: stage)  # of the IMDb reviews
        train.run(dataclasses.replace(run.cfg, **settings), stage, CPU)
    return keys


def different(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in after if after[name] != before.get(name)]


SETTINGS = {  # another value of each setting, and the stages that use it
    "seed": (1, ["dataset", "preferences", *MODEL]),
    "labels": ("soft", ["preferences", "eval_set", *EVAL]),
    "pairs": ("best-worst", ["preferences", "eval_set", *EVAL]),
    "beta": ((0.25, 2.0), ["dpo-0.25", "eval-0.25"]),
    "loss": ("users.py:my_loss", ["my_loss-0.5", "my_loss-2"]),
    "loss_args": (("scale=2",), ["my_loss-0.5", "my_loss-2"]),
    "init": ("init.pt", ["reference"]),
    "from_scratch": (True, ["reference"]),
    "context": (20, ["dataset", "reference"]),
    "shape": ((2, 2, 16), ["reference"]),
    "reviews": (140, ["dataset"]),
    "sft_steps": (5, ["reference"]),
    "sft_batch_size": (9, ["reference"]),
    "prompts": (15, ["dataset"]),
    "completions": (4, ["completions", "eval_set", *EVAL]),
    "frozen": (1, DPO),
    "optimizer": ("adamw", DPO),
    "lr": (0.02, DPO),
    "epochs": (2, DPO),
    "batch_size": (4, DPO),
    "eval_prompts": (3, ["dataset"]),
    "ref_samples": (48, ["eval_set", *EVAL]),
    "eval_samples": (24, ["eval_set", *EVAL]),
}


def test_every_setting_changes_the_keys_of_the_stages_that_use_it(toy, tmp_path, monkeypatch):
    assert SETTINGS.keys() == vars(toy.cfg).keys() - {"data", "imdb"}  # the next test covers these
    monkeypatch.chdir(tmp_path)
    Path("users.py").write_text(LOSS)
    Path("init.pt").write_bytes(saved(tiny.checkpoint()))
    bases = {"loss_args": {"loss": "users.py:my_loss"}, "from_scratch": {"init": "init.pt"}}
    unchanged, found = keys_with(toy), {}
    for name, (value, _) in SETTINGS.items():
        base = bases.get(name, {})
        before = keys_with(toy, **base) if base else unchanged
        found[name] = sorted(different(before, keys_with(toy, **base, **{name: value})))
    assert found == {name: sorted(stages) for name, (_, stages) in SETTINGS.items()}


def test_files_are_keyed_by_content(imdb, own, tmp_path):
    """A path that a setting names may change, but not the file's content."""
    for run, name, content, changed in (
        (imdb, "imdb", tiny.archive(n=230), ["reviews"]),
        (own, "data", tiny.lines(tiny.pairs(40)), ["dataset"]),
        (own, "init", saved(tiny.checkpoint() | {"extra": 1}), []),
    ):
        old = Path(getattr(run.cfg, name))
        path = tmp_path / f"{name}{''.join(old.suffixes)}"
        value = path if name == "imdb" else str(path)
        path.write_bytes(old.read_bytes())
        before = keys_with(run)
        assert keys_with(run, **{name: value}) == before
        path.write_bytes(content)
        assert different(before, keys_with(run, **{name: value})) == changed


def dotted(logps, batch):
    return beyond.losses.ipo(logps, batch, 1.0)


def test_code_reached_through_a_package_and_its_module_is_in_the_key(edit):
    before = stage_key(dotted, ())
    edit({definition for definition in DEFINITIONS if definition[1] == "ipo"}, semantic)
    assert stage_key(dotted, ()) != before


# ------------------------------------------------- values and versions


def closure(beta):
    return lambda logps, batch: dpo.dpo(logps, batch, beta)


def default(beta):
    return lambda logps, batch, beta=beta: dpo.dpo(logps, batch, beta)


class Method:
    def __init__(self, beta):
        self.beta = beta

    def loss(self, logps, batch):
        return dpo.dpo(logps, batch, self.beta)


CAPTURE = closure, default, lambda beta: Method(beta).loss
ONE = torch.ones(1)
DIFFERENT = [
    None, False, True, 0, 1, 1.0, -0.0, 0.0, 1 << 70, float("nan"), float("inf"), "1", b"1", "",
    [], (), {}, [1], (1,), [[1], 2], [[1, 2]], {1}, {1, 2}, {"a": 1}, {"a": 2}, {"b": 1}, {1: "a"},
    ONE, ONE.double(), ONE.int(), ONE[None], ONE[:0], ONE.expand(2), 2 * ONE, [ONE], {"a": ONE},
    [ONE, ONE], np.ones(1), np.zeros(1), CPU, torch.device("meta"), dpo.dpo, dpo.dpo_loss,
    functools.partial(dpo.dpo, beta=1), functools.partial(dpo.dpo, beta=2), dpo.Preferences,
    data.WordReward({"a": 1}), data.WordReward({"a": 2}), torch.optim.SGD, torch.optim.AdamW,
]  # fmt: skip


def test_different_values_have_different_keys_and_equal_ones_the_same():
    """Also functions that capture different or equal values."""
    keys, again = (
        [stage_key(dpo.dpo, (v,)) for v in DIFFERENT + [f(b) for f in CAPTURE for b in (0.1, 0.2)]]
        for _ in range(2)
    )
    assert len(set(keys)) == len(keys) and keys == again


def test_a_value_without_content_is_refused():
    with pytest.raises(TypeError, match="cannot pickle"):
        stage_key(dpo.dpo, ((i for i in ()),))


@pytest.mark.parametrize(
    "module, name, value",
    [
        (torch, "__version__", "1.0"),
        (platform, "python_version", lambda: "3.0"),
        (stage, "bf16_supported", lambda device: "other"),
    ],
)
def test_another_version_or_processor_is_another_key(module, name, value, toy, monkeypatch):
    function, args = toy.calls["reference"]
    before = stage_key(function, args)
    monkeypatch.setattr(module, name, value)
    assert stage_key(function, args) != before


# ------------------------------------------------- files


def double(x):
    double.calls += 1
    return {"twice": 2 * x}


@pytest.fixture
def run(tmp_path):
    """run() is the result of a cached stage; double.calls counts executions."""
    double.calls = 0
    return lambda x=3: Stage(tmp_path)("double", double, x)["twice"]


def test_a_result_is_computed_once_and_again_for_other_arguments(run, capsys):
    assert [run(), run(), run(4), run(4), run()] == [6, 6, 8, 8, 6]
    assert double.calls == 3
    said = ["[double]", "[double] cached"] * 2 + ["[double]"]
    assert capsys.readouterr().out.splitlines() == said


DAMAGE = {  # of a stage's file
    "truncated": lambda good: good[:-20],
    "text": lambda good: b"text",
    "code": lambda good: saved({"key": "", "seconds": 1.0, "value": Executed()}),
    "a number": lambda good: saved(7),
    "another dictionary": lambda good: saved({"twice": 7}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_computed_again(damage, run, tmp_path, monkeypatch, capsys):
    """It executes nothing, and one line names it if it cannot be read."""
    monkeypatch.chdir(tmp_path)
    run()
    path = tmp_path / "double.pt"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert run() == 6 and double.calls == 2
    told = "double.pt: damaged; computing it again" in capsys.readouterr().out
    assert told == (damage != "another dictionary")
    assert run() == 6 and double.calls == 2 and "damaged" not in capsys.readouterr().out
    assert not Path("executed").exists()


def test_a_flipped_bit_never_gives_a_wrong_result(run, tmp_path):
    assert run() == 6
    path = tmp_path / "double.pt"
    good = path.read_bytes()
    for i in range(0, len(good), 7):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
        assert run() == 6
    assert double.calls > 10


def test_a_write_that_fails_leaves_the_old_result(run, monkeypatch):
    """Key and value are in one file, which is written completely or not at all."""
    assert run(3) == 6
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(stage, "atomic_write", lambda path, content: 1 / 0)
        run(10)
    assert [run(3), run(10), run(3)] == [6, 20, 6] and double.calls == 4
