"""A reference's card, as the store keeps it."""

from looktwice_server.schemas import Reference


def card(name: str, version: str, expert: str = "mine", created: int = 0) -> Reference:
    return Reference(
        name=name,
        version=version,
        images=4,
        patches=64,
        false_alarm_rate=0.05,
        promised_rate=0.2,
        guaranteed_rate=0.4,
        threshold=0.1,
        created=created,
        expert=expert,
        calibration="own",
        warnings=[],
    )
