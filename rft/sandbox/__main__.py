"""Start the zygote: `python -I rft/sandbox SOCKET OWNER OPTIONS`, without importing rft."""

import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

sys.path.pop(0)  # this folder: its files are named like modules that programs import
spec = importlib.util.spec_from_file_location(
    "rft_sandbox", os.path.join(HERE, "__init__.py"), submodule_search_locations=[HERE]
)
assert spec is not None and spec.loader is not None
package = importlib.util.module_from_spec(spec)
sys.modules["rft_sandbox"] = package
spec.loader.exec_module(package)
importlib.import_module("rft_sandbox.zygote").main()
