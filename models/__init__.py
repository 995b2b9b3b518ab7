"""Networks. ``from models import load`` is the door for other programs; what it needs is imported at that moment."""


def __getattr__(name: str):
    if name == "load":
        from models.detector import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
