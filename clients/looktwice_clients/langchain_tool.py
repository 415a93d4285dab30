"""The inspection as a LangChain tool: a picture's name -> facts for a model, an object for code.

The text that the model reads is made of the inspection's own fields; nothing that stands in the
picture or in its file name gets into it.
"""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from langchain_core.tools import BaseTool, ToolException
from pydantic import BaseModel, Field, SecretStr

from looktwice_clients.address import TIMEOUT
from looktwice_clients.allowed_pictures import AllowedPictures
from looktwice_clients.errors import LookTwiceError, one_line
from looktwice_clients.images import ImageSource
from looktwice_clients.inspector import AsyncInspector, Inspector
from looktwice_clients.overlay import OverlayStyle, overlay_jpeg
from looktwice_clients.schemas import Inspection

DESCRIPTION = (
    "Inspect a picture of a part for defects. Returns the verdict (normal, anomalous or "
    "undecided), the anomaly score from 0 to 1 with its threshold, and where the suspicious "
    "regions are. With `reference` the part is compared with good pictures of that product."
)

Content = str | list[dict[str, Any]]


class InspectionInput(BaseModel):
    """What the model fills in."""

    image: Annotated[str, Field(min_length=1)] = Field(
        description="The picture: a file in an allowed folder, an http(s) address, a data URI, or "
        "the id of a picture that you were told of."
    )
    reference: str | None = Field(
        None, description="The product to compare with, by its reference's name, if there is one."
    )
    overlay: bool = Field(
        False, description="Whether to see the picture with its suspicious regions marked."
    )


class InspectionTool(BaseTool):
    """Inspects a picture on a LookTwice server; the artifact is the `Inspection`.

    What the model may name is closed until the program opens it: `roots` opens folders, `hosts`
    opens addresses, `media` hands over pictures under ids.
    """

    name: str = "inspect_image"
    description: str = DESCRIPTION
    args_schema: type[BaseModel] = InspectionInput
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    handle_tool_error: Any = True
    """A refused picture or a server that is down becomes a sentence for the model."""
    handle_validation_error: Any = True

    url: str | None = None
    """The server's address; else $LOOKTWICE_URL, else http://127.0.0.1:8000/v1."""
    api_key: SecretStr | None = None
    """Else $LOOKTWICE_API_KEY, else $OPENAI_API_KEY, else none."""
    timeout: float = TIMEOUT
    """Seconds that each of at most three tries of an inspection may take."""
    roots: Sequence[Path] = ()
    """Folders whose pictures, and those below them, the model may name."""
    hosts: Sequence[str] = ()
    """Hosts from which the model may let the server fetch; "*" opens all."""
    media: Mapping[str, Any] = Field(default={}, exclude=True, repr=False)
    """Pictures in memory (any `ImageSource`), by the id under which the model knows them."""

    def _run(
        self, image: str, reference: str | None = None, overlay: bool = False, **_: Any
    ) -> tuple[Content, Inspection]:
        from openai import OpenAIError  # slow to import

        try:
            source = self._allowed.find(image)
            with Inspector(**self._connection) as inspector:
                inspection = inspector.inspect(source, reference, overlay)
            return self._content(source, inspection), inspection
        except (LookTwiceError, OpenAIError) as error:
            raise ToolException(one_line(error)) from error

    async def _arun(
        self, image: str, reference: str | None = None, overlay: bool = False, **_: Any
    ) -> tuple[Content, Inspection]:
        from openai import OpenAIError  # slow to import

        try:
            source = await asyncio.to_thread(self._allowed.find, image)
            async with AsyncInspector(**self._connection) as inspector:
                inspection = await inspector.inspect(source, reference, overlay)
            return await asyncio.to_thread(self._content, source, inspection), inspection
        except (LookTwiceError, OpenAIError) as error:
            raise ToolException(one_line(error)) from error

    @property
    def _allowed(self) -> AllowedPictures:
        return AllowedPictures(self.roots, self.hosts, self.media)

    @property
    def _connection(self) -> dict[str, Any]:
        key = self.api_key.get_secret_value() if self.api_key else None
        return {"url": self.url, "api_key": key, "timeout": self.timeout}

    def _content(self, source: ImageSource, inspection: Inspection) -> Content:
        """The facts; with the overlay as a second block where there is a map to draw."""
        text = inspection.details()
        if inspection.map is None:
            return text
        picture = overlay_jpeg(source, inspection, OverlayStyle(longest=1024))
        block = {
            "type": "image",
            "base64": base64.b64encode(picture).decode("ascii"),
            "mime_type": "image/jpeg",
        }
        return [{"type": "text", "text": text}, block]
