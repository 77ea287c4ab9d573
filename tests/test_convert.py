"""beyond/convert.py: every shape becomes the standard one, and every bad input one clear line."""
import contextlib
import io
import json
import math
import os
import re

import pytest
from hypothesis import example, given, settings, strategies as st

import data
from beyond import convert
from kit import files


def messages(*contents: str) -> list[dict]:
    """A user and an assistant who take turns."""
    return [dict(role=role, content=c) for role, c in zip(("user", "assistant") * len(contents), contents)]


HELLO = dict(prompt="The plot", chosen=" shines.", rejected=" drags.")
GREETING = dict(prompt="\n\nHuman: Hi!\n\nAssistant:", chosen=" Hello.", rejected=" What?")
CONVERSATION = dict(prompt=messages("Hi!"), chosen=messages("", "Hello.")[1:], rejected=messages("", "What?")[1:])
WHOLE = dict(chosen=messages("Hi!", "Hello."), rejected=messages("Hi!", "What?"))
TRANSCRIPTS = {name: GREETING["prompt"] + GREETING[name] for name in ("chosen", "rejected")}
SCORED = dict(prompt="The plot", completions=[" drags.", " shines.", " is odd."], scores=[-1, 2.5, 0])
ULTRAFEEDBACK = dict(source="a benchmark", instruction="Hi!", completions=[
    dict(model="small", response="What?", overall_score=2.0, annotations={}),
    dict(model="large", response="Hello.", overall_score=9)])
ROWS = [HELLO, CONVERSATION, WHOLE, TRANSCRIPTS, SCORED, ULTRAFEEDBACK]


