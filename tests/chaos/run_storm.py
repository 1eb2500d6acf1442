"""`make chaos`: tries to break the promise that every job is settled once; see docs/howto-chaos.md."""

import os
import sys

# Before numpy: the checker's model is ten times slower with two threads beside a busy pool.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from storm.main import main

if __name__ == "__main__":
    sys.exit(main())
