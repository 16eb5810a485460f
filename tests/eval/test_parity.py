"""Recorded numbers of the official models are ours, and parity sees typical mistakes."""

import dataclasses
import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vlfoundry.eval.parity import chat, dual, layouts, vision
from vlfoundry.eval.parity.check import Check
from vlfoundry.eval.parity.run import check_folder, compare_folders
from vlfoundry.flows.cli import app
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.devices import find_device
from vlfoundry.infra.core.errors import DataError
from vlfoundry.models.layers.norms import FullWidthQKRMSNorm

pytestmark = pytest.mark.skipif(
    find_device().kind != "cpu", reason="recorded numbers are fp32 on a CPU"
)
GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def misses(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@functools.cache
def checked(name: str) -> list[Check]:
    """The folder's checks, by models without a mistake."""
    return check_folder(GOLDEN / name)


@pytest.mark.parametrize("name", FOLDERS)
def test_our_numbers_are_the_recorded_ones(run_ranks, name):
    checks = checked(name)

    assert not misses(checks)
    assert len({check.name for check in checks}) == len(checks)
    errors = [check.worst_abs for check in checks if check.worst_abs is not None]
    assert max(errors, default=0.0) < 5e-5


# --- mistakes ---------------------------------------------------------------------------------


@pytest.fixture
def one_rank(monkeypatch):
    """Without the same once more on two ranks."""
    monkeypatch.setattr("vlfoundry.eval.parity.run.check_layouts", lambda *_: [])


def per_head_norm(self, x):
    heads = x.float()
    unit = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.eps)
    return unit * self.weight.view(x.shape[2:])


def test_qk_norm_per_head_is_seen(monkeypatch, one_rank):
    monkeypatch.setattr(FullWidthQKRMSNorm, "forward", per_head_norm)

    assert "outputs/native.hidden_states.1" in misses(check_folder(GOLDEN / "internvit_rms"))
    assert "outputs/vit.last_hidden_state" in misses(check_folder(GOLDEN / "internvl_chat"))


@pytest.mark.parametrize("name", ["internvit_rms", "internvit_layer"])
def test_gelu_by_tanh_is_seen(monkeypatch, one_rank, name):
    approximate = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    monkeypatch.setattr(torch.nn.functional, "gelu", approximate)

    assert "outputs/native.hidden_states.1" in misses(check_folder(GOLDEN / name))


@pytest.mark.parametrize("name", ["internvit_rms", "internvit_layer"])
def test_a_wrong_epsilon_of_the_vision_tower_is_seen_by_the_probe(monkeypatch, name):
    right = vision.config_from_official
    monkeypatch.setattr(
        vision, "config_from_official", lambda c: dataclasses.replace(right(c), eps=1e-5)
    )

    assert misses(check_folder(GOLDEN / name)) == {
        "eps_probe_outputs/hidden_states.1",
        "tensor 2/eps_probe_outputs/hidden_states.1",
    }


def test_a_wrong_epsilon_of_qllama_is_seen_by_the_probe(monkeypatch, one_rank):
    right = dual.config_from_official

    def wrong(official):
        config = right(official)
        return dataclasses.replace(config, text=dataclasses.replace(config.text, eps=1e-5))

    monkeypatch.setattr(dual, "config_from_official", wrong)

    assert {
        "eps_probe_outputs/get_text_features",
        "eps_probe_outputs/G.get_image_features.qllama",
    } <= misses(check_folder(GOLDEN / "internvl_14b"))


def test_pooling_before_the_end_token_is_seen(monkeypatch, one_rank):
    def before_end(hidden, mask):
        return hidden[torch.arange(len(hidden)), mask.long().sum(1) - 2]

    for place in ("vlfoundry.eval.parity.dual", "vlfoundry.models.internvl.model"):
        monkeypatch.setattr(f"{place}.at_end", before_end)

    wrong = misses(check_folder(GOLDEN / "internvl_14b"))
    assert {"outputs/text_features", "outputs/C.cosine", "outputs/G.cosine"} <= wrong


def test_padding_that_is_seen_is_seen(monkeypatch, one_rank):
    monkeypatch.setattr(
        "vlfoundry.models.internvl.model.matching_blocked",
        lambda queries, mask: torch.zeros(len(mask), 1, *[queries + mask.shape[1]] * 2).bool(),
    )

    wrong = misses(check_folder(GOLDEN / "internvl_14b"))
    assert {"train_outputs/attention_mask_additive", "train_outputs/itm_logits"} <= wrong
    assert {"train_grads/itm_head.bias", "train_world2_outputs/rank0/itm_logits"} <= wrong