def jsonl(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def converted(tmp_path):
    """A function: the rows that a file with these bytes is converted to."""
    def convert_bytes(content: bytes, *flags: str) -> list[dict]:
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_bytes(content)
        out.unlink(missing_ok=True)
        assert convert.main([str(source), str(out), *flags]) == 0
        assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
        return [json.loads(line) for line in out.read_bytes().splitlines()]
    return convert_bytes


# ----------------------------------------------------------------------------------------------------- shapes

def test_standard_rows_keep_their_three_strings_alone(converted):
    assert converted(jsonl(HELLO | dict(reward=1.0, number=3), HELLO)) == [HELLO, HELLO]


@pytest.mark.parametrize("row", [CONVERSATION, WHOLE, WHOLE | dict(prompt="Hi!", score_chosen=8.0), TRANSCRIPTS,
                                 TRANSCRIPTS | dict(prompt=None)])
def test_conversations_and_transcripts_become_the_same_text(row, converted):
    assert converted(jsonl(row)) == [GREETING]


def test_turns_and_a_system_message_are_told_apart_by_their_speakers(converted):
    told = [dict(role="system", content="Be kind."), *messages("Hi!", "Hello.", "Tea?")]
    chosen, rejected = messages("", "Yes.", "Milk?", "No.")[1:], messages("", "No.")[1:]
    assert converted(jsonl(dict(prompt=told, chosen=chosen, rejected=rejected))) == [dict(
        prompt="\n\nSystem: Be kind.\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant:",
        chosen=" Yes.\n\nHuman: Milk?\n\nAssistant: No.", rejected=" No.")]


@pytest.mark.parametrize("y_w, y_l", [
    (" I think so.", " I think not."),                                              # both begin with the same words
    (" I", " I think."), (" I", " I\n\nAssistant: think."), (" Yes.\n\nAssistant: No.", " Yes, no."), ("Yes.", "No."),
    (" Yes.", " No.\n\nHuman: Why?\n\nAssistant: So."), (" A.\n\nHuman: B", " A.\n\nHuman: C\n\nAssistant: D")])
def test_transcripts_are_split_at_the_last_turn_that_both_share(y_w, y_l, converted):
    """The prompt ends with the assistant's name, and prompt + response is the transcript"""
    prompt = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Is it good?\n\nAssistant:"
    assert converted(jsonl(dict(chosen=prompt + y_w, rejected=prompt + y_l))) == [
        dict(prompt=prompt, chosen=y_w, rejected=y_l)]


def test_whole_conversations_are_split_like_their_transcripts(converted):
    row = dict(chosen=messages("Hi!", "Hello.", "Tea?", "I think so."),
               rejected=messages("Hi!", "Hello.", "Tea?", "I think not.", "Why?", "Who knows."))
    text = {name: convert.transcript(row[name], name) for name in row}
    assert converted(jsonl(row)) == converted(jsonl(text)) == [dict(
        prompt="\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant:", chosen=" I think so.",
        rejected=" I think not.\n\nHuman: Why?\n\nAssistant: Who knows.")]


INSIDE = dict(prompt="The plot", completions=[
    dict(text=y, score=r) for y, r in zip(SCORED["completions"], SCORED["scores"])])


@pytest.mark.parametrize("row", [SCORED, INSIDE])
def test_argmax_prefers_the_higher_score_in_every_pair(row, converted):
    found = converted(jsonl(row), "--labels", "argmax")
    assert [(pair["chosen"], pair["rejected"]) for pair in found] == [
        (" shines.", " drags."), (" is odd.", " drags."), (" shines.", " is odd.")]
    assert {pair["prompt"] for pair in found} == {"The plot"}


def test_instruction_is_a_message_and_its_completions_are_answers(converted):
    assert converted(jsonl(ULTRAFEEDBACK), "--labels", "argmax") == [GREETING]


def test_scores_of_the_row_come_before_those_inside(converted):
    assert converted(jsonl(ULTRAFEEDBACK | dict(scores=[2, 1])), "--labels", "argmax")[0]["chosen"] == " What?"


@pytest.mark.parametrize("gap", [-1.5, 0.0, 0.4, 3.0])
def test_labels_are_drawn_from_bradley_terry(gap, converted):
    """y_1 wins with probability sigmoid(r_1 - r_2), within four standard errors of 10,000 draws"""
    row, n, p = dict(prompt="x", completions=["1", "2"], scores=[7 + gap, 7]), 10_000, 1 / (1 + math.exp(-gap))
    wins = sum(pair["chosen"] == "1" for pair in converted(jsonl(row) * n))
    assert abs(wins / n - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("score", [1e3, 1.7e308])
def test_labels_of_huge_scores_are_certain(score, converted):
    row = dict(prompt="x", completions=["1", "2"], scores=[-score, score])
    assert {pair["chosen"] for pair in converted(jsonl(row) * 100)} == {"2"}


def test_labels_are_the_same_for_the_same_seed(converted):
    file = jsonl(*[SCORED | dict(scores=[0, 0, 0])] * 20)
    assert converted(file) == converted(file, "--seed", "0") != converted(file, "--seed", "1")


def test_identical_completions_and_ties_are_counted(converted, capsys):
    """Scores 1, 1, 1, 0 of a, a, b, c  =>  one pair of identical completions, two ties, three pairs"""
    row = dict(prompt="x", completions=["a", "a", "b", "c"], scores=[1, 1, 1, 0])
    assert len(converted(jsonl(row, row), "--labels", "argmax")) == 6
    assert capsys.readouterr().out.endswith(
        "out.jsonl: 6 pairs of 2 rows; left out 2 pairs of identical completions and 4 ties\n")
    assert len(converted(jsonl(row))) == 5


# ----------------------------------------------------------------------------------------------------- files

def test_output_converts_to_itself(converted):
    rows = [*ROWS, HELLO | dict(chosen=' é "\u2028\x00\r\n 字 \U0001f600')]
    once = converted(jsonl(*rows))
    assert len(once) == 9
    assert converted(jsonl(*once)) == once


def test_file_of_long_lines_converts_to_itself(tmp_path):
    """Text that is not ASCII takes no more bytes in the output than in the input, which is read up to a limit"""
    first, second, third = (tmp_path / name for name in "123")
    first.write_text(json.dumps(HELLO | dict(chosen="字" * (convert.LIMIT // 4)), ensure_ascii=False), encoding="utf-8")
    assert convert.main([str(first), str(second)]) == convert.main([str(second), str(third)]) == 0
    assert second.read_bytes() == third.read_bytes()


def test_array_blank_lines_carriage_returns_and_a_byte_order_mark_are_read(converted):
    lines = converted(jsonl(*ROWS))
    assert converted(json.dumps(ROWS).encode()) == lines
    assert converted(b"\xef\xbb\xbf\r\n " + json.dumps(ROWS, indent=1).encode()) == lines
    assert converted(b"\xef\xbb\xbf" + jsonl(*ROWS).replace(b"\n", b"\r\n\r\n")) == lines


def test_pipe_is_read(tmp_path):
    """As in a shell's <(zcat in.jsonl.gz)"""
    source, end = os.pipe()
    os.write(end, jsonl(HELLO))
    os.close(end)
    assert convert.main([f"/dev/fd/{source}", str(tmp_path / "out.jsonl")]) == 0
    os.close(source)
    assert json.loads((tmp_path / "out.jsonl").read_text()) == HELLO


def test_triplets_of_this_project_convert(tmp_path, converted):
    triplets = [HELLO | dict(prompt_ids=[1], chosen_ids=[2], rejected_ids=[3], reward_chosen=1.0, reward_rejected=0.0,
                             weight=1.0, number=0)]
    data.write_triplets(triplets, tmp_path / "triplets.jsonl")
    content = (tmp_path / "triplets.jsonl").read_bytes()
    (tmp_path / "triplets.jsonl").unlink()
    assert converted(content) == [HELLO]


# ----------------------------------------------------------------------------------------------------- bad input

def without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


def second(*rows) -> bytes:
    """A good first line, so that the bad one is the second."""
    return jsonl(HELLO, *rows)


def answers(**changes) -> dict:
    return SCORED | changes


BAD = {     # what is wrong: the file's bytes, and what the line says after the file's name
    "empty file": (b"", ": no pairs (0 rows"),
    "blank lines": (b"\n \n", ": no pairs (0 rows"),
    "empty array": (b"[]", ": no pairs (0 rows"),
    "malformed JSON": (jsonl(HELLO) + b'{"prompt": \n', ", line 2: malformed JSON (Expecting value"),
    "malformed array": (b'[{"prompt": 1},]', ": malformed JSON ("),
    "array not closed": (b"[" + jsonl(HELLO), ": malformed JSON ("),
    "array and more": (b"[] []", ": malformed JSON (Extra data"),
    "two objects on a line": (b"\n" + jsonl(HELLO).strip() * 2, ", line 2: malformed JSON (Extra data"),
    "nested too deeply": (b'{"a":' * 100_000, ", line 1: JSON nested too deeply"),
    "invalid UTF-8": (jsonl(HELLO) + b'{"prompt": "\xff"}', ", line 2: byte 13 is not UTF-8"),
    "gzip": (b"\x1f\x8b\x08\x00", ", line 1: byte 2 is not UTF-8"),
    "UTF-16": (jsonl(HELLO).decode().encode("utf-16"), ", line 1: byte 1 is not UTF-8"),
    "UTF-8 in an array": (b'["\xff"]', ": byte 3 is not UTF-8"),
    "long line": (jsonl(HELLO) + b" " * convert.LIMIT + jsonl(HELLO), ", line 2: longer than 4,000,000 bytes"),
    "not an object": (second([1]), ", line 2: not an object"),
    "item not an object": (json.dumps([HELLO, "text"]).encode(), ", item 2: not an object"),
    "null": (second(None), ", line 2: not an object"),
    "no keys": (second({}), ", line 2: no chosen and rejected, and no list"),
    "no prompt": (second(without(HELLO, "prompt")), ", line 2: chosen and rejected share no turn"),
    "no chosen": (
        second(without(HELLO, "chosen")),
        ", line 2: a row of no known shape (prompt str, chosen missing, rejected str)"),
    "no rejected": (
        second(without(WHOLE, "rejected")),
        ", line 2: a row of no known shape (prompt missing, chosen list, rej"),
    "rejected is null": (second(HELLO | dict(rejected=None)), ", line 2: a row of no known shape"),
    "prompt is a number": (second(HELLO | dict(prompt=3)), ", line 2: a row of no known shape (prompt float,"),
    "chosen is true": (second(HELLO | dict(chosen=True)), ", line 2: a row of no known shape (prompt str, chosen bool"),
    "text and messages": (second(HELLO | dict(chosen=messages("a"))), ", line 2: a row of no known shape"),
    "empty prompt": (second(HELLO | dict(prompt="")), ", line 2: prompt is empty"),
    "blank prompt": (second(HELLO | dict(prompt=" \n")), ", line 2: prompt is empty"),
    "empty chosen": (second(HELLO | dict(chosen="")), ", line 2: chosen is empty"),
    "blank rejected": (second(HELLO | dict(rejected="\t")), ", line 2: rejected is empty"),
    "identical": (second(HELLO | dict(chosen=" drags.")), ", line 2: chosen and rejected are identical"),
    "half a character": (second(HELLO | dict(chosen="\ud83d")), ", line 2: chosen holds half of a surrogate pair"),
    "no messages": (second(CONVERSATION | dict(prompt=[])), ", line 2: prompt is no list of messages"),
    "a message is text": (second(CONVERSATION | dict(chosen=["Hello."])), ", line 2: chosen is no list of messages"),
    "unknown role": (
        second(CONVERSATION | dict(prompt=[dict(role="tool\n", content="a")])),
        r", line 2: unknown role 'tool\n' in p"),
    "no role": (second(CONVERSATION | dict(prompt=[dict(content="a")])), ", line 2: unknown role None in prompt"),
    "role is a list": (
        second(CONVERSATION | dict(prompt=[dict(role=[], content="a")])),
        ", line 2: unknown role [] in prompt"),
    "no content": (
        second(CONVERSATION | dict(rejected=[dict(role="assistant")])),
        ", line 2: a message of rejected is missing"),
    "content is a list": (
        second(CONVERSATION | dict(prompt=[dict(role="user", content=[])])),
        ", line 2: a message of prompt is not text"),
    "empty content": (second(CONVERSATION | dict(prompt=messages(""))), ", line 2: a message of prompt is empty"),
    "user answers": (
        second(CONVERSATION | dict(chosen=messages("a"))),
        ", line 2: chosen or rejected does not begin with an assistant"),
    "identical answers": (
        second(CONVERSATION | dict(chosen=CONVERSATION["rejected"])),
        ", line 2: chosen and rejected are identical"),
    "no shared message": (
        second(WHOLE | dict(chosen=messages("Ho!", "Hello."))),
        ", line 2: chosen and rejected share no turn"),
    "answers without a prompt": (
        second(without(CONVERSATION, "prompt")),
        ", line 2: chosen and rejected share no turn"),
    "no shared turn": (
        second(dict(chosen="\n\nHuman: a\n\nAssistant: c", rejected="\n\nHuman: b\n\nAssistant: c")),
        ", line 2: chosen and rejected share no turn"),
    "transcript without an answer": (
        second(TRANSCRIPTS | dict(rejected=GREETING["prompt"])),
        ", line 2: rejected is empty"),
    "identical transcripts": (
        second(TRANSCRIPTS | dict(rejected=TRANSCRIPTS["chosen"])),
        ", line 2: chosen and rejected are identical"),
    "completions are text": (second(answers(completions="text")), ", line 2: no chosen and rejected, and no list of 2"),
    "one completion": (
        second(answers(completions=[" a"], scores=[1])),
        ", line 2: no chosen and rejected, and no list of 2"),
    "101 completions": (
        second(answers(completions=[" a"] * 101, scores=[1] * 101)),
        ", line 2: no chosen and rejected, and no list of 2 to 100"),
    "a completion is a number": (second(answers(completions=[" a", 1, " b"])), ", line 2: a completion is not text"),
    "a completion is null": (second(answers(completions=[" a", None, " b"])), ", line 2: a completion is missing"),
    "a completion without text": (second(answers(completions=[{}, {}, {}])), ", line 2: a completion is missing"),
    "an empty completion": (second(answers(completions=[" a", "", " b"])), ", line 2: a completion is empty"),
    "no scores": (second(without(SCORED, "scores")), ", line 2: a score is missing"),
    "scores are a number": (second(answers(scores=3)), ", line 2: scores is no list of 3 numbers"),
    "too few scores": (second(answers(scores=[1, 2])), ", line 2: scores is no list of 3 numbers"),
    "NaN": (second(answers(scores=[1, 2, math.nan])), ", line 2: a score is missing, or not a finite number"),
    "infinite": (second(answers(scores=[1, -math.inf, 2])), ", line 2: a score is missing, or not a finite number"),
    "larger than any float": (
        second(answers(scores=[1, 10 ** 400, 2])),
        ", line 2: a score is missing, or not a finite number"),
    "endless digits": (
        jsonl(HELLO) + b'{"scores": ' + b"9" * 5000 + b"}",
        ", line 2: no chosen and rejected, and no list"),
    "a score is text": (second(answers(scores=[1, "2", 3])), ", line 2: a score is missing, or not a finite number"),
    "a score is true": (second(answers(scores=[1, True, 3])), ", line 2: a score is missing, or not a finite number"),
    "scores but no prompt": (
        second(without(SCORED, "prompt")),
        ", line 2: a message of prompt or instruction is missing"),
    "empty prompt of completions": (second(answers(prompt="")), ", line 2: prompt is empty"),
    "all identical": (
        jsonl(answers(completions=[" a"] * 3)),
        ": no pairs (1 rows, 3 pairs of identical completions, 0 ties)"),
    "all tied": (jsonl(answers(scores=[1, 1, 1])), ": no pairs (1 rows, 0 pairs of identical completions, 3 ties)"),
}


def refused(capsys, folder, *argv) -> str:
    """The one line that refuses argv, which changes no file of the folder."""
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert convert.main([str(arg) for arg in argv]) == 2
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"convert\.py: [^\n]+; [^\n]+\n", err)
    return err.removeprefix("convert.py: ")


@pytest.mark.parametrize("content, says", BAD.values(), ids=BAD)
def test_bad_content_is_one_line_that_says_where_and_what_to_do(content, says, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    assert refused(capsys, tmp_path, source, tmp_path / "out", "--labels", "argmax").startswith(f"{source}{says}")


def test_long_array_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "ARRAY_LIMIT", 10)
    (tmp_path / "in").write_bytes(json.dumps([HELLO]).encode())
    assert "an array above 10 bytes" in refused(capsys, tmp_path, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("source, says", [
    ("missing", "cannot be read (No such file"), (".", "cannot be read (Is a directory"),
    ("in/in", "cannot be read (Not a directory"), ("/dev/zero", "line 1: longer than")])        # which is endless
def test_source_that_cannot_be_read_is_one_line(source, says, tmp_path, capsys):
    (tmp_path / "in").write_bytes(jsonl(HELLO))
    assert says in refused(capsys, tmp_path, tmp_path / source, tmp_path / "out")


def test_source_without_permission_is_one_line(tmp_path, capsys, monkeypatch):
    """As a user would see it: permissions do not bind an administrator"""
    def denied(path, *_):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(convert, "open", denied, raising=False)
    with pytest.raises(files.BadInput, match="in: cannot be read .Permission denied."):
        next(convert.lines(tmp_path / "in"))


def test_nothing_is_overwritten(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(jsonl(HELLO))
    out.write_text("dear")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("out", "in", "dangling", ".", ".."):
        assert "exists already" in refused(capsys, tmp_path, source, tmp_path / name)


@pytest.mark.parametrize("out", ["missing/out", "in/out", "x" * 256])
def test_out_that_cannot_be_written_is_one_line(out, tmp_path, capsys):
    (tmp_path / "in").write_bytes(jsonl(HELLO))
    assert "cannot be written" in refused(capsys, tmp_path, tmp_path / "in", tmp_path / out)


def test_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")
    (tmp_path / "in").write_bytes(jsonl(HELLO))
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refused(capsys, tmp_path, tmp_path / "in", tmp_path / "out")


def test_interruption_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt
    (tmp_path / "in").write_bytes(jsonl(HELLO))
    monkeypatch.setattr(os, "fsync", interrupt)
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 130
    assert os.listdir(tmp_path) == ["in"] and "interrupted" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- anything at all

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))
names = st.sampled_from("prompt chosen rejected instruction completions scores role content".split())
changes = st.dictionaries(names, values, max_size=2)
changed_rows = st.builds(lambda row, changed: row | changed, st.sampled_from(ROWS), changes)


@st.composite
def mutated(draw) -> bytes:
    """A good file of which a stretch of bytes is replaced."""
    file = jsonl(*ROWS)
    start = draw(st.integers(0, len(file)))
    return file[:start] + draw(st.binary(max_size=4)) + file[start + draw(st.integers(0, 8)):]


@settings(max_examples=300)
@given(content=st.binary() | mutated() | st.lists(changed_rows | values, max_size=3).map(lambda rows: jsonl(*rows))
       | st.lists(changed_rows | values, max_size=3).map(lambda rows: json.dumps(rows).encode()))
@example(content=jsonl(*ROWS))
def test_any_bytes_are_converted_or_refused_in_one_line(content, tmp_path_factory):
    """Success, with standard rows in one new file; or exit code 2, with no file; and one line either way"""
    folder = tmp_path_factory.mktemp("any")
    (folder / "in").write_bytes(content)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = convert.main([str(folder / "in"), str(folder / "out")])
    assert len(said.getvalue().splitlines()) == 1 and said.getvalue().endswith("\n")
    assert (folder / "in").read_bytes() == content
    if code == 2:
        assert os.listdir(folder) == ["in"]
    else:
        assert code == 0 and sorted(os.listdir(folder)) == ["in", "out"]
        for line in (folder / "out").read_bytes().splitlines():
            pair = json.loads(line)
            assert list(pair) == ["prompt", "chosen", "rejected"] and pair["chosen"] != pair["rejected"]
            assert all(text.strip() for text in pair.values())
