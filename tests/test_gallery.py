"""The page of clusters: what is in it, and what a browser makes of it."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from browser import CHROME, Browser
from PIL import Image

from common.evaluation import gallery

ATTACK = ("<img src=x onerror='document.title=1;window.stolen=1'></script>"
          "<script>window.stolen=1</script>&quot;.png")


class Pictures:
    """N images of one colour: red, green and blue in turn. The name of the first attacks the page."""

    classes = ("red", "green", "blue <i>")

    def __init__(self, n, labels=True, broken=()):
        self.labels = torch.arange(n) % 3 if labels else None
        self.paths = [ATTACK, *(f"{i:04d}.png" for i in range(1, n))]
        self.broken = broken

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        if i in self.broken:
            raise OSError("no image")
        return Image.new("RGB", (60, 40), tuple(200 if c == i % 3 else i % 100 for c in range(3)))


ABOUT = {"title": "Clusters of <b>300</b> images", "notes": ["a note"],
         "figures": [["NMI", "31.0", "chance 2.0"]]}


def content(path):
    text = path.read_text()
    return json.loads(text[text.index('id="data">') + 10 :].partition("</script>")[0])


def picture(page, thumbnail):
    return Image.open(io.BytesIO(base64.b64decode(page["head"] + thumbnail[0], validate=True)))


def test_what_the_page_holds(tmp_path):
    clusters = np.arange(300) % 7
    clusters[5::7] = 9  # 5 and 7, 8 are empty
    clusters[250:] = -1
    scores = np.arange(300.0)
    scores[::2] = np.nan
    size, samples = gallery.write(tmp_path / "page.html", Pictures(300, broken={3, 249}), clusters, scores,
                                  10, ABOUT, samples=4)
    page = content(tmp_path / "page.html")
    assert size == (tmp_path / "page.html").stat().st_size and samples == 4
    assert [c["id"] for c in page["clusters"]] == [0, 1, 2, 3, 4, 6, 9] and page["k"] == 10
    assert sum(c["size"] for c in page["clusters"]) == page["images"] == 250
    unsorted = 0
    for c in page["clusters"]:
        members = np.flatnonzero(clusters == c["id"])
        scored = [i for i in members[::-1] if i % 2]
        typical, random = ([0 if name == ATTACK else int(name[:4]) for _, name, *_ in c[kind]]
                           for kind in ("typical", "random"))
        assert typical == [i for i in scored[:4] if i not in (3, 249)]
        assert len(random) >= 3 and set(random) <= set(members) - set(typical)
        unsorted += random != sorted(random)
        counts = [[k, int((members % 3 == k).sum())] for k in range(3)]
        assert c["labels"] == sorted(counts, key=lambda pair: -pair[1]) and c["labelled"] == c["size"]
        for kind, names in (("typical", typical), ("random", random)):
            for thumbnail, i in zip(c[kind], names):
                image = picture(page, thumbnail)
                assert image.size == (96, 96) and image.format == "JPEG"
                assert thumbnail[2:] == [i % 3, i if i % 2 else None]
                assert max(range(3), key=lambda c: image.getpixel((48, 48))[c]) == i % 3
    assert unsorted > 3


def test_a_page_stays_within_its_limits(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    class Noise(Pictures):
        def read(self, i):
            return Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8))

    n = 2000
    monkeypatch.setattr(gallery, "LIMIT", 1_500_000)
    size, samples = gallery.write(tmp_path / "page.html", Noise(n), np.arange(n) % 50, np.zeros(n), 50, ABOUT)
    page = content(tmp_path / "page.html")
    assert page["side"] == 96 and samples == max(len(c["typical"]) for c in page["clusters"]) < 12
    assert 1_000_000 < size < 1_600_000
    monkeypatch.setattr(gallery, "SIDES", {100: 96, 600: 48})
    size, samples = gallery.write(tmp_path / "page.html", Noise(n), np.arange(n) % 50, np.zeros(n), 50, ABOUT)
    assert content(tmp_path / "page.html")["side"] == 48 and samples == 6


def test_of_more_clusters_than_fit_the_largest_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SIDES", {20: 96, 40: 48})
    clusters = np.repeat(np.arange(30), np.arange(30) + 1)
    none = np.full(len(clusters), np.nan)
    gallery.write(tmp_path / "page.html", Pictures(len(clusters)), clusters, none, 30, ABOUT)
    page = content(tmp_path / "page.html")
    assert [c["id"] for c in page["clusters"]] == list(range(10, 30))
    assert "the largest 20 of 30 clusters" in page["notes"]
    assert not any(c["typical"] for c in page["clusters"])  # without scores
    long = Pictures(40)
    long.paths = [f"{'日' * 400}/{i}.png" for i in range(40)]
    gallery.write(tmp_path / "page.html", long, np.arange(40) % 2, none[:40], 2, ABOUT)
    shown = content(tmp_path / "page.html")["clusters"][0]["random"][0][1]
    assert len(shown) == 150 and shown.startswith("…") and shown.endswith(".png")


def test_nothing_to_show(tmp_path):
    write = (Pictures(4, labels=False), np.full(4, -1), np.zeros(4), 5, ABOUT)
    gallery.write(tmp_path / "page.html", *write)
    assert content(tmp_path / "page.html")["clusters"] == []


def test_images_without_labels(tmp_path):
    gallery.write(tmp_path / "page.html", Pictures(4, labels=False), np.zeros(4, int), np.ones(4), 1, ABOUT)
    page = content(tmp_path / "page.html")
    (cluster,) = page["clusters"]
    assert page["classes"] == cluster["labels"] == [] and cluster["labelled"] == 0
    assert [thumbnail[2:] for thumbnail in cluster["typical"]] == [[-1, 1.0]] * 4


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    if CHROME is None:
        pytest.skip("no Chromium is installed")
    with Browser() as b:
        yield b


READY = "document.documentElement?.dataset.ready"
SHOWN = "[...document.querySelectorAll('.cluster:not([hidden])')].map(row => row.cluster.id)"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Clusters 0 to 4 of 20, 40, 60, 80 and 100 images; 1 is all green, the others are mixed."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    clusters = np.repeat(np.arange(5), [20, 40, 60, 80, 100])
    images = Pictures(300)
    images.labels[clusters == 1] = 1
    gallery.write(path, images, clusters, np.arange(300.0), 6, ABOUT)
    return path


def press(browser, selector, value=None):
    """Presses a button, or sets a field as a user would."""
    events = "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind))"
    action = "e.click()" if value is None else f"e.value = {json.dumps(value)}; {events}"
    browser.run(f"(e => {{ {action} }})(document.querySelector({json.dumps(selector)}))")


def test_sort_and_filter(browser, page):
    browser.window(1280, 900)
    browser.open(page, READY)
    count = "document.querySelector('#count').textContent"
    assert browser.run(SHOWN) == [4, 3, 2, 1, 0] and browser.run(count) == "5 of 5 clusters"
    press(browser, "#sort", "smallest")
    assert browser.run(SHOWN) == [0, 1, 2, 3, 4]
    press(browser, "#sort", "purity")
    assert browser.run(SHOWN)[0] == 1
    press(browser, "#purity", "90")
    assert browser.run(SHOWN) == [1] and browser.run(count) == "1 of 5 clusters"
    press(browser, "#purity", "0")
    press(browser, "#size", "100")
    assert browser.run(SHOWN) == [4]
    press(browser, "#size", "0")
    press(browser, "#q", "#3")
    assert browser.run(SHOWN) == [3]
    press(browser, "#q", "")
    press(browser, "#sort", "name")
    names = browser.run("[...document.querySelectorAll('.cluster')].map(row => row.cluster.name)")
    assert names == sorted(names)
    press(browser, "#sort", "random")
    assert sorted(browser.run(SHOWN)) == [0, 1, 2, 3, 4]
    press(browser, ".legend button:nth-child(2)")  # green
    green = browser.run(SHOWN)
    assert 1 in green and len(green) < 5
    press(browser, "#q", "no such name")
    text = browser.run("document.querySelector('main').textContent")
    assert browser.run(SHOWN) == [] and "No cluster is like this" in text
    # The address brings the same view back.
    press(browser, "#q", "")
    press(browser, ".legend button:nth-child(2)")
    press(browser, "#sort", "smallest")
    address = browser.run("location.href")
    assert address.endswith("#sort=smallest")
    browser.open(address, READY)
    assert browser.run(SHOWN) == [0, 1, 2, 3, 4]


def test_names_are_text_and_nothing_is_fetched(browser, page):
    browser.events.clear()
    browser.open(page, READY)
    press(browser, "#sort", "number")
    browser.wait("document.querySelectorAll('#cluster-0 img').length")
    titles = browser.run("[...document.querySelectorAll('img')].map(e => e.title)")
    assert any(title.startswith(ATTACK) for title in titles)
    assert browser.run("window.stolen") is None and browser.run("document.title") == ABOUT["title"]
    # the page's own two scripts
    assert browser.run("document.querySelectorAll('h1 b, .legend i i, script').length") == 2
    whole = "[...document.querySelectorAll('img')].map(e => e.complete && e.naturalWidth === 96)"
    assert all(browser.run(whole))
    asked = {e["params"]["request"]["url"].partition(":")[0] for e in browser.events
             if e.get("method") == "Network.requestWillBeSent"}
    assert asked <= {"file", "data", "about"}
    assert not [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]


def test_light_dark_and_narrow(browser, page):
    shade = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)[0]"
    for width in (1280, 400):
        for dark in (False, True):
            browser.window(width, 900, dark)
            browser.open(page, READY)
            assert (browser.run(shade) < 60) == dark
            assert browser.run("document.documentElement.scrollWidth") <= width
    press(browser, "#theme")
    assert browser.run(shade) > 200


def test_three_thousand_clusters_wait_for_their_pictures(browser, tmp_path):
    n = 12_000
    size, samples = gallery.write(tmp_path / "page.html", Pictures(n), np.arange(n) % 3000,
                                  np.arange(n) * 1.0, 3000, ABOUT, samples=2)
    assert samples == 2 and content(tmp_path / "page.html")["side"] == 48 and size < 30e6
    browser.window(1280, 900)
    seconds = browser.open(tmp_path / "page.html", READY)
    assert seconds < 10  # 0.5 on an idle machine
    assert browser.run("document.querySelectorAll('.cluster').length") == 3000
    assert browser.run("document.querySelectorAll('img').length") < 400
    browser.run("document.querySelector('#cluster-2900').scrollIntoView()")
    browser.wait("document.querySelectorAll('#cluster-2900 img').length === 4")
