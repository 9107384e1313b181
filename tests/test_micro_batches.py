"""Out of memory: the step starts again in smaller micro-batches, with the same result; one row too large is an error.

A limit on the tokens of one forward pass stands in for a GPU's memory; it raises what torch raises.
"""

import pytest
import torch
from test_trainer import Trained, assert_same_losses, assert_same_weights, member_of

from multilora.errors import CapacityError
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


def test_one_example_that_does_not_fit_is_an_error_that_says_what_to_do(fresh_base, tmp_path):
    base = with_little_memory(fresh_base("seq2seq"), 8)
    with pytest.raises(CapacityError, match=r"one example of \d+ tokens does not fit .*: lower train.max_length"):
        Trained(base, members(tmp_path, base), 2)


def test_other_errors_are_not_memory(fresh_base):
    micro_batches = MicroBatches(torch.device("cpu"), on_halved=lambda max_tokens: pytest.fail("nothing is halved"))

    def attempt():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        micro_batches.within_memory(8, attempt)
