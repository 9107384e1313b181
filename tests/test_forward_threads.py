"""Passes side by side: in order, without gradients, each on its share of the threads, and nothing left changed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat
from multilora.scoring import ScoringRow, encode_labels, score_labels
from multilora.segments import Segment
from multilora.target_modules import match_modules
from serve.forward_threads import ForwardThreads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_are_in_order_and_threads_are_given_back(two_threads):
    weight = torch.ones(2, 2, requires_grad=True)
    threads = ForwardThreads(torch.device("cpu"))
    together = threading.Barrier(2)

    def forward(number):
        together.wait(timeout=30)  # two run at once, or none goes on
        return number, torch.get_num_threads(), (weight * number).requires_grad

    assert threads.number == 2
    assert threads.map(forward, [0, 1, 2, 3]) == [(number, 1, False) for number in range(4)]
    assert torch.get_num_threads() == 2


def test_a_failure_comes_to_the_caller_and_the_next_call_works(two_threads):
    threads = ForwardThreads(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        threads.map(lambda number: 1 // number, [1, 0])
    assert torch.get_num_threads() == 2
    assert threads.map(lambda number: 1 // number, [1, -1]) == [1, -1]


def test_each_thread_has_its_own_routing(fresh_base, random_adapter):
    base = fresh_base("encoder")
    slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), 2, 4)
    for slot in range(2):
        slots.load(slot, random_adapter(slots, 4, slot), 2.0)
    layer = next(iter(slots.layers.values()))
    x_BTI = torch.randn(3, 5, layer.in_features)

    def forward(slot):
        with slots.using([Segment(slot, 3)]):
            inside.wait(timeout=30)
            y_BTO = layer(x_BTI)
            inside.wait(timeout=30)
        return y_BTO

    inside = threading.Barrier(1)
    alone = [forward(slot) for slot in range(2)]
    inside = threading.Barrier(2)
    found = {}
    workers = [threading.Thread(target=lambda slot=slot: found.update({slot: forward(slot).detach()})) for slot in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not torch.equal(alone[0], alone[1])
    assert all(torch.equal(found[slot], alone[slot]) for slot in range(2))
    assert slots.routing.segments == ()


@pytest.mark.parametrize("kind", ["seq2seq", "bart"])
def test_each_thread_has_its_own_answers_positions(kind, fresh_base):
    """Label trees of other depths, both inside the model at once."""
    base = fresh_base(kind)
    slots = AdapterSlots(base.model, [], num_slots=1, max_rank=1)
    texts = (("good", "good day", "bad"), ("order lost", "order late again", "order late now", "card"))
    formats = [PromptFormat("seq2seq", "{text} {labels}", "text", tuple((text, "") for text in one), 64) for one in texts]
    label_sets = [encode_labels(base, slots, one) for one in formats]
    assert not any(labels.tree.is_chain for labels in label_sets)
    ids = base.tokenizer("the order is late")["input_ids"]

    def forward(number):
        with torch.inference_mode():
            return score_labels(base, slots, [ScoringRow(tuple(ids), None, label_sets[number])] * (1 + number))[0]

    alone = [forward(number) for number in range(2)]
    inside = threading.Barrier(2)

    def meet(*_):
        inside.wait(timeout=30)

    hooks = [base.model.register_forward_pre_hook(meet), base.model.register_forward_hook(meet)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(forward, range(2)))
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(together[number], alone[number]) for number in range(2))
