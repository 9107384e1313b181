"""Passes side by side: in order, without gradients, each on its share of the threads, and nothing left changed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from multilora.answer_tree import decoder_positions
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat
from multilora.segments import Segment
from multilora.target_modules import match_modules
from serve.engine import Engine
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


def test_engines_of_one_process_leave_its_number_of_threads_as_it_was(two_threads):
    first, second = (ForwardThreads(torch.device("cpu")) for _ in range(2))
    first_is_in, second_is_in, first_may_end = (threading.Event() for _ in range(3))

    def hold(_):
        first_is_in.set()
        first_may_end.wait(timeout=30)

    def outlast(_):
        second_is_in.set()
        holding.result(timeout=30)

    with ThreadPoolExecutor(2) as pool:
        holding = pool.submit(first.map, hold, [0, 1])
        first_is_in.wait(timeout=30)
        outlasting = pool.submit(second.map, outlast, [0, 1])
        second_is_in.wait(timeout=0.5)  # it does not come in
        first_may_end.set()
        outlasting.result(timeout=30)
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == 2


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
def test_positions_are_those_of_the_thread_that_set_them(fresh_base, kind):
    model = fresh_base(kind).model
    ids_BT = torch.tensor([[5, 6, 7, 8]])

    @torch.no_grad()
    def forward():
        return model(input_ids=ids_BT, decoder_input_ids=ids_BT, use_cache=False).logits

    plain, found = forward(), []
    with decoder_positions(model, torch.tensor([[0, 1, 1, 1]])):
        other = threading.Thread(target=lambda: found.append(forward()))
        other.start()
        other.join()
        found.append(forward())
    assert torch.equal(found[0], plain)
    assert not torch.allclose(found[1], plain)
    assert torch.equal(forward(), plain)


def test_labels_that_share_tokens_score_side_by_side_as_alone(two_threads, fresh_base, family):
    prompt_format = PromptFormat(family, "{text}\n{labels}", "text", (("card lost", ""), ("card late", ""), ("rate", "")), 64)
    items = [{"text": f"where is {'my ' * (number % 9)}card {number}"} for number in range(60)]
    side_by_side = Engine(fresh_base(family), 1, 1).classify_zero_shot(prompt_format, items)
    torch.set_num_threads(1)
    alone = Engine(fresh_base(family), 1, 1).classify_zero_shot(prompt_format, items)
    scores, expected = (torch.tensor([answer.scores for answer in answers]) for answers in (side_by_side, alone))
    assert torch.allclose(scores, expected, rtol=1e-4)
