"""XBZRLE: a page as an edit of its previous content.

    encoded := { zrun nzrun }+     zrun: unchanged bytes to skip, nzrun: bytes that replace
    count   := one byte below 0x80, or two: low 7 bits | 0x80, then the high 7 bits

Reference: stream format 2.5.
"""


def decode_page(encoded: bytes, page: bytearray) -> None:
    """Apply an edit to a page in place.

    Args:
        encoded: The edit.
        page: Previous content of the page; holds the new one afterwards.

    Raises:
        ValueError: The edit is malformed or leaves the page.
    """
    at = 0
    target = 0
    while at < len(encoded):
        skip, at = _count(encoded, at)
        if not skip and target:
            raise ValueError("an empty run of unchanged bytes")
        target += skip
        length, at = _count(encoded, at)
        if not length:
            raise ValueError("an empty run of changed bytes")
        if target + length > len(page) or at + length > len(encoded):
            raise ValueError("a run leaves the page or the record")
        page[target : target + length] = encoded[at : at + length]
        target += length
        at += length


def _count(encoded: bytes, at: int) -> tuple[int, int]:
    if at >= len(encoded):
        raise ValueError("the edit ends inside a pair")
    first = encoded[at]
    if first < 0x80:
        return first, at + 1
    if at + 1 >= len(encoded) or encoded[at + 1] >= 0x80:
        raise ValueError("a malformed count")
    return first & 0x7F | encoded[at + 1] << 7, at + 2
