"""beyond/convert.py: every format becomes prompt, chosen and rejected, or one clear line."""

import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beyond import convert


def messages(*contents: str) -> list[dict]:
    """A user and an assistant who take turns."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]


PAIR = dict(prompt="The plot", chosen=" shines.", rejected=" drags.")
GREETING = dict(prompt="\n\nHuman: Hi!\n\nAssistant:", chosen=" Hello.", rejected=" What?")
CONVERSATION = dict(
    prompt=messages("Hi!"), chosen=messages("", "Hello.")[1:], rejected=messages("", "What?")[1:]
)
WHOLE = dict(chosen=messages("Hi!", "Hello."), rejected=messages("Hi!", "What?"))
TRANSCRIPTS = {name: GREETING["prompt"] + GREETING[name] for name in ("chosen", "rejected")}
SCORES = dict(
    prompt="The plot", completions=[" drags.", " shines.", " is odd."], scores=[-1, 2.5, 0]
)
INSIDE = dict(
    prompt="The plot",
    completions=[
        dict(text=y, score=r) for y, r in zip(SCORES["completions"], SCORES["scores"], strict=True)
    ],
)
ULTRAFEEDBACK = dict(
    instruction="Hi!",
    completions=[
        dict(response="What?", overall_score=2.0),
        dict(response="Hello.", overall_score=9, annotations={}),
    ],
)
ROWS = [PAIR, CONVERSATION, WHOLE, TRANSCRIPTS, SCORES, ULTRAFEEDBACK]


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_pairs(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


@pytest.fixture
def converted(tmp_path, capsys):
    """content, flags -> the pairs that were written, and what was printed."""

    def run(content: bytes, *flags: str):
        (tmp_path / "in").write_bytes(content)
        out = tmp_path / "out"
        out.unlink(missing_ok=True)
        assert convert.main([str(tmp_path / "in"), str(out), *flags]) == 0
        said = capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines()
        assert said.pop() == "next: python train.py --data out"
        return read_pairs(out), said

    return run


@pytest.mark.parametrize(
    "row, name, expected",
    [
        (PAIR | {"reward": 1.0}, "pair", PAIR),
        (CONVERSATION, "conversation", GREETING),
        (WHOLE, "conversations", GREETING),
        (WHOLE | {"prompt": "Hi!", "score_chosen": 8.0}, "conversations", GREETING),
        (TRANSCRIPTS, "transcripts", GREETING),
        (ULTRAFEEDBACK, "scores", GREETING),
    ],
)
def test_each_format_is_recognised_and_converted(row, name, expected, converted):
    pairs, said = converted(lines(row, row), "--labels", "argmax")
    assert pairs == [expected, expected]
    dropped = "dropped: 0 pairs of identical completions, 0 ties"
    assert said == [f"in: JSON lines, 2 x {name}", f"2 pairs; {dropped}"]


@pytest.mark.parametrize("row", [SCORES, INSIDE])
def test_argmax_prefers_the_higher_score_in_every_pair(row, converted):
    pairs, _ = converted(lines(row), "--labels", "argmax")
    found = [(pair["chosen"], pair["rejected"]) for pair in pairs]
    assert found == [(" shines.", " drags."), (" is odd.", " drags."), (" shines.", " is odd.")]
    assert {pair["prompt"] for pair in pairs} == {"The plot"}


def test_speakers_and_turns_are_kept_apart(converted):
    prompt = [dict(role="system", content="Be kind."), *messages("Hi!", "Hello.", "Tea?")]
    chosen, rejected = messages("", "Yes.", "Milk?", "No.")[1:], messages("", "No.")[1:]
    pairs, _ = converted(lines(dict(prompt=prompt, chosen=chosen, rejected=rejected)))
    asked = "\n\nSystem: Be kind.\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant:"
    answer = " Yes.\n\nHuman: Milk?\n\nAssistant: No."
    assert pairs == [dict(prompt=asked, chosen=answer, rejected=" No.")]


@pytest.mark.parametrize(
    "y_w, y_l",
    [
        (" I think so.", " I think not."),  # the shared words belong to the responses
        (" I", " I\n\nAssistant: think."),
        (" Yes.\n\nAssistant: No.", " Yes, no."),
        (" Yes.", " No.\n\nHuman: Why?\n\nAssistant: So."),
        (" A.\n\nHuman: B", " A.\n\nHuman: C\n\nAssistant: D"),
    ],
)
def test_transcripts_are_split_at_the_last_turn_they_share(y_w, y_l, converted):
    prompt = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Is it good?\n\nAssistant:"
    pairs, _ = converted(lines(dict(chosen=prompt + y_w, rejected=prompt + y_l)))
    assert pairs == [dict(prompt=prompt, chosen=y_w, rejected=y_l)]


@pytest.mark.parametrize("gap", [-1.5, 0.0, 0.4, 3.0])
def test_labels_follow_bradley_terry(gap, converted):
    """y_1 wins with probability sigmoid(r_1 - r_2), within 4 standard errors of 4,000 labels."""
    row, n = dict(prompt="x", completions=["1", "2"], scores=[7 + gap, 7]), 4000
    pairs, _ = converted(lines(row) * n)
    p, wins = 1 / (1 + math.exp(-gap)), sum(pair["chosen"] == "1" for pair in pairs)
    assert abs(wins / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_labels_depend_on_the_seed_only(converted):
    content = lines(*[SCORES | dict(scores=[0, 0, 0])] * 20)
    assert (
        converted(content) == converted(content, "--seed", "0") != converted(content, "--seed", "1")
    )


def test_huge_scores_give_certain_labels(converted):
    row = dict(prompt="x", completions=["1", "2"], scores=[-1.7e308, 1.7e308])
    assert {pair["chosen"] for pair in converted(lines(row) * 50)[0]} == {"2"}


def test_dropped_pairs_are_counted(converted):
    """Scores 1, 1, 1, 0 of a, a, b, c => 1 pair of identical completions, 2 ties, 3 pairs."""
    row = dict(prompt="x", completions=["a", "a", "b", "c"], scores=[1, 1, 1, 0])
    pairs, said = converted(lines(row, row), "--labels", "argmax")
    assert len(pairs) == 6
    assert said[1] == "6 pairs; dropped: 2 pairs of identical completions, 4 ties"


# ------------------------------------------------- files


def test_arrays_and_lines_give_the_same_pairs(converted):
    expected, said = converted(lines(*ROWS))
    assert said[0].endswith(
        "1 x pair, 1 x conversation, 1 x conversations, 1 x transcripts, 2 x scores"
    )
    array, said = converted(b"\xef\xbb\xbf\r\n " + json.dumps(ROWS, indent=1).encode())
    assert array == expected and said[0].startswith("in: JSON array, 1 x pair")
    assert converted(b"\xef\xbb\xbf" + lines(*ROWS).replace(b"\n", b"\r\n\r\n"))[0] == expected
    assert converted(lines(*expected))[0] == expected


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_files_are_read(separator, converted):
    rows = [
        ["id", "prompt", "chosen", "rejected"],
        ["1", "The plot", ' "shines",\nit; does', " no"],
    ]
    quoted = [[f'"{cell.replace(chr(34), 2 * chr(34))}"' for cell in row] for row in rows]
    content = "\r\n".join(separator.join(row) for row in quoted).encode()
    pairs, said = converted(content)
    assert pairs == [dict(prompt="The plot", chosen=' "shines",\nit; does', rejected=" no")]
    assert said[0] == "in: CSV, 1 x pair"


def changed(row: dict, **changes) -> bytes:
    """A good line, and a row that is not."""
    return lines(PAIR, row | changes)


BAD = {  # what is wrong: the file, and what the line says after its name
    "empty": (b"", ": JSON lines, no rows; no pairs"),
    "empty array": (b"[]", ": JSON array, no rows; no pairs"),
    "not JSON": (lines(PAIR) + b'{"prompt": \n', ", line 2: is not JSON (Expecting value"),
    "array not closed": (b"[" + lines(PAIR), ": is not JSON ("),
    "nested": (b'{"a":' * 100_000, ", line 1: is not JSON ("),
    "not UTF-8": (b'{"prompt": "\xff"}', ": is not UTF-8 text (byte 12)"),
    "not an object": (b"[1]", ", item 1: is not an object"),
    "CSV without columns": (b"a,b\n1,2\n", ", row 1: has no known format (a: str, b: str)"),
    "no chosen": (
        changed(PAIR, chosen=None),
        ", line 2: has no known format (prompt: str, chosen:",
    ),
    "a number": (changed(PAIR, chosen=3), ", line 2: has no known format"),
    "blank prompt": (changed(PAIR, prompt=" \n"), ", line 2: prompt is missing, empty"),
    "empty chosen": (changed(PAIR, chosen=""), ", line 2: chosen is missing, empty"),
    "identical": (changed(PAIR, chosen=" drags."), ", line 2: chosen and rejected are identical"),
    "half a character": (changed(PAIR, chosen="\ud83d"), ", line 2: chosen contains half of"),
    "no messages": (changed(CONVERSATION, prompt=[]), ", line 2: prompt is missing, empty"),
    "text in a list": (changed(CONVERSATION, chosen=["Hi"]), ", line 2: chosen has a message with"),
    "role": (
        changed(CONVERSATION, prompt=[dict(role="tool", content="a")]),
        ", line 2: prompt has a message with the role 'tool', not ['user',",
    ),
    "role is a list": (
        changed(CONVERSATION, prompt=[dict(role=[])]),
        ", line 2: prompt has a message",
    ),
    "no content": (
        changed(CONVERSATION, rejected=[dict(role="assistant")]),
        ", line 2: a message of rejected is missing",
    ),
    "user answers": (
        changed(CONVERSATION, chosen=messages("a")),
        ", line 2: chosen and rejected must begin with a message of the assistant",
    ),
    "nothing shared": (
        changed(WHOLE, chosen=messages("Ho!", "Hello.")),
        ", line 2: chosen and rejected must begin with the same turn",
    ),
    "no answer": (
        changed(TRANSCRIPTS, rejected=GREETING["prompt"]),
        ", line 2: rejected is missing",
    ),
    "an empty completion": (
        changed(SCORES, completions=[" a", "", " b"]),
        ", line 2: a completion is missing",
    ),
    "too few scores": (changed(SCORES, scores=[1, 2]), ", line 2: needs 3 scores"),
    "scores are a number": (changed(SCORES, scores=3), ", line 2: needs 3 scores"),
    "no score": (changed(INSIDE, completions=["a", "b"]), ", line 2: a score is missing"),
    "NaN": (changed(SCORES, scores=[1, 2, math.nan]), ", line 2: a score is missing"),
    "too large": (changed(SCORES, scores=[1, 10**400, 2]), ", line 2: a score is missing"),
    "a score is text": (changed(SCORES, scores=[1, "2", 3]), ", line 2: a score is missing"),
    "no instruction": (
        changed(SCORES, prompt=None),
        ", line 2: a message of prompt and instruction is missing",
    ),
    "all tied": (
        lines(SCORES | dict(scores=[1, 1, 1])),
        ": JSON lines, 1 x scores; no pairs (0 pairs of identical completions, 3 ties)",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_line_that_names_the_row(what, tmp_path, capsys):
    content, says = BAD[what]
    (tmp_path / "in").write_bytes(content)
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "out"), "--labels", "argmax"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"beyond.convert: {tmp_path / 'in'}{says}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "source, out, says",
    [
        ("none", "out", "none: cannot be read (No such file"),
        (".", "out", "cannot be read ("),
        ("in", "in", "in: exists already; choose another name"),
        ("in", "none/out", "No such file"),
    ],
)
def test_unusable_paths_are_one_line(source, out, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_bytes(lines(PAIR))
    assert convert.main([source, out]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert (tmp_path / "in").read_bytes() == lines(PAIR)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(ROWS), st.dictionaries(st.sampled_from(list(SCORES | WHOLE)), JSON))
def test_any_row_gives_pairs_or_one_line(tmp_path, capsys, row, changes):
    """Any JSON in place of any value => pairs that are read again unchanged, or one line."""
    (tmp_path / "in").write_bytes(lines(row | changes))
    (tmp_path / "out").unlink(missing_ok=True)
    code = convert.main([str(tmp_path / "in"), str(tmp_path / "out")])
    error = capsys.readouterr().err
    if code == 0:
        pairs = read_pairs(tmp_path / "out")
        assert pairs and convert.convert(tmp_path / "out", "bt", 0)[0] == pairs
    else:
        assert code == 2 and re.fullmatch(r"beyond\.convert: [^\n]+\n", error)
