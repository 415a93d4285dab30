"""What a CSV file says to a spreadsheet: a text stays a text."""

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""After a tab or a carriage return a spreadsheet may still find a formula."""


def cell(value: object) -> object:
    """The value; with a ' before it, if it is a text that would be run as a formula."""
    formula = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if formula else value
