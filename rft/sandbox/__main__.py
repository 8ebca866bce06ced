"""Start the zygote: `python -I rft/sandbox SOCKET OWNER OPTIONS`, without importing rft.

`__init__.py` is not executed, because every module of the client in the zygote would slow down each fork.
"""

import importlib
import os
import sys
import types

sys.path.pop(0)  # this folder: its files have the names of modules that programs import
package = types.ModuleType("rft_sandbox")
package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
sys.modules["rft_sandbox"] = package
importlib.import_module("rft_sandbox.zygote").main()
