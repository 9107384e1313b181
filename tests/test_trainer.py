"""Law 2: k adapters trained together, in as many slots or fewer, are the adapters that solo training gives.

float32 products of other shapes round otherwise, and Adam divides by a small number: losses may differ by 1e-5 (or by 1e-6 of a
loss above 10, as the tiny seq2seq base has), weights by 1e-4.
"""

import math
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import get_scheduler

from multilora.artifact import read_artifact, read_tensors
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import ScoringRow, answer_losses, encode_labels
from multilora.spec import ResourceSpec, TaskSpec
from multilora.spec_hash import spec_hash
from orchestrator.batching import batch_indices, drawn_wording
from orchestrator.calibration import fit_temperature
from orchestrator.dataset import Example
from orchestrator.group_task import Member
from orchestrator.ranks import ALONE
from orchestrator.trainer import GroupTrainer
from serve.engine import Engine, Work

# float32 sums of batches of other shapes, amplified by a few steps of bases with large random weights.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-4
NEVER_S = 1e9
WORDS = ["the", "client", "said", "that", "money", "time", "was", "not", "very", "good", "late", "order", "card", "help", "again"]
SOME_MODULES = {"seq2seq": ["q", "v"], "encoder": ["query", "value"], "causal": ["q_proj", "v_proj"]}
ADVICE = "loss is not finite; lower train.learning_rate, or use base.dtype float32"


def examples_of(count, labels, prefix):
    rng = random.Random(prefix)
    texts = (f"{prefix} {i} {' '.join(rng.choices(WORDS, k=rng.randint(1, 30)))}" for i in range(count))
    return tuple(Example(f"{prefix}-{i}", {"text": text}, rng.choice(labels)) for i, text in enumerate(texts))


def member_of(
    folder, base, name, *, labels="yes no", num_train=11, lora=(), metric="accuracy", instruction="{labels} {text}", **train
):
    """Make a member that writes below `folder`; `lora` and `train` are settings of its spec."""
    names = labels.split()
    spec = TaskSpec(
        name=name,
        base=base.spec,
        data={"train": "data.jsonl"},
        instruction=instruction,
        labels=dict.fromkeys(names),
        lora=dict(lora),
        train={"epochs": 2, "batch_size": 4, "max_length": 64, **train},
        gate={"metric": metric},
    )
    return Member(
        spec=spec,
        run_key=f"key-{name}",
        train=examples_of(num_train, names, name),
        select=examples_of(5, names, f"{name} select"),
        data_fingerprint=f"data of {name}",
        adapter_dir=str(folder / "adapters" / name / "adapter"),
        checkpoint_file=str(folder / "checkpoints" / f"{name}.safetensors"),
    )


def unlike_members(folder, base):
    """Four members that share nothing but the base."""
    some = SOME_MODULES[base.family]
    tail = rf".*\.1\..*\.({'|'.join(some)})"
    dropout = {"labels": "good bad odd", "lora": {"rank": 2, "alpha": 8, "dropout": 0.4, "rslora": True, "layers": [-1]}}
    narrow = {"labels": "a b c d", "lora": {"rank": 4, "target_modules": some, "plus_ratio": 4}, "metric": "macro_f1"}
    single = {"lora": {"rank": 1, "alpha": 2, "target_modules": tail}, "num_train": 6}
    return [
        member_of(folder, base, "plain", learning_rate=3e-3, batch_size=8, num_train=17),
        member_of(folder, base, "dropout", **dropout, learning_rate=1e-2, batch_size=3, max_length=32, seed=7, schedule="cosine"),
        member_of(folder, base, "narrow", **narrow, batch_size=5, epochs=3, seed=3, warmup_ratio=0.3, max_grad_norm=0.1),
        member_of(folder, base, "single", **single, batch_size=99, epochs=4, schedule="constant", weight_decay=0.5),
    ]


