"""Reads what the stages of a run wrote; the facts are the same for the same artefacts."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from vlfoundry.eval.compare.scores import read_document
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.infra.core import workfolder
from vlfoundry.infra.core.tables import read_table

FUNNEL = ("filter", "dedup", "decontaminate")
TRAINED = ("bootstrap", "pretrain_text", "contrastive", "generative", "sft@simple", "sft@full")
STAGES = (
    "ingest", "bootstrap", "filter", "dedup", "decontaminate", "shard",
    "pretrain_text", "contrastive", "generative", "sft@simple", "sft@full",
    *(f"evaluate@{variant}" for variant in OUTPUTS), "gate", "report",
)  # fmt: skip
NOT_A_LOSS = ("step", "lr", "grad_norm", "samples", "epoch")


def facts(root: Path) -> dict[str, Any]:
    """Everything that is the same each time: funnel, losses, scores, gate, lineage."""
    return {
        "format": "vlfoundry.report.v1",
        "funnel": funnel(root),
        "losses": {stage: ends(curve) for stage, curve in histories(root).items()},
        "scores": score_documents(root),
        "gate": _json(root / "artifacts/gate/gate.json"),
        "lineage": lineages(root),
    }


def metrics(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of `facts` that people compare between runs, scores aside: records after each
    step of the funnel, the last loss of each training stage, and whether the gate let pass."""
    told = found["funnel"]
    kept = {step["step"]: step["kept"] for step in told.get("steps", [])}
    losses = {
        stage: terms["loss"]["last"] for stage, terms in found["losses"].items() if "loss" in terms
    }
    return {
        "funnel": {"ingest": told["records"], **kept, **told["shards"]} if told else {},
        "loss": losses,
        "gate": {"passed": (found["gate"] or {}).get("passed")},
    }


def artefact(stage: str) -> str:
    """The folder of a stage's outputs: sft@full -> artifacts/sft/full."""
    return "artifacts/" + stage.replace("@", "/")


def funnel(root: Path) -> dict[str, Any]:
    """How many records each step kept, what each rule dropped, and how often it was right.

    Precision of a rule: the share of what it dropped that has any noise in it. Recall of a noise:
    the share of the records with it that some step dropped. Decontamination drops clean records on
    purpose, so it is left out of both.
    """
    truth = _truth(root)
    if truth is None:
        return {}
    steps, dropped_so_far = [], {}
    for step in FUNNEL:
        kept, dropped = (root / artefact(step) / f"{n}.parquet" for n in ("kept", "dropped"))
        if not (kept.is_file() and dropped.is_file()):
            continue
        rows = read_table(dropped, ["row", "rule"]).to_pydict()
        left = read_table(kept, ["row"]).num_rows
        measured = (_json(root / artefact(step) / "metrics.json") or {}).get("rules", {})
        rules = [
            _rule(step, rule, rows, truth, measured.get(rule, {}))
            for rule, _ in Counter(rows["rule"]).most_common()
        ]
        steps.append(
            {"step": step, "before": left + len(rows["row"]), "kept": left, "rules": rules}
        )
        if step != "decontaminate":
            dropped_so_far |= dict(zip(rows["row"], rows["rule"], strict=True))
    return {
        "records": len(truth),
        "steps": steps,
        "noise": _recalls(truth, dropped_so_far),
        **_overall(truth, dropped_so_far),
        "shards": {
            name: index["samples"]
            for name in ("stage1", "stage2")
            if (index := _json(root / f"artifacts/shard/{name}/index.json"))
        },
    }


def dropped_examples(root: Path, per_rule: int) -> list[dict[str, Any]]:
    """For each rule some dropped records, at even distances: caption, language, detail, bytes."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for step in FUNNEL:
        file = root / artefact(step) / "dropped.parquet"
        if not file.is_file():
            continue
        by_rule = defaultdict(list)
        for entry in read_table(file, ["row", "rule", "detail"]).to_pylist():
            by_rule[entry["rule"]].append(entry)
        for rule, entries in by_rule.items():
            found[step, rule] = spread(entries, per_rule)
    wanted = {entry["row"] for entries in found.values() for entry in entries}
    records = _records(root, wanted)
    return [
        {"step": step, "rule": rule, "examples": [{**e, **records[e["row"]]} for e in entries]}
        for (step, rule), entries in found.items()
    ]


def spread(entries: list[Any], count: int) -> list[Any]:
    """`count` entries at even distances: a sample that nobody picked."""
    if len(entries) <= count:
        return list(entries)
    return [entries[(2 * i + 1) * len(entries) // (2 * count)] for i in range(count)]


def histories(root: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Loss terms of each trained stage: stage -> term -> [(step, value), ...]."""
    curves = {}
    for stage in TRAINED:
        document = _json(root / artefact(stage) / "history.json")
        if document and document.get("steps"):
            curves[stage] = _terms(document["steps"])
    folds = (_json(root / "artifacts/bootstrap/metrics.json") or {}).get("folds", [])
    if folds and "bootstrap" not in curves:
        curves["bootstrap"] = {
            f"fold {i + 1}": list(enumerate(fold["loss"])) for i, fold in enumerate(folds)
        }
    return {stage: curves[stage] for stage in TRAINED if stage in curves}


