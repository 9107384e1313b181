"""Counts of live answers: what replicas write, what readers add up, and what is said of it."""

import json
import logging
from collections import Counter

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.live import live_rows, read_counts
from orchestrator.paired import wilson
from serve.live_counts import SAVE_EVERY_S, LiveCounts, Pair, PairCounts, SideCounts, table_key

pytestmark = pytest.mark.anyio
SHADOW = Pair("mood", 3, 4, "shadow")
CANARY = Pair("mood", 3, 4, "canary")


@pytest.fixture
def anyio_backend():
    return "asyncio"


def side(**labels):
    """Answers with these labels, each with the probability 0.75, in requests of one input and half a second."""
    total = sum(labels.values())
    return SideCounts(num_requests=total, num_inputs=total, seconds=0.5 * total, confidence=0.75 * total, labels=Counter(labels))


def shadow(num_agreed, num_flips):
    """Glad and glad, or glad and angry."""
    return PairCounts(
        champion=side(glad=num_agreed + num_flips),
        challenger=side(glad=num_agreed, angry=num_flips),
        num_agreed=num_agreed,
        difference=0.25 * (num_agreed + num_flips),
        table=Counter({table_key("glad", "glad"): num_agreed, table_key("glad", "angry"): num_flips}),
    )


async def written(folder, **pairs):
    """One replica's file: written(folder, SHADOW=shadow(1, 0))."""
    counts = LiveCounts(folder)
    for name, found in pairs.items():
        pair = {"SHADOW": SHADOW, "CANARY": CANARY, "OLDER": Pair("mood", 2, 3, "shadow")}[name]
        for entry in ("champion", "challenger"):
            setattr(counts.of(pair), entry, getattr(found, entry))
        for entry in ("num_errors", "num_dropped", "num_agreed", "difference", "table"):
            setattr(counts.of(pair), entry, getattr(found, entry))
    await counts.save(at_once=True)
    return counts


def test_counts_add_up_field_by_field():
    assert shadow(3, 1) + shadow(5, 0) == shadow(8, 1)
    assert PairCounts() + shadow(3, 1) == shadow(3, 1)
    assert PairCounts(num_errors=2, num_dropped=1) + PairCounts(num_errors=1) == PairCounts(num_errors=3, num_dropped=1)


async def test_replicas_and_restarts_neither_lose_nor_count_twice(tmp_path):
    first = await written(tmp_path, SHADOW=shadow(3, 1), CANARY=PairCounts(num_errors=1))
    await written(tmp_path, SHADOW=shadow(5, 0))  # another replica
    await written(tmp_path, OLDER=shadow(1, 1))  # and one that was started again
    first.of(SHADOW).num_dropped += 7
    await first.save(at_once=True)
    await first.save(at_once=True)  # nothing new
    expected = shadow(8, 1)
    expected.num_dropped = 7
    found = read_counts(tmp_path)
    assert found == {SHADOW: expected, CANARY: PairCounts(num_errors=1), Pair("mood", 2, 3, "shadow"): shadow(1, 1)}
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert {file.suffix for file in files} == {".json"}


async def test_a_file_is_written_every_few_seconds_at_most(tmp_path):
    counts = LiveCounts(tmp_path)
    await counts.save()
    assert not list(tmp_path.iterdir())  # there is nothing to write
    counts.of(CANARY).num_errors += 1
    await counts.save()
    counts.of(CANARY).num_errors += 1
    await counts.save()
    assert read_counts(tmp_path)[CANARY].num_errors == 1
    counts._saved_at -= SAVE_EVERY_S
    await counts.save()
    assert read_counts(tmp_path)[CANARY].num_errors == 2


async def test_what_cannot_be_read_or_written_costs_nothing_else(tmp_path, caplog):
    await written(tmp_path, SHADOW=shadow(3, 1))
    for name, content in (("cut.json", b'[[{"task": "mo'), ("other.json", b'{"a": 1}'), ("bytes.json", b"\xff\xfe")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "half.part").write_bytes(b"[")
    with caplog.at_level(logging.WARNING):
        assert read_counts(tmp_path) == {SHADOW: shadow(3, 1)}
    assert all(name in caplog.text for name in ("cut.json", "other.json", "bytes.json"))
    counts = LiveCounts(tmp_path / "cut.json" / "folder")  # no folder can be made there
    counts.of(SHADOW).num_dropped += 1
    await counts.save(at_once=True)
    assert "live counts not written" in caplog.text
    assert read_counts(tmp_path / "nowhere") == {}


