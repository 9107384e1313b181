"""A batch on disk: parts that cover the file, rows that say what is wrong with them, answers that are the engine's."""

import json

import pytest
from tiny_adapters import CARDS, MAIL, SHORTEN, TEXTS, tiny_prompt_format

from multilora.errors import DataError, RequestError, UnknownTaskError
from multilora.registry import CHAMPION
from orchestrator.batch import Adapter, answered, resolve
from orchestrator.batch_files import (
    MAX_LINE_BYTES,
    Origin,
    PartsFolder,
    beside,
    item_of,
    lines_of,
    look_through,
    read_row,
    write_part,
)
from orchestrator.controller import PYFUNC_CODE
from serve.engine import Engine, Work

ORIGIN = Origin("0" * 64, 2, "cards@1", "d" * 64)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8, 9, 40])
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("max_parts", [1, 3, 100])
def test_the_parts_are_the_file_in_order(tmp_path, num_rows, end, max_parts):
    lines = [f"{number} äöü {'x' * (number % 5)}" for number in range(num_rows)]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(lines) + end, encoding="utf-8")
    found = look_through(file, rows_per_part=2, max_parts=max_parts)
    assert found.num_rows == num_rows
    assert len(found.parts) <= max_parts
    parts = [lines_of(file, part.start, part.end) for part in found.parts]
    assert [line.decode() for part in parts for line in part] == lines
    assert [part.number for part in found.parts] == list(range(len(found.parts)))
    assert [lines[part.first_line - 1] for part in found.parts] == [part[0].decode() for part in parts]
    assert found == look_through(file, rows_per_part=2, max_parts=max_parts)


def test_empty_lines_are_rows(tmp_path):
    file = tmp_path / "in.jsonl"
    for content, num_rows in ((b"\n", 1), (b"\n\n", 2), (b"a\n\nb", 3), (b"a\r\nb\r\n", 2)):
        file.write_bytes(content)
        found = look_through(file)
        assert (found.num_rows, len(lines_of(file, 0, found.parts[-1].end))) == (num_rows, num_rows)


def test_what_is_no_input_file_is_refused(tmp_path):
    file = tmp_path / "in.jsonl"
    with pytest.raises(DataError, match="cannot be read: No such file"):
        look_through(file)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        look_through(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="has no rows"):
        look_through(file)
    file.write_bytes(b"{}\n" + b"x" * (MAX_LINE_BYTES + 1))
    with pytest.raises(DataError, match="line 2 has more than 16777216 bytes"):
        look_through(file)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "the line is empty"),
        (b" \r", "the line is empty"),
        (b"{", "the line is no JSON: Expecting property name"),
        (b"\xff\xfe", "the line is no JSON: 'utf-8'"),
        (b'{"text": NaN}', "the line is no JSON: NaN is no JSON number"),
        (b"[" * 100_000, "the line is no JSON"),
        (b"[1]", "the line is no JSON object"),
        (b'"a text"', "the line is no JSON object"),
        (b"null", "the line is no JSON object"),
        (b"{}", "the row lacks text; it has nothing"),
        (b'{"txt": "a", "id": 3}', "the row lacks text; it has id, txt"),
        (b'{"text": null}', "text is no text: null"),
        (b'{"text": ["a"]}', 'text is no text: ["a"]'),
        (b'{"text": " "}', "text is empty"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_bad_row_says_what_is_wrong(line, said):
    with pytest.raises(DataError) as refused:
        item_of(read_row(line), tiny_prompt_format(CARDS, "encoder"))
    assert said in str(refused.value)


def test_a_row_gives_the_columns_and_may_have_more():
    cards, mail = tiny_prompt_format(CARDS, "encoder"), tiny_prompt_format(MAIL, "encoder")
    assert item_of(read_row(b'\xef\xbb\xbf{"text": "a", "id": 3}'), cards) == {"text": "a"}
    assert item_of({"subject": "", "body": "b", "text": "c"}, mail) == {"subject": "", "body": "b"}
    with pytest.raises(DataError, match="the row lacks subject; it has body"):
        item_of({"body": "b"}, mail)
    with pytest.raises(DataError, match="subject and body are empty"):
        item_of({"subject": "", "body": " "}, mail)


def test_no_field_of_a_row_is_lost():
    assert beside({"text": "a", "id": 3}, {"label": "x"}) == {"text": "a", "id": 3, "label": "x"}
    assert beside({"label": "gold", "input_label": "i"}, {"label": "x"}) == {
        "label": "x", "input_label": "i", "input_input_label": "gold"}  # fmt: skip
    assert beside({"error": "theirs"}, {"error": "ours"}) == {"error": "ours", "input_error": "theirs"}


def test_parts_are_joined_in_order_and_kept_for_the_same_origin_alone(tmp_path):
    parts = PartsFolder(tmp_path / "out.jsonl")
    assert parts.open(ORIGIN) == ""
    assert write_part(parts.folder, 10, [{"n": 3}, {"error": "bad"}]) == (2, 1)
    write_part(parts.folder, 9, [{"n": 1}, {"n": "ä"}, {"n": "\ud800"}])
    (parts.folder / ".000011-5-0.jsonl.77.88").write_text("half", encoding="utf-8")
    again = PartsFolder(tmp_path / "out.jsonl")
    assert again.open(ORIGIN) == ""
    assert {number: found[:2] for number, found in again.finished().items()} == {9: (3, 0), 10: (2, 1)}
    again.join()
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == ['{"n": 1}', '{"n": "ä"}', r'{"n": "\ud800"}', '{"n": 3}', '{"error": "bad"}']
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]

    again.open(ORIGIN)
    write_part(again.folder, 0, [{}])
    said = PartsFolder(tmp_path / "out.jsonl").open(Origin("1" * 64, 2, "cards@2", "d" * 64))
    assert said == "an earlier batch into out.jsonl had another input_sha256 and adapter"
    assert again.finished() == {}


