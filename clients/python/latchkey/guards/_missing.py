"""The error for a guard whose framework is not installed."""

__all__ = ["not_installed"]


def not_installed(guard: str, framework: str) -> ImportError:
    """Return the error: one sentence that says what to install."""
    return ImportError(
        f"latchkey.guards.{guard} needs {framework}, which is not installed: "
        f"pip install {framework}",
        name=framework,
    )
