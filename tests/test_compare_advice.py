"""What a comparison says to do: cases worked by hand, and never "better" with zero inside the interval."""

import random
from dataclasses import replace

import pytest
from made_up_methods import GOLD, comparison, curve, row

from orchestrator.compare_advice import advise
from orchestrator.compare_result import difference
from orchestrator.methods import AS_IN_FILE
from orchestrator.paired import tango_interval
from orchestrator.report_words import MINUS, signed_share

ZERO_SHOT = row("prompting", "zero-shot", range(98), ms_per_text=12.0)


def interval(losses, wins, level=0.95):
    return " to ".join(map(signed_share, tango_interval(losses, wins, 200, level)))


# Differences


def test_a_difference_of_one_run_each_is_tangos():
    found = difference([row("curve", "a", range(60))], [row("prompting", "b", range(50, 100))], GOLD)
    assert (found.value, found.flip_rate) == pytest.approx((0.05, 0.45))  # 50 won, 40 lost
    assert (found.low, found.high) == tango_interval(40, 50, 200, 0.95)
    assert not found.is_shown


def test_over_seeds_it_is_the_mean_of_all_pairs():
    ours = [row("curve", "a", range(100), seed=0), row("curve", "a", range(140), seed=1)]
    theirs = [row("prompting", "b", range(80, 160), seed=seed) for seed in range(3)]
    found = difference(ours, theirs, GOLD)
    assert found.value == pytest.approx(0.6 - 0.4)
    # Against the first run 80 won and 60 lost, against the second 80 and 20; whatever the other's seed, the same.
    assert (found.low, found.high) == pytest.approx(tango_interval(40, 80, 200, 0.95))
    back = difference(theirs, ours, GOLD)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low), abs=1e-9)


# What to do


def test_train_where_the_interval_is_above_zero():
    found = advise(comparison(*curve(100, 130, 158), ZERO_SHOT))
    assert found.tone == "good"
    assert found.headline == "Train an adapter: .790 with 400 examples against .490 for the best prompt (zero-shot)."
    assert found.details[0] == f"The difference is +.300, 95 % interval {interval(0, 60)} on the same 200 gate examples."
    assert found.details[1] == (
        "Cost: the adapter 40 s of training, 3.4 ms a text, 1.3 MB beside the base; "
        "the best prompt (zero-shot) no training, 12 ms a text."
    )
    assert found.text == " ".join([found.headline, *found.details])


def test_the_stronger_of_prompt_and_baseline_comes_first_and_both_must_be_beaten():
    words = row("baselines", "words", range(10, 150), 400, train_s=0.05)
    found = advise(comparison(*curve(100, 130, 158), ZERO_SHOT, words))
    assert found.tone == "good"
    assert found.headline.endswith(" against .700 for the best baseline (words).")
    assert found.details[0].startswith("The difference is +.090, 95 % interval ")
    assert "; against .490 for the best prompt (zero-shot) +.300, 95 % interval" in found.details[0]
    equal = row("baselines", "words", range(5, 158), 400, train_s=0.05)
    found = advise(comparison(*curve(100, 130, 158), ZERO_SHOT, equal))
    assert found.tone == "good"  # five won, none lost
    other = row("baselines", "words", range(25, 180), 400, train_s=0.05)
    found = advise(comparison(*curve(100, 130, 158), ZERO_SHOT, other))
    assert found.tone == "warn"
    assert found.headline.startswith(
        "Too close to call: the adapter has .790 with 400 examples against .775 for the best baseline"
    )
    assert found.details[0].startswith(f"The difference is +.015, 95 % interval {interval(22, 25)} on the same")
    assert "About 8,200 gate examples would tell a difference of this size. Until then take what is cheaper." in found.details[0]
    assert "better" not in found.text


def test_no_difference_at_all_asks_for_no_number_of_examples():
    found = advise(comparison(*curve(100, 110, 120), row("prompting", "4 examples", range(120))))
    assert found.headline.startswith("Too close to call")
    assert "would tell" not in found.text


def test_do_without_where_a_prompt_is_better():
    found = advise(comparison(*curve(100, 100, 100), row("prompting", "8 examples", range(180), 8)))
    assert found.tone == "calm"
    assert found.headline.startswith(
        "Do without an adapter: .500 with 400 examples against .900 for the best prompt (8 examples)"
    )
    assert found.details[0].startswith(f"The difference is {MINUS}.400, 95 % interval {interval(80, 0)}")


def test_what_is_missing_for_an_answer_is_named():
    found = advise(comparison(*curve(100, 130, 158)))
    assert found.headline == (
        "An adapter trained with 400 examples is right for .790 (95 % interval .728 to .841) of 200 gate examples. "
        "Whether a prompt would do: orchestrator compare mood.yaml --parts baselines,prompting."
    )
    found = advise(comparison(ZERO_SHOT))
    assert found.headline == (
        "The adapter was not tried: the best prompt (zero-shot) is right for .490 (95 % interval .422 to .559) of 200 gate "
        "examples. What it would add: orchestrator compare mood.yaml --parts curve."
    )
    assert {advise(comparison(*curve(100, 130, 158))).tone, found.tone} == {"warn"}
    alone = advise(comparison(ZERO_SHOT, row("alone", "IA3", range(150), 400, train_s=9.0)))
    assert alone.headline.startswith("The adapter was not tried: the best of part alone (IA3) is right for .750 ")
    assert alone.details[0].startswith("Cost: the best of part alone (IA3) 9.0 s of training")


def test_where_nothing_ran_the_reasons_are_said():
    rows = [row("alone", name, [], skipped="") for name in "ab"]
    skipped = [type(one)(one.part, one.method, skipped="needs a generative base") for one in rows]
    assert advise(comparison(*skipped)).text == "Nothing could be compared: needs a generative base."
    assert advise(comparison()).text == "Nothing could be compared: no part gave a row."


