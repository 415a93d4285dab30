"""Every published set in a tiny folder of its own layout."""

import re

import numpy as np
import pytest
from PIL import Image

from looktwice_adapters.datasets import read_mask, read_sample
from looktwice_adapters.evaluate.judge import split
from looktwice_adapters.layouts import LAYOUTS, read_dataset


def draw(path, size=(24, 16), value=120):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def labels(samples):
    return sorted((s.path.name, s.split, s.anomalous, len(s.masks)) for s in samples)


@pytest.mark.parametrize("mask", ["000_mask.png", "000.png"])  # MVTec AD's name, MPDD's variant
def test_mvtec_ad_and_mpdd_have_train_test_and_masks(tmp_path, mask):
    for name in ("train/good/000.png", "test/good/000.png", "test/hole/000.png"):
        draw(tmp_path / "bracket" / name)
    draw(tmp_path / "bracket" / "ground_truth" / "hole" / mask)
    found = read_dataset(tmp_path)
    assert list(found) == ["bracket"]
    assert labels(found["bracket"]) == [
        ("000.png", "test", False, 0),
        ("000.png", "test", True, 1),
        ("000.png", "train", False, 0),
    ]


def test_btad_calls_them_ok_and_ko(tmp_path):
    for name in ("train/ok/0000.bmp", "test/ok/0001.bmp", "test/ko/0002.bmp"):
        draw(tmp_path / "01" / name)
        draw(tmp_path / "03" / name)
    draw(tmp_path / "01" / "ground_truth" / "ko" / "0002.png")
    draw(tmp_path / "03" / "ground_truth" / "ko" / "0002.bmp")
    found = read_dataset(tmp_path)
    assert list(found) == ["01", "03"]
    expected = [
        ("0000.bmp", "train", False, 0),
        ("0001.bmp", "test", False, 0),
        ("0002.bmp", "test", True, 1),
    ]
    assert labels(found["01"]) == labels(found["03"]) == expected


def test_visa_follows_its_split_file_and_any_mask_value_counts(tmp_path):
    draw(tmp_path / "candle/Data/Images/Normal/0001.JPG")
    draw(tmp_path / "candle/Data/Images/Normal/0002.JPG")
    draw(tmp_path / "candle/Data/Images/Anomaly/000.JPG")
    draw(tmp_path / "candle/Data/Masks/Anomaly/000.png", value=3)
    table = tmp_path / "split_csv" / "1cls.csv"
    table.parent.mkdir()
    table.write_text(
        "object,split,label,image,mask\n"
        "candle,train,normal,candle/Data/Images/Normal/0001.JPG,\n"
        "candle,test,normal,candle/Data/Images/Normal/0002.JPG,\n"
        "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png\n"
    )
    found = read_dataset(tmp_path)
    assert labels(found["candle"]) == [
        ("000.JPG", "test", True, 1),
        ("0001.JPG", "train", False, 0),
        ("0002.JPG", "test", False, 0),
    ]
    [anomalous] = [sample for sample in found["candle"] if sample.anomalous]
    assert read_mask(anomalous, (16, 24)).all()
    assert read_dataset(tmp_path / "candle") == found
    with pytest.raises(ValueError, match="no known data set layout"):
        read_dataset(table.parent)


