"""The installed version. A separate module, because `_channel` needs it too."""

from importlib.metadata import version

__version__ = version("latchkey-client")
