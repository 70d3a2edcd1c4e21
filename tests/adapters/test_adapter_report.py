"""The page: self-contained, escaped, and alive in a real browser."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import figures
import numpy as np
import pytest
from PIL import Image

from adapters.measuring import archive, gains, report, verify, words
from adapters.measuring.gains import Design
from adapters.measuring.labels import Rectangle, arrange, width
from adapters.measuring.plot import plot
from adapters.measuring.sample import Shot
from adapters.measuring.table import Row

EVIL = '</title></script><script>document.title="owned"</script><img src=x onerror=alert(1)>" onload="x'
RESULTS = figures.ROOT / "benchmarks" / "study" / "results"
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def page() -> str:
    rows, shots = [], {"CFG": [], EVIL: []}
    for index, prompt in enumerate(["a dog", "a cat", EVIL]):
        for arm, color in (("CFG", (200, 0, 0)), (EVIL, (0, 0, 200))):
            numbers = {"m": index + 0.1 * (arm == EVIL) * (1 + index), EVIL: float(index)}
            rows.append(Row(arm=arm, prompt=prompt, seed=1, latents="n", numbers=numbers))
            shots[arm].append(
                Shot(prompt=prompt, seed=1, latents="n", image=Image.new("RGB", (48, 48), color), arm=arm)
            )
    design = Design(
        arm=EVIL,
        baseline="CFG",
        primary="m",
        minimum_effect=0.01,
        higher_is_better={"m": True, EVIL: True},
        sweeps={EVIL: {"3": "CFG", "7.5": EVIL}},
        notes={EVIL: EVIL},
    )
    overlay = lambda shot: {EVIL: shot.image}  # noqa: E731
    return report.render_report(
        gains.compare(rows, design), shots, title=EVIL, command=EVIL, overlay=overlay, facts={EVIL: EVIL}
    )


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def tags_of(text: str) -> list[tuple[str, dict[str, str | None]]]:
    reader = Reader()
    reader.feed(text)
    return reader.tags


def test_foreign_text_makes_no_tag_and_no_handler(page):
    tags = tags_of(page)
    assert not any(tag == "script" for tag, _ in tags)
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert "default-src 'none'" in next(a["content"] for t, a in tags if a.get("http-equiv"))


def test_nothing_is_fetched(page):
    links = [a.get("src") or a.get("href") for t, a in tags_of(page) if a.get("src") or a.get("href")]
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert not re.search(r"url\(|@import|https?://", page)


def test_accessible_names_and_order(page):
    tags = tags_of(page)
    assert all(a.get("alt") for t, a in tags if t == "img")
    assert all(a.get("aria-label") for t, a in tags if t == "svg")
    assert page.count("<input") == len(re.findall(r"<label><input[^>]*> [^<]", page))
    assert page.count("<fieldset><legend>") == page.count('<figure class="pair">')
    assert [t for t, _ in tags if t == "h1"] == ["h1"]
    assert page.index('class="verdict"') < page.index("<h2>")
    assert dict(tags)["html"]["lang"] == "en"
    assert 'name="viewport"' in page


def test_all_pairs_are_there(page):
    tags = tags_of(page)
    pictures = [a for t, a in tags if t == "img" and "seed" in (a["alt"] or "")]
    assert len(pictures) == 2 * (3 + 3)  # the gallery and the best; none lost
    assert "gained most" in page
    assert "lost most" not in page


def test_plot_survives_degenerate_data():
    nothing, one = plot({}, "x", "y"), plot({"a": [(1.0, 2.0, 2.0, 2.0, "<1>")]}, "x", "y")
    assert nothing.startswith("<figure>")
    assert "&lt;1&gt;" in one
    assert "nan" not in (nothing + one).lower()


def chromium(folder, *arguments: str) -> str:
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; Debian has it as package chromium")
def test_in_a_browser(page, tmp_path):
    """All pictures of a strip are seen, and one alone at full width where its button is pressed."""
    sizes = {}
    for picked in (0, 2):
        file = tmp_path / f"{picked}.html"
        pressed = re.sub(r' checked(?=>)|(?<=class="pick2")(?=>)', lambda m: "" if m.group() else " checked", page)
        file.write_text(pressed if picked else page, "utf-8")
        assert "<title>owned</title>" not in chromium(tmp_path, "--dump-dom", file.as_uri())
        shot = tmp_path / f"{picked}.png"
        chromium(tmp_path, "--window-size=600,2400", "--hide-scrollbars", f"--screenshot={shot}", file.as_uri())
        pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
        sizes[picked] = [int((np.abs(pixels - color).max(-1) < 30).sum()) for color in ([200, 0, 0], [0, 0, 200])]
    assert min(sizes[0]) > 2000
    assert sizes[0][0] == pytest.approx(sizes[0][1], rel=0.25)
    assert sizes[2][0] < sizes[0][0] / 10
    assert sizes[2][1] > 2 * sizes[0][1]


def noisy(size: int, subjects: int, **more: Any) -> str:
    """A study of so many subjects whose pictures are noise, which nothing compresses."""
    generator = np.random.default_rng(0)
    rows, shots = [], {"base": [], "CFG": [], "S-CFG": []}
    for subject in range(subjects):
        for prompt in (f"subject {subject} in the snow", f"subject {subject} at night"):
            for arm in shots:
                image = Image.fromarray(generator.integers(0, 256, (size, size, 3), np.uint8))
                one = Shot(prompt=prompt, seed=1, latents="n", image=image, arm=arm, subject=str(subject))
                shots[arm].append(one)
                numbers = {"m": float(generator.random())}
                rows.append(Row(arm=arm, subject=str(subject), prompt=prompt, seed=1, latents="n", numbers=numbers))
    design = Design(
        arm="S-CFG", baseline="CFG", base="base", primary="m", minimum_effect=0.1, higher_is_better={"m": True}
    )
    references = [Image.fromarray(generator.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(4)]
    return report.render_report(
        gains.compare(rows, design), shots, title="16 subjects", references=references, terms={"sks bird": "it"}, **more
    )


@pytest.mark.parametrize("size", [64, 512])
def test_a_page_of_sixteen_subjects_stays_below_three_megabytes(size):
    page = noisy(size, 16)
    assert len(page.encode()) < 3_000_000
    assert page.count('<figure class="pair">') == 12 + 5 + 5
    assert ('class="sharp"' in page) == (size == 64)


TRADE = {"class", "arm", "baseline", "scope", "cluster", "unconditional", "cfg", "latents", "embedding"}


@pytest.mark.parametrize(
    "name", ["identity", "identity margin", "identity (dino)", "prompt accuracy", "subject similarity", "canny F1"]
)
def test_no_explanation_needs_another_one(name):
    assert not set(re.findall(r"\w+", words.metric(name).lower())) & TRADE


def test_every_way_to_sample_is_explained_with_what_makes_it_differ():
    plain = {"method": "cfg", "guidance_scale": 2.0, "options": {}, "weight": 1.0, "scope": None}
    placed = {"uncond_weight": None, "start": 0.0, "stop": 1.0, "where": "subject", "where_stop": 0.3}
    early = {"uncond_weight": 0.0, "start": 0.0, "stop": 0.5, "where": None, "where_stop": 1.0}
    assert words._arm(plain) == "plain guidance (classifier-free guidance), equally strong everywhere, scale 2"
    before = {**plain, "scale": 2.0}  # as versions before wrote it
    del before["guidance_scale"]
    assert words._arm(before) == words._arm(plain)
    assert words._arm({**plain, "scope": placed}) == (
        f"{words._arm(plain)}, the adapter acts only where the base puts its own thing of the class, "
        "in the first 30 % of the steps"
    )
    assert words._arm({**plain, "scope": early}) == (
        f"{words._arm(plain)}, the adapter acts from 0 to 50 % of the steps, adapter weight 0 in what guidance pushes "
        "away from"
    )


def test_checkpoints_are_curves_and_overfitting_is_a_sentence_above_them():
    points = [(1, 0.5, 0.5, 0.5, "step-10, chosen"), (2, 0.4, 0.4, 0.4, "lora")]
    said = noisy(
        16, 2, checkpoints={"what was maximised": points, "diversity (judge)": points}, overfitting="lora <is>"
    )
    assert said.count("step-10, chosen</text>") == 2
    assert said.index("<h2>Curves") < said.index("lora &lt;is&gt;") < said.index("diversity (judge) against checkpoint")
    assert "against checkpoint" not in noisy(16, 2)


def ticks(figure: str, anchor: str) -> list[str]:
    """What is written at an axis: below it in the middle, beside it at the end."""
    [written] = re.findall(rf'<g text-anchor="{anchor}">(.*?)</g>', figure)
    return [text for _, _, text in figures.TEXT.findall(written) if re.fullmatch(r"-?[\d.]+", text)]


@pytest.mark.parametrize("places", [(1, 2), (1, 2, 3), (100, 200, 300, 400), (250, 1000), (1, 30), (7, 12_000)])
def test_counted_axes_have_whole_numbers_and_shares_stay_between_zero_and_one(places):
    shares = [(float(x), y, y, y, "") for x, y in zip(places, (0.0, 1.0, 0.5, 0.25), strict=False)]
    figure = plot({"a": shares}, "training step", "share of copies", whole=True)
    below, beside = ticks(figure, "middle"), [float(each) for each in ticks(figure, "end")]
    assert len(below) >= 2
    assert all(each.isdigit() and int(each) <= places[-1] * 1.1 for each in below)  # no sign either
    assert (beside[0], beside[-1]) == (0.0, 1.0)
    assert len({round(later - one, 9) for one, later in itertools.pairwise(beside)}) == 1
    gains_and_losses = plot({"a": [(1.0, -0.2, -0.2, -0.2, ""), (2.0, 1.4, 1.4, 1.4, "")]}, "x", "y")
    assert [float(each) for each in ticks(gains_and_losses, "end")] == [0.0, 0.5, 1.0, 1.5]


def test_the_first_screen_explains_its_words(page):
    first = noisy(16, 2)
    first = re.sub(r"<style>.*?</style>", "", first[: first.index("<details>")], flags=re.DOTALL)
    assert "the base model alone" in first
    shown = ("adapter", "base model", "guidance", "classifier-free guidance (CFG)", "prompt", "seed", "noise")
    assert all(f"<dt>{word}</dt>" in first for word in ("sks bird", *shown))
    assert "<dt>class</dt>" not in first  # it is not used
    assert first.count('class="verdict"') == 2


def test_a_term_is_explained_where_it_is_used_with_those_that_its_explanation_needs():
    assert list(words.terms("pictures of the class")) == ["subject", "class"]
    assert list(words.terms("nothing but a word")) == []
    assert list(words.terms("the same SEED", known=["noise"])) == ["seed"]
    for name, said in words.TERMS.values():
        assert not set(words.terms(said, known=[name])) - {name for name, _ in words.TERMS.values()}


@pytest.fixture(scope="module")
def sixteen():
    """The study's sixteen subjects: the comparison, and its page without pictures."""
    with archive.unpacked(RESULTS / "subjects-kept.zip") as folder:
        found = verify.recompute(folder)
    shots = {name: [] for name in (found.design.base, found.design.baseline, found.design.arm)}
    return found, report.render_report(
        found, shots, title="16 subjects on pocket", terms={"pocket": "the base model's name"}
    )


