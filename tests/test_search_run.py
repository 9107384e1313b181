"""A search in one training group: each candidate as it trains alone, few slots or many, killed or not; no gate anywhere."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import FAMILIES
from test_free_text import text_member
from test_trainer import ADVICE, LOSS_TOLERANCE, NEVER_S, Trained, assert_same_weights, member_of

from multilora.artifact import read_artifact, read_tensors
from multilora.spec import SearchSpec
from orchestrator.group_task import SearchTask
from orchestrator.search import candidates, load_trails, planned_epochs, winner
from orchestrator.search_run import SearchRun
from orchestrator.trainer import GroupTrainer

RATES = [1e-4, 1e-2, 0.05]
SEARCH = {"learning_rate": RATES, "rank": [2, 8]}  # six candidates and the spec's own, which is one of rank 8 and 1e-3
TRAIN = {"epochs": 4, "batch_size": 4, "num_train": 8}  # 2 steps an epoch; they meet after the first and the second


def candidates_of(folder, base, search, **train):
    """The members of a search over one task."""
    own = member_of(folder, base, "mood", **{**TRAIN, **train})
    specs = candidates(own.spec.model_copy(update={"search": SearchSpec(**search)}))
    return [
        replace(
            own,
            spec=spec,
            run_key=f"key-{number}",
            adapter_dir=str(folder / "adapters" / f"key-{number}" / "adapter"),
            checkpoint_file=str(folder / "checkpoints" / f"key-{number}.safetensors"),
        )
        for number, spec in enumerate(specs)
    ]


class Searched:
    """One worker's go at a search, and at other members beside it."""

    def __init__(
        self, base, folder, search, num_slots=16, on_event=lambda trainer, event: None, every_s=NEVER_S, others=(),
        should_stop=lambda: False, **train,
    ):  # fmt: skip
        self.events, self.trainer = [], None
        self.members = candidates_of(folder, base, search, **train)
        self.keys = [member.run_key for member in self.members]
        self.adapter_dir = folder / "adapters" / "chosen" / "adapter"
        files = (str(self.adapter_dir), str(folder / "trails.json"))
        self.task = SearchTask("mood", "chosen", tuple(self.keys), SearchSpec(**search).eta, *files)

        def tell(event):
            self.events.append(event)
            on_event(self.trainer, event)

        run = SearchRun([self.task], [*others, *self.members], tell)
        run.begin()
        self.trainer = GroupTrainer(base, [*others, *self.members], num_slots, run.hear)
        self.trainer.train(lambda: self.keys if should_stop() else run.stopped(), every_s, run.held)

    @property
    def trails(self):
        epochs = {member.run_key: member.spec.train.epochs for member in self.members}
        return list(load_trails(Path(self.task.trails_file), epochs).values())

    @property
    def num_steps(self):
        return sum(event.kind == "progress" for event in self.events)

    @property
    def weights(self):
        pairs = read_tensors(read_artifact(self.adapter_dir))
        return {f"{name} {half}": tensor for name, pair in pairs.items() for half, tensor in zip("AB", pair, strict=True)}

    def kinds(self, run_key):
        return [event.kind for event in self.events if event.run_key == run_key and event.kind not in ("progress", "epoch")]


def assert_same_search(seen, expected):
    """Same results of the same candidates, and the same adapter, to the tolerance of training in groups of other sizes."""
    pairs = list(zip(seen.trails, expected.trails, strict=True))
    for one, other in pairs:
        assert (one.end, [result.epoch for result in one.results]) == (other.end, [result.epoch for result in other.results])
        losses = [[result.loss for result in trail.results] for trail in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6, abs=10 * LOSS_TOLERANCE)
    assert_same_weights(seen.weights, expected.weights)


@pytest.fixture(scope="module")
def undisturbed(fresh_base, tmp_path_factory):
    """The search over an encoder, once."""
    return Searched(fresh_base("encoder"), tmp_path_factory.mktemp("undisturbed"), SEARCH)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chosen_adapter_is_the_one_that_its_setting_gives_alone(family, fresh_base, tmp_path):
    base = fresh_base(family)
    group = Searched(base, tmp_path / "group", SEARCH, learning_rate=1e-3)
    chosen = group.members[winner(group.trails)]
    alone = replace(chosen, adapter_dir=str(tmp_path / "alone" / "adapter"), checkpoint_file=str(tmp_path / "alone.safetensors"))
    solo = Trained(fresh_base(family), [alone])
    assert_same_weights(group.weights, solo.weights("mood"))
    (told,) = [event for event in group.events if event.run_key == "chosen"]
    assert (told.kind, told.task, told.message) == ("finished", "mood", read_artifact(group.adapter_dir).digest)
    assert told.metrics == pytest.approx(solo.last("mood").metrics)


