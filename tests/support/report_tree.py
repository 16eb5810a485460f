"""A small tree of artefacts as a run would leave it, made from the shipped drawings."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np

from tests.support.fake_models import CAN, Guesser, looks
from vlfoundry.eval import questions
from vlfoundry.eval.datasets.folders import ConceptSet, read_concept_set
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.eval.questions import KINDS, ask
from vlfoundry.eval.report.collect import STAGES, artefact
from vlfoundry.eval.suites.retrieval import keyword_caption
from vlfoundry.infra.core import workfolder
from vlfoundry.infra.core.config import build
from vlfoundry.infra.core.stage import Context
from vlfoundry.infra.core.tables import write_table

FOLDERS = {name: output.folder for name, output in OUTPUTS.items()}

REPOSITORY = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh", "ja", "ar", "it")
CLASSES = 60
SCENES = 40
EARLIER = "data/start/earlier"
SEED = 3
RECORD = {
    "wall_s": 61.2,
    "cpu_s": 118.4,
    "samples": 600 * 128,
    "steps": 600,
    "throughput": {
        "samples_per_s": 271.5,
        "gflops_per_cpu_s": 23.0,
        "gemm_gflops_per_cpu_s": 56.0,
        "mfu_cpu": 0.41,
    },
}


class HalfTaught(Guesser):
    """Right about as often as a small model after some minutes: truth mixed with noise."""

    def __init__(self, kind: str, data: ConceptSet, share: float = 0.34) -> None:
        super().__init__(kind, width=len(data.drawn))
        self._share = share
        self._column: dict[object, int] = {}
        for picture in data.pictures:
            place = data.drawn.index(picture.concept)
            concept = data.concepts[picture.concept]
            self._column[looks(picture.data)] = place
            for lang in LANGUAGES:
                words = concept.keywords.get(lang, ())
                self._column[concept.names[lang].encode()] = place
                self._column[keyword_caption(concept.names[lang], words).encode()] = place
        asked = [
            q for k in KINDS for q in ask(data, k, languages=LANGUAGES, count=SCENES, seed=SEED)
        ]
        self._answers = {
            (looks(q.image), q.prompt): (k, q) for k in KINDS for q in asked if q.id.startswith(k)
        }

    def _vector(self, data: bytes) -> np.ndarray:
        vector = super()._vector(data)
        if data in self._column:
            vector[self._column[data]] += self._share
        return vector / np.linalg.norm(vector)

    def generate(self, images, prompts, max_new_tokens):
        return [
            self._say(looks(image), prompt) for image, prompt in zip(images, prompts, strict=True)
        ]

    def _say(self, image: bytes, prompt: str) -> str:
        if (image, prompt) not in self._answers:
            return "red apple"
        kind, question = self._answers[image, prompt]
        number = int(question.id[-3:])
        if kind == "box":
            shift = (number * 37) % 220 - 110
            x1, y1, x2, y2 = question.box
            return (
                f"[{max(0, x1 + shift)},{y1},{min(1000, x2 + shift)},{y2}]"
                if number % 9
                else "[1,2"
            )
        return question.answer if number % 7 else "blue"


def build_tree(root: Path) -> Path:
    """Fill `root` with the artefacts of every stage but `report`, and link the data there."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "data").symlink_to(REPOSITORY / "data")
    train, test = (read_concept_set(root / "data", sources=[name]) for name in ("noto", "twemoji"))
    concepts = [
        c
        for c in test.drawn
        if c in train.drawn and all(x in test.concepts[c].names for x in LANGUAGES)
    ][:: 1600 // CLASSES][:CLASSES]
    _ingest(root, train.only(concepts), concepts)
    _funnel(root)
    _histories(root)
    _evaluate(root, test.only(concepts))
    _gate(root)
    _lineage(root)
    return root


def _ingest(root: Path, train: ConceptSet, concepts: list[str]) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for picture in train.pictures:
        for lang in LANGUAGES:
            name = train.concepts[picture.concept].names[lang]
            rows.append((picture.id.replace("/", "_"), name, lang, picture.source, picture.concept))
    noise = rng.choice(
        ["", "shuffled", "low_resolution", "duplicate", "overlay", "wrong_lang"],
        len(rows),
        p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05],
    )
    columns = list(zip(*rows, strict=True))
    names = ("image_id", "caption", "lang", "source", "concept")
    numbers = np.arange(len(rows))
    out = root / "artifacts/ingest"
    write_table(
        out / "records.parquet",
        {"row": numbers, **{n: list(c) for n, c in zip(names, columns, strict=True)}},
    )
    write_table(out / "truth.parquet", {"row": numbers, "noise": noise.tolist()})
    ids = [p.id.replace("/", "_") for p in train.pictures]
    write_table(
        out / "images.parquet", {"image_id": ids, "bytes": [p.data for p in train.pictures]}
    )
    splits = ["held_out" if i % 12 == 5 else "train" for i in range(len(concepts))]
    write_table(out / "classes.parquet", {"concept": concepts, "split": splits})