def test_no_term_of_the_glossary_stands_above_the_pictures_without_its_explanation(sixteen, page):
    assert figures.unexplained(sixteen[1]) == []
    bare = re.sub(r"<dt>identity</dt><dd>.*?</dd>|<dt>adapter</dt><dd>.*?</dd>", "", sixteen[1])
    assert {"identity", "adapter"} <= set(figures.unexplained(bare)), "the test would not see it"


def test_labels_of_the_study_s_figures_do_not_overlap(sixteen):
    named = [said for said, _ in figures.labels(sixteen[1])]
    assert sorted(named) == sorted(arm["name"] for arm in sixteen[0].arms)
    assert figures.overlaps(sixteen[1]) == []
    for name in ("subjects-lora", "text-tuned", "canny"):
        with archive.unpacked(RESULTS / f"{name}.zip") as folder:
            drawn = report.figures.curves(verify.recompute(folder), {}, "", "")
        assert figures.labels(drawn)
        assert figures.overlaps(drawn) == []


@pytest.mark.parametrize("spread", [0, 5, 300])
def test_labels_find_a_place_whatever_the_points_are(spread):
    generator = np.random.default_rng(spread)
    spots = [(200 + x, 150 + y) for x, y in generator.random((25, 2)) * (spread, spread / 2)]
    texts = [f"CFG @ {number}, weight 0.85" if number % 3 else "S-CFG" for number in range(25)]
    area = Rectangle(64, 30, 560, 340)
    boxes = arrange(list(zip(spots, texts, strict=True)), area, list(itertools.pairwise(spots)))
    assert all(area.holds(box) for box in boxes)
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.meets(b)]
    assert not [box for box in boxes for x, y in spots if box.meets(Rectangle(x - 4, y - 4, x + 4, y + 4))]
    assert [round(box.right - box.left - width(text), 6) for box, text in zip(boxes, texts, strict=True)] == [0.0] * 25


