"""What is said at spec time of a gate split that is too small."""

import json

import pytest

from multilora.spec import TaskSpec
from orchestrator.dataset import build_dataset
from orchestrator.power import detectable_drop, examples_needed, num_gate_examples, power_warning


def spec_of(tmp_path, num_train, num_gate=None, suffix=".jsonl", **gate):
    def write(name, count):
        rows = [{"text": f"text {name} {i}", "label": ("yes", "no")[i % 2]} for i in range(count)]
        file = tmp_path / f"{name}{suffix}"
        if suffix == ".json":
            file.write_text(json.dumps(rows), encoding="utf-8")
        elif suffix == ".jsonl":
            file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
        else:
            separator = "\t" if suffix == ".tsv" else ","
            cells = [["text", "label"], *([row["text"] + ' "two\nlines"', row["label"]] for row in rows)]
            quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
            file.write_text("\n".join(map(separator.join, quoted)), encoding="utf-8")
        return str(file)

    data = {"train": write("train", num_train), **({} if num_gate is None else {"gate": write("gate", num_gate)})}
    labels = {"yes": None, "no": None}
    return TaskSpec(name="mood", base={"model": "a/b"}, data=data, instruction="{text} {labels}", labels=labels, gate=gate)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("num_gate", [None, 31])
def test_rows_are_counted_as_the_data_are_split(tmp_path, suffix, num_gate):
    spec = spec_of(tmp_path, 100, num_gate, suffix)
    assert num_gate_examples(spec) == len(build_dataset(spec).gate) == (num_gate or 40)


def test_what_cannot_be_counted_is_not_warned_of(tmp_path):
    spec = spec_of(tmp_path, 10)
    broken = spec.model_copy(update={"data": spec.data.model_copy(update={"train": str(tmp_path / "missing.jsonl")})})
    hub = spec.model_copy(update={"data": spec.data.model_validate({"train": {"hub": "a/b", "split": "train"}})})
    assert [(num_gate_examples(s), power_warning(s, None)) for s in (broken, hub)] == [(None, "")] * 2


def test_the_warning_names_sizes_rates_and_both_ways_out(tmp_path):
    spec = spec_of(tmp_path, 300)
    assert power_warning(spec, None) == (
        "120 gate examples cannot prove 2 points at a flip rate of 6.0 % (assumed); 928 can, or a gate.margin of 0.06"
    )
    assert "flip rate of 12.5 % (seen last time)" in power_warning(spec, 0.125)
    assert power_warning(spec, 0.005) == ""


@pytest.mark.parametrize("num_train", [50, 300, 2000])
def test_the_margin_that_it_advises_needs_no_warning(tmp_path, num_train):
    spec = spec_of(tmp_path, num_train)
    advised = float(power_warning(spec, None).rpartition(" ")[2])
    assert power_warning(spec.model_copy(update={"gate": spec.gate.model_copy(update={"margin": advised})}), None) == ""
    assert advised < 0.2


@pytest.mark.parametrize(("flip_rate", "expected"), [(0.01, 155), (0.02, 309), (0.04, 618), (0.08, 1237), (0.15, 2319)])
def test_examples_needed_for_two_points(flip_rate, expected):
    """Values of the planning formula n = 15,460 x flip rate, 80 % power."""
    assert examples_needed(flip_rate, 0.02) == pytest.approx(expected, rel=0.004)


@pytest.mark.parametrize(
    ("num_examples", "flip_rate", "drop"),
    [(100, 0.04, 0.084), (200, 0.04, 0.051), (500, 0.04, 0.029), (1000, 0.04, 0.019), (500, 0.08, 0.038), (2000, 0.08, 0.017)],
)
def test_detectable_drop_is_near_the_simulated_one(num_examples, flip_rate, drop):
    """Simulated minimum detectable drops of McNemar's mid-p at .05 with 80 % power."""
    assert detectable_drop(flip_rate, num_examples, 0.05) == pytest.approx(drop, rel=0.08)
