"""The report: its facts are right and stable, its page needs nothing else and can be read."""

import json
import math
import os
import re
import shutil
import subprocess

import pytest

from tests.support.report_tree import CLASSES, build_tree
from vlfoundry.eval.report import charts, collect, page
from vlfoundry.infra.core.config import build
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.core.stage import Context
from vlfoundry.stages.report import OUT, STAGE, Config

pytestmark = pytest.mark.slow

MAX_PAGE_BYTES = 3_000_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
NO_BROWSER = "no Chromium on the PATH: the page was NOT opened (apt-get install chromium)"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = build_tree(tmp_path_factory.mktemp("run") / "tree")
    STAGE.run(build(Config, {"report": {}}), Context(STAGE.bind(None), root, "key"))
    return root


@pytest.fixture(scope="module")
def html(root):
    return (root / page.PAGE).read_text(encoding="utf-8")


def test_funnel_counts_add_up(root):
    funnel = json.loads((root / OUT).read_text())["funnel"]
    left = funnel["records"]
    for step in funnel["steps"]:
        assert step["before"] == left
        assert sum(rule["dropped"] for rule in step["rules"]) == left - step["kept"]
        left = step["kept"]
    assert funnel["shards"]["stage1"] == left
    assert sum(row["records"] for row in funnel["noise"]) == funnel["records"]


def test_precision_and_recall_are_those_of_a_hand_count(tmp_path):
    from vlfoundry.infra.core.tables import write_table

    noise = ["shuffled", "shuffled", "overlay", "", "", "duplicate"]
    write_table(
        tmp_path / "artifacts/ingest/truth.parquet", {"row": list(range(6)), "noise": noise}
    )
    for step, rows in (("filter", [0, 3]), ("dedup", [5]), ("decontaminate", [4])):
        folder = tmp_path / "artifacts" / step
        write_table(
            folder / "dropped.parquet",
            {"row": rows, "rule": ["r"] * len(rows), "detail": [""] * len(rows)},
        )
        write_table(folder / "kept.parquet", {"row": [1]})
    funnel = collect.funnel(tmp_path)
    assert funnel["precision"] == pytest.approx(2 / 3, abs=1e-4)  # decontamination is left out
    assert funnel["recall"] == pytest.approx(2 / 4, abs=1e-4)
    assert funnel["steps"][0]["rules"][0]["noise"] == {"clean": 1, "shuffled": 1}
    shares = {row["noise"]: row["share"] for row in funnel["noise"]}
    assert shares == {"shuffled": 0.5, "overlay": 0.0, "duplicate": 1.0, "clean": 0.5}


def test_facts_are_the_same_bytes_each_time_and_hold_no_times(root):
    first = fingerprint(root / OUT)
    STAGE.run(build(Config, {"report": {}}), Context(STAGE.bind(None), root, "key"))
    assert fingerprint(root / OUT) == first
    assert "wall_s" not in (root / OUT).read_text()


def test_a_baseline_stands_beside_the_scores_of_its_model_alone(root, html):
    part = {
        variant: html.split(f'id="scores-{variant}"')[1].split("<h3")[0]
        for variant in ("internvl_c", "internvl_g")
    }
    assert "<code>internvl_c@v0.1.0</code>" in part["internvl_c"]
    assert ">baseline</th>" in part["internvl_c"]
    assert "baseline" not in part["internvl_g"]
    scores = json.loads((root / OUT).read_text())["scores"]["internvl_c"]["scores"]
    top1 = next(s for s in scores if (s["name"], s["lang"]) == ("top1", "ensemble"))
    assert 0 < top1["baseline"] < top1["value"]
    assert page.percent(top1["baseline"]) in part["internvl_c"]


def test_the_page_needs_nothing_else_and_is_small(root, html):
    assert (root / page.PAGE).stat().st_size <= MAX_PAGE_BYTES
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", html)
    assert links
    assert not [link for link in links if not link.startswith(("data:", "#"))]
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html
    assert "<script" not in html


def test_the_page_shows_every_part(html):
    for part in (
        "funnel",
        "training",
        "scores",
        "retrieval",
        "captions",
        "answers",
        "speed",
        "gate",
        "lineage",
    ):
        assert f'id="{part}"' in html
    assert "Nothing here yet" not in html
    for stage in collect.TRAINED:
        assert f"Training loss of {stage} by step" in html
    for text in (
        "near_duplicate",
        "guessing, ln(batch) = 4.85",
        "gate not passed",
        "MFU(CPU)",
        "56.0",
        "Where is this:",
        "0f0f0f0f0f0f",
    ):
        assert text in html, text
    assert html.count("its true box and the predicted box") >= 2 * 10  # each label stands twice
    assert f"{CLASSES} drawings by" in " ".join(html.split())


