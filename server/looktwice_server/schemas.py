"""The wire: what `inspection` takes and what an inspection says, strictly."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from looktwice_adapters.anomaly_map import Position
from looktwice_adapters.anomaly_prompt import Adverb
from looktwice_adapters.facts import Verdict

Unit = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """Refuses unknown keys and wrong types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class InspectionOptions(Strict):
    """The request key `inspection` of a chat completion."""

    reference: str | None = None
    map: bool = False
    grounding: bool = True


class InspectionsRequest(Strict):
    """The body of `POST /v1/inspections`."""

    images: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    reference: str | None = None
    map: bool = False
    model: str | None = None


class Region(Strict):
    """A connected part of the anomaly map."""

    box: tuple[int, int, int, int]  # x0, y0, x1, y1: pixels of the upright original, half open
    score: Unit
    area: Unit
    position: Position


class ReferenceVersion(Strict):
    """The reference an image was compared with."""

    name: str
    version: str


class AnomalyMap(Strict):
    """The map as a picture: 8 bit grey PNG in base64, value / 255 = calibrated score."""

    png: str


class Inspection(Strict):
    """One image's result."""

    id: str
    image: int
    score: Unit
    verdict: Verdict
    threshold: Unit
    severity: Adverb
    regions: list[Region]
    reference: ReferenceVersion | None
    p_value: Unit | None
    width: int
    height: int
    map: AnomalyMap | None
    model: str
    expert: str
    created: int


class InspectionList(Strict):
    """The answer of `POST /v1/inspections`."""

    object: Literal["list"] = "list"
    model: str
    data: list[Inspection]
