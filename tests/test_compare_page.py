"""A comparison's faces: the same numbers everywhere, safe with any text, the same bytes twice, and readable in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from made_up_methods import LABELS, comparison, curve, row
from playwright.sync_api import sync_playwright

from orchestrator.compare_page import faces, markdown, write_faces
from orchestrator.compare_plots import draw_plots
from orchestrator.compare_result import MethodComparison
from orchestrator.compare_table import cells_of, print_comparison, shown_columns
from orchestrator.methods import MethodRow
from orchestrator.report_words import MINUS, duration, share, signed_share, size

CHROMIUM = shutil.which("chromium")
EVIL = "<img src=x onerror=document.title='owned'> $x^2 \\frac | `_*[a](javascript:b) \x07\u202e &amp;"
FILES = ["answering.svg", "compare.html", "compare.json", "compare.md", "examples.svg", "training.svg"]


def rich(method: str = "4 examples, balanced", gold: tuple[str, ...] | None = None) -> MethodComparison:
    """All parts, several seeds, something skipped, something that wrote no label."""
    fields = {"gold": gold} if gold else {}
    rows = [
        row("baselines", "majority", range(66), 400, ms_per_text=0.001, **fields),
        row("baselines", "TF-IDF + logistic regression", range(10, 150), 400, train_s=0.06, ms_per_text=0.2, **fields),
        row("prompting", "zero-shot", range(98), ms_per_text=12, **fields),
        *(
            row("prompting", method, range(5, 100 + 9 * seed), 4, seed=seed, ms_per_text=31, note=method, **fields)
            for seed in range(3)
        ),
        row("prompting", "chain of thought", range(60), ms_per_text=950, **fields),
        *(
            row(
                "variants",
                f"rank {rank}",
                range(3, 140 + rank),
                400,
                train_s=30 + rank,
                ms_per_text=3.5,
                num_trained=1000 * rank,
                **fields,
            )
            for rank in (4, 8, 16)
        ),
        MethodRow("alone", "IA3", skipped=f"needs {method}"),
        row("alone", "head", range(130), 400, train_s=95, ms_per_text=3.1, num_trained=66_000, disk_bytes=91_000_000, **fields),
        *(
            one
            for seed, counts in enumerate(((90, 120, 158), (104, 131, 160), (97, 140, 155)))
            for one in curve(*counts, seed=seed)
        ),
        row("merged", "merged model", range(158), 400, ms_per_text=3.0, disk_bytes=91_000_000, **fields),
    ]
    written = row("prompting", "zero-shot, written freely", range(70), ms_per_text=80, **fields)
    rows.insert(3, MethodRow(**{**written.__dict__, "answers": (None,) * 50 + written.answers[50:]}))
    return comparison(*rows, failed={"merged": f"ValueError: {method}"}, **fields)


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_every_method_is_on_every_face(tmp_path, capsys):
    found = rich()
    assert write_faces(faces(found), tmp_path) == tmp_path / "compare.html"
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES
    stored = json.loads((tmp_path / "compare.json").read_text())
    print_comparison(found)
    terminal = " ".join(capsys.readouterr().out.split())
    page, table = Tags((tmp_path / "compare.html").read_text()).text, (tmp_path / "compare.md").read_text()
    for summary, cells in zip(found.summaries, cells_of(found), strict=True):
        (known,) = [
            one
            for one in stored["methods"]
            if (one["part"], one["method"], one["num_train"]) == (summary.part, summary.method, summary.num_train)
        ]
        assert known["accuracy"] == summary.accuracy
        for face in (page, table, terminal):
            assert cells.method.partition(" + ")[0].split(",")[0] in face
            assert cells.accuracy in face
    assert stored["advice"]["headline"] in page
    assert stored["failed"] == {"merged": "ValueError: 4 examples, balanced"}
    assert (stored["num_gate"], len(stored["runs"])) == (200, len(found.rows))
    assert "gold" not in stored
    own = [one for one in stored["methods"] if one["is_own"]]
    assert [(one["method"], one["num_train"], one["to_own"]) for one in own] == [("adapter", 400, None)]
    assert "skipped: needs 4 examples, balanced" in page


def test_cells_say_spread_interval_difference_and_what_is_unknown_is_empty():
    by_name = {(cells.method, cells.examples): cells for cells in cells_of(rich())}
    own = by_name["adapter", "400"]
    assert (own.accuracy, own.seeds, own.to_adapter) == (".788", "3", "")
    assert own.spread == ".013"
    assert own.note == "the others are held against it"
    assert (own.train_s, own.ms_per_text, own.trained, own.disk) == ("40", "3.4", "9,000", "1.3 MB")
    zero_shot = by_name["zero-shot", ""]
    assert zero_shot.to_adapter == f"{MINUS}.298"
    assert re.fullmatch(rf"{MINUS}\.3\d\d to {MINUS}\.2\d\d", zero_shot.to_adapter_interval)
    assert (zero_shot.spread, zero_shot.ill_formed, zero_shot.train_s) == ("", "", "")
    assert by_name["zero-shot, written freely", ""].ill_formed == "25.0 %"
    skipped = by_name["IA3", ""]
    assert set(skipped[2:-1]) == {""}
    assert by_name["head", "400"].train_s == "95"


def test_a_column_without_anything_is_left_out():
    names = [name for name, _ in shown_columns(cells_of(comparison(row("prompting", "zero-shot", range(9)))))]
    assert names == ["part", "method", "seeds", "accuracy", "interval"]


@pytest.mark.parametrize(
    "build", [lambda: rich(EVIL), lambda: comparison(), lambda: comparison(MethodRow("alone", "a", skipped=EVIL))]
)
def test_no_text_becomes_an_element_and_nothing_is_fetched(build, tmp_path):
    found = build()
    files = faces(found)
    page = Tags(files["compare.html"])
    assert not {"img", "script", "a", "iframe", "link", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "xlink:href")
    assert "default-src 'none'" in files["compare.html"]
    assert not re.findall(r"https?://(?!www\.w3\.org)", files["compare.html"])
    assert "<img" not in files["compare.md"]
    for name, text in files.items():
        if name.endswith(".svg"):
            assert "img" not in {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    rows = [line for line in files["compare.md"].splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) <= 1, "a cell broke the table"
    json.loads(files["compare.json"])


def test_hostile_labels_are_counted_like_others():
    gold = tuple(("<script>alert(1)</script>", "a|b", *LABELS)[number % 4] for number in range(200))
    found = rich(gold=gold)
    assert "script" not in Tags(faces(found)["compare.html"]).tags
    assert cells_of(found)[2].accuracy == ".490"


def test_the_same_comparison_gives_the_same_bytes():
    first, second = faces(rich()), faces(rich())
    assert first == second
    ids = [value for name, value in Tags(first["compare.html"]).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_plot_without_points_is_not_drawn():
    assert list(draw_plots(comparison(row("prompting", "zero-shot", range(9), ms_per_text=3)))) == ["answering"]
    assert draw_plots(comparison(row("prompting", "zero-shot", range(9)))) == {}
    assert draw_plots(comparison()) == {}
    assert list(draw_plots(comparison(*curve(100, 110, 120)))) == ["examples", "training", "answering"]


def test_markdown_has_the_command_that_makes_it_again():
    text = markdown(rich())
    command = "orchestrator compare mood.yaml --parts baselines,prompting,variants,alone,curve,merged --seeds 3 --sizes 25,50,100"
    assert sorted(re.search(r"--parts (\S+)", text)[1].split(",")) == sorted(re.search(r"--parts (\S+)", command)[1].split(","))
    assert text.startswith("### mood\n\nTrain an adapter: .788")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_in_a_browser_it_fits_and_no_label_covers_another(tmp_path, width, scheme):
    page_file = write_faces(faces(rich(EVIL[:30])), tmp_path)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        troubles: list[str] = []
        page.on("console", lambda message: troubles.append(message.text))
        page.on("request", lambda request: request.url.startswith("file:") or troubles.append(request.url))
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("figure svg").count() == 3
        assert page.title().startswith("mood: Train an adapter")
        colours = page.eval_on_selector_all("figure text", "texts => texts.map(text => getComputedStyle(text).fill)")
        assert "rgb(0, 0, 0)" not in colours, "black text is not there in dark mode"
        for plot in page.locator("figure svg").all():
            boxes = [text.bounding_box() for text in plot.locator("text").all()]
            covered = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if _overlap(a, b) > 12]
            assert not covered
        assert troubles == []
        browser.close()


def _overlap(a, b) -> float:
    """Shared area in square pixels."""
    wide = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
    high = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
    return max(wide, 0) * max(high, 0)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ((share(0.7891), share(0.0), share(1.0), share(0.9996)), (".789", ".000", "1.000", "1.000")),
        (
            (signed_share(0.0312), signed_share(-0.5), signed_share(-0.0004), signed_share(1.0)),
            ("+.031", f"{MINUS}.500", ".000", "+1.000"),
        ),
        ((duration(0.00004), duration(0.0034), duration(0.34), duration(4.2)), ("0.04 ms", "3.4 ms", "340 ms", "4.2 s")),
        ((duration(26.4), duration(119), duration(121), duration(7200)), ("26 s", "119 s", "2 min", "120 min")),
        ((size(8), size(5400), size(1_310_000), size(91_000_000)), ("8 B", "5 kB", "1.3 MB", "91.0 MB")),
    ],
)
def test_numbers_are_written_as_people_read_them(written, expected):
    assert written == expected