class Trained:
    """What came out of one GroupTrainer."""

    def __init__(
        self,
        base,
        members,
        num_slots=4,
        should_stop=lambda: False,
        on_event=lambda trainer, event: None,
        every_s=NEVER_S,
        ranks=ALONE,
    ):
        self.events = []
        self.trainer = None

        def note(event):
            self.events.append(event)
            on_event(self.trainer, event)

        self.folders = {member.spec.name: Path(member.adapter_dir) for member in members}
        self.trainer = GroupTrainer(base, members, num_slots, note, ranks)
        keys = [member.run_key for member in members]
        self.trainer.train(lambda: keys if should_stop() else (), every_s)
        ended = {event.task for event in self.events if event.kind in ("finished", "failed")}
        self.is_complete = ended == set(self.folders)

    def kinds(self, task):
        return [event.kind for event in self.events if event.task == task]

    def last(self, task):
        return [event for event in self.events if event.task == task][-1]

    def losses(self, task):
        return losses_in(self.events, task)

    def temperature(self, task):
        return read_artifact(self.folders[task]).card.temperature

    def weights(self, task):
        pairs = read_tensors(read_artifact(self.folders[task]))
        return {f"{name} {half}": tensor for name, pair in pairs.items() for half, tensor in zip("AB", pair, strict=True)}


def losses_in(events, task):
    """Loss by step; a step that was done again must give the same loss."""
    return {event.step: event.metrics["train/loss"] for event in events if (event.task, event.kind) == (task, "progress")}


def after(num_calls):
    """A wish to stop that comes with the given call."""
    calls = iter(range(num_calls))
    return lambda: next(calls, None) is None


def assert_same_losses(seen, expected):
    assert list(seen) == list(expected)
    assert list(seen.values()) == pytest.approx(list(expected.values()), rel=1e-6, abs=LOSS_TOLERANCE)


def assert_same_weights(seen, expected):
    assert set(seen) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.fixture(scope="module")
def solo(fresh_base, tmp_path_factory):
    """The four members of a family, each trained alone, once."""
    cache = {}

    def trained(family):
        if family not in cache:
            members = unlike_members(tmp_path_factory.mktemp(f"solo-{family}"), fresh_base(family))
            cache[family] = {member.spec.name: Trained(fresh_base(family), [member]) for member in members}
        return cache[family]

    return trained


@pytest.mark.parametrize("num_slots", [4, 2])
def test_group_training_equals_solo_training(family, num_slots, solo, fresh_base, tmp_path):
    base = fresh_base(family)
    group = Trained(base, unlike_members(tmp_path, base), num_slots)
    assert group.is_complete
    for task, alone in solo(family).items():
        assert_same_losses(group.losses(task), alone.losses(task))
        assert_same_weights(group.weights(task), alone.weights(task))
        assert group.temperature(task) == pytest.approx(alone.temperature(task), rel=1e-3)


def test_the_four_members_are_trained_and_differ(family, solo):
    alone = solo(family)
    assert [len(trained.losses(task)) for task, trained in alone.items()] == [6, 8, 9, 4]
    for task, rank in {"plain": 8, "dropout": 2, "narrow": 4, "single": 1}.items():
        weights = alone[task].weights(task)
        assert {tensor.shape[0] for name, tensor in weights.items() if name.endswith("A")} == {rank}
        assert all(tensor.abs().max() > 1e-4 for tensor in weights.values())


def test_training_learns_its_examples(family, fresh_base, tmp_path):
    base = fresh_base(family)
    member = member_of(tmp_path, base, "mood", epochs=12, learning_rate=1e-2, batch_size=11)
    trained = Trained(base, [replace(member, select=member.train)])
    losses = trained.losses("mood")
    assert losses[12] < 0.5 * losses[1]
    assert trained.last("mood").metrics["select/best"] > 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_stopped_and_resumed_in_other_groups_equals_undisturbed(family, solo, fresh_base, tmp_path):
    base = fresh_base(family)
    members = unlike_members(tmp_path, base)
    plain, dropout, narrow, single = members
    # `single` waits for a slot; the others are stopped in the middle of an epoch, after at least one epoch's end.
    first = Trained(base, members, 3, should_stop=after(4))
    assert not first.is_complete
    assert [Path(member.checkpoint_file).exists() for member in members] == [True, True, True, False]
    second = Trained(fresh_base(family), [single, narrow, dropout], 2, should_stop=after(3))
    third = Trained(fresh_base(family), [dropout, plain])
    fourth = Trained(fresh_base(family), [narrow, single])
    assert not second.is_complete
    assert third.is_complete
    assert fourth.is_complete
    events = [*first.events, *second.events, *third.events, *fourth.events]
    for run, task in ((third, "plain"), (third, "dropout"), (fourth, "narrow"), (fourth, "single")):
        assert_same_losses(losses_in(events, task), solo(family)[task].losses(task))
        assert_same_weights(run.weights(task), solo(family)[task].weights(task))
        assert run.last(task).metrics == pytest.approx(solo(family)[task].last(task).metrics)
    assert not any(Path(member.checkpoint_file).exists() for member in members)