@pytest.mark.parametrize("task", [CARDS, MAIL, SHORTEN])
def test_rows_get_the_engines_answers_and_a_bad_one_stops_nobody(fresh_base, tiny_adapter, task):
    artifact = tiny_adapter("seq2seq", task)
    engine = Engine(fresh_base("seq2seq"), num_slots=1, max_rank=8)
    key = engine.bind(artifact, 7)
    columns = tiny_prompt_format(task, "seq2seq").columns
    items = [dict.fromkeys(columns, text * 40) for text in TEXTS if text]
    lines = [json.dumps({"id": number, "label": "gold", **item}).encode() for number, item in enumerate(items)]
    rows = answered(engine, key, Adapter("", artifact.digest, 7), [b"nonsense", *lines, b""], first_line=101)
    assert rows[0]["error"].startswith("line 101: the line is no JSON: Expecting value")
    assert rows[-1] == {"error": "line 109: the line is empty"}
    answers = engine.classify([Work(key, engine.prompt(key, item)) for item in items])
    for number, (row, answer) in enumerate(zip(rows[1:-1], answers, strict=True)):
        assert (row["id"], row["version"], row["digest"]) == (number, 7, artifact.digest)
        assert row["is_truncated"] == answer.is_truncated
        if task is SHORTEN:
            assert (row["text"], row["is_cut_off"]) == (answer.label, answer.is_cut_off)
            assert row["input_text"] == items[number]["text"]
        else:
            assert (row["label"], row["input_label"]) == (answer.label, "gold")
            assert list(row["probabilities"].values()) == pytest.approx(answer.probabilities, abs=1e-6)


@pytest.fixture
def two_versions(registry, tiny_adapter):
    """Task `batched` with two versions, the first of them champion until the test ends."""
    for seed in (0, 1):
        artifact = tiny_adapter("encoder", CARDS, seed)
        run = registry.start_run("batched", artifact.digest[:16], {}, {})
        version = registry.register(run, artifact.folder, artifact.digest, PYFUNC_CODE, "", {})
        if seed == 0:
            registry.set_alias(version, CHAMPION)
    yield
    registry.drop_alias("batched", CHAMPION)


def test_the_version_is_the_champion_or_the_one_that_is_named(registry, two_versions):
    assert resolve(registry, "batched", None).key == "batched@1"
    assert resolve(registry, "batched", 2).key == resolve(registry, "batched@2", None).key == "batched@2"
    with pytest.raises(UnknownTaskError, match=r"nobody has no champion; champions: .*batched"):
        resolve(registry, "nobody", None)
    with pytest.raises(UnknownTaskError, match="batched has no version 3; its versions: 1, 2"):
        resolve(registry, "batched@3", None)
    for task, version in (("batched@1", 1), ("batched@", None), ("batched@x", None)):
        with pytest.raises(RequestError, match="name a version as"):
            resolve(registry, task, version)
