"""Bootstrap, filter, dedup, decontaminate, shard: what each must find, and that rows add up."""

import json
import time

import numpy as np
import pytest

from tests.support.tiny_project import LIMIT_S, make_project, start_process
from vlfoundry.infra.core.config import build
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.core.tables import read_table
from vlfoundry.infra.data.funnel import Verdict, dropped_table, rates
from vlfoundry.infra.data.shards.read import ShardSet
from vlfoundry.infra.data.sources.concept_set import read_artwork
from vlfoundry.infra.data.synthetic.noise import reencode
from vlfoundry.models.scorer import evidence
from vlfoundry.stages import bootstrap, decontaminate, dedup, filter, shard

pytestmark = pytest.mark.slow

STEPS = ("filter", "dedup", "decontaminate")


def metrics(funnel, stage):
    return json.loads((funnel / f"artifacts/{stage}/metrics.json").read_text("utf-8"))


def rows(funnel, path):
    return set(read_table(funnel / f"artifacts/{path}.parquet")["row"].to_pylist())


def test_every_row_is_kept_or_dropped_with_a_reason(funnel):
    before = rows(funnel, "ingest/records")
    for step in STEPS:
        kept, dropped = rows(funnel, f"{step}/kept"), rows(funnel, f"{step}/dropped")
        assert kept | dropped == before
        assert not kept & dropped
        table = read_table(funnel / f"artifacts/{step}/dropped.parquet")
        assert all(table["rule"].to_pylist())
        assert all(table["detail"].to_pylist())
        before = kept
    assert len(ShardSet(funnel / "artifacts/shard/stage1")) == len(before)


def test_the_scorer_starts_at_ln_batch_and_learns(funnel):
    measured = metrics(funnel, "bootstrap")
    for start, end in zip(measured["loss_at_step_0"], measured["final_loss"], strict=True):
        assert start == pytest.approx(measured["ln_batch"], rel=0.02)
        assert end < 0.95 * measured["ln_batch"]
    assert measured["auc"] > 0.9


def test_no_scorer_has_seen_the_family_that_it_scores(funnel):
    families = np.array(read_table(funnel / "artifacts/ingest/records.parquet")["family"])
    folds = read_table(funnel / "artifacts/bootstrap/scores.parquet")["fold"].to_numpy()
    assert set(folds) == {0, 1}
    for family in np.unique(families):
        assert len(set(folds[families == family])) == 1
    trained = [fold["trained_on_records"] for fold in metrics(funnel, "bootstrap")["folds"]]
    assert trained == [int((folds == 1).sum()), int((folds == 0).sum())]


def test_one_family_alone_cannot_be_cross_fitted():
    with pytest.raises(DataError, match=r"needs drawings of 2 families, got \['noto'\]"):
        bootstrap.assign_folds(["noto"] * 5)


def test_scores_of_mismatches_are_spread_evenly(funnel):
    noise = np.array(read_table(funnel / "artifacts/ingest/truth.parquet")["noise"])
    score = read_table(funnel / "artifacts/bootstrap/scores.parquet")["score"].to_numpy()
    assert 0.35 < score[noise == "shuffled"].mean() < 0.65
    assert np.median(score[noise == ""]) > 0.95