def test_the_page_says_what_the_nearest_picture_does_not_do():
    def score(suite, value, reference, lang="", interval=0.02):
        return {
            "suite": suite, "name": "accuracy", "lang": lang, "value": value,
            "interval": [value - interval, value + interval], "reference": reference,
        }  # fmt: skip

    documents = {
        "chat_simple": {
            "scores": [
                score("colour", 0.95, 0.5),
                score("colour", 0.99, 0.5),  # the suite's first score stands for it
                score("box", 0.61, 0.6),  # within its interval
                score("caption", 0.4, 0.3, lang="en"),
                score("matching", 0.7, None),
            ]
        },
        "internvl_c": {"scores": [score("zero_shot", 0.3, 0.7, lang="ensemble")]},
    }
    assert [(s["suite"], s["value"]) for s in page.beyond(documents)] == [("colour", 0.95)]
    documents["chat_full"] = {"scores": [score("box", 0.9, 0.6), score("colour", 0.8, 0.5)]}
    assert [(s["suite"], s["value"]) for s in page.beyond(documents)] == [
        ("colour", 0.95),
        ("box", 0.9),
    ]
    assert page.beyond({}) == []


def test_text_from_outside_is_escaped(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, symlinks=True)
    items = copy / "artifacts/evaluate/chat_full/items/colour.jsonl"
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    for line in lines:
        line["said"] = "<script>alert(1)</script>"
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = page.render(copy, tmp_path / "index.html").read_text()
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in html


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path):
    html = page.render(tmp_path, tmp_path / "index.html").read_text()
    assert html.count("Nothing here yet") >= 8


def test_the_untouched_sample_is_spread_evenly():
    assert collect.spread(list(range(100)), 4) == [12, 37, 62, 87]
    assert collect.spread([1, 2], 4) == [1, 2]


@pytest.mark.parametrize(("low", "high"), [(0, 4.85), (-1, 0.001), (0, 9999), (2, 2)])
def test_axes_hold_their_values_with_few_round_ticks(low, high):
    first, last, ticks = charts.axis(low, high)
    assert first <= low
    assert last >= high - 1e-6
    assert 2 <= len(ticks) <= 9


def test_long_curves_are_thinned_but_keep_their_mean_and_start():
    points = [(float(i), math.sin(i / 50) + 2) for i in range(5000)]
    thin = charts.smoothed(points)
    assert len(thin) <= charts.MAX_POINTS + 1
    assert thin[0] == points[0]
    mean = sum(value for _, value in thin) / len(thin)
    assert mean == pytest.approx(sum(value for _, value in points) / len(points), abs=0.02)


@pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page(root, html, tmp_path, width):
    """Offline, every picture loads, nothing runs over the side, and there is something to see."""
    probe = """<script>window.onload = () => {
      const images = [...document.images];
      document.body.dataset.wide = document.documentElement.scrollWidth - innerWidth;
      document.body.dataset.images = images.length;
      document.body.dataset.broken = images.filter(i => !i.complete || !i.naturalWidth).length;
    };</script></body>"""
    file = tmp_path / "page.html"
    whole = html.replace("</body>", probe).replace('loading="lazy"', "")
    file.write_text(whole, encoding="utf-8")
    picture = tmp_path / "page.png"
    dumped = _browse(file, tmp_path, width, "--dump-dom")
    found = dict(re.findall(r'data-(wide|images|broken)="(-?\d+)"', dumped))
    assert found.keys() == {"wide", "images", "broken"}, found
    assert int(found["images"]) > 50
    assert found["broken"] == "0"
    assert int(found["wide"]) <= 0
    _browse(file, tmp_path, width, f"--screenshot={picture}")
    from PIL import Image

    colours = Image.open(picture).convert("RGB").resize((300, 300)).getcolors(90_000)
    assert colours is None or len(colours) > 200, "the page is nearly blank"


def _browse(file, folder, width, action):
    command = [
        str(BROWSER),
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=20000", f"--window-size={width},3000", action, file.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_charts_say_what_guessing_costs_and_where_the_mixture_changes(tmp_path):
    parameters = {
        "sft/simple": {"sft": {
            "train": {"simple": {"steps": 500}}, "begins": {"simple": {"caption": 0.7, "box": 0}},
        }},
        "contrastive": {"contrastive": {
            "train": {"steps": 900}, "mask_ratio": 0.5, "unmasked_share": 0.1,
        }},
    }  # fmt: skip
    for stage, given in parameters.items():
        folder = tmp_path / "artifacts" / stage
        folder.mkdir(parents=True)
        (folder / "lineage.json").write_text(json.dumps({"parameters": given}))
    assert collect.mixture_changes(tmp_path, "sft@simple") == [(350.0, "caption begins")]
    assert collect.mixture_changes(tmp_path, "contrastive") == [(810.0, "whole pictures")]
    assert collect.mixture_changes(tmp_path, "generative") == []
    chance = collect.guessing_losses(tmp_path, "generative")
    assert chance == {"ITM: ln 2": pytest.approx(0.6931, abs=1e-4)}
    curve = {"itm": [(0.0, 0.8), (500.0, 0.7)]}
    svg = charts.loss_chart("x", curve, chance, [(350.0, "caption begins")])
    assert "guessing, ITM: ln 2 = 0.69" in svg
    assert ">caption begins</text>" in svg
    mark = re.search(r'<line x1="([\d.]+)" x2="\1" y1="14"', svg)
    assert mark
    assert float(mark[1]) == pytest.approx(48 + (420 - 48 - 12) * 0.7, abs=0.1)


def test_prefect_is_given_no_link_that_a_browser_would_refuse(tmp_path):
    from vlfoundry.flows.artifacts import report_markdown

    text = report_markdown(tmp_path)
    assert "file:" not in text
    assert str(tmp_path.parent) not in text
    assert f"`work/report/index.html` of the workspace `{tmp_path.name}`" in text
