"""Training by two ranks equals training by one: same losses, same weights (tolerances of test_trainer), dropout included.

The ranks are processes of their own that talk by gloo, as Ray Train's workers on CPUs do. They go through all the stories
below, one after another; the tests look at what came out, beside the same story told by one rank.
"""

import pickle
import random
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_free_text import text_member
from test_micro_batches import with_little_memory
from test_trainer import ADVICE, Trained, after, assert_same_losses, assert_same_weights, losses_in, member_of, unlike_members

from multilora.artifact import read_artifact, read_tensors
from multilora.base_model import load_base
from multilora.spec import BaseSpec
from orchestrator.dataset import Example
from orchestrator.ranks import ALONE, Ranks, balanced_shares

pytestmark = pytest.mark.slow

KINDS = ("seq2seq", "encoder")
TASKS = ("plain", "dropout", "narrow", "single")


@dataclass(frozen=True)
class Stage:
    """Where a story takes place: on one rank of several, or on one alone."""

    ranks: Ranks
    folder: Path
    bases: dict[str, Path]

    def base(self, kind):
        return load_base(BaseSpec(model=str(self.bases[kind])), "cpu")

    def train(self, base, members, *args, **options):
        return Trained(base, members, *args, ranks=self.ranks, **options).events


def equal(stage, kind):
    """Four unlike adapters, one of them with dropout, one with fewer rows than there may be ranks at its epoch's end."""
    base = stage.base(kind)
    return stage.train(base, unlike_members(stage.folder, base))


def stopped(stage):
    """Stopped in the middle of an epoch and continued in other groups."""
    base = stage.base("encoder")
    members = unlike_members(stage.folder, base)
    should_stop = after(4) if stage.ranks.rank == 0 else lambda: pytest.fail("rank 0 alone is asked")
    first = stage.train(base, members, 3, should_stop=should_stop)
    return [*first, *stage.train(stage.base("encoder"), members[::-1])]


def interrupted(stage):
    """Stopped, to be continued by one rank."""
    base = stage.base("encoder")
    return stage.train(base, unlike_members(stage.folder, base), should_stop=after(4))


def again(stage):
    """Trained to its end and started again, as after the death of a worker."""
    base = stage.base("encoder")
    members = unlike_members(stage.folder, base)[3:]
    stage.train(base, members)
    return stage.train(stage.base("encoder"), members)


def tight(stage):
    """The last rank has too little memory for the long texts of one adapter."""
    base = stage.base("encoder")
    if stage.ranks.rank == stage.ranks.size - 1:
        with_little_memory(base, 40)
    settings = {"num_train": 24, "batch_size": 12, "learning_rate": 1e-4, "instruction": "{text}"}
    longer, other = (member_of(stage.folder, base, name, **settings) for name in ("longer", "other"))
    short = tuple(Example(f"short-{i}", {"text": "very good"}, label) for i, label in enumerate(("yes", "no") * 4))
    long = tuple(Example(f"long-{i}", {"text": "again and " * 40}, label) for i, label in enumerate(("yes", "no") * 4))
    return stage.train(base, [replace(longer, train=long, select=short), replace(other, train=short, select=short)], 2)


def tight_at_the_epochs_end(stage):
    """The last rank has too little memory for the long texts of one adapter's select split."""
    base = stage.base("encoder")
    if stage.ranks.rank == stage.ranks.size - 1:
        with_little_memory(base, 40)
    longer, other = (member_of(stage.folder, base, name, instruction="{text}") for name in ("longer", "other"))
    short = tuple(Example(f"short-{i}", {"text": "very good"}, label) for i, label in enumerate(("yes", "no") * 4))
    long = tuple(Example(f"long-{i}", {"text": "again and " * 40}, label) for i, label in enumerate(("yes", "no") * 4))
    return stage.train(base, [replace(longer, train=short, select=long), replace(other, train=short, select=short)], 2)


def overheated(stage):
    """One rank's loss is not finite."""
    base = stage.base("encoder")

    def overheat(trainer, event):  # rank 0 alone hears of events
        if (event.task, event.kind, event.step) == ("hot", "progress", 2):
            trainer.slots.flat_SP[0] = torch.nan

    members = [member_of(stage.folder, base, name, epochs=3) for name in ("hot", "other")]
    return stage.train(base, members, on_event=overheat)


def written(stage):
    """A free-text task beside one with a single row to train on and one to select with."""
    base = stage.base("seq2seq")
    lonely = member_of(stage.folder, base, "lonely", num_train=1)
    return stage.train(base, [text_member(stage.folder, base, "shorten"), replace(lonely, select=lonely.select[:1])])


def blind(stage):
    """The second rank does not see the checkpoint."""
    base = stage.base("encoder")
    member = unlike_members(stage.folder, base)[0]
    stage.train(base, [member], should_stop=after(3))
    if stage.ranks.rank == 1:
        member = replace(member, checkpoint_file=str(stage.folder / "missing.safetensors"))
    try:
        return stage.train(stage.base("encoder"), [member])
    except RuntimeError as error:
        return str(error)


STORIES = {
    **{f"equal-{kind}": (equal, kind) for kind in KINDS},
    **{story.__name__: (story,) for story in (
        stopped, interrupted, again, tight, tight_at_the_epochs_end, overheated, written, blind
    )},
}  # fmt: skip


