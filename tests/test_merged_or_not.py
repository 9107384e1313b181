"""One adapter in the engine, switched by PEFT and merged: the same answers, each with its costs."""

import pytest
from tiny_adapters import CARDS, SHORTEN
from tiny_cards_bench import LABELS, tiny_bench

from orchestrator.merged_or_not import merged_rows

METHODS = [
    f"{name}, {pace}"
    for name in ("unmerged in the engine", "switched by PEFT", "merged into the base")
    for pace in ("batched", "one by one")
]


def megabytes(row):
    """What the note says that weights take: of the first task, and of each further one."""
    words = row.note.split()
    return [float(words[index - 1]) for index, word in enumerate(words) if word.rstrip(";") == "MB"]


def test_a_given_adapter_answers_alike_in_all_three(tmp_path, base_folder, tiny_adapter, family):
    artifact = tiny_adapter(family, CARDS)
    bench = tiny_bench(tmp_path, base_folder(family))
    rows = list(merged_rows(bench, artifact.folder))
    assert [row.method for row in rows] == METHODS
    assert not [row.skipped for row in rows if row.skipped]
    assert len({row.answers for row in rows}) == 1
    if (
        family == "encoder"
    ):  # of random generative bases the shortest label is always the likeliest; their scores: test_plain_scoring
        assert len(set(rows[0].answers)) > 1
    assert set(rows[0].answers) <= set(LABELS)
    assert all(row.note.endswith("; 11 of 11 answers are the batched engine's") for row in rows)
    assert all(row.ms_per_text > 0 and row.num_trained > 0 for row in rows)
    engine, switched, merged = rows[::2]
    assert engine.disk_bytes == switched.disk_bytes < merged.disk_bytes
    assert megabytes(engine) == megabytes(switched)
    assert megabytes(merged)[0] == megabytes(merged)[1] > megabytes(engine)[1]
    assert megabytes(engine)[0] > megabytes(merged)[0]


def test_without_an_adapter_one_is_trained(tmp_path, base_folder):
    rows = list(merged_rows(tiny_bench(tmp_path, base_folder("encoder"), seeds=(7, 8))))
    assert [row.method for row in rows] == METHODS
    assert {(row.seed, row.num_train, row.skipped) for row in rows} == {(7, 24, "")}
    assert all(row.train_s > 0 for row in rows)
    assert len({row.answers for row in rows}) == 1


def test_an_adapter_that_the_engine_refuses_has_a_reason_in_every_row(tmp_path, base_folder, tiny_adapter):
    bench = tiny_bench(tmp_path, base_folder("roberta"))
    rows = list(merged_rows(bench, tiny_adapter("encoder", CARDS).folder))
    assert [row.method for row in rows] == METHODS
    assert all("was trained on base" in row.skipped and not row.answers for row in rows)


def test_a_folder_without_an_adapter_has_a_reason_in_every_row(tmp_path, base_folder):
    rows = list(merged_rows(tiny_bench(tmp_path, base_folder("encoder")), tmp_path / "nothing"))
    assert [row.method for row in rows] == METHODS
    assert all(row.skipped.startswith("adapter folder nothing lacks") for row in rows)


@pytest.mark.parametrize("is_given", [True, False])
def test_a_free_text_task_has_a_reason_in_every_row(tmp_path, base_folder, tiny_adapter, is_given):
    adapter = tiny_adapter("causal", SHORTEN).folder if is_given else None
    rows = list(merged_rows(tiny_bench(tmp_path, base_folder("causal"), labels=()), adapter))
    assert [row.method for row in rows] == METHODS
    assert {row.skipped for row in rows} == {"a free-text task has no labels to choose from"}


@pytest.mark.slow
def test_over_a_quantised_base_the_merged_model_is_in_full_precision(tmp_path, base_folder):
    rows = list(merged_rows(tiny_bench(tmp_path, base_folder("causal"), quantization="8bit")))
    assert not [row.skipped for row in rows if row.skipped]
    says_so = ["in full precision" in row.note for row in rows]
    assert says_so == [False, False, True, True, True, True]
    assert megabytes(rows[0])[0] < megabytes(rows[-1])[0]
