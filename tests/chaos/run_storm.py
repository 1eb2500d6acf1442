"""`make chaos`: tries to break the promise that every job is settled once; see docs/howto-chaos.md."""

import sys

from storm.main import main

if __name__ == "__main__":
    sys.exit(main())
