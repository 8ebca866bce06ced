"""Start the zygote: `python -I rft/sandbox SOCKET OWNER OPTIONS`, without importing rft.

`__init__.py` is not executed: each fork pays for every module of the client that the zygote would hold.
"""

import importlib
import os
import sys
import types

sys.path.pop(0)  # this folder: its files are named like modules that programs import
package = types.ModuleType("rft_sandbox")
package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
sys.modules["rft_sandbox"] = package
importlib.import_module("rft_sandbox.zygote").main()