def test_bootstrap_gives_the_same_bits_again(funnel, funnel_params, run_one, tmp_path):
    short = funnel_params | {"bootstrap": funnel_params["bootstrap"] | {"steps": 5}}
    prints = []
    for name in ("a", "b"):
        (tmp_path / name / "artifacts").mkdir(parents=True)
        (tmp_path / name / "artifacts/ingest").symlink_to(funnel / "artifacts/ingest")
        run_one(bootstrap.STAGE, tmp_path / name, short)
        prints.append(fingerprint(tmp_path / name / "artifacts/bootstrap"))
    assert prints[0] == prints[1]


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_worker_of_bootstrap_ends_it(funnel, funnel_params, tmp_path, which):
    long = funnel_params | {"bootstrap": funnel_params["bootstrap"] | {"steps": 100_000}}
    root = make_project(tmp_path / "project", long, concepts=1)
    (root / "artifacts/ingest").symlink_to(funnel / "artifacts/ingest")
    stage = start_process(root, "bootstrap")
    deadline = time.monotonic() + LIMIT_S
    while len(workers := stage.ranks()) < 2 and stage.collect() is None:
        assert time.monotonic() < deadline, stage.output
    time.sleep(1.0)
    workers[which].kill()
    began = time.monotonic()
    assert stage.wait() == 1, stage.output
    assert time.monotonic() - began < 10
    last = stage.output.splitlines()[-1]
    assert last.startswith(f"bootstrap: the worker of fold {which + 1} was killed by SIGKILL (out")
    assert not [worker for worker in workers if worker.is_running()]


@pytest.mark.parametrize(
    ("rule", "precision", "recall"),
    [
        ("resolution", 0.9, 0.95),
        ("overlay", 0.6, 0.85),
        ("language", 0.8, 0.85),
        ("similarity", 0.6, 0.6),
    ],
)
def test_rules_find_what_they_are_for(funnel, rule, precision, recall):
    measured = metrics(funnel, "filter")["rules"][rule]
    assert measured["precision"] > precision, measured
    assert measured["recall"] > recall, measured


def test_the_estimated_rate_of_mismatches_is_near_the_truth(funnel):
    measured = metrics(funnel, "filter")
    entered = measured["rows_out"] + measured["rules"]["similarity"]["dropped"]
    share = measured["rules"]["similarity"]["wanted"] / entered
    assert abs(measured["similarity_estimate"]["mismatched_share"] - share) < 0.08


def test_a_filter_never_reads_what_the_picture_shows(funnel, funnel_params, run_one, tmp_path):
    """Without concepts, and with a false truth, the same rows go."""
    (tmp_path / "artifacts/ingest").mkdir(parents=True)
    (tmp_path / "artifacts/bootstrap").symlink_to(funnel / "artifacts/bootstrap")
    from vlfoundry.infra.core.tables import write_table

    for name in ("records", "truth", "images"):
        table = read_table(funnel / f"artifacts/ingest/{name}.parquet")
        if name == "records":
            table = table.drop_columns(["concept"])
        if name == "truth":
            table = {"noise": [""] * len(table), "original": np.full(len(table), -1)}
        write_table(tmp_path / f"artifacts/ingest/{name}.parquet", table)
    run_one(filter.STAGE, tmp_path, funnel_params)
    assert rows(tmp_path, "filter/kept") == rows(funnel, "filter/kept")


def test_the_cutoff_follows_the_precision_asked_for():
    rng = np.random.default_rng(0)
    score = np.concatenate([rng.random(2000), 1 - rng.random(8000) ** 8 * 0.3])
    strict, _ = filter.mismatch_cutoff(score, 0.95)
    loose, estimate = filter.mismatch_cutoff(score, 0.6)
    assert 0 < strict < loose
    assert estimate["mismatched_share"] == pytest.approx(0.2, abs=0.02)
    for cutoff, precision in ((strict, 0.95), (loose, 0.6)):
        below = score < cutoff
        assert below[:2000].sum() / below.sum() == pytest.approx(precision, abs=0.05)
    assert filter.mismatch_cutoff(np.full(100, 0.99), 0.8)[0] == 0.0
    assert filter.mismatch_cutoff(score, 0.0)[0] == 0.0


@pytest.mark.parametrize(
    ("caption", "fault"),
    [
        ("red apple", ""),
        ("猫", ""),
        ("", "0 characters"),
        ("x" * 300, "300 characters"),
        ("?!...", "no letter"),
        ("buy now buy now buy now buy buy buy", "'buy' 6 times"),
    ],
)
def test_captions_are_judged_by_their_text(caption, fault):
    verdict = filter.caption_text(filter.FilterConfig(), [caption])
    assert bool(verdict.drop[0]) == bool(fault)
    assert not fault or fault in verdict.detail[0]


