"""`launch.generate` as a rank whose encoding fails: `python -m tests.launch.faulty`."""

import os
import sys

from launch.faults import leave
from launch.generate import main
from ringstar.engine import RankEngine

encode = RankEngine.encode


def failing(self, *arguments):
    if os.environ["RANK"] == "1":
        self._transport.publish("encode chunk 3 of 5")
        raise ZeroDivisionError("no such luck\nand a second line")
    return encode(self, *arguments)


if __name__ == "__main__":
    RankEngine.encode = failing
    leave(main(sys.argv[1:]))
