"""Laws of the report's other elements and faces: history, suspects, errors by kind; JUnit, Markdown, flips; hostile text."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_report import CREATED, FACTS, eval_report, held_back, judged, plain, render, same, unproven, worse

from multilora.spec import GateSpec
from orchestrator.comparison import Evidence
from orchestrator.eval_report import EvalReport, Graded
from orchestrator.history import Cell, CellState, PromotionEvent
from orchestrator.judge import Outcome, Release, judge
from orchestrator.live import live_rows
from orchestrator.paired import mcnemar_midp
from orchestrator.report import TaskOutcome, build_report
from orchestrator.report_page import summary_rows, write_report
from orchestrator.report_text import markdown
from orchestrator.report_text import plain as escaped
from orchestrator.search import Found
from serve.live_counts import LiveCounts, Pair, table_key


def event(number: int, **values: tuple[CellState, float | None]) -> PromotionEvent:
    cells = {task: Cell(state, f"{task}@{number}", value=value, gate_fingerprint="g") for task, (state, value) in values.items()}
    return PromotionEvent(f"e{number}", "submit", f"2026-11-2{number}T10:00:00+00:00", "ana", "", "", cells)


def rechecked(task: str, gold: list[str], before: list[str], now: list[str], policy: Any = "balanced") -> TaskOutcome:
    """A champion that was evaluated again because what it runs on changed."""
    outcome = judged(gold, now, before, task, f"{task}@2", policy=policy)
    return replace(outcome, state="rechecked", champion=f"{task}@2", changed=("engine",))


def spread_drop(num_tasks: int, policy: Any = "balanced") -> tuple[list[TaskOutcome], Release]:
    """Tasks that lost a little each: none shows it alone, together they do."""
    gold = ["a", "b"] * 100
    evidences = []
    for number in range(num_tasks):
        now = ["b", "a", "b", *gold[3:]]
        new, old = eval_report(f"t{number}@2", gold, now), eval_report(f"t{number}@1", gold, gold)
        evidences.append(Evidence(f"t{number}", GateSpec(min=0.5, margin=0.05, policy=policy), new, old))
    release = judge(evidences)
    outcomes = []
    for found in evidences:
        verdict, new, old = release.verdicts[found.task], found.candidate, found.reference
        champion = new.system if verdict.is_promoted else old.system
        numbers = ("accuracy", 0.5, 0.05, champion, new.system, old.system, verdict, new, old)
        outcomes.append(TaskOutcome(found.task, "", "judged", *numbers, policy=policy))
    return outcomes, release


FOUND = Found(9, 5, 1, {"learning_rate": 2e-3, "rank": 16, "epochs": 12}, False, "accuracy", 0.84, 0.81, 38)


def cases(report: dict[str, Any], folder: Path) -> dict[str, str]:
    """What CI sees: kind of every test case by class name."""
    write_report(report, folder)
    root = ElementTree.parse(folder / "junit.xml").getroot()
    found = {case.attrib["classname"]: next((part.tag for part in case), "pass") for case in root.iter("testcase")}
    assert int(root.attrib["tests"]) == len(found)
    for count, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(root.attrib[count]) == list(found.values()).count(kind)
    return found


@pytest.mark.parametrize("outcome", [same(), worse()], ids=["promoted", "refused"])
def test_every_face_says_what_a_search_chose_and_that_its_number_is_optimistic(outcome: TaskOutcome, tmp_path: Path) -> None:
    report = build_report([replace(outcome, search=FOUND)], CREATED, FACTS)
    (task,) = report["tasks"]
    assert task["search"]["chosen"] == {"learning_rate": 2e-3, "rank": 16, "epochs": 12}
    assert (task["search"]["select"], task["search"]["own_select"]) == (0.84, 0.81)
    assert task["search"]["sentence"] == (
        "search: 9 candidates (5 ended early, 1 failed), chosen learning_rate 0.002, rank 16, epochs 12 on select accuracy "
        "0.840; spec's own 0.810. The best of several on 38 select examples is an optimistic number; the gate judges."
    )
    assert render(report, tmp_path).text.count("spec's own 0.810") >= 1
    assert markdown(report).count(escaped("spec's own 0.810")) == 1
    assert task["search"]["sentence"] in summary_rows(report)[0].note
    assert build_report([outcome], CREATED, FACTS)["tasks"][0]["search"] is None


def test_a_drop_everywhere_blocks_and_is_said() -> None:
    outcomes, release = spread_drop(4)
    report = build_report(outcomes, CREATED, FACTS, release)
    assert report["outcome"] == Outcome.BLOCK
    assert report["pooled"] == {
        "tasks": ["t0", "t1", "t2", "t3"],
        "num_losses": 12,
        "num_wins": 0,
        "p": pytest.approx(2**-13),
        "is_drop": True,
    }
    assert {task["decision"] for task in report["tasks"]} == {"held back"}
    assert "the 4 changed tasks together got worse (12 lost, 0 won, p < 0.001)" in report["sentence"]
    assert "look for what they have in common" in report["next_step"]


def test_an_advisory_gate_reports_and_does_not_block(tmp_path: Path) -> None:
    gold = ["a", "b"] * 20
    advised = judged(gold, ["a"] * 30 + gold[30:], gold, "free", "free@1", policy="advisory")
    report = build_report([advised, same()], CREATED, FACTS)
    assert (report["outcome"], report["tasks"][0]["decision"]) == (Outcome.CLEAR, "promoted against advice")
    assert "1 promoted against advice (free)" in report["sentence"]
    assert cases(report, tmp_path) == {"free": "skipped", "same": "system-out"}


@pytest.mark.parametrize(
    ("now", "decision", "outcome"),
    [
        (["a"] * 30 + ["a", "b"] * 5, "regressed in production", Outcome.BLOCK),
        (["b", *(["a", "b"] * 20)[1:]], "in doubt", Outcome.HOLD),
        (["a", "b"] * 20, "verified again", Outcome.CLEAR),
    ],
)
def test_a_champion_that_was_evaluated_again(now: list[str], decision: str, outcome: Outcome, tmp_path: Path) -> None:
    gold = ["a", "b"] * 20
    report = build_report([rechecked("mood", gold, gold, now)], CREATED, FACTS)
    assert (report["outcome"], report["tasks"][0]["decision"]) == (outcome, decision)
    assert decision in render(report, tmp_path).text
    advisory = build_report([rechecked("mood", gold, gold, now, "advisory")], CREATED, FACTS)
    assert advisory["outcome"] == Outcome.CLEAR


def test_an_error_of_the_release_never_passes() -> None:
    release = Release(Outcome.ERROR, {}, {"same": "other gate examples", "gone": "other scorer"}, (), (), 0, 0, 1.0)
    report = build_report([same()], CREATED, FACTS, release)
    assert report["outcome"] == Outcome.ERROR
    assert report["tasks"][0]["error"] == "other gate examples"
    assert "no comparison for gone" in report["sentence"]


def test_the_next_step_counts_the_examples_that_are_missing() -> None:
    report = build_report([held_back()], CREATED, FACTS)
    verdict = report["tasks"][0]["verdict"]
    assert verdict["num_more"] == verdict["examples_needed"] - 20
    assert f"held needs {verdict['num_more']:,} more" in report["next_step"]
    assert report["evidence"].startswith("held: 100.0 % → 95.0 %, \N{MINUS SIGN}5.0 points (90 % interval")
    assert "1 lost, 0 won of 20 gate examples" in report["evidence"]


def test_every_wrong_answer_has_its_kind() -> None:
    gold = ["a", "a", "b", "b", "b", "a"]
    labels = ("a", "b")
    other = judged(["yes", "no"], ["yes", "no"], ["yes", "no"], "other", "other@1")

    def report_of(system: str, answers: list[str]) -> EvalReport:
        return replace(eval_report(system, gold, answers), labels=labels)

    new, old = report_of("mood@2", ["a", "b", "yes", "garbage", "b", " A "]), report_of("mood@1", gold)
    verdict = judge([Evidence("mood", GateSpec(), new, old)]).verdicts["mood"]
    mood = TaskOutcome("mood", "", "judged", "accuracy", 0.0, 0.02, "mood@1", "mood@2", "mood@1", verdict, new, old)
    task = next(task for task in build_report([mood, other], CREATED, FACTS)["tasks"] if task["task"] == "mood")
    assert {row["kind"]: (row["reference"], row["candidate"]) for row in task["errors"]} == {
        "right": (6, 3), "another label": (0, 1), "another task's label": (0, 1), "outside every label set": (0, 1),
    }  # fmt: skip
    assert {(row["gold"], row["answer"], row["candidate"]) for row in task["confusions"]} == {
        ("a", "b", 1), ("b", "yes", 1), ("b", "garbage", 1),
    }  # fmt: skip


def test_labels_are_tested_together_and_decide_nothing() -> None:
    gold = ["a"] * 40 + ["b"] * 40 + ["c"] * 40
    now = ["b"] * 8 + ["a"] * 32 + ["c"] * 2 + ["b"] * 38 + ["c"] * 40
    report = build_report([judged(gold, now, gold)], CREATED, FACTS)
    rows = {row["label"]: row for row in report["tasks"][0]["labels"]}
    p_a, p_b = mcnemar_midp(8, 0), mcnemar_midp(2, 0)
    assert (rows["a"]["p_worse"], rows["b"]["p_worse"], rows["c"]["p_worse"]) == (p_a, p_b, None)
    assert rows["a"]["p_corrected"] == pytest.approx(2 * p_a)  # the smallest of two p values, times 2
    assert rows["b"]["p_corrected"] == pytest.approx(p_b)
    assert [row["label"] for row in report["suspects"]] == ["a"]


def test_leads_are_differences_of_scores() -> None:
    def one(system: str, answer: str, scores: tuple[float, ...]) -> EvalReport:
        return EvalReport("mood", system, "d", "g", ("a", "b", "c"), (Graded("1", "text", "a", answer, 0.5, scores),))

    new, old = one("mood@2", "b", (-2.0, -0.5, -3.0)), one("mood@1", "a", (-0.25, -1.25, -4.0))
    verdict = judge([Evidence("mood", GateSpec(), new, old)]).verdicts["mood"]
    outcome = TaskOutcome("mood", "", "judged", "accuracy", 0.0, 0.02, "mood@1", "mood@2", "mood@1", verdict, new, old)
    (flip,) = build_report([outcome], CREATED, FACTS)["flips"]
    assert (flip["candidate_lead"], flip["reference_lead"]) == (1.5, 1.0)  # over the right answer; over the runner-up
    assert flip["candidate_scores"] == [-2.0, -0.5, -3.0]


def test_all_flips_are_kept_whole(tmp_path: Path) -> None:
    gold = ["a"] * 80
    report = build_report([judged(gold, ["b"] * 80, gold, text="long " * 200)], CREATED, FACTS)
    write_report(report, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "flips.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 80
    assert all(len(line["text"]) > 1000 and line["task"] == "mood" and line["candidate"] == "mood@2" for line in lines)


def test_history_cells_say_how_they_are_known(tmp_path: Path) -> None:
    measured, carried, canary, missing = CellState.MEASURED, CellState.CARRIED, CellState.CANARY, CellState.MISSING
    events = [
        event(1, mood=(measured, 0.80), tone=(measured, 0.5)),
        event(2, mood=(measured, 0.90), tone=(carried, 0.5)),
        event(3, mood=(measured, 0.85), tone=(canary, 0.5), new=(missing, None)),
    ]
    report = build_report([same("mood")], CREATED, FACTS, None, events)
    rows = {row["task"]: row for row in report["history"]["tasks"]}
    assert [cell["change"] for cell in rows["mood"]["cells"]] == [None, pytest.approx(0.1), pytest.approx(-0.05)]
    assert [cell["state"] for cell in rows["tone"]["cells"]] == ["measured", "carried", "canary-verified"]
    assert rows["new"]["cells"] == [None, None, {"state": "missing", "version": "new@3", "value": None, "change": None}]
    assert (rows["mood"]["values"], rows["mood"]["best_ever"]) == ([0.8, 0.9, 0.85], 0.9)
    assert report["tasks"][0]["cell_state"] == "measured"
    assert (report["who"], report["event"], report["history"]["events"][-1]["outcome"]) == ("ana", "e3", "CLEAR")
    text = render(report, tmp_path).text
    assert "85.0 \N{MINUS SIGN}5.0" in text
    assert "50.0 ✓" in text
    assert all(metric["meaning"] in text for metric in report["history"]["summary"])


def test_the_cross_matrix_is_against_the_base_alone(tmp_path: Path) -> None:
    right = {"base": {"mood": 5, "tone": 4}, "mood@1": {"mood": 9, "tone": None}}
    matrix = {"base": "tiny", "created": "2026-11-21T10:00:00+00:00", "adapters": ["mood@1"], "tasks": ["mood", "tone"],
              "num_examples": {"mood": 10, "tone": 10}, "num_right": right,
              "forward_transfer": -0.125, "num_pairs": 1}  # fmt: skip
    report = build_report([same()], CREATED, FACTS, matrices=[matrix])
    base, mood = report["cross"][0]["rows"]
    assert base["cells"][1] == {"num_right": 4, "value": 0.4, "change": 0.0}
    assert mood["cells"] == [{"num_right": 9, "value": 0.9, "change": pytest.approx(0.4)}, None]
    text = render(report, tmp_path).text
    assert "Every adapter on every task" in text
    assert "Forward transfer: \N{MINUS SIGN}12.5 points" in text
    assert "mean over 1 ordered pairs" in text


def test_what_makes_a_verdict_less_sure_is_a_warning() -> None:
    outcome = replace(same(), num_consults=5, best_ever=1.0, contamination=("same-1 is a gate example of mood",))
    assert outcome.candidate_report is not None
    cut = tuple(replace(graded, is_truncated=True) for graded in outcome.candidate_report.answers[:3])
    answers = (*cut, *outcome.candidate_report.answers[3:])
    outcome = replace(outcome, candidate_report=replace(outcome.candidate_report, answers=answers))
    consults, truncated, contaminated = build_report([outcome], CREATED, FACTS)["tasks"][0]["warnings"]
    assert "judged 5 candidates" in consults
    assert truncated == "3 of 10 inputs were cut to fit max_length"
    assert contaminated == "same-1 is a gate example of mood"
    assert build_report([replace(same(), num_consults=4)], CREATED, FACTS)["tasks"][0]["warnings"] == []


def test_ci_sees_failures_skips_and_errors(tmp_path: Path) -> None:
    outcomes, release = spread_drop(2)
    outcomes += [worse(), held_back(), unproven(), same(), plain("v", "verified", "v@1"), plain("f", "failed", error="boom")]
    assert cases(build_report(outcomes, CREATED, FACTS, release), tmp_path) == {
        "worse": "failure", "held": "skipped", "unproven": "skipped", "f": "error", "t0": "skipped", "t1": "skipped",
        "same": "system-out", "v": "pass", "release": "failure",
    }  # fmt: skip


def test_every_face_has_the_same_numbers(tmp_path: Path) -> None:
    report = build_report([worse(), unproven(), same()], CREATED, FACTS)
    page = " ".join(render(report, tmp_path).text.split())
    text = markdown(report).replace("&#45;", "-")
    xml = (tmp_path / "junit.xml").read_text(encoding="utf-8")
    for task in report["tasks"]:
        verdict, now = task["verdict"], task["candidate_result"]
        difference = f"{100 * verdict['difference']:+.1f}".replace("-", "\N{MINUS SIGN}").replace("+0.0", "0.0")
        row = next(line for line in text.splitlines() if line.startswith(f"| {task['task']} |"))
        assert f"{verdict['num_losses']} / {verdict['num_wins']} of {task['num_examples']}" in row
        assert f"| {difference} |" in row
        assert f"{100 * now['value']:.1f} %" in row
        assert difference in page
        assert all(reason in page and reason in xml for reason in verdict["reasons"])


HOSTILE = (
    '</details></code><script>alert(1)</script> | `x` "]]> <!-- [a](http://evil) **b** @octocat www.evil.com\x00\x1b\ufffe \ud83d'
)


def hostile() -> dict[str, Any]:
    gold = [HOSTILE, "b"] * 20
    outcome = judged(gold, ["b"] * 40, gold, text=HOSTILE)
    outcome = replace(outcome, description=HOSTILE, contamination=(HOSTILE,), changed=(HOSTILE,), run_id=HOSTILE)
    broken = TaskOutcome(HOSTILE, HOSTILE, "failed", "accuracy", 0.5, 0.02, None, error=HOSTILE)
    past = replace(event(1, mood=(CellState.MEASURED, 0.5)), who=HOSTILE, reason=HOSTILE)
    return build_report([outcome, broken], CREATED, {**FACTS, HOSTILE: HOSTILE}, None, [past])


def test_hostile_text_stays_text_in_html_and_xml(tmp_path: Path) -> None:
    page = render(hostile(), tmp_path)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "form"}
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert {part.tag for part in root.iter()} == {"testsuites", "testsuite", "testcase", "failure", "error"}
    assert any("<script>alert(1)</script>" in (part.text or "") for part in root.iter("error"))


def test_hostile_text_stays_text_in_markdown() -> None:
    text = markdown(hostile())
    assert set(re.findall(r"</?(\w+)", text)) == {"details", "summary", "code"}
    assert text.count("<details>") == text.count("</details>") == 1
    assert not re.search(r"[`\x00\x1b\ufffe]|\]\(|(?<!\w)@octocat|(?<!\w)&#64;octocat|www\.", text)
    table = [line for line in text.splitlines() if line.startswith("| ") and "lost |" not in line and "won |" not in line]
    assert {line.count("|") for line in table} == {9, 6}
    assert escaped("a\n\n# b") == "a &#35; b"
    assert escaped("odd: +.1 = a/b :smile: http://x") == "odd: +.1 = a/b &#58;smile: http&#58;//x"


def test_the_same_report_is_written_the_same(tmp_path: Path) -> None:
    outcomes, release = spread_drop(3)
    outcomes = [replace(outcome, changed=("engine", "adapter")) for outcome in outcomes]
    for name in ("one", "two"):
        write_report(build_report(outcomes, CREATED, FACTS, release, [event(1, t0=(CellState.MEASURED, 0.5))]), tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


async def live_of(folder: Path, label: str) -> list[dict[str, Any]]:
    """A challenger that agreed with its champion on 19 of 20 inputs."""
    counts = LiveCounts(folder)
    found = counts.of(Pair("mood", 3, 4, "shadow"))
    for side in (found.champion, found.challenger):
        side.num_requests = side.num_inputs = 20
        side.labels.update({label: 20})
    found.num_agreed, found.difference = 19, 1.0
    found.table.update({table_key(label, label): 19, table_key(label, "b"): 1})
    await counts.save(at_once=True)
    return live_rows(folder)


def test_live_answers_are_told_as_agreement(tmp_path: Path) -> None:
    live = asyncio.run(live_of(tmp_path / "live", HOSTILE.removesuffix("\ud83d")))
    report = build_report([same()], CREATED, FACTS, live=live)
    assert report["live"] == live
    sentence = "In shadow, mood@3 and challenger mood@4 agreed on 19 of 20 inputs (76.4-99.1 %)."
    page = render(report, tmp_path)
    text = " ".join(page.text.split())
    assert "Live: champion against challenger" in text
    assert sentence in text
    assert "agreement, not accuracy" in text
    assert "0.050 apart on average; 1 flip." in text
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert escaped(sentence) in markdown(report)
    assert "Live:" not in render(build_report([same()], CREATED, FACTS), tmp_path).text