def run_rank(rank, folder, bases):
    """Tell all stories on one of two ranks, and keep what each came to."""
    torch.set_num_threads(1)
    method, timeout = f"file://{folder / 'rendezvous'}", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=timeout)
    ranks = Ranks.of_process_group(torch.device("cpu"))
    for name, (story, *args) in STORIES.items():
        outcome = story(Stage(ranks, folder / name, bases), *args)
        (folder / f"{name}-{rank}").write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def bases(base_folder):
    return {kind: base_folder(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def two(bases, tmp_path_factory):
    """Folder of the two ranks' stories."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(run_rank, (folder, bases), nprocs=2)
    return folder


def outcomes(two, name):
    return [pickle.loads((two / f"{name}-{rank}").read_bytes()) for rank in range(2)]


@pytest.fixture(scope="module")
def one(bases, tmp_path_factory):
    """The same stories by one rank: events and folder."""
    told = {}

    def of(name):
        if name not in told:
            folder, (story, *args) = tmp_path_factory.mktemp("one"), STORIES[name]
            told[name] = story(Stage(ALONE, folder, bases), *args), folder
        return told[name]

    return of


def artifact_of(folder, task):
    return read_artifact(folder / "adapters" / task / "adapter")


def weights(folder, task):
    pairs = read_tensors(artifact_of(folder, task))
    return {f"{name} {half}": tensor for name, pair in pairs.items() for half, tensor in zip("AB", pair, strict=True)}


def of_kind(events, kind):
    return {event.task: event for event in events if event.kind == kind}


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_the_adapters_of_one(kind, two, one):
    (events, of_second), (expected, folder) = outcomes(two, f"equal-{kind}"), one(f"equal-{kind}")
    assert of_second == []
    assert [(event.task, event.kind, event.step) for event in events] == [(e.task, e.kind, e.step) for e in expected]
    for task in TASKS:
        assert_same_losses(losses_in(events, task), losses_in(expected, task))
        assert_same_weights(weights(two / f"equal-{kind}", task), weights(folder, task))
        seen, alone = (artifact_of(place, task).card for place in (two / f"equal-{kind}", folder))
        assert seen.temperature == pytest.approx(alone.temperature, rel=1e-3)
        for canary, other in zip(seen.canaries, alone.canaries, strict=True):
            assert canary.scores == pytest.approx(other.scores, abs=1e-3)
    for event, other in zip(events, expected, strict=True):
        assert event.metrics == pytest.approx(other.metrics, rel=1e-4, abs=1e-4)


def test_stopped_and_continued_equals_undisturbed(two, one):
    events, of_second = outcomes(two, "stopped")
    expected, folder = one("equal-encoder")
    assert of_second == []
    for task in TASKS:
        assert_same_losses(losses_in(events, task), losses_in(expected, task))
        assert_same_weights(weights(two / "stopped", task), weights(folder, task))
    assert not list((two / "stopped" / "checkpoints").iterdir())


def test_one_rank_continues_what_two_began(two, one, bases):
    began, _ = outcomes(two, "interrupted")
    expected, folder = one("equal-encoder")
    stage = Stage(ALONE, two / "interrupted", bases)
    base = stage.base("encoder")
    ended = stage.train(base, unlike_members(stage.folder, base))
    for task in TASKS:
        assert_same_losses(losses_in([*began, *ended], task), losses_in(expected, task))
        assert_same_weights(weights(stage.folder, task), weights(folder, task))


def test_what_was_trained_is_reported_and_not_trained_again(two):
    (event,), of_second = outcomes(two, "again")
    assert (event.task, event.kind, event.message) == ("single", "finished", artifact_of(two / "again", "single").digest)
    assert of_second == []


@pytest.mark.parametrize("story", ["tight", "tight_at_the_epochs_end"])
def test_what_one_rank_has_no_memory_for_fails_on_all_and_the_others_go_on(story, two, one):
    events, _ = outcomes(two, story)
    expected, folder = one(story)
    assert of_kind(events, "failed").keys() == of_kind(expected, "failed").keys() == {"longer"}
    assert of_kind(events, "failed")["longer"].message.startswith("one example of ")
    assert of_kind(events, "finished").keys() == {"other"}
    assert_same_losses(losses_in(events, "other"), losses_in(expected, "other"))
    assert_same_weights(weights(two / story, "other"), weights(folder, "other"))


def test_a_loss_that_is_not_finite_on_one_rank_fails_on_all(two, one):
    events, _ = outcomes(two, "overheated")
    assert {task: event.message for task, event in of_kind(events, "failed").items()} == {"hot": ADVICE}
    assert_same_losses(losses_in(events, "other"), losses_in(one("overheated")[0], "other"))


def test_free_texts_and_fewer_rows_than_ranks(two, one):
    events, _ = outcomes(two, "written")
    expected, folder = one("written")
    for task in ("shorten", "lonely"):
        assert_same_losses(losses_in(events, task), losses_in(expected, task))
    seen, alone = (artifact_of(place, "shorten").card.canaries for place in (two / "written", folder))
    assert [canary.text for canary in seen] == [canary.text for canary in alone]


def test_ranks_that_see_different_checkpoints_all_say_so(two):
    assert set(outcomes(two, "blind")) == {"workers see different checkpoints of plain: put the workspace on storage they share"}


@pytest.mark.parametrize("num_ranks", [1, 2, 7])
@pytest.mark.parametrize("num_rows", [0, 1, 6, 200])
def test_shares_are_of_like_size_and_hold_each_row_once(num_ranks, num_rows):
    lengths = [random.Random(row).randint(1, 128) for row in range(num_rows)]
    shares = balanced_shares(lengths, num_ranks)
    assert sorted(row for share in shares for row in share) == list(range(num_rows))
    assert all(share == sorted(share) for share in shares)
    sums = [sum(lengths[row] for row in share) for share in shares]
    assert max(sums) - min(sums) <= max(lengths, default=0)