async def test_a_shadow_is_told_as_agreement_with_an_interval(tmp_path):
    await written(tmp_path, SHADOW=shadow(961, 39))
    (row,) = live_rows(tmp_path)
    low, high = wilson(961, 1000)
    assert row["sentence"] == (
        f"In shadow, mood@3 and challenger mood@4 agreed on 961 of 1,000 inputs ({100 * low:.1f}-{100 * high:.1f} %)."
    )
    assert row["agreement"] == {"count": 961, "of": 1000, "share": 0.961, "interval": [low, high]}
    assert row["table"] == [
        {"champion": "glad", "challenger": "angry", "count": 39},
        {"champion": "glad", "challenger": "glad", "count": 961},
    ]
    assert row["mean_difference"] == 0.25
    for name in ("champion", "challenger"):
        assert (row[name]["mean_probability"], row[name]["mean_s"]) == (0.75, 0.5)
    assert json.loads(json.dumps(row, allow_nan=False)) == row


async def test_a_canary_is_told_by_the_label_that_differs_most(tmp_path):
    counts = PairCounts(champion=side(glad=60, angry=40), challenger=side(glad=2, angry=6), num_errors=2)
    await written(tmp_path, CANARY=counts)
    (row,) = live_rows(tmp_path)
    assert row["sentence"] == (
        "As a canary, mood@4 answered 8 of 108 requests, champion mood@3 the others; they differ most in angry: 75.0 % "
        "(40.9-92.9 %) of its inputs, 40.0 % (30.9-49.8 %) of the champion's. mood@4 failed 2 of 10 requests (5.7-51.0 %), "
        "which the champion answered."
    )
    assert (row["agreement"], row["table"], row["mean_difference"]) == (None, [], None)


async def test_what_is_not_there_yet_is_not_told_as_a_number(tmp_path):
    await written(tmp_path, SHADOW=PairCounts(num_errors=1, num_dropped=4), CANARY=PairCounts(champion=side(glad=3)))
    canary, compared = live_rows(tmp_path)
    assert canary["sentence"] == "As a canary, mood@4 answered 0 of 3 requests, champion mood@3 the others."
    assert compared["sentence"] == (
        "In shadow, mood@3 and challenger mood@4 were not compared yet. mood@4 failed 1 of 1 requests (20.7-100.0 %), which the "
        "champion answered. 4 inputs were not compared, for want of idle time."
    )


async def test_the_report_has_the_newest_challenger_alone(tmp_path):
    await written(tmp_path, SHADOW=shadow(3, 1), OLDER=shadow(1, 0), CANARY=PairCounts(num_errors=1))
    assert [(row["challenger"]["system"], row["mode"]) for row in live_rows(tmp_path)] == [
        ("mood@4", "canary"), ("mood@4", "shadow"), ("mood@3", "shadow"),
    ]  # fmt: skip
    assert {row["challenger"]["system"] for row in live_rows(tmp_path, is_newest_only=True)} == {"mood@4"}


async def test_the_command_prints_it(tmp_path):
    arguments = ["live", "--workspace", str(tmp_path)]
    assert "no challenger was asked yet" in CliRunner().invoke(app, arguments).output
    await written(tmp_path / "live", SHADOW=shadow(3, 1))
    output = CliRunner().invoke(app, arguments).output
    assert "mood@3 and challenger mood@4 agreed on 3 of 4 inputs (30.1-95.4 %)." in output
    assert "1 x glad -> angry" in output
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output) == live_rows(tmp_path / "live")


@pytest.mark.parametrize(
    "given", [["mood"], ["mood=5"], ["mood=0%"], ["mood=100%"], ["mood=-1%"], ["mood=canary"], ["Mood=5%"], ["a=5%", "a=shadow"]]
)
def test_challengers_that_are_no_share_are_refused(given, tmp_path):
    arguments = [word for text in given for word in ("--challenger", text)]
    result = CliRunner().invoke(app, ["serve", "--workspace", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert f"--challenger {given[-1]}" in " ".join(result.output.replace("│", " ").split())
