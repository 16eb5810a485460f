"""Makes `set/` beside this file. Needs megatron-energon 7.4.1 (not in our environments):

    python tests/infra/golden/energon/make.py
    energon prepare tests/infra/golden/energon/set --non-interactive \
        --split-parts 'train:part_{000..001}.tar' --split-parts 'val:part_002.tar' \
        --sample-type CaptioningSample --field-map '{"image":"jpg","caption":"json[caption]"}'
"""

import io
import json
import tarfile
from pathlib import Path

FOLDER = Path(__file__).parent / "set"
SHARDS, SAMPLES_PER_SHARD = 3, 3


def parts(number: int) -> dict[str, bytes]:
    """Parts of one sample. (The picture is none: nobody decodes it.)"""
    return {
        "jpg": bytes([number]) * (300 + number),
        "json": json.dumps({"caption": f"picture {number}"}).encode(),
        "txt": b"a part that we do not read",
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(FOLDER / f"part_{shard:03d}.tar", "w") as archive:
            for number in range(shard * SAMPLES_PER_SHARD, (shard + 1) * SAMPLES_PER_SHARD):
                for name, data in parts(number).items():
                    member = tarfile.TarInfo(f"{number:04d}.{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
