"""What comparisons say of the field's claims: cases worked by hand."""

import math
from dataclasses import replace

import pytest
from made_up_methods import curve, order, row

from benchmarks import claims
from orchestrator.compare_result import MethodComparison


def found(adapter, prompt, task="mood", seeds=(0, 1, 2), vanilla_s=80.0, instruction_s=80.0):
    """A comparison where the adapter is right on `adapter` examples with seed 0, one more with each further seed."""
    rows = [
        *(one for seed in seeds for one in curve(adapter - 40 + seed, adapter + seed, adapter + seed, seed=seed)),
        row("prompting", "zero-shot, label name", range(prompt)),
        row("prompting", "zero-shot, meaning", range(prompt - 4)),
        *(row("prompting", "prototypes, 16 per label", range(prompt - 8 * seed), 32, seed=seed) for seed in seeds),
        *(row("alone", claims.VANILLA, range(adapter - 5 * seed), 400, seed=seed, train_s=vanilla_s) for seed in seeds),
        *(row("alone", claims.HEAD, range(adapter), 400, seed=seed, train_s=60.0) for seed in seeds),
        *(row("alone", claims.INSTRUCTION, range(adapter), 400, seed=seed, train_s=instruction_s) for seed in seeds),
    ]
    return MethodComparison(order(task), tuple(rows), ("prompting", "alone", "curve"), {})


def many(adapter, prompt, **options):
    return [found(adapter + number, prompt - number, f"task-{number}", **options) for number in range(8)]


def test_better_than_every_prompt_is_confirmed_and_worse_contradicted():
    good = claims.beats_prompting(many(150, 80))
    assert good.finding.startswith("With 100 examples confirmed: the adapter is shown better on 8 of 8 tasks, shown worse on 0, ")
    assert "with 200 examples confirmed: " in good.finding
    assert good.finding.endswith("p = 0.008).")
    assert len(good.table) == 9
    assert good.table[1][:5] == ("task-0", ".555", ".755", "zero-shot, label name", ".400")
    bad = claims.beats_prompting(many(90, 160))
    assert bad.finding.startswith(
        "With 100 examples contradicted: the adapter is shown better on 0 of 8 tasks, shown worse on 8, "
    )
    mixed = claims.beats_prompting([*many(150, 80)[:4], *many(90, 160)[:4]])
    assert mixed.finding.count("neither confirmed nor contradicted: ") == 2
    assert "shown better on 4 of 8 tasks, shown worse on 4" in mixed.finding


def test_deviations_are_pooled_over_tasks():
    assert claims.pooled([(3.0, 3), (4.0, 3)]) == pytest.approx((math.sqrt(12.5), 4))
    assert claims.pooled([(3.0, 3), (9.0, 1)]) == (3.0, 2)
    assert claims.pooled([(9.0, 1)]) == (0.0, 0)


def test_the_spread_over_seeds_is_told_beside_the_others():
    verdict = claims.is_more_stable(many(150, 80))
    # 0, 1, 2 of 200 right more: 0.5 points; 0, 5, 10 fewer: 2.5; 0, 8, 16 fewer: 4.
    assert verdict.finding.startswith(
        f"Adapter, all examples against {claims.VANILLA} confirmed, 0.5 to 2.5 points (F test of equal variances: p = 0.000)"
    )
    assert "adapter, 100 examples against examples in the prompt, 16 a label confirmed, 0.5 to 4.0 points" in verdict.finding
    table = {name: (tasks, seeds, value) for name, tasks, seeds, value in verdict.table[1:]}
    assert table[claims.HEAD] == ("8", "3", "0.0 points")
    assert table["zero-shot, over wordings instead of seeds"] == ("8", "", "1.4 points")
    alone = claims.is_more_stable(many(150, 80, seeds=(0,)))
    assert "not comparable, one of them has no spread" in alone.finding


def test_time_is_a_share_of_vanilla_fine_tunings():
    verdict = claims.takes_less_time(many(150, 80, instruction_s=70.0))
    assert verdict.finding.startswith(
        "Adapter, in its group takes 0.50 of its time (confirmed, Wilcoxon test over tasks: p = 0.008)"
    )
    assert f"{claims.HEAD} takes 0.75 of its time (confirmed" in verdict.finding
    same = "takes 1.00 of its time (neither confirmed nor contradicted"
    with pytest.warns(RuntimeWarning, match="invalid value"):  # all differences are zero
        assert same in claims.takes_less_time(many(150, 80)).finding
    slower = claims.takes_less_time(many(150, 80, vanilla_s=30.0, instruction_s=30.5))
    assert "takes 1.33 of its time (contradicted" in slower.finding
    assert slower.table[1] == ("task-0", "400", "30.0", "40.0", "60.0", "30.5")


def test_the_document_has_the_claims_and_every_table():
    all_found = many(150, 80)
    text = claims.as_markdown([claims.beats_prompting(all_found)], all_found)
    assert text.startswith("# Evidence\n")
    assert "## Claim 1: Fine-tuning beats prompting at 100 to 200 examples." in text
    assert all(f"### task-{number}\n" in text for number in range(8))
    assert "Means over" not in text  # no baselines and no variants in these
    table = claims.means(all_found, "curve", "prompting")
    assert table[0] == ("part", "method", "mean accuracy")
    assert ("curve", "adapter with 100 examples", ".573") in table
    assert ("prompting", "zero-shot, label name", ".383") in table
    assert claims.means([*all_found, replace(all_found[0], rows=())], "curve") == (table[0],)  # one task lacks them all
