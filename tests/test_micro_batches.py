"""Out of memory: the step starts again in smaller micro-batches, with the same result; one row too large ends its adapter.

A limit on the tokens of one forward pass stands in for a GPU's memory; it raises what torch raises.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from e2e.conftest import MINILM, SHARED, needs_minilm
from test_trainer import Trained, assert_same_losses, assert_same_weights, member_of
from transformers import AutoTokenizer

from multilora.base_files import find_base
from multilora.spec import BaseSpec
from orchestrator.batching import batch_indices
from orchestrator.dataset import Example
from orchestrator.micro_batches import MicroBatches


def with_little_memory(base, max_tokens):
    """Let every forward pass of more than `max_tokens` padded tokens run out of memory."""

    def refuse(module, args, options):
        if options["input_ids"].numel() > max_tokens:
            raise torch.OutOfMemoryError("the tokens do not fit")

    base.model.register_forward_pre_hook(refuse, with_kwargs=True)
    return base


def members(folder, base):
    return [
        member_of(folder, base, name, num_train=24, batch_size=12, learning_rate=1e-4, instruction="{text}", seed=seed)
        for seed, name in enumerate(("plain", "other"))
    ]


def test_a_step_that_does_not_fit_is_cut_and_gives_the_same_adapters(family, fresh_base, tmp_path):
    base = fresh_base(family)
    roomy = Trained(base, members(tmp_path / "roomy", base), 2)
    base = with_little_memory(fresh_base(family), 300)
    tight = Trained(base, members(tmp_path / "tight", base), 2)
    assert roomy.is_complete
    assert tight.is_complete
    assert "halved" not in roomy.kinds("plain")
    halved = [event.metrics["train/micro_batch_tokens"] for event in tight.events if event.kind == "halved"]
    assert halved[:4] == [2048.0, 2048.0, 1024.0, 1024.0]
    assert halved[-1] >= 64
    for task in ("plain", "other"):
        assert_same_losses(tight.losses(task), roomy.losses(task))
        assert_same_weights(tight.weights(task), roomy.weights(task))


def test_an_adapter_whose_example_does_not_fit_ends_alone_and_says_what_to_do(family, fresh_base, tmp_path):
    base = with_little_memory(fresh_base(family), 40)
    longer, other = members(tmp_path, base)
    long_text = Example("long", {"text": "again and " * 40}, "yes")
    longer = replace(longer, train=(*longer.train, long_text), spec=longer.spec.model_copy(update={"name": "longer"}))
    short = tuple(Example(f"short-{i}", {"text": "very good"}, label) for i, label in enumerate(("yes", "no") * 4))
    trained = Trained(base, [longer, replace(other, train=short, select=short)], 2)
    assert trained.kinds("longer")[-1] == "failed"
    assert re.match(r"one example of \d+ tokens does not fit .*: lower train.max_length", trained.last("longer").message)
    assert trained.last("other").kind == "finished"


def test_an_adapter_whose_select_example_does_not_fit_ends_alone(fresh_base, tmp_path):
    base = with_little_memory(fresh_base("encoder"), 40)
    longer, other = members(tmp_path, base)
    short = tuple(Example(f"short-{i}", {"text": "very good"}, label) for i, label in enumerate(("yes", "no") * 4))
    long_text = Example("long", {"text": "again and " * 40}, "yes")
    longer, other = replace(longer, train=short, select=(long_text,)), replace(other, train=short, select=short)
    trained = Trained(base, [longer, other], 2)
    assert [trained.last(task).kind for task in ("plain", "other")] == ["failed", "finished"]


@needs_minilm()
@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not beside this checkout")
def test_little_is_padding_on_public_data():
    """Of ten tasks, 16 rows each a step, 8.2 % of the positions.

    A lone task of short texts has 21 to 24 %: micro-batches with less would be so many that a step took longer.
    """
    tokenizer = AutoTokenizer.from_pretrained(find_base(BaseSpec(model=MINILM)).folder)
    lengths_of = []
    for file in sorted(SHARED.glob("*/train.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:400] if line]
        lengths_of.append([min(len(ids), 256) for ids in tokenizer([row["text"] for row in rows])["input_ids"]])
    assert len(lengths_of) >= 10
    micro_batches = MicroBatches(torch.device("cpu"), on_halved=lambda max_tokens: None)
    num_real = num_positions = 0
    for step in range(20):
        lengths = [of[i] for of in lengths_of for i in batch_indices(len(of), 16, 0, step)]
        for rows in micro_batches.cut(lengths):
            num_real += sum(lengths[row] for row in rows)
            num_positions += len(rows) * max(lengths[row] for row in rows)
    assert num_real > 0.9 * num_positions


def test_other_errors_are_not_memory(fresh_base):
    micro_batches = MicroBatches(torch.device("cpu"), on_halved=lambda max_tokens: pytest.fail("nothing is halved"))

    def attempt():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        micro_batches.within_memory(8, attempt)