def test_a_line_cuts_a_box_or_does_not():
    box = Rectangle(10, 10, 20, 20)
    assert box.cut_by(((0, 15), (30, 15)))
    assert box.cut_by(((0, 0), (30, 30)))
    assert not box.cut_by(((0, 15), (9, 15)))
    assert not box.cut_by(((0, 0), (30, 0)))


def test_the_plane_is_told_in_words(sixteen):
    said = figures.html.unescape(sixteen[1])
    assert (
        "The line of plain guidance goes from base (identity 3 %, prompt accuracy 90 %) over CFG, weight 0.85 (68 %, "
        "84 %) to CFG (80 %, 77 %)."
    ) in said


def test_a_price_is_told_apart_from_a_loss_of_the_subject(sixteen):
    found, _ = sixteen
    assert words.adapter(found).startswith("The adapter draws its subject, but its pictures follow")
    means = {"base": (0.8, 0.5), "CFG": (0.1, 0.9)}
    arms = [
        {"name": name, "metrics": {"identity": {"mean": x}, "prompt accuracy": {"mean": y}}}
        for name, (x, y) in means.items()
    ]
    assert words.adapter(replace(found, arms=arms)) == (
        "The adapter does not draw its subject; its pictures follow their prompts better than the base's. Identity "
        "80 % without it, 10 % with it; prompt accuracy 50 % without it, 90 % with it."
    )
