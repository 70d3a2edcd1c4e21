"""The page: self-contained, escaped, and alive in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from adapters.measuring import gains, report
from adapters.measuring.gains import Design
from adapters.measuring.plot import plot
from adapters.measuring.sample import Shot
from adapters.measuring.table import Row

EVIL = '</title></script><script>document.title="owned"</script><img src=x onerror=alert(1)>" onload="x'
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
    return report.render(
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
    assert sum(tag == "script" for tag, _ in tags) == 1
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
    assert all(a.get("aria-label") for t, a in tags if t in ("input", "svg"))
    assert [t for t, _ in tags if t == "h1"] == ["h1"]
    assert page.index('class="verdict"') < page.index("<h2>")
    assert dict(tags)["html"]["lang"] == "en"
    assert 'name="viewport"' in page


def test_all_pairs_are_there(page):
    tags = tags_of(page)
    pictures = [a for t, a in tags if t == "img" and "seed" in (a["alt"] or "")]
    assert len(pictures) == 2 * (3 + 3 + 3)  # the gallery, the best five and the worst five


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
    file = tmp_path / "report.html"
    file.write_text(page, "utf-8")
    live = chromium(tmp_path, "--dump-dom", file.as_uri())
    assert '<html lang="en" class="live">' in live
    assert live.count('style="--cut: 50%;"') == 9
    assert "<title>owned</title>" not in live
    assert "&lt;script&gt;" in live
    bare = tmp_path / "bare.html"  # what a reader without JavaScript gets
    bare.write_text(re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL), "utf-8")
    assert 'class="live"' not in chromium(tmp_path, "--dump-dom", bare.as_uri())
    sizes = {}
    for source in (file, bare):
        shot = tmp_path / f"{source.stem}.png"
        chromium(tmp_path, "--window-size=600,1600", "--hide-scrollbars", f"--screenshot={shot}", source.as_uri())
        pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
        sizes[source] = [(np.abs(pixels - color).max(-1) < 30).sum() for color in ([200, 0, 0], [0, 0, 200])]
    # Under the slider each picture shows one half; side by side both show whole, at half the width.
    assert min(*sizes[file], *sizes[bare]) > 2000
    assert sizes[file][0] == pytest.approx(sizes[file][1], rel=0.25)
