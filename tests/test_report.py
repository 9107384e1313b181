"""Laws of the cross-task report: right numbers, the same in JSON and HTML; nothing unsafe or remote; small; never too kind."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from multilora.spec import GateSpec
from orchestrator.comparison import Evidence
from orchestrator.eval_report import EvalReport, Graded
from orchestrator.judge import ALPHA_TASKS, Outcome, Verdict, VerdictKind, judge
from orchestrator.paired import mcnemar_midp
from orchestrator.report import MAX_FLIPS, TaskOutcome, build_report
from orchestrator.report_page import summary_rows, write_report

CREATED = datetime(2026, 11, 23, 14, 55, tzinfo=UTC)
FACTS = {"version": "0.1.0", "commit": "3f2a91c", "base": "tiny", "command": "orchestrator submit tasks/*.yaml"}
FILES = ["flips.jsonl", "junit.xml", "report.html", "report.json", "report.md"]
VOID = {"meta", "br", "line", "path", "circle"}


def eval_report(system: str, gold: Sequence[str], answers: Sequence[str], gate: str = "gate-1", text: str = "text") -> EvalReport:
    graded = tuple(
        Graded(f"id-{i}", f"{text} {i}", right, answer, 0.5 + i / 1000, ())
        for i, (right, answer) in enumerate(zip(gold, answers, strict=True))
    )
    return EvalReport("mood", system, f"digest of {system}", gate, tuple(sorted({*gold, *answers})), graded)


def judged(
    gold: Sequence[str],
    candidate: Sequence[str],
    reference: Sequence[str],
    task: str = "mood",
    reference_system: str = "mood@1",
    baselines: Sequence[EvalReport] = (),
    metric: Any = "accuracy",
    text: str = "text",
    policy: Any = "balanced",
) -> TaskOutcome:
    new, old = eval_report(f"{task}@2", gold, candidate, text=text), eval_report(reference_system, gold, reference, text=text)
    is_first = reference_system == "zero-shot"
    gate = GateSpec(metric=metric, min=0.5, margin=0.02, policy=policy)
    verdict = judge([Evidence(task, gate, new, old, is_first)]).verdicts[task]
    champion = new.system if verdict.is_promoted else None if is_first else old.system
    return TaskOutcome(
        task,
        "How somebody feels.",
        "judged",
        metric,
        0.5,
        0.02,
        champion,
        new.system,
        old.system,
        verdict,
        new,
        old,
        tuple(baselines),
        policy=policy,
    )


def plain(task: str, state: Any, champion: str | None = None, error: str = "") -> TaskOutcome:
    return TaskOutcome(task, "", state, "accuracy", 0.5, 0.02, champion, error=error)


def same(task: str = "same") -> TaskOutcome:
    return judged(["a", "b"] * 5, ["a", "b"] * 5, ["a", "b"] * 5, task, f"{task}@1")


def worse(task: str = "worse") -> TaskOutcome:
    gold = ["a", "b"] * 20
    return judged(gold, ["a"] * 30 + gold[30:], gold, task, f"{task}@1")


def unproven(task: str = "unproven") -> TaskOutcome:
    gold = ["a", "b"] * 10
    return judged(gold, ["b", *gold[1:]], [gold[0], "a", *gold[2:]], task, f"{task}@1")


def held_back(task: str = "held") -> TaskOutcome:
    gold = ["a", "b"] * 10
    return judged(gold, ["b", *gold[1:]], gold, task, f"{task}@1")


def build(*outcomes: TaskOutcome) -> dict[str, Any]:
    return build_report(outcomes, CREATED, FACTS)


def without_flips(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "flips"}


class Page(HTMLParser):
    """What a browser would see: balanced tags, attributes, visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def render(report: dict[str, Any], folder: Path) -> Page:
    return Page(write_report(report, folder).read_text(encoding="utf-8"))


