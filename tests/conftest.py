"""One thread a process: the networks of the tests are so small that threads would only wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the commands that tests start
