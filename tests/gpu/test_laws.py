"""Laws 1 to 4 on a GPU: the same laws that the CPU tests hold, in few cases. The CPU runs them too, so that they are exercised.

Dims: B rows, T positions, S slots, P adapter parameters per slot.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_lora import farthest, outputs, random_tokens
from test_trainer import Trained, member_of

from multilora.artifact import FORMAT_VERSION, Canary, TaskCard, card_fields, write_artifact
from multilora.base_model import load_base
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat
from multilora.scoring import SCORER_VERSION
from multilora.segments import Segment
from multilora.spec import BaseSpec
from multilora.target_modules import match_modules

DTYPES = ("float32", "bfloat16")
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
"""Share of the largest output by which equal results may differ."""
LEARNED_TOLERANCES = {"float32": 1e-2, "bfloat16": 0.5}
"""Share of what was learned by which group and solo training may differ."""
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
LAYOUTS = (
    [Segment(None, 1), Segment(0, 2), Segment(1, 2), Segment(2, 2), Segment(None, 1)],
    [Segment(2, 1), Segment(0, 3), Segment(None, 2), Segment(1, 2)],
)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request):
    """The CPU, and a GPU where there is one. torch leaves TF32 off, so float32 means float32 there too."""
    return request.param


@pytest.fixture
def load(base_folder, device):
    """Load a tiny base on the device."""
    return lambda family, dtype: load_base(BaseSpec(model=str(base_folder(family)), dtype=dtype), device)


@pytest.fixture(params=DTYPES)
def dtype(request):
    """Each dtype in turn."""
    return request.param


def wrapped(load, random_adapter, family, dtype, *, num_slots=3, is_trainable=False):
    """A base whose slots hold adapters of ranks 1, 4 and 8."""
    base = load(family, dtype)
    slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), num_slots, 8, is_trainable=is_trainable)
    for slot, rank in zip(range(num_slots), (1, 4, 8), strict=False):
        slots.load(slot, random_adapter(slots, rank, seed=slot), 1.5)
    return base, slots


def run(base, slots, segments, tokens_BT):
    with torch.no_grad(), slots.using(segments):
        return outputs(base, tokens_BT.to(base.device)).float().cpu()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_batch_equals_each_adapter_alone(load, random_adapter, family, dtype, layout):
    base, slots = wrapped(load, random_adapter, family, dtype)
    tokens_BT = random_tokens(sum(segment.num_rows for segment in layout), 0)
    together = run(base, slots, layout, tokens_BT)
    plain = run(base, slots, [], tokens_BT)
    row = 0
    for segment in layout:
        rows = slice(row, row + segment.num_rows)
        alone = run(base, slots, [segment], tokens_BT[rows])
        tolerance = TOLERANCES[dtype] * alone.abs().max()
        assert farthest(together[rows], alone) <= tolerance
        assert segment.slot is None or farthest(alone, plain[rows]) > tolerance, "an adapter must change the base"
        row += segment.num_rows


def test_group_training_equals_solo_training(load, family, dtype, tmp_path):
    learning = {"learning_rate": 3e-3, "epochs": 1}
    make = lambda base, folder: [  # noqa: E731
        member_of(tmp_path / folder, base, "plain", batch_size=4, num_train=12, **learning),
        member_of(tmp_path / folder, base, "small", batch_size=3, num_train=9, lora={"rank": 2}, seed=7, **learning),
    ]
    base = load(family, dtype)
    group = Trained(base, make(base, "group"))
    for number in range(2):
        base = load(family, dtype)
        member = make(base, f"solo-{number}")[number]
        alone = Trained(base, [member])
        task = member.spec.name
        seen, expected = group.losses(task), alone.losses(task)
        assert len(expected) == 3
        assert list(seen.values()) == pytest.approx(list(expected.values()), rel=TOLERANCES[dtype], abs=TOLERANCES[dtype])
        weights, alone_weights = group.weights(task), alone.weights(task)
        assert set(weights) == set(alone_weights)
        # B starts at zero, so it is what was learned. Adam's steps are as long for tiny gradients, whose sign rounding may turn.
        for name in (name for name in weights if name.endswith("B")):
            share = ((weights[name] - alone_weights[name]).norm() / alone_weights[name].norm()).item()
            assert share <= LEARNED_TOLERANCES[dtype], name


def test_a_slot_is_not_touched_by_the_others(load, random_adapter, family, dtype):
    base, slots = wrapped(load, random_adapter, family, dtype, is_trainable=True)
    tokens_BT = random_tokens(6, 0).to(base.device)
    results = []
    for _ in range(2):
        slots.flat_grad_SP.zero_()
        with slots.using([Segment(None, 1), Segment(0, 2), Segment(1, 2), Segment(None, 1)]):
            y = outputs(base, tokens_BT)
        y.float().tanh().flatten(1).mean(1).sum().backward()
        results.append((y.detach(), slots.flat_grad_SP.clone()))
        torch.optim.AdamW(slots.parameters(1), lr=0.1).step()
    (before, before_SP), (after, after_SP) = results
    others = [0, 1, 2, 5]
    assert torch.equal(before[others], after[others])
    assert torch.equal(before_SP[0], after_SP[0])
    assert before_SP[0].any()
    assert not after_SP[2].any(), "a slot without rows gets no gradient"
    assert not torch.equal(before[3:5], after[3:5])


def test_fresh_and_absent_adapters_are_the_base_exactly(load, random_adapter, family, dtype):
    base, slots = wrapped(load, random_adapter, family, dtype)
    plain = load(family, dtype)
    tokens_BT = random_tokens(4, 0)
    with torch.no_grad():
        expected = outputs(plain, tokens_BT.to(plain.device)).float().cpu()
    slots.fresh(1, list(slots.layers), 4, 2.0, torch.Generator().manual_seed(0))
    assert torch.equal(run(base, slots, [Segment(None, 4)], tokens_BT), expected)
    assert torch.equal(run(base, slots, [Segment(1, 4)], tokens_BT), expected)


def test_exported_adapter_gives_the_same_logits_in_plain_peft(load, random_adapter, family, dtype, tmp_path):
    base, slots = wrapped(load, random_adapter, family, dtype)
    prompt_format = PromptFormat(family, "{labels} {text}", "text", (("a", ""), ("b", "")), 64)
    card = TaskCard(
        format_version=FORMAT_VERSION, task="mood", description="", base=base.spec, base_fingerprint=base.files.fingerprint,
        scorer_version=SCORER_VERSION, rank=8, scaling=1.5, num_modules=len(slots.layers),
        canaries=[Canary(columns={"text": "a"}, scores=[0.0, 0.0])], temperature=1.0,
        spec_hash="0" * 16, data_fingerprint="0" * 64,
        **card_fields(prompt_format),
    )  # fmt: skip
    artifact = write_artifact(Path(tmp_path) / "adapter", card, slots.export(2))
    tokens_BT = random_tokens(3, 0)
    seen = run(base, slots, [Segment(2, 3)], tokens_BT)
    plain = load(family, dtype)
    PeftModel.from_pretrained(plain.model, artifact.folder)  # changes the model's layers in place
    with torch.no_grad():
        expected = outputs(plain, tokens_BT.to(plain.device)).float().cpu()
    tolerance = TOLERANCES[dtype] * expected.abs().max()
    assert farthest(seen, expected) <= tolerance
    assert farthest(seen, run(base, slots, [], tokens_BT)) > tolerance


@pytest.mark.slow
@pytest.mark.long
def test_these_tests_load_neither_ray_nor_mlflow():
    code = "import sys, gpu.test_laws; print(*sorted({'ray', 'mlflow'} & set(sys.modules)))"
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests, tests.parent)))
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []
