"""The supported bit-widths."""

from anybit.errors import InvalidSetting

MIN_BITS, MAX_BITS = 2, 8


def check_bits(bits: int, what: str = "bit-width") -> int:
    """Return `bits`. Raises InvalidSetting unless it is an integer from 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise InvalidSetting(f"{what} {bits!r} is outside {MIN_BITS}..{MAX_BITS}. Choose from 2, 3, 4, 5, 6, 7, 8.")
    return bits
