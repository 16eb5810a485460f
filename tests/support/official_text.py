"""Official tokenizer files as they are published, around the recorded tiny vocabularies."""

import json
import shutil
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "eval" / "golden" / "conversations"
RECORDED = json.loads((GOLDEN / "meta.json").read_text("utf-8"))["tokenizers"]
PIECES = {
    "llama_bos": ("tiny_spm.model", "tokenizer.model"),
    "llama_bos_phi3": ("tiny_spm.model", "tokenizer.model"),
    "internlm2": ("tiny_spm_nodummy.model", "tokenizer.model"),
    "qwen_like": ("tiny_bytelevel_bpe.json", "tokenizer.json"),
}
PHI3_SWALLOWS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
ROWS = 640
"""of an embedding matrix that has room for all of these tokenizers"""


def write_tokenizer(folder: Path, name: str) -> None:
    """The files of a recorded tokenizer. "llama_bos" is told as folders of 2023 tell it."""
    folder.mkdir(parents=True, exist_ok=True)
    spec, (source, target) = RECORDED[name], PIECES[name]
    shutil.copyfile(GOLDEN / source, folder / target)
    names = {f"{role}_token": spec[role] for role in ("bos", "eos", "pad") if spec[role]}
    config = {"tokenizer_class": spec["cls"]}
    if spec["add_bos"] is not None:
        config["add_bos_token"] = spec["add_bos"]
    if name == "llama_bos":
        added = {token: index for index, token in spec["added"] if index > 2}
        _write(folder / "added_tokens.json", added)
        _write(folder / "special_tokens_map.json", {k: {"content": v} for k, v in names.items()})
    else:
        config |= {
            "legacy": spec["legacy"],
            "added_tokens_decoder": {
                str(index): {"content": token, "lstrip": False, "rstrip": token in PHI3_SWALLOWS}
                for index, token in spec["added"]
            },
            **names,
        }
    _write(folder / "tokenizer_config.json", config)


def write_template(folder: Path, template: str | None) -> None:
    """Name a conversation template in the folder's config.json, which may have to be made."""
    path = folder / "config.json"
    facts = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    _write(path, facts | ({"template": template} if template else {}))


def _write(path: Path, facts: dict) -> None:
    path.write_text(json.dumps(facts, ensure_ascii=False), "utf-8")
