"""Training texts that stand in a gate split are found, exactly or nearly, in the own task and in others."""

from pathlib import Path

from orchestrator.contamination import find_overlaps, near_texts

TEXTS = (Path(__file__).parent / "tiny_texts.txt").read_text(encoding="utf-8").splitlines()


def test_equal_and_nearly_equal_texts_are_told_apart():
    long = "The delivery came two days late and nobody at the shop answered the telephone when I called them about it."
    near = long.replace("two days", "three days")
    train = {"a": ["Something else altogether.", long], "b": ["nothing of the kind here at all"]}
    gate = {"a": ["Quite another sentence about the weather."], "c": [f"  {long.upper()}", "unrelated"], "d": [near]}
    found = {(o.train_task, o.gate_task): (o.num_exact, o.num_near, o.sample) for o in find_overlaps(train, gate)}
    assert found == {("a", "c"): (1, 0, long), ("a", "d"): (0, 1, long)}


def test_the_own_gate_split_counts_too_and_says_so():
    text = "The very same words, but for one more at the end of this rather long sentence about trains"
    (overlap,) = find_overlaps({"a": [text]}, {"a": [text + " indeed"]})
    assert overlap.sentence.startswith(
        "training examples are in its own gate split, too (1 nearly equal), such as 'The very same"
    )


def test_different_texts_of_one_topic_are_no_overlap():
    train = [
        f"I would like to book a table for {n} people at {h} o'clock in {c}." for n in (2, 3) for h in (6, 7) for c in ("Rome",)
    ]
    gate = ["Can I get a room for tonight in Rome, please?", "I would like to cancel the booking that I made for Friday."]
    assert find_overlaps({"a": train}, {"a": gate}) == []
    half = len(TEXTS) // 2
    assert find_overlaps({"a": TEXTS[:half]}, {"b": [text for text in TEXTS[half:] if text not in TEXTS[:half]]}) == []


def test_empty_sides_are_no_overlap():
    assert find_overlaps({"a": []}, {"b": ["text"]}) == find_overlaps({"a": ["text"]}, {"b": []}) == []


def test_texts_of_one_file_find_their_nearest_twin():
    long = "The delivery came two days late and nobody at the shop answered the telephone when I called them about it."
    other = "Something else altogether, which has nothing to do with the first text at all."
    assert near_texts([long, other, long.replace("two days", "three days"), "  " + other.upper(), "x"]) == {
        0: 2,
        1: 3,
        2: 0,
        3: 1,
    }
    assert near_texts([long, other]) == near_texts([long]) == near_texts([]) == {}
