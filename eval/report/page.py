"""Renders the report as one HTML file that needs nothing else: pictures and charts lie inside."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlfoundry.eval.compare.scores import read_items
from vlfoundry.eval.datasets.folders import read_folder
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.eval.report import charts, collect
from vlfoundry.eval.suites import suites

PAGE = "work/report/index.html"
TEMPLATE = "page.html.j2"
DATA = "data"
LANGUAGES = {
    "en": "English", "zh": "Chinese", "ja": "Japanese", "ar": "Arabic", "it": "Italian",
    "ensemble": "ensemble of all", "": "all",
}  # fmt: skip
SHOWN_PER_QUERY = 5


def render(root: Path, out: Path | None = None, *, examples: int = 12) -> Path:
    """Write the page for whatever the artefacts under `root` hold; sections without any say so.

    Returns the path of the page, by default `work/report/index.html`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("vlfoundry.eval.report", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "short": short}
    out = out or root / PAGE
    out.parent.mkdir(parents=True, exist_ok=True)
    text = environment.get_template(TEMPLATE).render(**content(root, examples))
    out.write_text(text, encoding="utf-8")
    return out


def content(root: Path, examples: int) -> dict[str, Any]:
    """All that the template shows."""
    found = collect.facts(root)
    documents = found["scores"]
    pictures = _test_pictures(root, documents)
    return {
        "facts": found,
        "headlines": headlines(documents),
        "beyond": beyond(documents),
        "summary": summary(found),
        "funnel_svg": charts.funnel_chart(found["funnel"]) if found["funnel"] else "",
        "dropped": _dropped(root),
        "curves": _curves(root, found["losses"]),
        "tables": {variant: tables(document) for variant, document in documents.items()},
        "model_names": {output.name: output.title for output in OUTPUTS.values()},
        "languages": LANGUAGES,
        "retrieval": _retrieval(root, documents, pictures, examples),
        "captions": _captions(root, documents, pictures, examples),
        "answers": _answers(root, documents, examples),
        "boxes": _boxes(root, documents, examples),
        "work": _work(root),
    }


