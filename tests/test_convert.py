"""beyond/convert.py: every format becomes prompt, chosen and rejected, or one clear line."""

import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beyond import convert
from tiny import lines


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
TWICE = " Yes.\n\nAssistant: "  # the marker of a turn inside an answer
GREETED = {name: [dict(role="assistant", content="Welcome."), *WHOLE[name]] for name in WHOLE}
RATED = {" drags.": -1, " shines.": 2.5, " is odd.": 0}
SCORES = dict(prompt="The plot", completions=list(RATED), scores=list(RATED.values()))
INSIDE = dict(prompt="The plot", completions=[dict(text=y, score=r) for y, r in RATED.items()])
NULLS = INSIDE | dict(
    scores=None,
    completions=[c | dict(response=None, overall_score=None) for c in INSIDE["completions"]],
)
ULTRAFEEDBACK = dict(
    instruction="Hi!",
    completions=[dict(response=y, overall_score=r) for y, r in (("What?", 2.0), ("Hello.", 9))],
)
ROWS = [PAIR, CONVERSATION, WHOLE, TRANSCRIPTS, SCORES, ULTRAFEEDBACK]


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
        (
            {name: messages("Hi!", f"{TWICE[1:]}{name}") for name in WHOLE},
            "conversations",
            GREETING | {name: f"{TWICE}{name}" for name in WHOLE},
        ),
        (
            GREETED,
            "conversations",
            GREETING | {"prompt": f"\n\nAssistant: Welcome.{GREETING['prompt']}"},
        ),
        (TRANSCRIPTS, "transcripts", GREETING),
        (TRANSCRIPTS | {"prompt": None}, "transcripts", GREETING),
        (ULTRAFEEDBACK, "scores", GREETING),
    ],
)
def test_each_format_is_recognised_and_converted(row, name, expected, converted):
    pairs, said = converted(lines([row, row]), "--labels", "argmax")
    assert pairs == [expected, expected]
    dropped = "dropped: 0 pairs of identical completions, 0 ties"
    assert said == [f"in: JSON lines, 2 x {name}", f"2 pairs; {dropped}"]


@pytest.mark.parametrize("row", [SCORES, INSIDE, NULLS])
def test_argmax_prefers_the_higher_score_in_every_pair(row, converted):
    pairs, _ = converted(lines([row]), "--labels", "argmax")
    found = [(pair["chosen"], pair["rejected"]) for pair in pairs]
    assert found == [(" shines.", " drags."), (" is odd.", " drags."), (" shines.", " is odd.")]
    assert {pair["prompt"] for pair in pairs} == {"The plot"}


def test_speakers_and_turns_are_kept_apart(converted):
    prompt = [dict(role="system", content="Be kind."), *messages("Hi!", "Hello.", "Tea?")]
    chosen, rejected = messages("", "Yes.", "Milk?", "No.")[1:], messages("", "No.")[1:]
    pairs, _ = converted(lines([dict(prompt=prompt, chosen=chosen, rejected=rejected)]))
    asked = "\n\nSystem: Be kind.\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant:"
    answer = " Yes.\n\nHuman: Milk?\n\nAssistant: No."
    assert pairs == [dict(prompt=asked, chosen=answer, rejected=" No.")]


@pytest.mark.parametrize(
    "y_w, y_l",
    [
        (" I think so.", " I think not."),  # the shared words belong to the responses
        (" I", " I\n\nAssistant: think."),
        (" A.\n\nHuman: B", " A.\n\nHuman: C\n\nAssistant: D"),
    ],
)
def test_transcripts_are_split_at_the_last_turn_they_share(y_w, y_l, converted):
    prompt = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Is it good?\n\nAssistant:"
    pairs, _ = converted(lines([dict(chosen=prompt + y_w, rejected=prompt + y_l)]))
    assert pairs == [dict(prompt=prompt, chosen=y_w, rejected=y_l)]


