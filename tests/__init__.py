"""The tests. A package, so that `from tests.ranks import run_ranks` works under every runner.

Here stands what the environment must say before torch is imported, for the ranks and their subprocesses too.
"""

import os

# Every TCPStore client asks for the host name of 127.0.0.1, in a form (::ffff:127.0.0.1) that /etc/hosts does not
# answer. Where the name server is slow or absent that stalls a rank for seconds: no test needs one, so none is asked.
os.environ.setdefault("RES_OPTIONS", "attempts:0")
# Or c10d would say in some rank's output that it got no host name.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
