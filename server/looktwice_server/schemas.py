"""The wire: what `inspection` takes and what an inspection says, strictly."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from looktwice_adapters.anomaly_map import Position
from looktwice_adapters.anomaly_prompt import Adverb
from looktwice_adapters.facts import Verdict

Unit = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """Refuses unknown keys and wrong types."""

    # The docstrings of the fields become descriptions in the OpenAPI, and docs/api.md.
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class InspectionOptions(Strict):
    """The request key `inspection` of a chat completion."""

    reference: str | None = None
    """Name of the reference to compare with."""
    reference_images: list[Annotated[int, Field(ge=0)]] = []
    """Numbers of this conversation's pictures, from 0, that show the product as it should be."""
    map: bool = False
    """Whether each inspection carries its anomaly map."""
    grounding: bool = True
    """Whether the facts stand in the prompt; false gives Anomaly-OV's layout, with the adverb of
    the calibrated score."""


class InspectionsRequest(Strict):
    """The body of `POST /v1/inspections`."""

    images: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Pictures: http(s) URLs or base64 data URIs."""
    reference: str | None = None
    """Name of the reference to compare with."""
    map: bool = False
    """Whether each inspection carries its anomaly map."""
    model: str | None = None
    """The served model's name, to be sure of it."""


class ReferenceRequest(Strict):
    """The body of `PUT /v1/references/{name}`."""

    images: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Good pictures: http(s) URLs or base64 data URIs."""
    false_alarm_rate: Annotated[float, Field(ge=0.001, le=0.5)] = 0.05
    """Share of good parts that may be called anomalous."""
    calibration_images: list[Annotated[str, Field(min_length=1)]] = []
    """More good ones, which only set the threshold."""
    defect_images: list[Annotated[str, Field(min_length=1)]] = []
    """Known defects, which may only lower it."""
    augment: bool = False
    """Whether turned and mirrored copies belong to the reference too."""


class Reference(Strict):
    """A product's normal images, and what they promise."""

    object: Literal["reference"] = "reference"
    name: str
    version: str
    """Hash of the content."""
    images: int
    patches: int
    """Size of the memory bank."""
    false_alarm_rate: Unit
    """What was asked for."""
    promised_rate: Unit
    """What so few pictures can promise, in practice."""
    guaranteed_rate: Unit
    """What is guaranteed whatever the distribution: `promised_rate` where calibration pictures
    alone were counted, else twice that."""
    threshold: float
    """Of the evidence: the mean of a picture's strongest patches."""
    created: int
    expert: str
    """Hash of the weights that judge: the expert's, or AnomalyGPT's decoder's."""
    calibration: str
    """Hash of the expert's sizes and calibration, which stand beside its weights."""
    warnings: list[str]
    problem: str | None = None
    """Why it cannot be used; what is not known then is 0 or empty."""
    thumbnails: list[str] | None = None
    """Base64 JPEGs, where they were asked for."""


class ReferenceList(Strict):
    """The answer of `GET /v1/references`."""

    object: Literal["list"] = "list"
    model: str
    data: list[Reference]


class ReferenceDeleted(Strict):
    """The answer of `DELETE /v1/references/{name}`."""

    object: Literal["reference.deleted"] = "reference.deleted"
    name: str
    deleted: bool = True


class Region(Strict):
    """A connected part of the anomaly map."""

    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 in pixels of the picture after EXIF rotation, half open."""
    score: Unit
    """The region's peak."""
    area: Unit
    """Fraction of the picture."""
    position: Position
    """Where the peak is, in a 3x3 grid."""


class ReferenceVersion(Strict):
    """The reference an image was compared with."""

    name: str | None
    """null: pictures of the conversation itself."""
    version: str
    false_alarm_rate: Unit
    """What was asked for; 0.05 where a conversation's own pictures are compared with."""
    promised_rate: Unit
    """What so few pictures can promise, in practice."""
    warnings: list[str]
    """What whoever made it was told; images[0] is the first of the reference's pictures."""


class AnomalyMap(Strict):
    """The score of every place in a picture, at the picture's aspect."""

    png: str
    """Base64 of an 8 bit grey PNG; value / 255 is the calibrated score."""


class Inspection(Strict):
    """One image's result."""

    id: str
    """Another for every answer."""
    image: int
    """Which of the request's pictures, counted from 0."""
    score: Unit
    """The anomaly score, calibrated: higher is more anomalous."""
    verdict: Verdict
    threshold: Unit
    """The score from which on the verdict is anomalous; against a reference, above which."""
    severity: Adverb
    """The adverb that the language model was given: slightly below 0.3, highly from 0.7."""
    regions: list[Region]
    """Connected parts of the map at 0.5 and above: at least one when the verdict is anomalous, none
    when it is normal, either when it is undecided."""
    reference: ReferenceVersion | None
    """What the picture was compared with."""
    p_value: Unit | None
    """Share of good pictures that score at least as high; null without a reference, and with one of
    a single picture, which nothing is compared with."""
    width: int
    """Pixels after EXIF rotation."""
    height: int
    """Pixels after EXIF rotation."""
    map: AnomalyMap | None
    """Only where it was asked for."""
    model: str
    expert: str
    """Hash of the weights that judged: the anomaly expert's, or AnomalyGPT's decoder's."""
    created: int
    """Seconds since 1970, UTC."""


class InspectionList(Strict):
    """The answer of `POST /v1/inspections`."""

    object: Literal["list"] = "list"
    model: str
    data: list[Inspection]