def test_copies_go_and_one_stays(funnel):
    measured = metrics(funnel, "dedup")["overall"]
    assert measured["precision"] > 0.9
    assert measured["recall"] > 0.9
    truth = read_table(funnel / "artifacts/ingest/truth.parquet")["original"].to_pylist()
    before, after = rows(funnel, "filter/kept"), rows(funnel, "dedup/kept")
    for row in before:
        if truth[row] in before:
            assert row in after or truth[row] in after


def test_dedup_keeps_the_sharpest_then_the_best_score():
    group = np.array([0, 0, 0, 3, 3])
    side = np.array([60.0, 64.0, 64.0, 50.0, 50.0])
    score = np.array([1.0, 0.2, 0.9, 0.5, 0.5])
    assert dedup.best_of(group, side, score).tolist() == [2, 2, 2, 3, 3]


def test_dedup_compares_only_inside_its_scope():
    hashes, colours = np.zeros(4, np.uint64), np.zeros((4, 192), np.float32)
    a, b = dedup.copies(np.array([7, 7, 2, 2]), hashes, colours, dedup.DedupConfig())
    assert sorted(zip(a.tolist(), b.tolist(), strict=True)) == [(0, 1), (2, 3)]


def test_leaked_test_pictures_are_found_by_name():
    test = read_artwork("data/twemoji.parquet")[:60]
    train = read_artwork("data/noto.parquet")[:60]
    rng = np.random.default_rng(0)
    from vlfoundry.infra.data.images.bulk import decode_rgba

    leaked = [reencode(decode_rgba(drawing.image_bytes), rng) for drawing in test[:10]]
    training = decontaminate.prints([drawing.image_bytes for drawing in train] + leaked)
    verdict = decontaminate.contaminated(
        training, decontaminate.prints([drawing.image_bytes for drawing in test]),
        decontaminate.DecontaminateConfig(), [drawing.id for drawing in test],
        np.arange(len(train) + len(leaked)),
    )  # fmt: skip
    assert verdict.drop[60:].all()
    assert verdict.drop[:60].sum() <= 1
    assert any("twemoji/" in detail for detail in verdict.detail)


def test_another_test_source_needs_its_dependency(funnel, funnel_params, run_one, tmp_path):
    (tmp_path / "artifacts/dedup").mkdir(parents=True)
    (tmp_path / "artifacts/dedup/kept.parquet").symlink_to(funnel / "artifacts/dedup/kept.parquet")
    (tmp_path / "artifacts/ingest").mkdir()
    for name in ("records.parquet", "images.parquet"):
        (tmp_path / "artifacts/ingest" / name).symlink_to(funnel / "artifacts/ingest" / name)
    (tmp_path / "artifacts/ingest/metrics.json").write_text('{"test_source": "noto"}')
    with pytest.raises(
        DataError, match=r"test_source is 'noto', but this stage reads data/twemoji"
    ):
        run_one(decontaminate.STAGE, tmp_path, funnel_params)


def test_shards_hold_the_survivors_with_their_pictures(funnel):
    records = read_table(funnel / "artifacts/ingest/records.parquet").to_pylist()
    images = read_table(funnel / "artifacts/ingest/images.parquet").to_pylist()
    stored = {row["image_id"]: row["bytes"] for row in images}
    shards = ShardSet(funnel / "artifacts/shard/stage1")
    assert {s.meta["row"] for s in shards} == rows(funnel, "decontaminate/kept")
    for sample in (shards[0], shards[len(shards) - 1]):
        record = records[sample.meta["row"]]
        assert sample.image_bytes == stored[record["image_id"]]
        assert sample.meta["caption"] == record["caption"]
        assert set(sample.meta) == {*shard.META, "row", "similarity"}


