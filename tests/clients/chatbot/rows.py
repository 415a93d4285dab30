"""Rows of the history, as an operator's inspection makes them."""

from datetime import UTC, datetime, timedelta

from looktwice_clients.chatbot.tables import FeedbackRow, InspectionRow, new_id

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def inspection(owner: str = "a", minute: int = 0, **fields: object) -> InspectionRow:
    region = {"box": [0, 1, 2, 3], "score": 0.9, "area": 0.1, "position": "top left"}
    values = {
        "id": new_id(),
        "owner": owner,
        "operator": "Kim",
        "created": NOON + timedelta(minutes=minute),
        "file_name": "part.png",
        "product": "bottle",
        "product_version": "9f2c",
        "verdict": "anomalous",
        "score": 0.87,
        "threshold": 0.5,
        "severity": "highly",
        "p_value": 0.02,
        "regions": [region],
        "width": 40,
        "height": 30,
        "model": "looktwice-test",
        "expert": "0123abcd",
        "overlay": b"jpeg of " + owner.encode(),
    }
    return InspectionRow(**(values | fields))


def feedback(row: InspectionRow, minute: int = 0, **fields: object) -> FeedbackRow:
    values = {
        "id": new_id(),
        "inspection_id": row.id,
        "created": NOON + timedelta(minutes=minute),
        "operator": "Kim",
        "right": True,
        "word": "",
    }
    return FeedbackRow(**(values | fields))