def test_without_a_curve_the_variant_as_in_the_task_file_is_the_adapter():
    variants = [row("variants", f"rank {rank}", range(140 + rank), 400) for rank in (1, 8, 16)]
    variants[1] = replace(variants[1], note=AS_IN_FILE)
    found = comparison(*variants, ZERO_SHOT)
    assert found.own.method == "rank 8"
    assert advise(found).headline.startswith("Train an adapter: .740 with 400 examples")
    assert comparison(variants[0], variants[2]).own.method == "rank 1"  # where that one could not be trained


# More labels


def test_the_best_of_several_is_said_to_be_favoured():
    several = advise(comparison(*curve(100, 130, 158), ZERO_SHOT, row("prompting", "calibrated", range(90), ms_per_text=12.0)))
    assert several.details[0].endswith(
        "What it is held against is the best of several on these very examples, which favours that."
    )


def test_a_rising_curve_says_what_labels_buy_and_a_flat_one_where_it_flattens():
    rising = advise(comparison(*curve(120, 160, 180), ZERO_SHOT)).details[2]
    assert rising == (f"More labels still pay: 200 to 400 examples changed +.100, 95 % interval {interval(0, 20)}.")
    flat = advise(comparison(*curve(100, 150, 151, 152, sizes=(50, 100, 200, 400)), ZERO_SHOT)).details[2]
    assert flat.startswith("The curve shows no gain after 100 examples: 200 to 400 examples changed +.005, 95 % interval ")
    fitted = advise(comparison(*curve(100, 150, 151, 152, sizes=(50, 100, 200, 400)), ZERO_SHOT)).details[3]
    assert fitted.startswith(
        "From 50 to 400 examples the fitted accuracy goes from 0.502 to 0.766 (points lie 0.010 off). From 143 on"
    )
    one_size = advise(comparison(*curve(150, sizes=(400,)), ZERO_SHOT))
    assert not any("labels" in detail or "curve" in detail for detail in one_size.details)


def test_the_last_step_is_a_doubling_where_there_is_one():
    found = advise(comparison(*curve(100, 110, 120, 121, sizes=(50, 100, 200, 279)), ZERO_SHOT)).details[2]
    assert ": 100 to 279 examples changed +.055" in found


# Other ways to train


def test_the_luckiest_of_many_is_not_better_until_it_is_corrected():
    own, best = curve(100, 130, 158), row("variants", "rank 16", range(1, 167), 400)  # 9 won, 1 lost
    alone = advise(comparison(*own, best, ZERO_SHOT)).details[-1]
    assert alone == f"The best of 1 other way to train, rank 16, is better still: .830 (+.040, 95 % interval {interval(1, 9)})."
    others = [row("alone", f"method {number}", range(150), 400) for number in range(40)]
    many = advise(comparison(*own, best, *others, ZERO_SHOT)).details[-1]
    assert many == (
        "The best of 41 other ways to train, rank 16, is not shown better: "
        f".830 (+.040, 95 % interval {interval(1, 9, 1 - 0.05 / 41)}, corrected for 41 comparisons)."
    )
    unsure = row("variants", "rank 16", range(6, 170), 400)  # 12 won, 6 lost
    assert "rank 16, is not shown better: .820 (+.030" in advise(comparison(*own, unsure, ZERO_SHOT)).details[-1]
    none = advise(comparison(*own, *others, ZERO_SHOT)).details[-1]
    assert none == "None of 40 other ways to train comes out above it; the best is method 0 with .750."


def test_merged_or_not_is_said_where_both_ran_at_both_paces():
    def way(name, ms_per_text, disk_bytes):
        return row("merged", name, range(158), 400, ms_per_text=ms_per_text, disk_bytes=disk_bytes)

    own = curve(100, 130, 158)
    engine = way("unmerged in the engine, batched", 3.0, 1_300_000), way("unmerged in the engine, one by one", 20.0, 1_300_000)
    merged = way("merged into the base, batched", 3.3, 90_000_000), way("merged into the base, one by one", 15.0, 90_000_000)
    assert advise(comparison(*own, *engine, *merged, ZERO_SHOT)).details[-1] == (
        "Merged into the base it is right for .790, in the engine for .790; the merged model takes 1.10 times batched and 0.75 "
        "times one by one of the engine's time, and 90.0 MB a task instead of 1.3 MB: merge what is served alone, keep adapters "
        "where several tasks share a base."
    )
    for part in (engine, merged, (*engine, merged[0])):
        assert "Merged" not in advise(comparison(*own, *part, ZERO_SHOT)).text


def test_what_failed_or_was_cut_off_is_said_last():
    found = comparison(*curve(100, 130, 158), ZERO_SHOT, failed={"alone": "OutOfMemoryError: 3 GB"})
    assert advise(found).details[-1] == "Not complete: alone failed (OutOfMemoryError: 3 GB); the same command goes on."
    cut = type(found)(found.order, found.rows, ("curve",), {})
    assert advise(cut).details[-1] == "Not complete: prompting was cut off; the same command goes on."


def test_nothing_is_called_better_with_zero_inside():
    rng = random.Random(0)
    tones = set()
    for _ in range(150):
        size = rng.randrange(60, 180)
        own = row("curve", "adapter", rng.sample(range(200), size), 400)
        prompt = row("prompting", "zero-shot", rng.sample(range(200), min(max(size + rng.randrange(-60, 60), 1), 200)))
        found = advise(comparison(own, prompt))
        gap = difference([own], [prompt], GOLD)
        assert found.tone == ("good" if gap.low > 0 else "calm" if gap.high < 0 else "warn")
        tones.add(found.tone)
    assert tones == {"good", "warn", "calm"}
