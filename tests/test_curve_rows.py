"""The curve's subsets are nested and stratified, its steps sensible, and every row is what its examples alone give."""

from collections import Counter
from dataclasses import replace

import pytest
from test_train_together import assert_same_rows, bench_of
from test_trainer import examples_of

from multilora.spec import TrainSpec
from orchestrator.curve_rows import curve_rows, nested_subset, settings_for
from orchestrator.methods import MethodRow
from orchestrator.train_together import Entry, train_together
from orchestrator.variants import with_seed


@pytest.mark.parametrize("seed", range(20))
def test_subsets_are_nested_and_keep_the_shares_of_labels(seed, fresh_base, tmp_path):
    spec = bench_of(tmp_path, fresh_base("encoder")).spec
    examples = examples_of(200, ["a", "a", "a", "b", "b", "c"], f"seed {seed}")
    share = Counter(example.label for example in examples)
    inner = set()
    for size in (1, 7, 25, 50, 100, 199, 200):
        subset = nested_subset(spec, examples, size, seed)
        ids = {example.id for example in subset}
        assert len(subset) == len(ids) == size
        assert [example for example in examples if example.id in ids] == [*subset], "in their own order"
        assert inner <= ids
        inner = ids
        found = Counter(example.label for example in subset)
        assert all(abs(found[label] - size * count / 200) < 1 for label, count in share.items())


def test_seeds_draw_other_examples_and_a_free_text_task_draws_at_random(fresh_base, tmp_path):
    spec = bench_of(tmp_path, fresh_base("encoder")).spec
    examples = examples_of(100, ["a", "b"], "draw")
    first, second = ({example.id for example in nested_subset(spec, examples, 50, seed)} for seed in (0, 1))
    assert 10 < len(first & second) < 40
    text = spec.model_copy(update={"labels": None})
    assert len(nested_subset(text, [replace(e, label=e.id) for e in examples], 30, 0)) == 30


@pytest.mark.parametrize(
    ("size", "epochs", "patience"),
    [(25, 30, 15), (50, 15, 8), (100, 9, 5), (200, 5, 3), (279, 4, 2)],
)
def test_few_examples_are_read_more_often(size, epochs, patience):
    """Of 279 examples four epochs are 72 steps; fewer take at least 60, and patience grows with the epochs."""
    settings = TrainSpec(epochs=4, batch_size=16, early_stopping=2)
    found = settings_for(settings, size, 279)
    assert (found.epochs, found.early_stopping) == (epochs, patience)
    assert settings_for(TrainSpec(epochs=4), size, 279).early_stopping is None


def test_no_size_takes_more_steps_than_needed_nor_fewer_epochs_than_the_spec():
    assert settings_for(TrainSpec(epochs=2, batch_size=16), 25, 100).epochs == 7, "all 100 take 14 steps, 25 examples two each"
    assert settings_for(TrainSpec(epochs=40, batch_size=16), 25, 100).epochs == 40
    settings = TrainSpec(epochs=3, batch_size=16, early_stopping=1)
    assert settings_for(settings, 100, 100) == settings


@pytest.mark.parametrize("family", ["encoder", "seq2seq"])
def test_a_row_for_every_size_and_seed(family, fresh_base, tmp_path):
    base = fresh_base(family)
    bench = bench_of(tmp_path / "group", base, num_train=12)
    rows = list(curve_rows(bench, base))
    assert [(row.part, row.method, row.num_train, row.seed) for row in rows] == [
        ("curve", "adapter", size, seed) for size in (4, 8, 12) for seed in (0, 1)
    ]
    assert [row.note for row in rows[::2]] == [
        f"{epochs} epochs; the best epoch is chosen on 5 examples more" for epochs in (6, 3, 2)
    ]
    assert all(not row.skipped and row.train_s > 0 for row in rows)
    # The largest size is the task's adapter itself.
    entry = Entry(replace(MethodRow("curve", "adapter"), note=rows[4].note), with_seed(bench.spec, 0), bench.dataset.train)
    assert_same_rows(rows[4:5], list(train_together(replace(bench, folder=tmp_path / "alone"), base, [entry])))
