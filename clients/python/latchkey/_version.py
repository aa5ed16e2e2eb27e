"""The installed version. In a module of its own because `_channel` needs it for its user agent."""

from importlib.metadata import version

__version__ = version("latchkey")