def test_the_numbers_of_a_hand_worked_task() -> None:
    gold = ["a"] * 6 + ["b"] * 4
    candidate = ["a", "a", "a", "a", "b", "b", "b", "b", "b", "b"]  # 8 right: loses the a's number 4 and 5
    reference = ["a", "a", "a", "a", "a", "a", "a", "b", "b", "b"]  # 9 right: only the b number 6 is wrong
    baselines = [eval_report("majority", gold, ["a"] * 10), eval_report("tf-idf", gold, gold)]
    (task,) = build(judged(gold, candidate, reference, baselines=baselines))["tasks"]
    assert task["candidate_result"]["accuracy"] == 0.8
    assert task["candidate_result"]["accuracy_interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)  # Wilson, by hand
    assert task["reference_result"]["num_correct"] == 9
    assert [(base["system"], base["value"]) for base in task["baselines"]] == [("majority", 0.6), ("tf-idf", 1.0)]
    assert task["verdict"]["difference"] == pytest.approx(-0.1)
    assert (task["verdict"]["num_losses"], task["verdict"]["num_wins"]) == (2, 1)
    assert task["verdict"]["accuracy_difference"] == pytest.approx(-0.1)
    assert task["verdict"]["p_worse"] == pytest.approx(0.3125)  # P(3 of 3) + P(2 of 3) / 2 = 1/8 + 3/16
    assert task["warnings"] == ["tf-idf is better: 100.0 % against 80.0 %"]
    assert task["num_examples"] == 10


def test_labels_show_recall_before_and_now_and_what_they_are_taken_for() -> None:
    gold = ["a"] * 6 + ["b"] * 4
    (task,) = build(judged(gold, ["a"] * 4 + ["b"] * 6, ["a"] * 7 + ["b"] * 3))["tasks"]
    assert [row["label"] for row in task["labels"]] == ["a", "b"]  # a lost two, b won one
    lost, won = task["labels"]
    assert (lost["num_examples"], lost["recall"], lost["reference_recall"]) == (6, pytest.approx(4 / 6), 1.0)
    assert lost["mistaken_for"] == [{"answer": "b", "count": 2}]
    assert (won["recall"], won["reference_recall"], won["mistaken_for"]) == (1.0, 0.75, [])


def test_losses_come_first_and_the_surest_mistake_leads() -> None:
    gold = ["a"] * 6 + ["b"] * 4
    (task,) = build(judged(gold, ["a"] * 4 + ["b"] * 6, ["a"] * 7 + ["b"] * 3))["tasks"]
    assert [(flip["id"], flip["kind"]) for flip in task["flips"]] == [("id-5", "loss"), ("id-4", "loss"), ("id-6", "win")]
    assert task["flips"][0] == {
        "id": "id-5", "kind": "loss", "text": "text 5", "gold": "a", "reference_answer": "a", "reference_probability": 0.505,
        "candidate_answer": "b", "candidate_probability": 0.505, "reference_lead": None, "candidate_lead": None,
    }  # fmt: skip


def test_flips_are_capped_and_the_rest_is_counted() -> None:
    gold = ["a"] * 80
    (task,) = build(judged(gold, ["b"] * 80, gold))["tasks"]
    assert (len(task["flips"]), task["num_flips_hidden"]) == (MAX_FLIPS, 30)


def test_a_label_that_is_never_right_any_more_is_a_reason() -> None:
    gold = ["a"] * 90 + ["b"] * 10
    (task,) = build(judged(gold, ["a"] * 100, gold))["tasks"]
    assert task["verdict"]["reasons"] == ["none of the 10 `b` examples is right any more (10 were)"]
    assert task["decision"] == "refused"


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([], Outcome.CLEAR),
        ([plain("v", "verified", "v@1"), plain("u", "unchanged", "u@1"), same()], Outcome.CLEAR),
        ([same(), unproven()], Outcome.HOLD),
        ([same(), held_back()], Outcome.HOLD),
        ([unproven(), worse(), same()], Outcome.BLOCK),
        ([plain("f", "failed", error="boom"), worse(), unproven()], Outcome.ERROR),
        ([worse(), plain("f", "failed")], Outcome.ERROR),
    ],
)
def test_the_worst_task_decides(outcomes: list[TaskOutcome], expected: Outcome) -> None:
    assert build(*outcomes)["outcome"] == expected


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        ([], "0 tasks: nothing to judge."),
        ([same()], "1 task: 1 promoted."),
        ([same(), worse()], "2 tasks: 1 regressed (worse), 1 promoted; worse@1 still answers."),
        ([held_back()], "1 task: 1 held back (held); held@1 still answers."),
        ([unproven()], "1 task: 1 promoted but not proven (unproven)."),
        ([plain("f", "failed", error="x")], "1 task: 1 failed (f); nothing answers for f."),
        ([judged(["a", "b"], ["b", "b"], ["a", "b"], "new", "zero-shot")], "1 task: 1 refused (new); nothing answers for new."),
        (
            [worse("w1"), worse("w2"), plain("v", "verified", "v@1"), plain("u", "unchanged", "u@1")],
            "4 tasks: 2 regressed (w1 and w2), 1 unchanged, 1 verified; w1@1 and w2@1 still answer.",
        ),
        (
            [worse(f"w{i}") for i in range(6)],
            "6 tasks: 6 regressed (w0, w1, w2 and 3 more); w0@1, w1@1, w2@1 and 3 more still answer.",
        ),
    ],
)
def test_the_sentence_says_what_happened_and_what_answers(outcomes: list[TaskOutcome], sentence: str) -> None:
    assert build(*outcomes)["sentence"] == sentence


