"""A running LookTwice server as a judge: samples on the wire -> its inspections."""

import base64
import io
import re
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from looktwice_adapters.datasets import Sample
from looktwice_adapters.detector import Judgement
from looktwice_adapters.evaluate.chat import connect, data_uri, first_model


class ServerJudge:
    """Asks `POST /v1/inspections`; references go to `PUT /v1/references/{name}` and leave again."""

    def __init__(self, url: str) -> None:
        """Connect to a server whose address ends in /v1; raises as `first_model`."""
        self.client = connect(url)
        self.name = first_model(self.client)
        self.reference: str | None = None
        self.expert: str | None = None  # hash of its weights, once it has judged

    def prepare(self, product: str, references: Sequence[Sample]) -> None:
        """Store the product's references under a name of their own; drop the last product's."""
        self._forget()
        if references:
            words = re.sub(r"[^A-Za-z0-9._-]+", "-", f"evaluate-{product}")[:55]
            name = f"{words}-{secrets.token_hex(4)}"  # nobody else's, whom it would overwrite
            body = {"images": [data_uri(sample) for sample in references]}
            self.client.put(f"/references/{name}", cast_to=object, body=body)
            self.reference = name

    @property
    def chat_options(self) -> dict[str, Any]:
        """What lets a chat request be inspected against the product's references, if there are."""
        if self.reference is None:
            return {}
        return {"extra_body": {"inspection": {"reference": self.reference}}}

    def judge(self, sample: Sample) -> Judgement:
        """Score, verdict and map of one sample, as the server answers them."""
        body: dict[str, Any] = {"images": [data_uri(sample)], "map": True}
        if self.reference:
            body["reference"] = self.reference
        answer: Any = self.client.post("/inspections", cast_to=object, body=body)
        [inspection] = answer["data"]
        self.expert = inspection.get("expert")
        png = base64.b64decode(inspection["map"]["png"])
        with Image.open(io.BytesIO(png)) as image:
            grey = np.asarray(image.convert("L"), np.float32)
        anomaly_map = np.asarray(grey / 255, np.float32)
        return Judgement(inspection["score"], inspection["verdict"], anomaly_map)

    def close(self) -> None:
        """Remove the references that were stored, and close the connection."""
        try:
            self._forget()
        finally:
            self.client.close()

    def _forget(self) -> None:
        if self.reference:
            self.client.delete(f"/references/{self.reference}", cast_to=object)
            self.reference = None
