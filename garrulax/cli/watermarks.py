"""The options of a watermark, which `garrulax generate` and `garrulax detect` read alike."""

import garrulax as gx

GREEN_ONLY = ("gamma", "delta")  # what the other scheme has not


def watermark_of(key: str, prefix: str, **options: str | float | None) -> gx.Watermark:
    """The watermark of a key.

    Args:
        key: The secret.
        prefix: How the names of its options begin on the command line.
        **options: Arguments of `gx.watermark`; None is its default.

    Raises:
        ValueError: An option that the scheme does not have, or one that is out of range.
    """
    given: dict = {name: value for name, value in options.items() if value is not None}
    unread = [name for name in GREEN_ONLY if name in given and given.get("scheme") == "gumbel"]
    if unread:
        raise ValueError(f"{prefix}{unread[0]} is for green lists: leave it out, or {prefix}scheme gumbel")
    return gx.watermark(key, **given)