def test_the_worst_task_comes_first() -> None:
    report = build(same(), plain("v", "verified", "v@1"), unproven(), worse(), plain("f", "failed"), held_back())
    assert [task["task"] for task in report["tasks"]] == ["f", "worse", "held", "unproven", "same", "v"]


def test_an_invalid_comparison_never_passes() -> None:
    good = same()
    assert good.candidate_report is not None
    gold = [graded.gold for graded in good.candidate_report.answers]
    broken = {
        "another gate": {"reference_report": eval_report("same@1", gold, gold, gate="gate-2")},
        "other examples": {"reference_report": eval_report("same@1", gold[:4], gold[:4])},
        "another gate for a baseline": {"baselines": (eval_report("majority", gold, gold, gate="gate-2"),)},
        "no verdict": {"verdict": None},
        "no report": {"candidate_report": None},
        "a stranger's verdict": {
            "verdict": Verdict(VerdictKind.NON_INFERIOR, True, (), 0.0, 3, 0, 1.0, None, 0.0, (0.0, 0.0), 0.1)
        },
        "no examples": {"candidate_report": eval_report("same@2", [], []), "reference_report": eval_report("same@1", [], [])},
    }
    for name, change in broken.items():
        report = build(TaskOutcome(**{**vars(good), **change}))
        assert report["outcome"] == Outcome.ERROR, name
        assert report["tasks"][0]["error"], name
        assert report["tasks"][0]["verdict"] is None, name


def test_submitting_a_refused_version_again_does_not_pass() -> None:
    again = TaskOutcome("mood", "", "unchanged", "accuracy", 0.5, 0.02, "mood@1", "mood@2")
    report = build(again)
    assert report["outcome"] == Outcome.BLOCK
    assert report["sentence"] == "1 task: 1 refused (mood); mood@1 still answers."
    assert summary_rows(report)[0].note == "mood@2 did not pass before, and nothing has changed since"


