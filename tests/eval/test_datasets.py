"""Folders in the two formats, with all that can be odd or wrong in them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.fake_models import drawing, encoded, write_concept_set, write_pair_set
from vlfoundry.eval.datasets.folders import ConceptSet, PairSet, read_concept_set, read_folder
from vlfoundry.eval.datasets.pictures import decode_squares
from vlfoundry.eval.suites.zero_shot import as_concept_set
from vlfoundry.infra.core.errors import DataError


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
        ({"image": {"bytes": None, "path": "gone.png"}}, r"row 1: .*'gone.png': .*no such file"),
        ({"image": {"bytes": None, "path": "../../x.png"}}, r"row 1: .*without `\.\.`"),
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
    with pytest.raises(DataError, match="is not a directory; expected a concept set"):
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


CASES = Path(__file__).parents[1] / "cases"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("c_keywords_int", r"concepts.parquet, row 0: keywords.text is 1, expected a text"),
        ("c_keywords_textint", r"concepts.parquet, row 0: keywords.text is 4, expected a list"),
        ("path_long", r"a.parquet, row \d: image has no bytes, and its path .*(too long|at most)"),
        ("type_caption_text_int", r"a.parquet, row 0: captions.text is 5, expected a text"),
        ("type_caption_text_list", r"row 0: captions.text is \['a'\], expected a text"),
        ("type_image_bytes_list", r"row 0: image.bytes is \[.*, expected the bytes of an encoded"),
        ("type_image_bytes_str", r"row 0: image.bytes is '.*, expected the bytes of an encoded"),
        ("utf8_bad_id", r"a.parquet, row \d: id holds bytes that are not UTF-8"),
    ],
)
def test_columns_of_the_wrong_type_name_the_row(case, message):
    with pytest.raises(DataError, match=message):
        read_folder(CASES / "evaluate_wrong_types" / case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": [{"lang": 7, "text": "x"}]}, r"row 1: captions.lang is 7, expected a text"),
        ({"captions": "a text"}, r"row 1: captions is 'a text', expected a list of"),
        ({"captions": [["en", "x"]]}, r"row 1: captions is .*expected a list of"),
        ({"id": 1.5}, r"row 1: id is 1.5, expected a text that is not empty"),
        ({"id": True}, r"row 1: id is True, expected a text"),
        ({"label": ["a"]}, r"row 1: label is .*expected a text or a number"),
        ({"label": {"a": 1}}, r"row 1: label is .*expected a text or a number"),
        ({"image": b""}, r"row 1: image is bytes, expected"),
        ({"image": "a.png"}, r"row 1: image is str, expected"),
        ({"image": {"bytes": None, "path": 7}}, r"row 1: image has no bytes.* path 7: .*a path"),
        ({"image": {"bytes": None, "path": "a\0b"}}, r"row 1: .*text without NUL"),
        ({"image": {"bytes": None, "path": "http://x/a"}}, r"row 1: .*may be a URL"),
        ({"image": {"bytes": None, "path": "pipe"}}, r"row 1: .*is a named pipe, expected a plain"),
    ],
)
def test_a_value_of_the_wrong_type_names_the_row(tmp_path, change, message):
    """One row group a file, so that every row may have a type of its own."""
    import os

    os.mkfifo(tmp_path / "pipe")
    write_pair_set(tmp_path, [{**pair(1), **change}], "odd")
    write_pair_set(tmp_path, [pair(0)], "good")
    with pytest.raises(DataError, match=message.replace("row 1", "odd.parquet, row 0")):
        read_folder(tmp_path)


def labelled(labels) -> list[dict]:
    return [pair(i, label=label) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["red ", " red", "blue", "yellow"], {"red", "blue", "yellow"}),
        (["Red", "red", "red", "blue"], {"red", "blue"}),
        (["A", "a", "b", " a"], {"A", "a", "b"}),  # letters are classes of their own
        (["caf\u00e9", "cafe\u0301", "bar"], {"caf\u00e9", "bar"}),
        (["\uff21\uff22", "AB", "ab", "x"], {"AB", "x"}),
        (["new  york", "New\tYork", "rome"], {"New York", "rome"}),
        ([1, 2, 2, 3], {"1", "2", "3"}),
        ([1.0, 2.0, 2.5], {"1", "2", "2.5"}),
        ([True, False], {"True", "False"}),
        (["stra\u00dfe", "STRASSE", "weg"], {"STRASSE", "weg"}),
    ],
)
def test_labels_of_one_class_are_one(tmp_path, labels, classes):
    data = read_folder(write_pair_set(tmp_path, labelled(labels)))
    assert {picture.label for picture in data.pictures} == classes
    tidy = all(str(label) in classes for label in labels) or isinstance(labels[0], float)
    assert bool(data.told) != tidy
    named = as_concept_set(data)
    assert set(named.drawn) == classes


@pytest.mark.parametrize(
    "nothing", [None, "", "  ", "nan", "NaN", "None", "null", "<NA>", float("nan")]
)
def test_a_row_without_a_label_is_refused_by_zero_shot_alone(tmp_path, nothing):
    words = [3.0, nothing, 4.0] if isinstance(nothing, float) else ["a", nothing, "b"]
    data = read_folder(write_pair_set(tmp_path, labelled(words)))
    assert data.pictures[1].label == ""
    with pytest.raises(DataError, match=r"pairs.parquet, row 1: label is empty .* in 1 of 3 rows"):
        as_concept_set(data)


def test_a_file_that_is_none_is_named(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet is a named pipe, expected a plain file"):
        read_folder(tmp_path)


def test_what_was_done_to_labels_is_told(tmp_path):
    data = read_folder(CASES / "labels-with-blanks" / "data")
    assert data.told == ("' red', 'red ' are read as 'red'",)
    assert sorted({p.label for p in data.pictures}) == ["blue", "red", "yellow"]


def test_a_folder_may_be_a_url(tmp_path):
    import fsspec

    (tmp_path / "art").mkdir()
    (tmp_path / "art" / "0.png").write_bytes(encoded(drawing(0)))
    rows = [pair(0, image={"bytes": None, "path": "art/0.png"}), pair(1)]
    write_pair_set(tmp_path, rows)
    fsspec.filesystem("memory").put(f"{tmp_path}/", "/datasets/own/", recursive=True)
    data = read_folder("memory://datasets/own/")
    assert [p.data for p in data.pictures] == [p.data for p in read_folder(tmp_path).pictures]
    assert data.facts()["folder"] == "own"
    with pytest.raises(DataError, match="memory://datasets/none"):
        read_folder("memory://datasets/none")


def test_the_fingerprint_is_of_pictures_and_of_all_that_is_said_of_them(tmp_path):
    """A score is of both: two sets that differ in a caption alone are two sets."""

    def fingerprint(*rows):
        write_pair_set(tmp_path, rows)
        return read_folder(tmp_path).facts()["fingerprint"]

    rows = [pair(0, label="red"), pair(1, label="red")]
    prints = [
        fingerprint(*rows),
        fingerprint(rows[0] | {"captions": [{"lang": "en", "text": "another"}]}, rows[1]),
        fingerprint(rows[0] | {"captions": [{"lang": "it", "text": "picture 0"}]}, rows[1]),
        fingerprint(rows[0], rows[1] | {"label": "blue"}),
        fingerprint(rows[0], rows[1] | {"image": rows[0]["image"]}),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(*rows) == prints[0]


@pytest.mark.parametrize("lang", ["../../../../victim", "a/b", "x" * 300, "en us", ".hidden", "1"])
def test_a_language_that_is_no_tag_is_refused(tmp_path, lang):
    """It names files: one of another folder would be overwritten."""
    write_pair_set(tmp_path, [pair(0), pair(1, captions=[{"lang": lang, "text": "a cat"}])])
    with pytest.raises(DataError, match=r"row 1: captions.lang is .*expected a language tag"):
        read_folder(tmp_path)


@pytest.mark.parametrize("lang", ["en", "EN", "zh-Hans", "pt_BR", "x-klingon"])
def test_language_tags_are_taken_as_they_are(tmp_path, lang):
    write_pair_set(tmp_path, [pair(0, captions=[{"lang": lang, "text": "a cat"}])])
    assert read_folder(tmp_path).languages == (lang,)
