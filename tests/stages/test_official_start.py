"""Official weights are imported, trained on by stage 3, and given back as they were published."""

import copy
import json
from pathlib import Path

from tests.support.official_text import ROWS, write_template, write_tokenizer
from tests.support.tiny_project import PARAMS, ROOT, make_project, run_stage, write_params
from vlfoundry.flows.recipes import with_profile
from vlfoundry.flows.start import import_model, new_profile, write_profile
from vlfoundry.infra.core.config import load_params


def publish(folder: Path) -> None:
    """A chat model as it is published: InternVL-Chat on InternLM2, with random weights."""
    from vlfoundry.infra.core.config import build as build_config
    from vlfoundry.models.internvl.config import InternVLConfig
    from vlfoundry.models.internvl.convert import export_model
    from vlfoundry.models.internvl.model import build
    from vlfoundry.models.internvl.predict import save_model
    from vlfoundry.models.tokenizer import train

    model = copy.deepcopy(PARAMS["model"])
    model["text"]["vocab_size"] = ROWS
    config = build_config(InternVLConfig, model)
    made = folder.with_name("made")
    save_model(made, "chat_simple", config, build("chat_simple", config, seed=5), train([], 300))
    export_model(made, folder, "internvl_chat")
    write_tokenizer(folder, "internlm2")
    write_template(folder, "internlm2-chat")


def test_official_weights_train_on_and_go_back(warm, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from vlfoundry.models.internvl.convert import export_model

    publish(tmp_path / "published")
    params = copy.deepcopy(PARAMS)
    params["sft"]["train"]["simple"] |= {"steps": 3, "save_every_steps": 3}
    defaults = load_params(ROOT / "params.yaml")
    params["sft"]["start"], params["evaluate"] = defaults["sft"]["start"], defaults["evaluate"]
    root = make_project(tmp_path / "project", params)
    target = root / "data/start/chat"
    profile = new_profile(root, "on", target)
    import_model(root, str(tmp_path / "published"), target)
    assert write_profile(root, profile, target) == "vlfoundry run --profile on --stage sft@simple"
    write_params(root, with_profile(params, root, "on"))

    output = run_stage(root, "sft", "variant=simple")
    assert "from data/start/chat (chat_simple): vision" in output
    assert "new: nothing" in output
    export_model(root / "artifacts/sft/simple/model", tmp_path / "back", "internvl_chat")
    names = {path.name for path in (tmp_path / "published").iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == names
    for name in names - {"model.safetensors", "config.json"}:
        same = (tmp_path / "published" / name).read_bytes()
        assert (tmp_path / "back" / name).read_bytes() == same, name
    assert json.loads((tmp_path / "back/config.json").read_text())["template"] == "internlm2-chat"
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("published", "back"))
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert any((after[n] != before[n]).any() for n in before)
