"""Folders in the two formats, with all that can be odd or wrong in them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.datasets import ConceptSet, PairSet, read_concept_set, read_folder
from eval.pictures import decode_squares
from infra.errors import DataError
from tests.eval_fakes import drawing, encoded, write_concept_set, write_pair_set


def pair(index, **changes):
    row = {
        "id": f"p{index}",
        "image": {"bytes": encoded(drawing(index)), "path": None},
        "captions": [{"lang": "en", "text": f"picture {index}"}],
    }
    return row | changes


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (300, 20), (64, 64), (33, 500)])
def test_a_picture_of_any_mode_and_size_becomes_a_square(mode, size):
    kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    picture = drawing(3).convert("L" if mode == "I;16" else mode).resize(size)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    (square,) = decode_squares([encoded(picture, kind)], 48)
    assert square.shape == (48, 48, 3)
    assert square.dtype == np.uint8


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "GIF"])
def test_formats_agree(kind):
    picture = Image.new("RGB", (50, 50), (200, 30, 60))
    (square,) = decode_squares([encoded(picture, kind)], 16)
    assert np.abs(square.astype(int) - (200, 30, 60)).max() <= 8


def test_the_whole_picture_is_squeezed_and_transparency_is_white():
    wide = Image.new("RGBA", (42, 20), (0, 0, 0, 255))
    (square,) = decode_squares([encoded(wide)], 20)
    assert (square == 0).all()
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (decode_squares([encoded(clear)], 8) == 255).all()


def test_16_bit_grey_is_scaled_not_clipped():
    grey = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    (square,) = decode_squares([encoded(grey)], 8)
    assert abs(int(square[0, 0, 0]) - 128) <= 1


def test_concept_set_with_several_files_and_a_choice_of_sources(tmp_path):
    folder = write_concept_set(tmp_path, count=5, sources=("a", "b"))
    both = read_folder(folder)
    assert isinstance(both, ConceptSet)
    assert both.sources == ("a", "b")
    assert len(both) == 10
    one = read_concept_set(folder, sources=["b"])
    assert {picture.source for picture in one.pictures} == {"b"}
    assert one.classes("zh") == ("c00", "c01", "c02", "c03", "c04")
    with pytest.raises(DataError, match=r"no source \['c'\]; it has \['a', 'b'\]"):
        read_folder(folder, sources=["c"])


def test_classes_need_a_drawing_and_a_name(tmp_path):
    write_concept_set(tmp_path, count=4)
    table = pq.read_table(tmp_path / "concepts.parquet").to_pylist()
    table[1]["name"] = [{"lang": "en", "text": "only English"}]
    table[2]["name"] = [{"lang": "en", "text": " "}, {"lang": None, "text": "x"}]
    table.append({**table[0], "concept": "drawn nowhere"})
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "concepts.parquet")
    data = read_concept_set(tmp_path)
    assert data.classes("en") == ("c00", "c01", "c03")
    assert data.classes("zh") == ("c00", "c03")
    assert data.classes("xx") == ()
    assert data.languages == ("en", "zh")


def test_pictures_beside_the_file(tmp_path):
    (tmp_path / "art").mkdir()
    (tmp_path / "art" / "0.png").write_bytes(encoded(drawing(0)))
    rows = [pair(0, image={"bytes": None, "path": "art/0.png"})]
    data = read_folder(write_pair_set(tmp_path, rows))
    assert isinstance(data, PairSet)
    assert data.pictures[0].data == encoded(drawing(0))


def test_same_pictures_are_found_whatever_their_file_format(tmp_path):
    png, webp = encoded(drawing(0)), None
    image = drawing(0)
    import io

    out = io.BytesIO()
    image.save(out, "WEBP", lossless=True, exact=False)
    webp = out.getvalue()
    rows = [
        pair(0, image={"bytes": png, "path": None}),
        pair(1),
        pair(2, image={"bytes": webp, "path": None}),
    ]
    assert read_folder(write_pair_set(tmp_path, rows)).look.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"bytes": None, "path": None}}, r"row 1: image has neither bytes nor a path"),
        ({"image": {"bytes": None, "path": "gone.png"}}, r"row 1: .*'gone.png' is no file"),
        ({"image": {"bytes": None, "path": "../../x.png"}}, r"row 1: .*leads out of the folder"),
        ({"id": ""}, r"row 1: id is ''"),
        ({"id": "p0"}, r"id 'p0' stands in pairs.parquet and again"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    write_pair_set(tmp_path, [pair(0), pair(1, **change)])
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path)


def test_an_unreadable_picture_is_named(tmp_path):
    rows = [pair(0), pair(1, image={"bytes": b"no picture", "path": None})]
    data = read_folder(write_pair_set(tmp_path, rows))
    with pytest.raises(DataError, match=r"p1: 10 bytes cannot be read as a picture"):
        data.squares(8)


def test_folders_that_are_in_neither_format(tmp_path):
    with pytest.raises(DataError, match="is no folder; expected a concept set"):
        read_folder(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no Parquet file"):
        read_folder(tmp_path)
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"lacks the columns \['image', 'captions'\], has"):
        read_folder(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_folder(tmp_path)


def test_captions_in_another_shape_are_refused(tmp_path):
    write_pair_set(tmp_path, [pair(0, captions=["just a text"])])
    with pytest.raises(DataError, match=r"captions is .*expected a list of \{lang, text\}"):
        read_folder(tmp_path)


def test_drawings_without_a_known_concept(tmp_path):
    write_concept_set(tmp_path, count=2)
    table = pq.read_table(tmp_path / "concepts.parquet").to_pylist()
    for row in table:
        row["concept"] += "?"
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "concepts.parquet")
    with pytest.raises(DataError, match="none of 2 drawings has its concept"):
        read_folder(tmp_path)