def test_swapped_rows_of_the_pixel_shuffle_are_seen(monkeypatch, one_rank):
    right = chat.config_from_official

    def wrong(official):
        return right({**official, "ps_version": "v2"})

    monkeypatch.setattr(chat, "config_from_official", wrong)

    assert {"outputs/extract_feature", "outputs/pixel_shuffle.arange_out"} <= misses(
        check_folder(GOLDEN / "internvl_chat")
    )


def test_a_recorded_tensor_that_nothing_answers_to_does_not_pass(tmp_path):
    folder = shutil.copytree(GOLDEN / "internvit_layer", tmp_path / "folder")
    recorded = load_file(folder / "outputs.safetensors")
    save_file({**recorded, "native.new": torch.zeros(2)}, folder / "outputs.safetensors")

    assert misses(check_folder(folder)) == {"outputs/native.new", "tensor 2/outputs/native.new"}


# --- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("internvit_rms", "eps_probe_outputs/"),
        ("internvit_layer", "eps_probe_outputs/"),
        ("internvl_14b", "train_grads/"),
        ("internvl_chat", "grads/"),
    ],
)
def test_tensor_ranks_and_pipeline_stages_are_compared_too(run_ranks, name, prefix):
    names = {check.name for check in checked(name)}

    assert any(check.startswith(f"tensor 2/{prefix}") for check in names)
    outputs = {check for check in names if check.startswith("outputs/")}
    assert {f"tensor 2/{check}" for check in outputs} <= names
    # The smallest folders' models have one layer, which no pipeline can cut.
    staged = sum(check.startswith("pipeline 2/outputs/") for check in names)
    assert staged >= len(outputs) / 2 or "pipeline 2" in names
    assert staged or name.startswith("internvit")


def test_a_layout_that_the_sizes_do_not_allow_is_told(monkeypatch, run_ranks):
    monkeypatch.setitem(layouts.LAYOUTS, "pipeline 2", Layout(pipeline=2, virtual_pipeline=9))
    checks = {check.name: check for check in check_folder(GOLDEN / "internvit_layer")}

    assert "pipeline stages" in checks["pipeline 2"].note
    assert not any(name.startswith("pipeline 2/") for name in checks)


# --- the command ------------------------------------------------------------------------------


def test_the_command_prints_each_tensor_and_skips_files(tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    folder = GOLDEN / "internvit_layer"
    result = CliRunner().invoke(app, ["parity", str(folder), str(tmp_path / "notes.json")])

    assert result.exit_code == 0
    assert f"skipped {tmp_path / 'notes.json'}: no folder" in result.stdout
    assert "[1/1] internvit_layer: comparing" in result.stdout
    line = next(x for x in result.stdout.splitlines() if "native.hidden_states.1" in x)
    _, absolute, relative, verdict = line.split()
    assert float(absolute) < 1e-4
    assert float(relative) < 1e-4
    assert verdict == "pass"
    assert result.stdout.splitlines()[-1] == "8 of 8 pass in 1 folder(s)"


def test_a_miss_is_exit_code_one(tmp_path):
    folder = shutil.copytree(GOLDEN / "internvit_layer", tmp_path / "folder")
    recorded = load_file(folder / "outputs.safetensors")
    recorded["native.hidden_states.1"][0, 0, 0] += 0.01
    save_file(recorded, folder / "outputs.safetensors")
    result = CliRunner().invoke(app, ["parity", str(folder)])

    assert result.exit_code == 1
    assert "MISS" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("not passed: folder")


def test_a_folder_of_no_group_is_named_and_the_others_go_on(tmp_path):
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "pictures.bin").write_bytes(b"")
    lines: list[str] = []

    assert not compare_folders([tmp_path / "strange", GOLDEN / "internvit_layer"], lines.append)
    assert any("no golden folder of a known group: it holds pictures.bin" in x for x in lines)
    assert lines[-1] == "8 of 8 pass in 2 folder(s); not passed: strange"
    with pytest.raises(DataError, match="known group"):
        check_folder(tmp_path / "strange")


def test_paths_that_do_not_exist_or_are_all_files_are_errors(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        compare_folders([tmp_path / "nowhere"], print)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="nothing to compare"):
        compare_folders([tmp_path / "file"], lambda line: None)


def test_not_a_number_never_passes():
    nan = np.array([np.nan])
    assert not dual.forward_checks("f", {"x": torch.tensor(nan)}, {"x": torch.zeros(1).double()})[
        0
    ].passed
