"""Inspections as a client sees them: JSON from the wire -> typed, frozen objects.

The server's schemas are strict; these keep fields they do not know, so that an older client reads
a newer server.
"""

import base64
import binascii
import io
from collections import Counter

from PIL import Image
from pydantic import BaseModel, ConfigDict

from looktwice_clients.errors import ReplyError

MOST_REGIONS_TOLD = 12
"""How many regions `Inspection.details` lists; the inspection has them all."""


class _FromWire(BaseModel):
    """Frozen, and tolerant of new fields: they stay in `model_extra` and in dumps."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Region(_FromWire):
    """One connected part of the anomaly map at 0.5 and above."""

    box: tuple[int | float, int | float, int | float, int | float]
    """x0, y0, x1, y1 in pixels of the original picture after EXIF rotation, half open."""
    score: float
    """The region's peak, in [0, 1]."""
    area: float
    """Fraction of the picture, in [0, 1]."""
    position: str
    """Where the peak is, in a 3x3 grid: top left, top, ..., center, ..., bottom right."""


class ReferenceVersion(_FromWire):
    """The normal images that an inspection compared with."""

    name: str | None = None
    """None: pictures of the conversation itself."""
    version: str | None = None
    false_alarm_rate: float | None = None
    """What was asked for."""
    promised_rate: float | None = None
    """What so few pictures can promise, in practice."""
    warnings: list[str] = []
    """What whoever made it was told; images[0] is the first of the reference's pictures."""


class AnomalyMap(_FromWire):
    """Per-pixel score of the whole picture, at the picture's aspect."""

    png: str
    """Base64 of an 8 bit grey PNG; value/255 is the score."""

    def image(self) -> Image.Image:
        """The map as a Pillow picture of mode "L"; 0..255 stands for 0..1.

        Raises:
            ReplyError: the server's field holds no PNG.
        """
        try:
            picture = Image.open(io.BytesIO(base64.b64decode(self.png)), formats=["PNG"])
            return picture.convert("L")
        except (binascii.Error, OSError, SyntaxError, ValueError) as error:
            raise ReplyError(f"the server's anomaly map is not a PNG: {error}") from None


class Inspection(_FromWire):
    """One image's result: score, verdict, regions and, where asked, the anomaly map."""

    id: str
    image: int = 0
    """Which of the request's pictures, counted from 0."""
    score: float
    """Anomaly score in [0, 1], higher is more anomalous, calibrated to `threshold`."""
    verdict: str
    """normal, anomalous, or undecided."""
    threshold: float = 0.5
    severity: str = ""
    """slightly, moderately or highly: the adverb that the language model was given."""
    regions: list[Region] = []
    reference: ReferenceVersion | None = None
    p_value: float | None = None
    """Share of good pictures that score at least as high; None where there are none to compare."""
    width: int
    height: int
    """Size of the original picture in pixels, after EXIF rotation."""
    map: AnomalyMap | None = None
    model: str = ""
    expert: str = ""
    """Hash of the expert's weights."""
    created: int = 0
    """Seconds since 1970, UTC."""

    @property
    def anomalous(self) -> bool:
        """Whether the verdict is "anomalous" (not: undecided)."""
        return self.verdict == "anomalous"

    def places(self) -> str:
        """The regions in words, highest score first, such as "2: top left, center"."""
        if not self.regions:
            return "none"
        by_score = sorted(self.regions, key=lambda region: -region.score)
        counted = Counter(region.position for region in by_score)
        words = [f"{place} ({n})" if n > 1 else place for place, n in counted.items()]
        return f"{len(by_score)}: {', '.join(words)}"

    def facts(self) -> str:
        """Everything but the map in one line, for a terminal or a log."""
        parts = [f"{self.verdict}, score {self.score:.3f} (threshold {self.threshold:.2f})"]
        if self.severity:
            parts.append(f"{self.severity} suspicious")
        parts.append(f"regions {self.places()}")
        if self.reference is not None:
            parts.append(f"reference {self.reference.name or 'of this conversation'}")
        if self.p_value is not None:
            parts.append(f"p {self.p_value:.3f}")
        return "; ".join(parts)

    def details(self) -> str:
        """`facts` and a line for each region, highest score first, for a language model."""
        by_score = sorted(self.regions, key=lambda region: -region.score)[:MOST_REGIONS_TOLD]
        regions = [
            f"region {list(region.box)} score {region.score:.3f} {region.position}"
            for region in by_score
        ]
        size = f"picture {self.width} x {self.height} pixels, boxes are x0, y0, x1, y1"
        return "\n".join([self.facts(), *([size, *regions] if regions else [])])


class InspectionList(_FromWire):
    """The envelope of `POST /v1/inspections`."""

    object: str = "list"
    model: str = ""
    data: list[Inspection]
