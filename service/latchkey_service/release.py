"""Names the release and the build that run, for logs, status and metrics."""

from importlib import metadata, resources

__all__ = ["release"]


def release() -> str:
    """Return the version, with the build as its local part if the wheel names it (PEP 440)."""
    version = metadata.version("latchkey-service")
    try:
        build = resources.files("latchkey_service").joinpath("BUILD").read_text("ascii").strip()
    except FileNotFoundError:
        # Run from a clone: its files may have any state.
        return version
    return f"{version}+{build}"