def test_without_early_ends_the_best_of_all_that_train_alone_is_chosen(fresh_base, tmp_path, undisturbed):
    group = Searched(fresh_base("encoder"), tmp_path / "group", {**SEARCH, "eta": 1})
    alone = candidates_of(tmp_path / "alone", fresh_base("encoder"), SEARCH)
    results = []
    for member in alone:
        epochs = [event.metrics for event in Trained(fresh_base("encoder"), [member]).events if event.kind == "epoch"]
        results.append(max((metrics["select/accuracy"], -metrics["select/loss"]) for metrics in epochs))
    assert len({value for value, _ in results}) > 1
    best = max(range(7), key=results.__getitem__)
    assert winner(group.trails) == (0 if results[0][0] == results[best][0] else best)
    # Halving takes fewer steps, and no more than the plan counts with.
    assert group.num_steps == 7 * 4 * 2
    assert undisturbed.num_steps <= 2 * planned_epochs([4] * 7, 2) < 0.7 * group.num_steps


def test_candidates_that_end_early_say_so_and_leave_nothing(undisturbed):
    ends = Counter(undisturbed.kinds(key)[-1] for key in undisturbed.keys)
    assert set(ends) == {"finished", "dropped"}
    assert undisturbed.kinds("key-0") == ["started", "finished"]
    files = [file for member in undisturbed.members for file in (member.adapter_dir, member.checkpoint_file)]
    assert [file for file in files if Path(file).exists()] == []


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_few_slots_decide_as_many_do(num_slots, undisturbed, fresh_base, tmp_path):
    base = fresh_base("encoder")
    other = member_of(tmp_path, base, "other")
    few = Searched(base, tmp_path, SEARCH, num_slots, others=[other])
    assert_same_search(few, undisturbed)
    assert few.num_steps == undisturbed.num_steps + 6
    assert few.kinds("key-other") == ["started", "finished"]


def test_candidates_of_other_lengths_wait_for_each_other(fresh_base, tmp_path):
    search = {"learning_rate": [1e-2], "epochs": [2, 4, 8]}
    many = Searched(fresh_base("encoder"), tmp_path / "many", search)
    few = Searched(fresh_base("encoder"), tmp_path / "few", search, 1)
    assert_same_search(few, many)


def test_of_a_free_text_task_the_loss_decides(fresh_base, tmp_path):
    base = fresh_base("seq2seq")
    own = text_member(tmp_path, base, "shorten", epochs=2)
    spec = own.spec.model_copy(update={"search": SearchSpec(learning_rate=[1e-2])})
    members = [
        replace(own, spec=one, run_key=f"key-{number}", adapter_dir=str(tmp_path / f"key-{number}" / "adapter"),
                checkpoint_file=str(tmp_path / f"key-{number}.safetensors"))
        for number, one in enumerate(candidates(spec))
    ]  # fmt: skip
    task = SearchTask("shorten", "chosen", ("key-0", "key-1"), 1, str(tmp_path / "chosen"), str(tmp_path / "trails.json"))
    events = []
    run = SearchRun([task], members, events.append)
    GroupTrainer(base, members, 2, run.hear).train(run.stopped, NEVER_S, run.held)
    losses = {}
    for event in events:
        if event.kind == "epoch":
            losses.setdefault(event.run_key, []).append(event.metrics["select/loss"])
    assert events[-1].run_key == "chosen"
    assert events[-1].metrics["select/best"] == min(map(min, losses.values()))
    assert winner(list(load_trails(tmp_path / "trails.json", {"key-0": 2, "key-1": 2}).values())) == 1


class KilledError(Exception):
    """The worker ends here."""