def guessing_losses(root: Path, stage: str) -> dict[str, float]:
    """What losses cost that have learnt nothing, in words: ln(batch) for a contrastive one, ln 2
    for matching, which says yes or no.

    The stage's record or metrics say how many samples a batch had.
    """
    if stage == "generative":
        return {"ITM: ln 2": math.log(2)}
    if stage == "bootstrap":
        folds = (_json(root / "artifacts/bootstrap/metrics.json") or {}).get("folds") or [{}]
        batch = folds[0].get("batch_samples")
    else:
        record = work_records(root).get(stage, {}) if stage == "contrastive" else {}
        batch = record["samples"] / record["steps"] if record.get("steps") else None
    return {"ln(batch)": math.log(batch)} if batch else {}


def mixture_changes(root: Path, stage: str) -> list[tuple[float, str]]:
    """Steps from which a stage trains on something else, with what: a loss may jump there."""
    lineage = _json(root / artefact(stage) / "lineage.json") or {}
    parameters = lineage.get("parameters", {})
    name, _, variant = stage.partition("@")
    options = parameters.get(name, {})
    trained = options.get("train", {})
    steps = (trained.get(variant, {}) if variant else trained).get("steps", 0)
    if name == "sft":
        begins = options.get("begins", {}).get(variant, {})
        later = sorted((share, kind) for kind, share in begins.items() if share > 0)
        return [(share * steps, f"{kind} begins") for share, kind in later]
    if name == "contrastive" and options.get("mask_ratio"):
        return [(steps * (1 - options["unmasked_share"]), "whole pictures")]
    return []


def ends(curve: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """First and last value of each term, the last as the mean of the last tenth."""
    result = {}
    for term, points in curve.items():
        tail = [value for _, value in points[-max(1, len(points) // 10) :]]
        result[term] = {
            "steps": int(points[-1][0]),
            "first": round(points[0][1], 5),
            "last": round(sum(tail) / len(tail), 5),
        }
    return result


def score_documents(root: Path) -> dict[str, dict[str, Any]]:
    """The score file of each model that was evaluated."""
    files = {variant: root / OUTPUTS[variant].scores for variant in OUTPUTS}
    return {variant: read_document(file) for variant, file in files.items() if file.is_file()}


def lineages(root: Path) -> list[dict[str, Any]]:
    """Run key, inputs and outputs of each stage that ran, in the order of the pipeline."""
    found = []
    for stage in STAGES:
        document = _json(root / artefact(stage) / "lineage.json")
        if document and stage != "report":
            keys = ("stage", "run_key", "inputs", "outputs")
            found.append({key: document.get(key) for key in keys})
    return found


def work_records(root: Path) -> dict[str, dict[str, Any]]:
    """Times and rates of each stage: not the same each time, so for the page alone."""
    places = {stage: place for stage in STAGES if (place := workfolder.current(root, stage))}
    records = {stage: _json(place / "record.json") for stage, place in places.items()}
    return {stage: record for stage, record in records.items() if record}


def _truth(root: Path) -> dict[int, str] | None:
    file = root / "artifacts/ingest/truth.parquet"
    if not file.is_file():
        return None
    columns = read_table(file, ["row", "noise"]).to_pydict()
    return dict(zip(columns["row"], columns["noise"], strict=True))


def _rule(
    step: str,
    rule: str,
    rows: dict[str, list[Any]],
    truth: dict[int, str],
    measured: dict[str, Any],
) -> dict[str, Any]:
    hit = [truth[row] for row, name in zip(rows["row"], rows["rule"], strict=True) if name == rule]
    noisy = sum(noise != "" for noise in hit)
    return {
        "rule": rule,
        "dropped": len(hit),
        "target": measured.get("target", ""),
        "target_precision": measured.get("precision"),
        "target_recall": measured.get("recall"),
        "precision": None if step == "decontaminate" else round(noisy / len(hit), 4),
        "noise": dict(sorted(Counter(noise or "clean" for noise in hit).items())),
    }


def _recalls(truth: dict[int, str], dropped: dict[int, str]) -> list[dict[str, Any]]:
    counts = Counter(truth.values())
    gone = Counter(truth[row] for row in dropped)
    return [
        {
            "noise": noise or "clean",
            "records": counts[noise],
            "dropped": gone[noise],
            "share": round(gone[noise] / counts[noise], 4),
        }
        for noise in sorted(counts, key=lambda noise: (noise == "", noise))
    ]


def _overall(truth: dict[int, str], dropped: dict[int, str]) -> dict[str, float | None]:
    noisy = sum(noise != "" for noise in truth.values())
    right = sum(truth[row] != "" for row in dropped)
    return {
        "precision": round(right / len(dropped), 4) if dropped else None,
        "recall": round(right / noisy, 4) if noisy else None,
    }


def _records(root: Path, wanted: set[int]) -> dict[int, dict[str, Any]]:
    if not wanted:
        return {}
    columns = ["row", "image_id", "caption", "lang", "source"]
    rows = read_table(root / "artifacts/ingest/records.parquet", columns).to_pylist()
    records = {row["row"]: row for row in rows if row["row"] in wanted}
    ids = {record["image_id"] for record in records.values()}
    images = read_table(root / "artifacts/ingest/images.parquet", ["image_id", "bytes"])
    data = {
        image["image_id"]: image["bytes"]
        for image in images.to_pylist()
        if image["image_id"] in ids
    }
    return {row: {**record, "data": data[record["image_id"]]} for row, record in records.items()}


def _terms(steps: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    terms = defaultdict(list)
    for step in steps:
        for name, value in step.items():
            is_loss = name == "loss" or "loss" in name or name in ("itc", "itm", "itg")
            if name not in NOT_A_LOSS and is_loss and isinstance(value, int | float):
                terms[name].append((step["step"], float(value)))
    return dict(terms)


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