def test_aitex_strips_become_tiles_labelled_by_their_masks(tmp_path, capsys):
    draw(tmp_path / "NODefect_images" / "2306881-210020u" / "0001_000_05.png", (64, 16))
    draw(tmp_path / "Defect_images" / "0044_019_04.png", (64, 16), 90)
    draw(tmp_path / "Defect_images" / "0100_025_08.png", (64, 16))  # comes without a mask
    for name, left in (("mask1", 20), ("mask2", 50)):
        mask = np.zeros((16, 64), np.uint8)
        mask[4:8, left : left + 6] = 255
        path = tmp_path / "Mask_images" / f"0044_019_04_{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(mask).save(path)
    [samples] = read_dataset(tmp_path).values()
    normal = [sample for sample in samples if not sample.anomalous]
    anomalous = [sample for sample in samples if sample.anomalous]
    assert [sample.box[0] for sample in normal] == [0, 16, 32, 48]
    assert [(sample.box[0], sample.kind) for sample in anomalous] == [(16, "019"), (48, "019")]
    assert read_sample(anomalous[0]).shape == (16, 16, 3)
    mask = read_mask(anomalous[0], (16, 16))
    assert mask[4:8, 4:10].all()
    assert mask.sum() == 24
    assert capsys.readouterr().err == (
        f"looktwice: {tmp_path}/Defect_images/0100_025_08.png has no mask and is left out\n"
    )
    with pytest.raises(ValueError, match="no test pictures left"):  # tiles of one strip are alike
        split(normal, 1, 0)
    (tmp_path / "Mask_images").rename(tmp_path / "masks")  # all would be gone without a word
    with pytest.raises(ValueError, match="no mask in Mask_images/ covers a strip"):
        read_dataset(tmp_path)


def test_elpv_leaves_out_the_cells_that_the_experts_doubted(tmp_path):
    lines = []
    for index, probability in enumerate(("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")):
        draw(tmp_path / "images" / f"cell000{index}.png")
        lines.append(f"images/cell000{index}.png  {probability}  mono")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    [samples] = read_dataset(tmp_path).values()
    assert labels(samples) == [
        ("cell0000.png", "test", False, 0),
        ("cell0003.png", "test", True, 0),
    ]


def test_head_ct_is_labelled_by_id(tmp_path):
    draw(tmp_path / "head_ct" / "head_ct" / "000.png")
    draw(tmp_path / "head_ct" / "head_ct" / "001.png")
    (tmp_path / "labels.csv").write_text("id, hemorrhage\n0,1\n1,0\n")
    [samples] = read_dataset(tmp_path).values()
    assert labels(samples) == [("000.png", "test", True, 0), ("001.png", "test", False, 0)]


@pytest.mark.parametrize("inner", ["", "brain_tumor_dataset"])
def test_brain_scans_lie_in_yes_and_no(tmp_path, inner):
    draw(tmp_path / inner / "yes" / "Y1.jpg")
    draw(tmp_path / inner / "no" / "1 no.jpeg")
    draw(tmp_path / "pred" / "pred0.jpg")  # Br35H's, without labels
    [samples] = read_dataset(tmp_path).values()
    assert labels(samples) == [("1 no.jpeg", "test", False, 0), ("Y1.jpg", "test", True, 0)]


def test_an_unknown_folder_is_told_every_known_layout_in_one_line(tmp_path):
    draw(tmp_path / "holiday" / "beach.png")
    with pytest.raises(ValueError, match="no known data set layout") as caught:
        read_dataset(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for name in (
        "MVTec AD",
        "VisA",
        "AITEX",
        "ELPV",
        "BTAD",
        "MPDD",
        "BrainMRI",
        "HeadCT",
        "Br35H",
    ):
        assert name in message
    assert len(LAYOUTS) == message.count("(")


@pytest.mark.parametrize(
    ("folder", "table", "content", "says"),
    [
        ("images", "labels.csv", "images/a.png high mono", "line 1: expected"),
        ("head_ct", "labels.csv", "id,hemorrhage\n7,1", "has the id '7'"),
        ("head_ct", "labels.csv", "number,label\n7,1", "has no column id"),
        ("split_csv", "split_csv/1cls.csv", "object,split,label,image,mask\ncup,test", "too few"),
    ],
)
def test_a_broken_label_file_is_named_with_what_was_expected(
    tmp_path, folder, table, content, says
):
    (tmp_path / folder).mkdir()
    (tmp_path / table).write_text(content)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        read_dataset(tmp_path)
    assert str(tmp_path / table) in str(caught.value)


def test_a_broken_picture_is_named(tmp_path):
    draw(tmp_path / "yes" / "a.png")
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "b.png").write_bytes(b"not a picture")
    [samples] = read_dataset(tmp_path).values()
    with pytest.raises(ValueError, match=r"b\.png: cannot be read as a picture"):
        read_sample(next(sample for sample in samples if not sample.anomalous))
