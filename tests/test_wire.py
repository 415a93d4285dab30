"""The wire, seen from both ends: the server's strict schemas and the client's tolerant ones."""

import json

import pytest
from pydantic import ValidationError

from looktwice_clients import references as client_references
from looktwice_clients import schemas as client
from looktwice_server import schemas as server

REGION = {"box": [12, 30, 96, 88], "score": 0.94, "area": 0.031, "position": "bottom left"}
NORMAL = {
    "id": "insp_00000000000000000000000000000001",
    "image": 0,
    "score": 0.12,
    "verdict": "normal",
    "threshold": 0.5,
    "severity": "slightly",
    "regions": [],
    "reference": None,
    "p_value": None,
    "width": 1024,
    "height": 768,
    "map": None,
    "model": "looktwice-nano",
    "expert": "9f2c4d1e9f2c4d1e",
    "created": 1764000000,
}
ANOMALOUS = NORMAL | {
    "score": 0.87,
    "verdict": "anomalous",
    "severity": "highly",
    "regions": [REGION, REGION | {"position": "center"}],
    "reference": {
        "name": "bottle",
        "version": "9f2c",
        "false_alarm_rate": 0.05,
        "promised_rate": 0.2,
        "warnings": ["images[3] looks unlike the others"],
    },
    "p_value": 0.02,
    "map": {"png": "aGVsbG8="},
}
UNDECIDED = NORMAL | {"verdict": "undecided", "image": 3}
EXAMPLES = {"normal": NORMAL, "anomalous": ANOMALOUS, "undecided": UNDECIDED}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_an_inspection_comes_through_both_schemas_unchanged(example):
    sent = server.Inspection.model_validate_json(json.dumps(example)).model_dump_json()
    received = client.Inspection.model_validate_json(sent)
    assert json.loads(received.model_dump_json()) == example


def test_a_list_of_inspections_comes_through_both_schemas_unchanged():
    example = {"object": "list", "model": "looktwice-nano", "data": [NORMAL, ANOMALOUS]}
    sent = server.InspectionList.model_validate_json(json.dumps(example)).model_dump_json()
    received = client.InspectionList.model_validate_json(sent)
    assert json.loads(received.model_dump_json()) == example


def test_a_field_of_a_newer_server_stays_with_an_older_client_and_is_refused_by_the_server():
    newer = json.dumps(NORMAL | {"line": 4})
    assert client.Inspection.model_validate_json(newer).model_extra == {"line": 4}
    with pytest.raises(ValidationError, match="line"):
        server.Inspection.model_validate_json(newer)


def test_every_field_of_the_server_is_one_that_the_client_names():
    assert server.Inspection.model_fields.keys() == client.Inspection.model_fields.keys()
    assert server.Region.model_fields.keys() == client.Region.model_fields.keys()


def test_a_reference_comes_through_both_schemas_unchanged():
    example = {
        "object": "reference",
        "name": "bottle",
        "version": "9f2c4d1e9f2c4d1e",
        "images": 8,
        "patches": 4096,
        "false_alarm_rate": 0.05,
        "promised_rate": 0.125,
        "guaranteed_rate": 0.25,
        "threshold": -1.5,
        "created": 1764000000,
        "expert": "9f2c4d1e9f2c4d1e",
        "calibration": "1e4d2c9f1e4d2c9f",
        "warnings": ["images[3] looks unlike the others"],
        "problem": None,
        "thumbnails": None,
    }
    sent = server.Reference.model_validate_json(json.dumps(example)).model_dump_json()
    received = client_references.Reference.model_validate_json(sent)
    assert json.loads(received.model_dump_json()) == example
    assert set(example) - set(client_references.Reference.model_fields) == {"object"}