@pytest.mark.parametrize("every_s", [-1.0, NEVER_S], ids=["checkpoint after each step", "from the last rung"])
@pytest.mark.parametrize("number", [0, 9, 25, 31, 44, -1])
def test_killed_and_started_again_ends_alike(number, every_s, undisturbed, fresh_base, tmp_path):
    kill_at = range(len(undisturbed.events))[number]

    def kill(trainer, event):
        if next(count) == kill_at:
            raise KilledError

    count = iter(range(10**6))
    with pytest.raises(KilledError):
        Searched(fresh_base("encoder"), tmp_path, SEARCH, on_event=kill, every_s=every_s)
    resumed = Searched(fresh_base("encoder"), tmp_path, SEARCH)
    assert_same_search(resumed, undisturbed)
    assert resumed.kinds("chosen") == ["finished"]
    if every_s < 0 and kill_at > 20:  # the first step of all seven is saved
        assert resumed.num_steps < undisturbed.num_steps


def test_a_search_that_is_over_trains_nothing(fresh_base, tmp_path):
    Searched(fresh_base("encoder"), tmp_path, SEARCH)
    again = Searched(fresh_base("encoder"), tmp_path, SEARCH)
    assert [(event.kind, event.run_key) for event in again.events] == [("finished", "chosen")]


def test_a_search_that_is_stopped_goes_on_later(undisturbed, fresh_base, tmp_path):
    calls = iter(range(3))
    stopped = Searched(fresh_base("encoder"), tmp_path, SEARCH, should_stop=lambda: next(calls, None) is None)
    assert {event.kind for event in stopped.events} == {"started", "progress", "epoch", "stopped", "dropped"}
    resumed = Searched(fresh_base("encoder"), tmp_path, SEARCH)
    assert_same_search(resumed, undisturbed)
    assert stopped.num_steps + resumed.num_steps == undisturbed.num_steps


def overheat(*run_keys):
    """Spoil these candidates' weights after their first step."""

    def on_event(trainer, event):
        if event.run_key in run_keys and (event.kind, event.step) == ("progress", 1):
            slot = next(run.slot for run in trainer._active if run.member.run_key == event.run_key)
            trainer.slots.flat_SP[slot] = math.inf

    return on_event


def test_a_candidate_whose_loss_is_not_finite_is_out_and_the_others_go_on(fresh_base, tmp_path):
    group = Searched(fresh_base("encoder"), tmp_path, SEARCH, on_event=overheat("key-0", "key-3"))
    ends = [trail.end for trail in group.trails]
    assert (ends[0], ends[3]) == ("failed", "failed")
    assert [trail.reason for trail in group.trails if trail.reason] == [ADVICE] * 2
    assert "finished" in ends
    assert group.kinds("chosen") == ["finished"]


def test_a_search_of_which_no_candidate_can_be_trained_fails_and_begins_again(fresh_base, tmp_path):
    group = Searched(fresh_base("encoder"), tmp_path, SEARCH, on_event=overheat(*(f"key-{number}" for number in range(7))))
    told = group.events[-1]
    assert (told.kind, told.run_key) == ("failed", "chosen")
    assert told.message == f"no candidate of the search was trained to its end; the spec's own setting: {ADVICE}"
    assert not group.adapter_dir.exists()
    again = Searched(fresh_base("encoder"), tmp_path, SEARCH)
    assert again.kinds("chosen") == ["finished"]


def test_a_candidate_that_cannot_start_does_not_make_the_others_wait(fresh_base, tmp_path):
    base = fresh_base("encoder")
    members = candidates_of(tmp_path, base, SEARCH)
    lost = members[2].spec.model_copy(update={"lora": members[2].spec.lora.model_copy(update={"target_modules": ["nothing"]})})
    members[2] = replace(members[2], spec=lost)
    events = []
    files = (str(tmp_path / "chosen" / "adapter"), str(tmp_path / "trails.json"))
    task = SearchTask("mood", "chosen", tuple(member.run_key for member in members), 2, *files)
    run = SearchRun([task], members, events.append)
    run.begin()
    GroupTrainer(base, members, 1, run.hear).train(run.stopped, NEVER_S, run.held)
    assert [event.kind for event in events if event.run_key == "key-2"] == ["failed"]
    assert [event.kind for event in events if event.run_key == "chosen"] == ["finished"]