def headlines(documents: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers that stand on top."""
    tiles = []
    for suite in suites().values():
        for headline in suite.headlines:
            for score in documents.get(headline.kind, {}).get("scores", ()):
                if score_key(score) == f"{suite.name}/{headline.key}":
                    tiles.append({"label": headline.label, "score": score})
    return tiles


def beyond(documents: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each suite the first score over all languages, of the model that is best at it, if it is
    above what the nearest training picture reaches by more than its 95 % interval."""
    best: dict[str, Any] = {}
    for document in documents.values():
        firsts: dict[str, Any] = {}
        for score in filter(is_overall, document["scores"]):
            firsts.setdefault(score["suite"], score)
        for suite, score in firsts.items():
            best[suite] = max(best.get(suite, score), score, key=lambda s: s["value"])
    return [
        score
        for score in best.values()
        if score["reference"] is not None and score["interval"][0] > score["reference"]
    ]


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """A few facts for the sentence below the title."""
    data = next((document["data"] for document in found["scores"].values()), None)
    languages = {
        score["lang"]
        for document in found["scores"].values()
        for score in document["scores"]
        if score["lang"] not in ("", "ensemble")
    }
    order = [lang for lang in LANGUAGES if lang in languages] + sorted(languages - set(LANGUAGES))
    return {"data": data, "languages": [LANGUAGES.get(lang, lang) for lang in order]}


def tables(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table a suite: rows of (name, language) with a chart on a scale fit for the suite."""
    result = []
    for suite in suites().values():
        scores = [score for score in document["scores"] if score["suite"] == suite.name]
        if not scores:
            continue
        shown = [s.get(k) for s in scores for k in ("value", "reference", "baseline")]
        levels = [level for level in shown if level is not None]
        full = scale(max(levels))
        names = list(dict.fromkeys(score["name"] for score in scores))
        order = sorted(scores, key=lambda s: (names.index(s["name"]), not is_overall(s)))
        rows = [
            {**s, "overall": is_overall(s), "svg": charts.interval_chart(s, full)} for s in order
        ]
        result.append({"suite": suite.name, "rows": rows, "full": full, "opened": suite.opened})
    return result


def is_overall(score: Mapping[str, Any]) -> bool:
    """Whether the score covers all languages."""
    return score["lang"] in ("", "ensemble")


def scale(largest: float) -> float:
    """The right end of a chart: the next of some round fractions."""
    return next((end for end in (0.05, 0.1, 0.2, 0.25, 0.5) if largest <= end), 1.0)


def score_key(score: Mapping[str, Any]) -> str:
    """suite/name or suite/name/lang."""
    return "/".join(part for part in (score["suite"], score["name"], score["lang"]) if part)


def percent(value: float | None) -> str:
    """12.3 %, or a dash for None."""
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def short(key: str | None) -> str:
    """The start of a hash."""
    return (key or "")[:12]


def data_uri(data: bytes) -> str:
    """Encoded picture bytes as a data URI; the kind is read from the first bytes."""
    kinds = {b"\x89PNG": "png", b"RIFF": "webp", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
    kind = next((kind for start, kind in kinds.items() if data.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _curves(root: Path, losses: Mapping[str, Any]) -> list[dict[str, Any]]:
    curves = collect.histories(root)
    return [
        {
            "stage": stage,
            "svg": charts.loss_chart(
                stage,
                curve,
                collect.guessing_losses(root, stage),
                collect.mixture_changes(root, stage),
            ),
            "ends": losses[stage],
        }
        for stage, curve in curves.items()
    ]


def _dropped(root: Path) -> list[dict[str, Any]]:
    rules = collect.dropped_examples(root, 6)
    for rule in rules:
        for example in rule["examples"]:
            example["uri"] = data_uri(example.pop("data"))
    return rules


def _test_pictures(root: Path, documents: Mapping[str, Any]) -> dict[str, str]:
    """Id of each picture under test -> data URI."""
    sources = sorted({s for document in documents.values() for s in document["data"]["sources"]})
    if not sources or not (root / DATA).is_dir():
        return {}
    data = read_folder(root / DATA, sources=sources)
    return {picture.id: data_uri(picture.data) for picture in data.pictures}


def _items(root: Path, variant: str, name: str) -> list[dict[str, Any]]:
    file = root / Path(OUTPUTS[variant].scores).parent / "items" / f"{name}.jsonl"
    return read_items(file) if file.is_file() else []


def _retrieval(
    root: Path, documents: Mapping[str, Any], pictures: Mapping[str, str], count: int
) -> list[dict[str, Any]]:
    """Queries of each language and direction, half found and half not, at even distances."""
    shown = []
    for variant in documents:
        langs = [s["lang"] for s in documents[variant]["scores"] if s["suite"] == "retrieval"]
        for lang in dict.fromkeys(langs):
            for direction in ("text_to_image", "image_to_text"):
                items = _items(root, variant, f"retrieval_{direction}_{lang}")
                each = max(1, count // 12)
                hits = [item for item in items if item["rank"] == 1]
                misses = [item for item in items if item["rank"] > 1]
                for item in collect.spread(hits, each) + collect.spread(misses, each):
                    shown.append(_query(item, variant, lang, direction, pictures))
        if shown:
            break  # one model's examples: the other's differ in numbers, not in kind
    return shown


def _query(
    item: dict[str, Any], variant: str, lang: str, direction: str, pictures: Any
) -> dict[str, Any]:
    right = set(item["right"])
    to_image = direction == "text_to_image"
    found = [
        {"text": "" if to_image else answer, "uri": pictures.get(answer, "") if to_image else "",
         "right": answer in right}
        for answer in item["found"][:SHOWN_PER_QUERY]
    ]  # fmt: skip
    answer = item["right"][0]
    return {
        "variant": variant,
        "lang": lang,
        "direction": direction,
        "text": item["query"] if to_image else answer,
        "uri": pictures.get(answer if to_image else item["query"], ""),
        "found": found,
        "rank": item["rank"],
    }


def _captions(
    root: Path, documents: dict[str, Any], pictures: Any, count: int
) -> list[dict[str, Any]]:
    shown = []
    for variant in documents:
        scenes = _scenes(root, variant)
        items = [
            {
                **item,
                "variant": variant,
                "uri": scenes.get(item["id"]) or pictures.get(item["picture"]),
            }
            for item in _items(root, variant, "caption")
        ]
        is_chat = variant.startswith("chat")
        usable = [item for item in items if item["uri"] and (not is_chat or item["id"] in scenes)]
        shown += collect.spread(usable, max(4, count // 2))
    return shown


def _answers(root: Path, documents: dict[str, Any], count: int) -> list[dict[str, Any]]:
    return _questions(root, documents, "colour", max(5, count // 2))


def _boxes(root: Path, documents: dict[str, Any], count: int) -> list[dict[str, Any]]:
    shown = _questions(root, documents, "box", max(5, count // 2))
    for item in shown:
        item["svg"] = charts.picture_with_boxes(item["uri"], item["truth"], item["box"])
    return shown


def _questions(
    root: Path, documents: dict[str, Any], kind: str, count: int
) -> list[dict[str, Any]]:
    shown = []
    for variant in documents:
        scenes = _scenes(root, variant)
        items = [i for i in _items(root, variant, kind) if i["id"] in scenes]
        for item in collect.spread(items, count):
            shown.append({**item, "variant": variant, "uri": scenes[item["id"]]})
    return shown


def _scenes(root: Path, variant: str) -> dict[str, str]:
    folder = root / Path(OUTPUTS[variant].scores).parent / "items" / "scenes"
    return {file.stem: data_uri(file.read_bytes()) for file in sorted(folder.glob("*.png"))}


def _work(root: Path) -> list[dict[str, Any]]:
    """Times and rates of each stage, with both terms of MFU(CPU) where it was measured."""
    rows = []
    for stage, record in collect.work_records(root).items():
        rates = record.get("throughput") or {}
        rows.append(
            {
                "stage": stage,
                "run_key": record.get("run_key", ""),
                "wall_s": record.get("wall_s"),
                "cpu_s": record.get("cpu_s"),
                "samples_per_s": rates.get("samples_per_s"),
                "mfu": rates.get("mfu_cpu"),
                "model_gflops": rates.get("gflops_per_cpu_s"),
                "gemm_gflops": rates.get("gemm_gflops_per_cpu_s"),
            }
        )
    return rows