@pytest.mark.parametrize("num_steps", [0, 1, 3, 5])
def test_stopped_anywhere_and_resumed_equals_undisturbed(num_steps, solo, fresh_base, tmp_path):
    base = fresh_base("encoder")
    member = unlike_members(tmp_path, base)[0]
    stopped = Trained(base, [member], should_stop=after(num_steps))
    assert len(stopped.losses("plain")) == num_steps
    resumed = Trained(fresh_base("encoder"), [member])
    alone = solo("encoder")["plain"]
    assert_same_losses(stopped.losses("plain") | resumed.losses("plain"), alone.losses("plain"))
    assert_same_weights(resumed.weights("plain"), alone.weights("plain"))
    epochs = [event.metrics for run in (stopped, resumed) for event in run.events if event.kind == "epoch"]
    assert epochs == [pytest.approx(event.metrics) for event in alone.events if event.kind == "epoch"]


def test_one_adapter_that_is_stopped_changes_nothing_for_the_others(solo, fresh_base, tmp_path):
    base = fresh_base("encoder")
    members = unlike_members(tmp_path, base)
    events, is_wanted = [], after(3)
    trainer = GroupTrainer(base, members, 4, events.append)
    trainer.train(lambda: [members[1].run_key] if is_wanted() else (), NEVER_S)
    kinds = {event.task: event.kind for event in events}  # the last one of each
    assert kinds == {"plain": "finished", "dropout": "stopped", "narrow": "finished", "single": "finished"}
    assert not Path(members[1].adapter_dir).exists()
    for task in ("plain", "narrow", "single"):
        assert_same_losses(losses_in(events, task), solo("encoder")[task].losses(task))
    resumed = Trained(fresh_base("encoder"), [members[1]])
    assert_same_losses(losses_in([*events, *resumed.events], "dropout"), solo("encoder")["dropout"].losses("dropout"))
    assert_same_weights(resumed.weights("dropout"), solo("encoder")["dropout"].weights("dropout"))


def test_a_worker_that_dies_continues_from_the_last_checkpoint(solo, fresh_base, tmp_path):
    members = unlike_members(tmp_path, fresh_base("encoder"))

    def die(trainer, event):
        if event.kind == "progress" and event.task == "narrow" and event.step == 5:
            raise ConnectionError("the worker's node is gone")

    with pytest.raises(ConnectionError):
        Trained(fresh_base("encoder"), members, on_event=die, every_s=-1.0)
    resumed = Trained(fresh_base("encoder"), members)
    assert min(resumed.losses("narrow")) == 5
    for task, alone in solo("encoder").items():
        assert_same_weights(resumed.weights(task), alone.weights(task))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_whose_loss_is_not_finite_fails_alone_with_advice(family, solo, fresh_base, tmp_path):
    base = fresh_base(family)
    members = unlike_members(tmp_path, base)
    hot = member_of(tmp_path, base, "hot", lora={"rank": 3}, epochs=9)

    def overheat(trainer, event):
        if (event.task, event.kind, event.step) == ("hot", "progress", 2):
            trainer.slots.flat_SP[0] = math.inf

    # `single` takes over the slot that `hot` leaves full of infinities.
    group = Trained(base, [hot, *members], 4, on_event=overheat)
    assert group.is_complete
    assert group.kinds("hot") == ["started", "progress", "progress", "failed"]
    assert group.last("hot").message == ADVICE
    assert not Path(hot.adapter_dir).exists()
    for task, alone in solo(family).items():
        assert_same_losses(group.losses(task), alone.losses(task))
        assert_same_weights(group.weights(task), alone.weights(task))


