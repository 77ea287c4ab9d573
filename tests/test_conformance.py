"""`beyond.conformance`: it diagnoses wrong implementations and passes correct ones."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from wrong import logps, losses, training  # noqa: F401  importing them fills the list WRONG
from wrong.correct import CORRECT
from wrong.registry import WRONG

from beyond import conformance

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def few_examples():
    """Hypothesis fixes the number of examples on import, so the theorems are imported again."""
    with pytest.MonkeyPatch.context() as patch, conformance.hypothesis_profile(12, shrink=False):
        for name in conformance.THEOREMS:
            patch.delitem(sys.modules, name, raising=False)
        yield


def failures(module) -> Iterator[conformance.Result]:
    """The theorems that fail for what a module offers, in the order of the report."""
    offered = conformance.adapt(module)
    assert offered
    results = (conformance.check(theorem, offered) for theorem in conformance.theorems())
    return (result for result in results if result.outcome == "fails")


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.function.__name__)
def test_wrong_implementation_is_diagnosed(case):
    """One mistake  =>  the first failing statement names it, with its pitfall.  pitfall 32"""
    diagnosis = next(failures(SimpleNamespace(**{case.offer: case.function})))
    assert diagnosis.name == f"test_{case.theorem}"
    assert diagnosis.theorem.mistake.pitfall == case.pitfall


@pytest.mark.parametrize("name", CORRECT)
def test_correct_implementation_passes(name):
    """Correct, in another style or in float32 only  =>  no statement fails"""
    assert [(r.name, r.error) for r in failures(CORRECT[name])] == []


def test_every_statement_names_its_likely_mistake():
    """Each theorem about an offered function names a likely mistake, except one"""
    without = [f.__name__ for f in conformance.theorems() if not hasattr(f, "mistake")]
    assert without == ["test_a_lower_loss_need_not_raise_the_chosen_response"]


def test_trl_conforms_but_for_ties():
    """TRL's loss, metrics and log-softmax, and a Hugging Face model  =>  only ties are counted
    differently, as in results/conformance-trl.txt"""
    pytest.importorskip("trl")
    pytest.importorskip("transformers")
    from beyond import adapters

    failed = [result.name for result in failures(adapters)]
    assert failed == ["test_tie_counts_one_half", "test_accuracy_compares_implicit_rewards"]


def test_command_explains_a_failure(tmp_path):
    """A wrong file  =>  exit code 1, and a report with equation, counterexample, pitfall and fix,
    even if files in its folder have the names of ours"""
    path = tmp_path / "dpo.py"
    (tmp_path / "lib").mkdir()
    for name in ("model.py", "test_loss.py", "lib/__init__.py", "lib/io.py"):
        (tmp_path / name).write_text("mine = True\n")
    path.write_text(
        "import lib.io, model, test_loss\n"
        "assert lib.io.mine and model.mine and test_loss.mine\n"
        "def response_logps(model, ids, mask):\n"
        "    logps = model(ids)[:, :-1].log_softmax(-1)\n"
        "    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]\n"
        "    return logps.sum(-1) / mask.sum(-1)\n"
    )
    command = [sys.executable, "-m", "beyond.conformance", str(path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    text = " ".join(found.stdout.split())
    assert found.returncode == 1 and found.stderr == ""
    for part in (
        "== response_logps: mean instead of sum",
        "Pitfall 5",
        "Statement that fails: log probability is a sum over tokens",
        "Equation: Each token of y has weight 1",
        "counterexample found: response_logps(<a model: logits by position>, [[0, ",
        "Fix: log pi",
        "not offered",
    ):
        assert part in text, part
    counts = re.findall(r"(\d+) (?:hold|fail|not offered)\b", text)
    assert sum(map(int, counts)) == len(conformance.theorems())


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be imported"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def f(:", "SyntaxError"),
        ("x = 1", "offers none of"),
    ],
)
def test_command_refuses_a_file_it_cannot_use(content, message, tmp_path, capsys):
    """A missing, broken or empty file  =>  exit code 2 and one line"""
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    assert conformance.main([str(path)]) == 2
    found = capsys.readouterr()
    assert found.out == "" and message in found.err and found.err.count("\n") == 1


def test_documentation_lists_every_offer_and_its_template_conforms(tmp_path):
    """docs/conformance.md  =>  all offers are in its table, and its template passes as it is"""
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert [name for name in conformance.OFFERS if f"`{name}`" not in text] == []
    path = tmp_path / "my_dpo.py"
    path.write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    assert [result.name for result in failures(conformance.import_file(path))] == []