def test_json_and_html_hold_the_same_numbers(tmp_path: Path) -> None:
    gold = ["a"] * 6 + ["b"] * 4
    baselines = [eval_report("majority", gold, ["a"] * 10)]
    macro = judged(gold, ["a"] * 4 + ["b"] * 6, ["a"] * 7 + ["b"] * 3, metric="macro_f1", baselines=baselines)
    report = build(macro, worse(), plain("v", "verified", "v@3"), plain("f", "failed", error="out of memory"))
    page = render(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == without_flips(report)
    for task in report["tasks"]:
        assert task["task"] in page.text
        results = [task["candidate_result"], task["reference_result"], *task["baselines"]]
        shares = [result[name] for result in results if result for name in ("value", "accuracy")]
        shares += [edge for result in results if result for edge in result["accuracy_interval"]]
        shares += [row[name] for row in task["labels"] for name in ("recall", "reference_recall")]
        shares += [flip[f"{side}_probability"] for flip in task["flips"] for side in ("candidate", "reference")]
        assert all(f"{100 * share:.1f} %" in page.text for share in shares)
        if task["verdict"]:
            verdict = task["verdict"]
            for points in (verdict["difference"], verdict["accuracy_difference"], *verdict["interval"]):
                assert f"{100 * points:+.1f}".replace("-", "\u2212") in page.text
            assert f"{verdict['num_losses']} lost, {verdict['num_wins']} won of {task['num_examples']}" in page.text
            assert all(reason in page.text for reason in verdict["reasons"])
            assert verdict["kind"] in page.text
    assert "out of memory" in page.text
    assert "v@3" in page.text
    assert all(value in page.text for value in FACTS.values())


def test_summary_rows_are_plain_strings() -> None:
    first, second, third = summary_rows(build(worse(), same(), plain("v", "verified", "v@3")))
    assert first[:6] == ("worse", "refused (REGRESSED)", "100.0 % (worse@1)", "62.5 % (worse@2)", "-37.5", "40")
    assert second.difference == "0.0"
    assert third == ("v", "verified", "v@3", "", "", "", "", "")
    assert all(type(cell) is str for row in (first, second, third) for cell in row)


def test_model_text_labels_and_descriptions_are_escaped(tmp_path: Path) -> None:
    evil = "</title></style></td><script>alert('1')</script><img src=x onerror=alert(1)>"
    quote = "\" onmouseover='alert(2)' x=`{{ 7 * 7 }}"
    gold = [quote, evil] * 10
    outcome = judged(gold, [evil] * 20, gold, text=evil, baselines=[eval_report(quote, gold, gold)])
    hostile = TaskOutcome(**{**vars(outcome), "description": evil, "candidate": quote})
    failed = TaskOutcome(evil, quote, "failed", "accuracy", 0.5, 0.02, quote, error=evil)
    report = build_report([hostile, failed], CREATED, {"version": evil, "command": quote, quote: evil})
    page = render(report, tmp_path)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(evil) > 20
    assert quote in page.text


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    facts = {**FACTS, "tracking": "http://mlflow.example/#/runs"}
    html = write_report(build_report([worse(), same()], CREATED, facts), tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"link", "script", "img"}
    for tag, attributes in page.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#"), tag
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert all((attributes["href"] or "")[1:] in targets for _, attributes in page.tags if "href" in attributes)


@pytest.mark.parametrize("outcomes", [[], [plain("v", "verified", "v@1"), plain("u", "unchanged"), plain("f", "failed")]])
def test_a_report_without_a_judged_task(outcomes: list[TaskOutcome], tmp_path: Path) -> None:
    report = build_report(outcomes, CREATED, {})
    assert report["sentence"] in render(report, tmp_path).text
    assert len(summary_rows(report)) == len(outcomes)


def test_an_unchanged_task_may_bring_its_numbers(tmp_path: Path) -> None:
    report_of = eval_report("mood@1", ["a", "b", "b"], ["a", "b", "a"])
    outcome = TaskOutcome("mood", "", "unchanged", "accuracy", 0.5, 0.02, "mood@1", "mood@1", candidate_report=report_of)
    report = build(outcome)
    assert report["outcome"] == Outcome.CLEAR
    assert "66.7 %" in render(report, tmp_path).text
    assert summary_rows(report)[0].candidate == "66.7 % (mood@1)"


def test_calibration_errors_with_and_without_the_temperature(tmp_path: Path) -> None:
    # Confidence 0.9 with scores (ln 9, 0) at temperature 1; 0.75 at temperature 2, which is what 3 of 4 right deserve.
    wrong, right = ("b", 0.75, (0.0, math.log(9))), ("a", 0.75, (math.log(9), 0.0))
    rows = [Graded(f"id-{i}", "text", "a", *answer) for i, answer in enumerate([wrong, right, right, right])]
    answers = EvalReport("mood", "mood@1", "digest", "gate-1", ("a", "b"), tuple(rows), temperature=2.0)
    assert EvalReport.from_json(answers.to_json()) == answers
    assert answers.calibration_errors == pytest.approx({"ece": 0.0, "ece_uncalibrated": 0.15})
    outcome = TaskOutcome("mood", "", "unchanged", "accuracy", 0.5, 0.02, "mood@1", "mood@1", candidate_report=answers)
    report = build(outcome, same())
    by_task = {task["task"]: task["calibration"] for task in report["tasks"]}
    (bin_of_all,) = by_task["mood"]["bins"]
    assert {name: value for name, value in by_task["mood"].items() if name != "bins"} == pytest.approx(
        {"temperature": 2.0, "ece": 0.0, "ece_uncalibrated": 0.15}
    )
    assert bin_of_all == pytest.approx({"low": 11 / 15, "high": 0.8, "num_examples": 4, "confidence": 0.75, "accuracy": 0.75})
    assert by_task["same"] is None  # answers without scores
    text = " ".join(render(report, tmp_path).text.split())
    assert text.count("Calibration of") == 1
    assert "Calibration of mood@1: its confidence is off by 0.0 % on average (expected calibration error) with" in text
    assert "the temperature 2.00 that was fitted on the select split; by 15.0 % without." in text


@pytest.mark.slow
def test_two_hundred_tasks_stay_small(tmp_path: Path) -> None:
    labels = [f"label {i}" for i in range(77)]
    gold = labels * 4
    wrong = [gold[0], *gold[:-1]]
    tasks = [judged(gold, wrong, gold, f"task-{i}", f"task-{i}@1", text="<long> " * 100) for i in range(200)]
    write_report(build(*tasks), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert len((tmp_path / "report.md").read_text(encoding="utf-8")) < 60_000


def test_a_report_is_written_whole_and_survives_broken_text(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    report = build(judged(["a"] * 10, ["b"] * 10, ["a"] * 10, text="lone surrogate \ud83d nul \0 right-to-left \u202e"))
    assert write_report(report, folder) == folder / "report.html"
    assert write_report(report, folder) == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == without_flips(report)
    assert "lone surrogate ? nul" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_names_the_fewest_changes_that_can_prove_a_loss() -> None:
    assert mcnemar_midp(4, 0) >= ALPHA_TASKS > mcnemar_midp(5, 0)
