"""What a language model may name, and what it may not."""

import os
from pathlib import Path

import pytest
from PIL import Image

from looktwice_clients import ImageError
from looktwice_clients.allowed_pictures import AllowedPictures
from looktwice_clients.images import to_wire

REFUSED = "no such picture in the allowed folders"


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """An open folder, a closed one beside it whose name starts the same, links between them."""
    for folder in ("line/deep", "line-secret"):
        (tmp_path / folder).mkdir(parents=True)
    for level, name in enumerate(("line/a.png", "line/deep/b.png", "line-secret/c.png")):
        Image.new("RGB", (40, 30), (level, 0, 0)).save(tmp_path / name)
    (tmp_path / "line/notes.png").write_text("the password is swordfish")
    (tmp_path / "line/out.png").symlink_to(tmp_path / "line-secret/c.png")
    (tmp_path / "line/out").symlink_to(tmp_path / "line-secret")
    (tmp_path / "line/in.png").symlink_to(tmp_path / "line/deep/b.png")
    (tmp_path / "line/loop.png").symlink_to(tmp_path / "line/loop.png")
    os.mkfifo(tmp_path / "line/pipe.png")
    return tmp_path / "line"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.png", "a.png"),
        ("deep/b.png", "deep/b.png"),
        ("deep/../a.png", "a.png"),
        ("in.png", "deep/b.png"),
    ],
)
def test_a_picture_below_an_open_folder_is_found(line: Path, name: str, found: str) -> None:
    allowed = AllowedPictures([line])
    assert allowed.find(name) == to_wire(line / found)
    assert allowed.find(str(line / name)) == to_wire(line / found)


@pytest.mark.parametrize(
    "name",
    [
        "../line-secret/c.png",
        "deep/../../line-secret/c.png",
        "out.png",
        "out/c.png",
        "loop.png",
        "pipe.png",
        "/etc/passwd",
        "~/.ssh/id_rsa",
        "file:///etc/passwd",
        "missing.png",
        "",
        ".",
        "a\0.png",
        "x" * 5000,
    ],
)
def test_what_is_outside_is_refused_as_if_it_did_not_exist(line: Path, name: str) -> None:
    with pytest.raises(ImageError, match=REFUSED):
        AllowedPictures([line]).find(name)


def test_an_absolute_path_outside_is_refused_like_a_missing_one(line: Path) -> None:
    secret = line.parent / "line-secret"
    messages = set()
    for path in (secret / "c.png", secret / "d.png"):
        with pytest.raises(ImageError) as refusal:
            AllowedPictures([line]).find(str(path))
        messages.add(str(refusal.value).replace("d.png", "c.png"))
    assert len(messages) == 1


def test_a_file_that_is_no_picture_is_neither_shown_nor_located(line: Path) -> None:
    with pytest.raises(ImageError) as refusal:
        AllowedPictures([line]).find("notes.png")
    assert str(refusal.value) == "notes.png: not a picture"


def test_what_is_wrong_with_a_picture_in_hand_is_told_by_its_id(line: Path) -> None:
    for handed, wrong in (
        (line / "notes.png", "not a picture"),
        (line / "no.png", "No such file or directory"),
    ):
        with pytest.raises(ImageError) as refusal:
            AllowedPictures(media={"media:1": handed}).find("media:1")
        assert str(refusal.value) == f"media:1: {wrong}"


def test_nothing_is_open_by_default_but_data_uris(line: Path) -> None:
    assert AllowedPictures().find("data:image/png;base64,AA==").startswith("data:")
    for name in (str(line / "a.png"), "http://camera/now.png"):
        with pytest.raises(ImageError):
            AllowedPictures().find(name)


def test_a_media_id_is_the_picture_that_the_program_handed_over() -> None:
    picture = Image.new("RGB", (40, 30))
    assert AllowedPictures(media={"media:1": picture}).find("media:1") == to_wire(picture)
    with pytest.raises(ImageError, match="media:2"):
        AllowedPictures(media={"media:1": picture}).find("media:2")


@pytest.mark.parametrize(
    "address",
    [
        "http://elsewhere/now.png",
        "http://camera.elsewhere/now.png",
        "http://camera@elsewhere/now.png",
        "http://elsewhere\\@camera/now.png",
        "http://camera\n.elsewhere/now.png",
        "http://[camera/now.png",
        "http:///now.png",
    ],
)
def test_an_address_at_another_host_is_refused(address: str) -> None:
    with pytest.raises(ImageError, match="not at an allowed host"):
        AllowedPictures(hosts=["camera"]).find(address)


def test_an_address_at_an_allowed_host_is_handed_to_the_server_as_it_is() -> None:
    for allowed in (AllowedPictures(hosts=["camera"]), AllowedPictures(hosts=["*"])):
        assert allowed.find("http://camera:8080/now.png?line=3") == (
            "http://camera:8080/now.png?line=3"
        )