def test_stage_2_takes_the_same_share_of_each_kind():
    kinds = ["name", "keywords", "name", "title", "keywords", "name", "name"]
    similarity = np.array([0.1, 0.9, 0.2, 0.99, 0.7, 0.3, 0.4])
    names = shard.ShardConfig(stage2_share=0.5)
    assert shard.best(kinds, similarity, names).tolist() == [2, 5, 6]
    both = shard.ShardConfig(stage2_share=0.5, stage2_kinds=("keywords", "name"))
    assert shard.best(kinds, similarity, both).tolist() == [1, 2, 4, 5, 6]
    assert shard.best(["title"], similarity[:1], both).tolist() == []


def test_stage_2_holds_the_best_names(funnel):
    first, second = (ShardSet(funnel / f"artifacts/shard/stage{n}") for n in (1, 2))
    names = {s.key: s.meta["similarity"] for s in first if s.meta["kind"] == "name"}
    chosen = {s.key for s in second}
    assert chosen < set(names)
    assert 0.85 < len(chosen) / len(names) < 0.96
    assert min(names[k] for k in chosen) >= max(v for k, v in names.items() if k not in chosen)


def test_a_filter_that_keeps_nothing_says_why(funnel, funnel_params, run_one, tmp_path):
    strict = funnel_params | {"filter": {"min_side_px": 65.0}}
    (tmp_path / "artifacts").mkdir()
    for name in ("ingest", "bootstrap"):
        (tmp_path / "artifacts" / name).symlink_to(funnel / "artifacts" / name)
    with pytest.raises(DataError, match=r"no record of \d+ survived.*'resolution': \d+"):
        run_one(filter.STAGE, tmp_path, strict)


def test_reasons_are_those_of_the_first_rule():
    verdicts = [
        Verdict(rule="a", target="", drop=np.array([True, False, False]), detail=["x"]),
        Verdict(rule="b", target="", drop=np.array([True, True, False]), detail=["y", "z"]),
    ]
    table = dropped_table(np.array([10, 20, 30]), verdicts)
    assert table["row"].tolist() == [10, 20]
    assert (table["rule"], table["detail"]) == (["a", "b"], ["x", "z"])


def test_precision_and_recall_by_hand():
    drop, wanted = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    assert rates(drop, wanted) == {"dropped": 3, "wanted": 2, "precision": 0.3333, "recall": 0.5}
    nothing = np.zeros(5, bool)
    assert rates(nothing, nothing)["precision"] is None


def test_witnesses_do_not_include_the_record_or_its_copies():
    """A record whose picture is unlike all others is judged from its pixels alone."""
    features = np.eye(3, dtype=np.float32)
    images, texts = np.eye(3, 4, dtype=np.float32), np.eye(4, dtype=np.float32)[::-1].copy()
    image, caption = np.array([0, 1, 1, 1]), np.array([0, 1, 1, 2])
    vectors = evidence.picture_vectors(features, images, texts, image, caption, 1.0)
    assert np.allclose(vectors[0], images[0])
    assert np.allclose(vectors[1], vectors[2])
    assert vectors[1] @ texts[1] == pytest.approx(images[1] @ texts[1] / np.linalg.norm(
        images[1] + texts[2]))  # fmt: skip
    assert vectors[1] @ texts[2] > 0.5


def test_parameters_out_of_range_are_refused():
    from vlfoundry.infra.core.errors import ConfigError

    for config, values in (
        (dedup.DedupConfig, {"max_bits": 40}),
        (shard.ShardConfig, {"stage2_share": 0.0}),
        (filter.FilterConfig, {"similarity_precision": 2.0}),
        (bootstrap.BootstrapConfig, {"steps": 0}),
        (decontaminate.DecontaminateConfig, {"planted": -1}),
    ):
        with pytest.raises(ConfigError):
            build(config, values)