@pytest.mark.parametrize("step", [3, 6])
def test_weights_that_are_not_finite_at_an_epochs_end_are_never_exported(step, fresh_base, tmp_path):
    base = fresh_base("encoder")
    member = member_of(tmp_path, base, "hot")

    def overheat(trainer, event):
        if (event.kind, event.step) == ("progress", step):
            trainer.slots.flat_SP[0] = math.nan

    trained = Trained(base, [member], on_event=overheat)
    assert (trained.last("hot").kind, trained.last("hot").message) == ("failed", ADVICE)
    assert not Path(member.adapter_dir).exists()


def test_members_that_cannot_start_fail_alone(solo, fresh_base, tmp_path):
    base = fresh_base("seq2seq")
    plain, *_ = unlike_members(tmp_path, base)
    long = member_of(tmp_path, base, "long", instruction=f"{' '.join(WORDS)} {{labels}} {{text}}", max_length=8)
    alike = member_of(tmp_path, base, "alike", labels="☃ ♞")
    lost = member_of(tmp_path, base, "lost", lora={"target_modules": ["query"]})
    deep = member_of(tmp_path, base, "deep", lora={"layers": [1, 12]})
    group = Trained(base, [long, lost, alike, deep, plain], 1)
    assert group.is_complete
    assert {task: group.last(task).kind for task in ("long", "lost", "alike", "deep", "plain")} == {
        "long": "failed",
        "lost": "failed",
        "alike": "failed",
        "deep": "failed",
        "plain": "finished",
    }
    assert group.last("long").message.endswith("more than train.max_length 8: raise max_length or shorten them")
    assert group.last("lost").message.startswith("target_modules ['query'] match no linear layer; this base has ")
    assert group.last("deep").message.startswith("layers [12] do not exist; this base has 2 layers in encoder.block and 2 ")
    assert group.last("alike").message.startswith("two of the labels ☃, ♞ are the same tokens to base ")
    assert_same_weights(group.weights("plain"), solo("seq2seq")["plain"].weights("plain"))


def test_a_group_of_which_no_member_can_start_ends(fresh_base, tmp_path):
    base = fresh_base("encoder")
    group = Trained(base, [member_of(tmp_path, base, "lost", lora={"target_modules": ["nothing"]})])
    assert group.is_complete
    assert group.kinds("lost") == ["failed"]


def test_early_stopping_ends_after_the_given_epochs_without_a_better_result(solo, fresh_base, tmp_path):
    base = fresh_base("encoder")
    # So small a rate changes no score in float32: the first epoch stays the best.
    idle = member_of(tmp_path, base, "idle", learning_rate=1e-12, epochs=9, early_stopping=2)
    plain, *_ = unlike_members(tmp_path, base)
    group = Trained(base, [idle, plain], 1)
    assert group.kinds("idle").count("epoch") == 3
    assert (group.last("idle").kind, group.last("idle").step, group.last("idle").num_steps) == ("finished", 9, 27)
    assert group.last("idle").metrics["train/best_epoch"] == 1
    assert_same_weights(group.weights("plain"), solo("encoder")["plain"].weights("plain"))


