"""What a user of a LookTwice server imports."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looktwice_clients.conversation import Answer as Answer
    from looktwice_clients.errors import ImageError as ImageError
    from looktwice_clients.errors import LookTwiceError as LookTwiceError
    from looktwice_clients.errors import ReplyError as ReplyError
    from looktwice_clients.inspector import AsyncInspector as AsyncInspector
    from looktwice_clients.inspector import Inspector as Inspector
    from looktwice_clients.overlay import draw_overlay as draw_overlay
    from looktwice_clients.references import Reference as Reference
    from looktwice_clients.report import InspectionReport as InspectionReport
    from looktwice_clients.schemas import AnomalyMap as AnomalyMap
    from looktwice_clients.schemas import Inspection as Inspection
    from looktwice_clients.schemas import ReferenceVersion as ReferenceVersion
    from looktwice_clients.schemas import Region as Region

_HOME = {
    "Answer": "conversation",
    "AnomalyMap": "schemas",
    "AsyncInspector": "inspector",
    "ImageError": "errors",
    "Inspection": "schemas",
    "InspectionReport": "report",
    "Inspector": "inspector",
    "LookTwiceError": "errors",
    "Reference": "references",
    "ReferenceVersion": "schemas",
    "Region": "schemas",
    "ReplyError": "errors",
    "draw_overlay": "overlay",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the OpenAI SDK alone takes a second to import."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, also those that were not used yet."""
    return sorted({*globals(), *_HOME})
