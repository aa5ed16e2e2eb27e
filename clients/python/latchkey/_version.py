"""The library's version, as installed. Not in `__init__`: the channel's user agent needs it."""

from importlib.metadata import version

__version__ = version("latchkey")
