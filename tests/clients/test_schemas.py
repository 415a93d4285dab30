import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from looktwice_clients import AnomalyMap, Inspection, Reference, ReplyError
from looktwice_clients.schemas import InspectionList
from tests.clients.conftest import reference_of

WIRE = {
    "id": "insp_1",
    "image": 0,
    "score": 0.87,
    "verdict": "anomalous",
    "threshold": 0.5,
    "severity": "highly",
    "regions": [
        {"box": [10, 20, 30, 40], "score": 0.6, "area": 0.01, "position": "top left"},
        {"box": [100, 200, 300, 400], "score": 0.94, "area": 0.031, "position": "bottom left"},
        {"box": [110, 300, 200, 400], "score": 0.55, "area": 0.01, "position": "bottom left"},
    ],
    "reference": {
        "name": "bottle",
        "version": "9f2c",
        "false_alarm_rate": 0.05,
        "promised_rate": 0.2,
        "warnings": [],
    },
    "p_value": 0.02,
    "width": 1024,
    "height": 768,
    "map": None,
    "model": "looktwice-nano",
    "expert": "0123",
    "created": 1764000000,
}


def test_an_inspection_goes_through_unchanged() -> None:
    assert json.loads(Inspection.model_validate(WIRE).model_dump_json()) == WIRE


def test_new_fields_of_a_newer_server_are_kept_everywhere() -> None:
    new = {"camera": {"id": 3}}
    parts = {
        "regions": [WIRE["regions"][0] | new],
        "reference": WIRE["reference"] | new,
        "map": {"png": ""} | new,
    }
    newer = WIRE | new | parts | {"verdict": "repairable"}
    inspection = Inspection.model_validate(newer)
    assert inspection.model_extra == new
    assert inspection.verdict == "repairable"
    for kind, wire in (
        (Inspection, newer),
        (InspectionList, {"object": "list", "model": "", "data": [newer]} | new),
        (Reference, reference_of("bottle", 8, 0.05) | new),
    ):
        assert json.loads(kind.model_validate(wire).model_dump_json()) == wire


@pytest.mark.parametrize("field", ["id", "score", "verdict", "width", "height"])
def test_an_inspection_without_its_essentials_is_none(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Inspection.model_validate({name: WIRE[name] for name in WIRE if name != field})


def test_an_inspection_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Inspection.model_validate(WIRE).score = 0.1  # type: ignore[misc]


def test_the_facts_stand_in_one_line_with_the_highest_region_first() -> None:
    inspection = Inspection.model_validate(WIRE)
    assert inspection.places() == "3: bottom left (2), top left"
    assert inspection.facts() == (
        "anomalous, score 0.870 (threshold 0.50); highly suspicious; "
        "regions 3: bottom left (2), top left; reference bottle; p 0.020"
    )
    quiet = {**WIRE, "verdict": "normal", "regions": [], "reference": None, "p_value": None}
    assert Inspection.model_validate(quiet).places() == "none"
    assert not Inspection.model_validate(quiet).anomalous
    assert inspection.anomalous


def test_the_map_is_a_grey_picture_of_the_scores() -> None:
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    anomaly_map = AnomalyMap(png=base64.b64encode(buffer.getvalue()).decode())
    assert anomaly_map.image().tobytes() == Image.linear_gradient("L").tobytes()


@pytest.mark.parametrize("png", ["", "!!!", base64.b64encode(b"hello").decode()])
def test_a_map_that_is_no_png_says_so(png: str) -> None:
    with pytest.raises(ReplyError, match="anomaly map is not a PNG"):
        AnomalyMap(png=png).image()


def test_every_exception_stands_in_the_tree_at_the_top_of_errors() -> None:
    from looktwice_clients import errors

    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    defined = [error.__name__ for error in errors.LookTwiceError.__subclasses__()]
    assert drawn == [name for name in defined if name in drawn]
    source = Path(errors.__file__).read_text()
    assert set(drawn) == set(re.findall(r"class (\w+)\(LookTwiceError", source))