def test_the_best_epoch_is_exported(fresh_base, tmp_path):
    base = fresh_base("encoder")
    member = member_of(tmp_path, base, "mood", learning_rate=1e-2, epochs=6)
    weights, results = {}, {}

    def disturb(trainer, event):
        """Make the epochs differ in no order that training would have, and note what each ended with."""
        if event.kind == "progress" and event.step % 3 == 0:
            generator = torch.Generator().manual_seed(event.step)
            trainer.slots.flat_SP[0] += 0.05 * torch.randn(trainer.slots.flat_SP.shape[1], generator=generator)
            weights[event.step // 3] = trainer.slots.export(0)
        if event.kind == "epoch":
            results[event.step // 3] = (event.metrics["select/accuracy"], -event.metrics["select/loss"])

    trained = Trained(base, [replace(member, select=member.train)], on_event=disturb)
    best = max(results, key=results.__getitem__)
    assert sorted(results) == list(range(1, 7))
    assert len(set(results.values())) == 6
    assert trained.last("mood").metrics["train/best_epoch"] == best
    for name, pair in weights[best].items():
        for half, tensor in zip("AB", pair, strict=True):
            assert torch.equal(trained.weights("mood")[f"{name} {half}"], tensor)


def test_a_finished_adapter_is_not_trained_again(fresh_base, tmp_path):
    base = fresh_base("encoder")
    members = unlike_members(tmp_path, base)[2:]
    first = Trained(base, members)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    again = Trained(fresh_base("encoder"), members)
    assert [(event.task, event.kind) for event in again.events] == [("narrow", "finished"), ("single", "finished")]
    assert [event.message for event in again.events] == [first.last("narrow").message, first.last("single").message]
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == written
    # A folder that lacks a part was never finished.
    (Path(members[1].adapter_dir) / "task_card.json").unlink()
    repaired = Trained(fresh_base("encoder"), members)
    assert repaired.kinds("narrow") == ["finished"]
    assert repaired.kinds("single").count("progress") == 4
    assert_same_weights(repaired.weights("single"), first.weights("single"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_adapter_answers_in_the_engine_as_its_card_says(family, dtype, fresh_base, tmp_path):
    base = fresh_base(family, dtype=dtype)
    members = unlike_members(tmp_path, base)[:3]
    trained = Trained(base, members)
    assert trained.trainer.slots.flat_SP.dtype == torch.float32, "adapters train in float32 over any base"
    engine = Engine(fresh_base(family, dtype=dtype), num_slots=2, max_rank=8)
    for member in members:
        artifact = read_artifact(Path(member.adapter_dir), trained.last(member.spec.name).message)
        card = artifact.card
        assert (card.task, card.rank, card.family, card.data_fingerprint) == (
            member.spec.name,
            member.spec.lora.rank,
            family,
            member.data_fingerprint,
        )
        assert card.spec_hash == spec_hash(member.spec)
        assert card.prompt_format == PromptFormat.of(member.spec, family)
        assert card.scaling == member.spec.lora.scaling
        assert [canary.columns for canary in card.canaries] == [example.columns for example in member.select[:4]]
        key = engine.bind(artifact, version=1)
        selected = engine.classify([Work(key, engine.prompt(key, example.columns)) for example in member.select])
        gold = [answer.labels.index(example.label) for answer, example in zip(selected, member.select, strict=True)]
        fitted = fit_temperature([answer.scores for answer in selected], gold)
        assert card.temperature == pytest.approx(fitted, rel=1e-3 if dtype == "float32" else 0.1)
        assert {answer.temperature for answer in selected} == {card.temperature}
        answers = engine.classify([Work(key, engine.prompt(key, canary.columns)) for canary in card.canaries])
        for answer, canary in zip(answers, card.canaries, strict=True):
            assert answer.scores == pytest.approx(canary.scores, abs=1e-4 if dtype == "float32" else 0.5)


def test_events_tell_the_whole_story(fresh_base, tmp_path):
    base = fresh_base("encoder")
    member = member_of(tmp_path, base, "mood", metric="macro_f1", learning_rate=1e-2)
    trained = Trained(base, [member])
    assert trained.kinds("mood") == ["started", *["progress"] * 3, "epoch", *["progress"] * 3, "epoch", "finished"]
    assert {event.num_steps for event in trained.events} == {6}
    assert {event.run_key for event in trained.events} == {"key-mood"}
    rates = [event.metrics["train/learning_rate"] for event in trained.events if event.kind == "progress"]
    assert rates == pytest.approx([1e-2 * left / 6 for left in (6, 5, 4, 3, 2, 1)])
    epochs = [event.metrics for event in trained.events if event.kind == "epoch"]
    assert all(set(metrics) == {"select/macro_f1", "select/loss", "train/epoch_loss"} for metrics in epochs)
    losses = list(trained.losses("mood").values())
    assert [metrics["train/epoch_loss"] for metrics in epochs] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    assert trained.last("mood").metrics["select/best"] == max(metrics["select/macro_f1"] for metrics in epochs)
    assert trained.last("mood").message == read_artifact(Path(member.adapter_dir)).digest


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_loss_is_the_bases_mean_loss_of_the_batch_however_it_is_cut(family, fresh_base, tmp_path):
    """A fresh adapter changes nothing, and more rows than one forward pass takes are one step all the same."""
    base, plain = fresh_base(family), fresh_base(family)
    member = member_of(tmp_path, base, "mood", num_train=260, batch_size=256, epochs=1)
    trained = Trained(base, [member], should_stop=after(1))
    prompt_format = PromptFormat.of(member.spec, family)
    nothing = AdapterSlots(plain.model, [], num_slots=1, max_rank=1)
    labels = encode_labels(plain, nothing, prompt_format)
    batch = [member.train[index] for index in batch_indices(260, 256, 0, 0)]
    prompts = [encode_prompt(prompt_format, example.columns, plain.tokenizer).token_ids for example in batch]
    assert sum(map(len, prompts)) > 4096 or family == "encoder"
    with torch.no_grad():
        rows = [ScoringRow(ids, None, labels) for ids in prompts]
        losses_B = answer_losses(plain, nothing, rows, [labels.names.index(example.label) for example in batch])
    assert trained.losses("mood")[1] == pytest.approx(losses_B.mean().item(), rel=1e-6, abs=LOSS_TOLERANCE)


OPTIONS = {"rslora": True, "plus_ratio": 4, "layers": [1]}
STEPS = {"schedule": "cosine", "warmup_ratio": 0.2, "weight_decay": 0.3, "max_grad_norm": 0.5}


@pytest.mark.parametrize(("options", "steps"), [({}, {}), (OPTIONS, STEPS)])
@pytest.mark.parametrize("family", ["seq2seq", "causal"])
def test_training_equals_a_plain_peft_loop(family, options, steps, fresh_base, tmp_path):
    """The oracle: PEFT's layers and LoRA+, transformers' own loss one row at a time and schedule, AdamW and clipping."""
    base, plain = fresh_base(family), fresh_base(family)
    settings = {"rank": 4, "alpha": 8, "target_modules": SOME_MODULES[family], **options}
    member = member_of(tmp_path, base, "mood", lora=settings, learning_rate=3e-3, labels="good very-bad", **steps)
    weights = {}
    # After the last event, at step 6, the slot is empty.
    trained = Trained(base, [member], on_event=lambda trainer, event: weights.update({event.step: trainer.slots.export(0)}))
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=SOME_MODULES[family], use_rslora="rslora" in options,
        layers_to_transform=options.get("layers"),
    )  # fmt: skip
    model = get_peft_model(plain.model, config)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, (a_RI, _) in weights[0].items():
        layers[name].lora_A["default"].weight.data.copy_(a_RI)
    assert set(layers) == set(weights[0])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=3e-3, loraplus_lr_ratio=options.get("plus_ratio", 1.0),
        loraplus_weight_decay=steps.get("weight_decay", 0.0),
    )  # fmt: skip
    scheduler = get_scheduler(steps.get("schedule", "linear"), optimizer, math.ceil(6 * steps.get("warmup_ratio", 0)), 6)
    prompt_format = PromptFormat.of(member.spec, family)
    for step in range(5):
        batch = [member.train[index] for index in batch_indices(11, 4, 0, step)]
        losses = []
        for example in batch:
            ids = encode_prompt(prompt_format, example.columns, plain.tokenizer).token_ids
            answer = plain.tokenizer(("" if family == "seq2seq" else " ") + example.label, add_special_tokens=False)["input_ids"]
            answer = [*answer, plain.tokenizer.eos_token_id]
            inputs, gold = (ids, answer) if family == "seq2seq" else ([*ids, *answer], [*[-100] * len(ids), *answer])
            losses.append(model(input_ids=torch.tensor([inputs]), labels=torch.tensor([gold])).loss)
        loss = torch.stack(losses).mean()
        assert trained.losses("mood")[step + 1] == pytest.approx(loss.item(), rel=1e-6, abs=LOSS_TOLERANCE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, steps.get("max_grad_norm", 1.0))
        optimizer.step()
        scheduler.step()
    for name, (a_RI, b_OR) in weights[5].items():
        torch.testing.assert_close(layers[name].lora_A["default"].weight, a_RI, rtol=0, atol=WEIGHT_TOLERANCE)
        torch.testing.assert_close(layers[name].lora_B["default"].weight, b_OR, rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_trains_the_same_adapters(family, solo, fresh_base, tmp_path):
    base = fresh_base(family)
    first, *others = unlike_members(tmp_path, base)
    resources = ResourceSpec(gradient_checkpointing=True)
    group = Trained(base, [replace(first, spec=first.spec.model_copy(update={"resources": resources})), *others])
    for task, alone in solo(family).items():
        assert_same_losses(group.losses(task), alone.losses(task))
        assert_same_weights(group.weights(task), alone.weights(task))


WORDINGS = ["Say: {text}", "{text} ({labels})?"]


def mixed_member(folder, base, **settings):
    """A member whose training mixes three wordings."""
    member = member_of(folder, base, "mixed", seed=5, **settings)
    return replace(member, spec=member.spec.model_copy(update={"instructions": WORDINGS}))


class Watched(GroupTrainer):
    """Keeps what every batch shows."""

    def next_batch(self):
        batch = super().next_batch()
        self.shown = [*getattr(self, "shown", []), [row.token_ids for row in batch.rows]]
        return batch


@pytest.mark.parametrize("family", ["seq2seq", "causal"])
def test_training_shows_each_example_in_the_wording_that_is_drawn(family, fresh_base, tmp_path):
    base = fresh_base(family)
    member = mixed_member(tmp_path, base, epochs=3)
    trainer = Watched(base, [member], 1, lambda event: None)
    trainer.train(lambda: (), NEVER_S)
    formats = PromptFormat.all_of(member.spec, family)
    drawn = [[(index, drawn_wording(3, 5, step // 3, index)) for index in batch_indices(11, 4, 5, step)] for step in range(9)]
    assert {wording for batch in drawn for _, wording in batch} == {0, 1, 2}
    assert trainer.shown == [
        [encode_prompt(formats[wording], member.train[index].columns, base.tokenizer).token_ids for index, wording in batch]
        for batch in drawn
    ]
    card = read_artifact(Path(member.adapter_dir)).card
    assert card.prompt_format == formats[0]
    assert card.spec_hash == spec_hash(member.spec)


def test_mixed_wordings_train_alike_in_a_group_and_after_a_stop(solo, fresh_base, tmp_path):
    base = fresh_base("causal")
    alone = Trained(base, [mixed_member(tmp_path / "alone", base)])
    base = fresh_base("causal")
    plain, mixed = unlike_members(tmp_path, base)[0], mixed_member(tmp_path, base)
    first = Trained(base, [plain, mixed], should_stop=after(2))
    second = Trained(fresh_base("causal"), [plain, mixed])
    assert (first.is_complete, second.is_complete) == (False, True)
    assert_same_losses(losses_in([*first.events, *second.events], "mixed"), alone.losses("mixed"))
    assert_same_weights(second.weights("mixed"), alone.weights("mixed"))
    assert_same_weights(second.weights("plain"), solo("causal")["plain"].weights("plain"))


def test_a_wording_that_leaves_no_room_for_the_text_is_refused(fresh_base, tmp_path):
    base = fresh_base("causal")
    member = mixed_member(tmp_path, base)
    member = replace(member, spec=member.spec.model_copy(update={"instructions": [f"{' '.join(WORDS * 9)} {{text}}"]}))
    trained = Trained(base, [member])
    assert trained.last("mixed").message.endswith("more than train.max_length 64: raise max_length or shorten them")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_that_is_given_back_is_as_new(family, fresh_base, tmp_path):
    """Slots, recomputed layers and the frozen prefix are all taken off, so that the next trainer or engine finds a plain base."""
    base, new = fresh_base(family), fresh_base(family)
    member = member_of(tmp_path / "first", base, "top", lora={"layers": [-1]})
    resources = ResourceSpec(gradient_checkpointing=True)
    trained = Trained(base, [replace(member, spec=member.spec.model_copy(update={"resources": resources}))])
    assert any(isinstance(vars(module).get("forward"), partial) for module in base.model.modules())
    trained.trainer.detach()
    assert [name for name, _ in base.model.named_modules()] == [name for name, _ in new.model.named_modules()]
    assert not any(isinstance(vars(module).get("forward"), partial) for module in base.model.modules())
    assert not any(module._forward_pre_hooks for module in base.model.modules())
    again, expected = (Trained(each, unlike_members(tmp_path / str(id(each)), each)[:1]) for each in (base, new))
    for name, tensor in expected.weights("plain").items():
        assert torch.equal(again.weights("plain")[name], tensor)


def test_two_groups_leave_the_base_as_it_was(fresh_base, tmp_path):
    base = fresh_base("encoder")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    Trained(base, unlike_members(tmp_path, base)[:2])
    now = {name.replace(".base.", "."): tensor for name, tensor in base.model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    shutil.rmtree(tmp_path)
