"""These tests need vLLM, which has an environment of its own: `make test-vllm`. Elsewhere they are not collected.

There they run without the `conftest.py` above, whose plugins that environment lacks.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

collect_ignore = ["runs.py"]
collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

if find_spec("vllm"):  # forked processes import `runs`, too
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:1], os.environ.get("PYTHONPATH", "")])