@pytest.mark.parametrize("scores", [[5.5, 7], [7.4, 7], [-1.7e308, 1.7e308]])
def test_labels_follow_bradley_terry(scores, converted):
    """y_1 wins with probability sigmoid(r_1 - r_2), within 4 standard errors of 4,000 labels."""
    row, n = dict(prompt="x", completions=["1", "2"], scores=scores), 4000
    pairs, _ = converted(lines([row] * n))
    p, wins = 1 / (1 + math.exp(scores[1] - scores[0])), sum(y["chosen"] == "1" for y in pairs)
    assert abs(wins / n - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_labels_depend_on_the_seed_only(converted):
    content = lines([SCORES | dict(scores=[0, 0, 0])] * 20)
    first, again, other = (converted(content, "--seed", seed) for seed in "001")
    assert first == again != other


def test_dropped_pairs_are_counted(converted):
    """Scores 1, 1, 1, 0 of a, a, b, c => 1 pair of identical completions, 2 ties, 3 pairs."""
    row = dict(prompt="x", completions=["a", "a", "b", "c"], scores=[1, 1, 1, 0])
    pairs, said = converted(lines([row, row]), "--labels", "argmax")
    assert len(pairs) == 6
    assert said[1] == "6 pairs; dropped: 2 pairs of identical completions, 4 ties"


# ------------------------------------------------- files


def test_arrays_and_lines_give_the_same_pairs(converted):
    expected, said = converted(lines(ROWS))
    formats = "1 x pair, 1 x conversation, 1 x conversations, 1 x transcripts, 2 x scores"
    assert said[0].endswith(formats)
    array, said = converted(b"\xef\xbb\xbf\r\n " + json.dumps(ROWS, indent=1).encode())
    assert array == expected and said[0].startswith("in: JSON array, 1 x pair")
    assert converted(b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n\r\n"))[0] == expected
    assert converted(lines(expected))[0] == expected


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_files_are_read(separator, converted):
    header = '"id"', '"prompt"', '"chosen"', '"rejected"'
    row = '"1"', '"The plot"', '" ""shines"",\nit; does"', '" no"'
    content = f"{separator.join(header)}\r\n{separator.join(row)}"
    pairs, said = converted(content.encode())
    assert pairs == [dict(prompt="The plot", chosen=' "shines",\nit; does', rejected=" no")]
    assert said[0] == "in: CSV, 1 x pair"


BAD_FILES = [  # the file, what the line says after its name
    (b"", ": JSON lines, no rows; no pairs"),
    (lines([PAIR]) + b'{"prompt": \n', ", line 2: is not JSON (Expecting value"),
    (b"[" + lines([PAIR]), ": is not JSON ("),
    (b'{"a":' * 100_000, ", line 1: is not JSON ("),
    (b'{"prompt": "\xff"}', ": is not UTF-8 text (byte 12)"),
    (b"[1]", ", item 1: is not an object"),
    (b"a,b\n1,2\n", ", row 1: has no known format (a: str, b: str)"),
    (lines([SCORES | dict(scores=[1, 1, 1])]), ": JSON lines, 1 x scores; no pairs (0 pairs"),
]
BAD_ROWS = [  # a format, what is changed, what the line says after the row's place
    (PAIR, dict(chosen=None), "has no known format (prompt: str, chosen:"),
    (PAIR, dict(prompt=messages("Hi!")), "has no known format (prompt: list, chosen: str"),
    (PAIR, dict(prompt=" \n"), "prompt is missing, empty"),
    (PAIR, dict(chosen=" drags."), "chosen and rejected are identical"),
    (PAIR, dict(chosen="\ud83d"), "chosen contains half of"),
    (CONVERSATION, dict(prompt=[]), "prompt is missing, empty"),
    (CONVERSATION, dict(chosen=["Hi"]), "chosen has the role"),
    (CONVERSATION, dict(prompt=[dict(role="tool")]), "prompt has the role 'tool'"),
    (CONVERSATION, dict(prompt=[dict(role=[])]), "prompt has the role []"),
    (CONVERSATION, dict(chosen=messages("a")), "chosen and rejected must begin with a message"),
    (WHOLE, dict(chosen=messages("Ho!", "Hello.")), "chosen and rejected must begin with the same"),
    (SCORES, dict(completions=[" a", "", " b"]), "a completion is missing"),
    (SCORES, dict(scores=[1, 2]), "needs 3 scores"),
    (SCORES, dict(scores=[1, 10**400, 2]), "a score is missing"),
    (SCORES, dict(scores=[1, "2", 3]), "a score is missing"),
    (SCORES, dict(prompt=None), "a message in prompt or instruction is missing"),
]
BAD = [(lines([PAIR, row | changes]), f", line 2: {says}") for row, changes, says in BAD_ROWS]
BAD += BAD_FILES


@pytest.mark.parametrize("content, says", BAD, ids=[says for _, says in BAD])
def test_a_bad_file_gives_one_line_that_names_the_row(content, says, tmp_path, capsys):
    (tmp_path / "in").write_bytes(content)
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "out"), "--labels", "argmax"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"beyond.convert: {tmp_path / 'in'}{says}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "source, out, says",
    [
        ("none", "out", "cannot be read"),
        ("in", "in", "already exists"),
        ("in", "none/out", "No such file"),
    ],
)
def test_unusable_paths_give_one_line(source, out, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_bytes(lines([PAIR]))
    assert convert.main([source, out]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert (tmp_path / "in").read_bytes() == lines([PAIR])


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
    (tmp_path / "in").write_bytes(lines([row | changes]))
    (tmp_path / "out").unlink(missing_ok=True)
    code = convert.main([str(tmp_path / "in"), str(tmp_path / "out")])
    error = capsys.readouterr().err
    if code == 0:
        pairs = read_pairs(tmp_path / "out")
        assert pairs and convert.convert(tmp_path / "out", "bt", 0)[0] == pairs
    else:
        assert code == 2 and re.fullmatch(r"beyond\.convert: [^\n]+\n", error)