def _funnel(root: Path) -> None:
    import pyarrow.parquet as pq

    truth = pq.read_table(root / "artifacts/ingest/truth.parquet").to_pydict()
    rules = {
        "shuffled": "similarity",
        "low_resolution": "resolution",
        "overlay": "overlay",
        "wrong_lang": "language",
    }
    rng = np.random.default_rng(1)
    left = list(zip(truth["row"], truth["noise"], strict=True))
    for step in ("filter", "dedup", "decontaminate"):
        kept, dropped = [], []
        for row, noise in left:
            rule = (
                rules.get(noise)
                if step == "filter"
                else "near_duplicate"
                if (step, noise) == ("dedup", "duplicate")
                else None
            )
            if step == "filter" and rng.random() < 0.06:
                rule = None if rule else "similarity"
            if step == "decontaminate" and row % 97 == 0:
                rule = "test_picture"
            (dropped if rule else kept).append((row, rule))
        folder = root / "artifacts" / step
        write_table(folder / "kept.parquet", {"row": [row for row, _ in kept]})
        write_table(
            folder / "dropped.parquet",
            {
                "row": [row for row, _ in dropped],
                "rule": [rule for _, rule in dropped],
                "detail": ["0.12 below 0.20"] * len(dropped),
            },
        )
        measured = {"target": "shuffled", "precision": 0.9, "recall": 0.96}
        _write(folder / "metrics.json", {"rules": {"similarity": measured}})
        left = [(row, noise) for row, noise in left if row in {r for r, _ in kept}]
    for name, share in (("stage1", 1.0), ("stage2", 0.4)):
        _write(root / f"artifacts/shard/{name}/index.json", {"samples": int(share * len(left))})


def _histories(root: Path) -> None:
    rng = np.random.default_rng(2)
    fold = [4.85 - 1.9 * (1 - math.exp(-i / 150)) + 0.1 * rng.normal() for i in range(400)]
    folds = [
        {"loss": fold, "batch_samples": 128},
        {"loss": [v + 0.05 for v in fold], "batch_samples": 128},
    ]
    _write(root / "artifacts/bootstrap/metrics.json", {"auc": 0.93, "folds": folds})
    starts = {
        "pretrain_text": 7.2,
        "contrastive": 4.85,
        "generative": 9.0,
        "sft@simple": 6.9,
        "sft@full": 6.9,
    }
    for stage, start in starts.items():
        steps = []
        for i in range(600):
            loss = start * (0.25 + 0.75 * math.exp(-i / 160)) + 0.08 * rng.normal()
            terms = (
                {"itc": loss * 0.4, "itm": loss * 0.15, "itg": loss * 0.45}
                if stage == "generative"
                else {}
            )
            steps.append({"step": i + 1, "loss": loss, "lr": 1e-3, **terms})
        _write(root / artefact(stage) / "history.json", {"steps": steps})
        state = workfolder.folder(root, stage, "ab" * 32)
        _write(state / "record.json", {"stage": stage, "run_key": "ab" * 32, **RECORD})
        (state / workfolder.KEY_FILE).write_text("ab" * 32)


def _evaluate(root: Path, data: ConceptSet) -> None:
    import vlfoundry.stages.evaluate as stage

    for kind, folder in (*FOLDERS.items(), ("internvl_c", EARLIER)):
        _write(root / folder / "config.json", {"kind": kind})
    _write(root / EARLIER / "origin.json", {"ref": "internvl_c@v0.1.0"})

    def load_model(folder, *, untrained_seed=None):
        if folder == root / EARLIER:
            return HalfTaught("internvl_c", data, share=0.28)
        kind = next(kind for kind, path in FOLDERS.items() if folder == root / path)
        return HalfTaught(kind, data) if untrained_seed is None else Guesser(kind)

    name, module = "vlfoundry.models.internvl.predict", types.SimpleNamespace(load_model=load_model)
    before, scenes = sys.modules.get(name), questions.TRAINING_SCENES
    questions.TRAINING_SCENES = 60
    sys.modules[name] = module  # type: ignore[assignment]
    try:
        config = build(
            stage.Config,
            {
                "seed": SEED,
                "languages": list(LANGUAGES),
                "evaluate": {"scenes": SCENES, "baseline": {"internvl_c": EARLIER}},
            },
        )
        for variant in OUTPUTS:
            stage.run(config, Context(stage.STAGE.bind(variant), root, "key"))
    finally:
        questions.TRAINING_SCENES = scenes
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
    assert set(CAN) == set(OUTPUTS)


def _gate(root: Path) -> None:
    import vlfoundry.stages.gate as stage

    rules = [
        {
            "variant": "internvl_c",
            "score": "zero_shot/top1/ensemble",
            "at_least": 0.08,
            "above_untrained_by_stderr": 3,
        },
        {"variant": "internvl_c", "score": "zero_shot/top5/zh", "above_chance": True},
        {"variant": "chat_full", "score": "box/accuracy_iou50", "at_least": 0.99},
    ]
    config = build(stage.Config, {"gate": {"candidate": "internvl_c", "rules": rules}})
    stage.run(config, Context(stage.STAGE.bind(None), root, "key"))


def _lineage(root: Path) -> None:
    for number, name in enumerate(STAGES):
        if name != "report":
            key = f"{number:02x}" * 32
            _write(
                root / artefact(name) / "lineage.json",
                {
                    "stage": name,
                    "run_key": key,
                    "inputs": {"data/noto.parquet": "cd" * 32},
                    "outputs": {artefact(name): "ef" * 32},
                },
            )


def _write(file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")
