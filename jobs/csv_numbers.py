"""Tells which columns of a CSV hold numbers, and reads them: prices as people write them."""

import re
from dataclasses import dataclass, field

NULL_WORDS = frozenset({"", "-", "nan", "na", "n/a", "#n/a", "null", "none"})
MIN_CODE_CHARS = 8
_CURRENCY = (
    r"[A-Za-z]{0,3}[$€£¥₹₽₺₩₫₴₦₱฿₪₡₲₸₮]|(?i:USD|EUR|GBP|JPY|CNY|RMB|INR|BRL|CAD|AUD|NZD|CHF|SEK|NOK"
    r"|DKK|PLN|CZK|HUF|RON|BGN|TRY|RUB|UAH|MXN|ARS|CLP|COP|PEN|ZAR|KRW|SGD|HKD|TWD|THB|IDR|MYR|PHP"
    r"|VND|AED|SAR|ILS|EGP|NGN|KES|PKR|Rs\.?|kr\.?|zł|Kč|Ft|lei|Fr\.|\u0440\u0443\u0431\.?)"
)
_MONEY = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<before>{_CURRENCY})?\s*(?P<inner>[+-]?)"
    rf"(?P<number>[\d.,'\u2019\s]*\d(?:[eE][+-]?\d\d?)?)(?:,[-\u2013]{{1,2}})?\s*(?P<after>{_CURRENCY})?"
)
# A leading zero makes a code of a number: 0 and 0.5 are numbers, 007 is none.
_POINT = re.compile(
    r"(?:0|[1-9]\d{0,17}|[1-9]\d{0,2}(?:[,'\u2019\s]\d{3}){1,5})?(?:\.\d+(?:[eE][+-]?\d\d?)?)?"
)
_COMMA = re.compile(r"(?:0|[1-9]\d{0,17}|[1-9]\d{0,2}(?:[.'\u2019\s]\d{3}){1,5})(?:,\d+)?")
_INTEGER = re.compile(r"[+-]?(?:0|[1-9]\d{0,17})")
_GROUPS = re.compile(r"['\u2019\s]")


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """How a column writes its numbers.

    Attributes:
        integer: All cells are plain whole numbers.
        decimal_comma: `1.299,00`; else `1,299.00`.
        currency: The one that stands beside them; empty if none.
    """

    integer: bool
    decimal_comma: bool
    currency: str

    def parse(self, cell: str) -> float | int | None:
        """Read a cell; None if it is empty or a word for nothing.

        Raises:
            ValueError: The cell is no number; a profiled column has none such.
        """
        text = cell.strip()
        if text.lower() in NULL_WORDS:
            return None
        if self.integer:
            return int(text)
        found = _MONEY.fullmatch(text)
        if found is None:
            raise ValueError(f"{cell!r} is no number")
        value = _value(found["number"], decimal_comma=self.decimal_comma)
        return -value if "-" in (found["sign"], found["inner"]) else value


@dataclass(kw_only=True)
class NumberProfile:
    """What was seen of one column so far; `add` every cell, then ask `format`.

    Attributes:
        filled: Cells that hold something, words for nothing not counted.
        text: The first cell that made it a column of text.
    """

    filled: int = 0
    text: str | None = None
    _point: bool = True
    _comma: bool = True
    _integer: bool = True
    _point_groups: bool = False
    _comma_groups: bool = False
    _lengths: set[int] = field(default_factory=set)
    _currencies: set[str] = field(default_factory=set)

    def add(self, cell: str) -> bool:
        """Take one cell; False once the column is known to hold text."""
        if self.text is not None:
            return False
        text = cell.strip()
        if text.lower() in NULL_WORDS:
            return True
        self.filled += 1
        if self._integer and _INTEGER.fullmatch(text):
            if len(self._lengths) < 2:
                self._lengths.add(len(text))
            return True
        self._integer = False
        if not self._add_decimal(text):
            self.text = text
        return self.text is None

    def _add_decimal(self, text: str) -> bool:
        found = _MONEY.fullmatch(text)
        if found is None or (found["before"] and found["after"]):
            return False
        number = found["number"]
        point, comma = bool(_POINT.fullmatch(number)), bool(_COMMA.fullmatch(number))
        if point and comma:
            self._point_groups |= "." in number
            self._comma_groups |= "," in number
        self._point &= point
        self._comma &= comma
        self._currencies.add((found["before"] or found["after"] or "").upper())
        # Dropping the currency is right only while there is one.
        return (self._point or self._comma) and len(self._currencies - {""}) <= 1

    def format(self, *, price: bool) -> NumberFormat | None:
        """Say how the column is to be read; None: as text.

        `1.299` alone is 1.299, but in a price 1299: prices have no three decimals.

        Args:
            price: Whether the column holds prices: never whole numbers, never codes.
        """
        if self.text is not None or not self.filled:
            return None
        if self._integer and not price:
            codes = len(self._lengths) == 1 and min(self._lengths) >= MIN_CODE_CHARS
            return None if codes else NumberFormat(integer=True, decimal_comma=False, currency="")
        grouped = price and self._point_groups and not self._comma_groups
        return NumberFormat(
            integer=False,
            decimal_comma=self._comma and (not self._point or grouped),
            currency=next(iter(self._currencies - {""}), ""),
        )


def _value(number: str, *, decimal_comma: bool) -> float:
    text = _GROUPS.sub("", number)
    text = text.replace(".", "").replace(",", ".") if decimal_comma else text.replace(",", "")
    return float(text)
