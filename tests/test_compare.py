"""A comparison keeps every row, goes on after a cut with what is missing, and survives a part that raises."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from e2e.conftest import write_spec
from made_up_methods import GOLD, NUM_GATE, order, row
from ray.exceptions import RayTaskError
from test_submissions import order_of
from typer.testing import CliRunner

from multilora.errors import AdapterError, CapacityError, DataError, RequestError, SpecError
from orchestrator.cli import app
from orchestrator.compare import compare, metric_names, reason_of, run_part
from orchestrator.compare_result import PARTS
from orchestrator.compare_store import CompareStore, PartRows, check_row, newest
from orchestrator.compare_worker import part_rows
from orchestrator.config import OrchestratorConfig
from orchestrator.dataset import Example, TaskDataset
from orchestrator.methods import Bench, MethodRow
from orchestrator.status import COMPARED, status


@pytest.fixture
def store(tmp_path):
    return CompareStore(tmp_path / "compare" / "mood" / "key")


@pytest.fixture
def bench(store):
    gate = tuple(Example(str(number), {"text": str(number)}, label) for number, label in enumerate(GOLD))
    (spec,) = order_of(store.folder, "mood").specs
    return Bench(spec, TaskDataset("mood", (), (), gate, "f", ()), store.folder)


def three(part, **fields):
    """Three rows of a part."""
    return [row(part, f"method {number}", range(10 * number), **fields) for number in range(3)]


def cut_after(rows, error):
    """Give rows, then end as a cut or a bug would."""
    yield from rows
    raise error


# Storing and going on


def test_a_part_is_stored_row_by_row_and_finished(store, bench):
    seen, said = [], []
    with store.opened(order()):
        for one in three("prompting"):
            seen.append(len(store.part("prompting").rows))
            seen.append(one)
        run_part(store, bench, "prompting", three("prompting"), said.append)
    assert said == [f"prompting: method {number}, seed 0: {share}" for number, share in enumerate((".000", ".050", ".100"))]
    found = store.load()
    assert found.rows == tuple(three("prompting"))
    assert (found.finished, found.failed, found.cut_off) == (("prompting",), {}, ())
    assert found.order == order()


def test_every_row_is_on_disk_before_the_next_is_asked_for(store, bench):
    def rows():
        for number, one in enumerate(three("curve")):
            assert len(store.part("curve").rows) == number
            assert not store.part("curve").is_finished
            yield one

    with store.opened(order()):
        run_part(store, bench, "curve", rows())
    assert store.part("curve") == PartRows(tuple(three("curve")), is_finished=True)


def test_a_cut_keeps_the_rows_and_the_next_run_replaces_them(store, bench):
    with store.opened(order()), pytest.raises(KeyboardInterrupt):
        run_part(store, bench, "curve", cut_after(three("curve"), KeyboardInterrupt()))
    found = store.load()
    assert (len(found.rows), found.finished, found.cut_off) == (3, (), ("curve",))
    slower = three("curve", train_s=9.0)
    with store.opened(order()), pytest.raises(KeyboardInterrupt):
        run_part(store, bench, "curve", cut_after(slower[:1], KeyboardInterrupt()))
    assert [one.train_s for one in store.load().rows] == [9.0, 0.0, 0.0], "nothing is lost by a second cut"
    with store.opened(order()):
        run_part(store, bench, "curve", slower[:2])
    assert store.load().rows == tuple(slower[:2]), "the whole part is what it gave last"
    assert store.load().finished == ("curve",)


def test_a_part_that_raises_keeps_its_rows_says_why_and_runs_again(store, bench):
    said = []
    with store.opened(order()):
        run_part(store, bench, "alone", cut_after(three("alone"), ValueError("no such layer\nsecond line")), said.append)
        run_part(store, bench, "curve", three("curve"))
    found = store.load()
    assert found.failed == {"alone": "ValueError: no such layer"}
    assert said[-1] == "alone: failed: ValueError: no such layer"
    last = [one for one in found.rows if one.part == "alone"][-1]
    assert (last.method, last.skipped, last.answers) == ("the rest of this part", "ValueError: no such layer", ())
    assert [one.skipped for one in found.summaries if one.part == "alone"] == ["", "", "", "ValueError: no such layer"]
    assert found.finished == ("curve",)
    with store.opened(order()):
        run_part(store, bench, "alone", three("alone"))
    assert (store.load().failed, store.load().finished) == ({}, ("alone", "curve"))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row("curve", "a", range(9), gold=GOLD[:7]), "a has 7 answers to 200 gate examples"),
        (row("merged", "a", range(9)), "a says that it belongs to merged"),
        (row("curve", "a", range(9), train_s=float("nan")), "a has a time that is no number: nan s, 0.0 ms a text"),
    ],
)
def test_a_row_that_would_break_every_later_look_is_refused(store, bench, bad, said):
    with pytest.raises(DataError, match=said):
        check_row(bad, "curve", NUM_GATE)
    with store.opened(order()):
        run_part(store, bench, "curve", [*three("curve"), bad])
    assert store.load().failed == {"curve": said}
    assert len(store.part("curve").rows) == 3
    check_row(MethodRow("curve", "a", skipped="no"), "curve", NUM_GATE)


def test_what_a_worker_raised_is_said_without_rays_wrapping():
    cause = AdapterError("rank 9 does not fit")
    wrapped = RayTaskError("rows", "a traceback\nof many lines", cause)
    assert reason_of(wrapped) == "rank 9 does not fit"
    assert reason_of(RayTaskError("rows", "a traceback", wrapped)) == "rank 9 does not fit"
    assert reason_of(ValueError()) == "ValueError: "
    assert reason_of(ValueError("\ud800 x")) == "ValueError: ? x"
    assert len(reason_of(ValueError("x" * 9999))) < 320


def test_a_part_that_nobody_runs_is_refused(bench):
    with pytest.raises(RequestError, match="no methods for the part nonsense"):
        next(part_rows("nonsense", bench))


# On disk


def test_files_are_whole_and_none_is_left_over(store, bench):
    with store.opened(order()):
        run_part(store, bench, "curve", three("curve"))
    assert sorted(str(file.relative_to(store.folder)) for file in store.folder.rglob("*") if file.is_file()) == [
        "order.json", "rows/curve.json"]  # fmt: skip


def test_two_do_not_write_at_once(store, tmp_path):
    other = CompareStore(store.folder.parent / "other-key")
    with store.opened(order()):
        with pytest.raises(CapacityError, match="another command compares mood in this workspace"), other.opened(order()):
            pass
        with CompareStore(tmp_path / "compare" / "other-task" / "key").opened(order("other-task")):
            pass
    with other.opened(order()):
        pass


def test_a_file_that_somebody_changed_is_named(store, bench):
    with store.opened(order()):
        run_part(store, bench, "curve", three("curve"))
    (store.folder / "rows" / "curve.json").write_text("{")
    with pytest.raises(DataError, match=r"curve\.json cannot be read: .*delete its folder and compare again"):
        store.load()


def test_the_newest_is_the_one_that_was_worked_on_last(tmp_path):
    first, second = (CompareStore(tmp_path / "mood" / key) for key in "ab")
    for one in (first, second):
        with one.opened(order()):
            pass
    assert newest(tmp_path, "mood").folder == second.folder
    with first.opened(order()):
        pass
    assert newest(tmp_path, "mood").folder == first.folder
    with pytest.raises(RequestError, match=r"nothing was compared for tone in .* yet; there are comparisons of mood; run: "):
        newest(tmp_path, "tone")
    with pytest.raises(RequestError, match=r"nothing was compared for tone in .* yet; run: orchestrator compare TASK.yaml"):
        newest(tmp_path / "nowhere", "tone")


# MLflow


def test_metric_names_are_such_as_mlflow_takes_and_no_two_are_the_same(store, bench):
    methods = ["4 examples, balanced", "4 examples/balanced", "ü € $", "..", "x" * 999, "4 examples, balanced"]
    with store.opened(order()):
        run_part(store, bench, "prompting", [row("prompting", name, [], num) for num, name in enumerate(methods)])
    names = metric_names(store.load())
    assert list(names.values())[:4] == [
        "accuracy/prompting/4-examples-balanced",
        "accuracy/prompting/4-examples-balanced-2",
        "accuracy/prompting/method",
        "accuracy/prompting/method-2",
    ]
    assert len(names) == len(set(names.values())) == 5
    assert max(map(len, names.values())) < 250


@pytest.fixture
def compared(tmp_path, base_folder, registry):
    """A spec, and settings over the session's registry; the task's rows are stored already, so that no worker is needed."""
    rows = [{"text": f"text {number}", "label": "good" if number % 2 else "bad"} for number in range(40)]
    spec = write_spec(tmp_path, "compared", rows, str(base_folder("encoder")), {"good": None, "bad": None})
    config = OrchestratorConfig(workspace=Path(registry.tracking_uri.removeprefix("sqlite:///")).parent)

    def interrupt(_):
        raise KeyboardInterrupt  # before Ray is asked for anything

    def finish(seeds=(0,)):
        with pytest.raises(KeyboardInterrupt):
            compare(config, spec, parts=["curve"], seeds=seeds, sizes=[5, 999], on_progress=interrupt)
        store = newest(config.compare_dir, "compared")
        gold = store.load().order.gold
        rows = [row("curve", "adapter", range(size), size, gold=gold, train_s=1.0) for size in (5, 8)]
        store.put("curve", PartRows(tuple(rows), is_finished=True))
        return store

    return config, spec, finish


def test_what_is_finished_is_not_run_again_and_is_recorded_once(compared, registry):
    config, spec, finish = compared
    store = finish()
    said = []
    found = compare(config, spec, parts=["curve"], seeds=[0], sizes=[5, 999], on_progress=said.append)
    assert said[0].startswith("compared: nothing to do, 16 gate examples")
    assert found.rows == store.part("curve").rows
    assert found.order.sizes == (5,), "more than there are is no size"
    assert (store.folder / "compare.html").is_file()
    (run,) = registry.runs("compared")
    assert (run.run_key, run.status) == (found.order.key, COMPARED)
    assert run.metrics == {"accuracy/curve/adapter": pytest.approx(0.5)}  # the last point: 8 of 16
    compare(config, spec, parts=["curve"], seeds=[0], sizes=[5, 999])
    assert len(registry.runs("compared")) == 1
    (row_of,) = status(config, ["compared"])
    assert row_of.status == "NEW", "a comparison is no training"


def test_other_seeds_or_data_are_another_comparison(compared):
    _, spec, finish = compared
    first = finish()
    assert finish(seeds=(0, 1)).folder != first.folder
    data = spec.with_suffix(".jsonl")
    data.write_text(data.read_text() + json.dumps({"text": "one more", "label": "good"}) + "\n")
    assert finish().folder != first.folder


def test_what_cannot_be_compared_is_refused(compared, tmp_path):
    config, spec, _ = compared
    text = spec.read_text()
    spec.write_text(text.replace("base:", "basis:"))
    with pytest.raises(SpecError, match="basis"):
        compare(config, spec)
    spec.write_text(text)
    spec.with_suffix(".jsonl").write_text('{"text": "a", "label": "ugly"}\n')
    with pytest.raises(SpecError, match="'ugly'"):
        compare(config, spec)
    fields = yaml.safe_load(text)
    del fields["labels"]
    spec.write_text(yaml.safe_dump({**fields, "instruction": "Text: {text}"}))
    with pytest.raises(RequestError, match="compared answers with free text; compare holds labels against labels"):
        compare(config, spec)


# The command


@pytest.fixture
def command(tmp_path):
    """Run the command over a workspace of its own."""

    def run(*words):
        return CliRunner().invoke(app, ["compare", *map(str, words), "--workspace", str(tmp_path / "workspace")])

    return run


def test_unknown_parts_and_sizes_are_named(command):
    found = command("x.yaml", "--parts", "prompting,curves")
    assert found.exit_code == 2
    assert "there is no part 'curves'; parts are baselines, prompting, variants" in " ".join(
        found.output.replace("│", " ").split()
    )
    for sizes in ("25,x", "0", "", "25,,50", "-1"):
        found = command("x.yaml", "--sizes", sizes)
        assert found.exit_code == 2
        assert "is no number of examples" in found.output
    assert command("x.yaml", "--seeds", 0).exit_code == 2
    missing = command("x.yaml", "--quick")
    assert missing.exit_code == 2
    assert "quick: 1 seed, sizes 25, 100: a first look" in missing.output
    assert "error: x.yaml: file: No such file" in missing.output


def test_show_prints_what_is_stored_and_runs_nothing(command, tmp_path, bench, capsys):
    missing = command("--show", "mood")
    assert missing.exit_code == 1
    assert "nothing was compared for mood" in missing.output
    store = CompareStore(tmp_path / "workspace" / "compare" / "mood" / "key")
    with store.opened(replace(order(), seeds=(0,))):
        run_part(store, bench, "curve", three("curve", train_s=2.0))
    shown = command("--show", "mood", "--markdown", tmp_path / "table.md")
    assert shown.exit_code == 0
    assert "200 gate examples, 400 training examples, 2 labels, 1 seed, so that no spread is known" in shown.output
    assert "mood: An adapter trained with 0 examples" in shown.output
    assert (tmp_path / "table.md").read_text().startswith("### mood")
    data = json.loads(command("--show", "mood", "--json").stdout)
    assert [one["method"] for one in data["methods"]] == ["method 0", "method 1", "method 2"]
    assert (data["finished"], data["folder"]) == (["curve"], str(store.folder))


def test_help_names_every_part(command):
    text = " ".join(command("--help").output.replace("│", " ").split())
    assert ", ".join(PARTS) in text
