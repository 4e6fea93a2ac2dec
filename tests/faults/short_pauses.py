"""The command line of `anew` with other pauses between the attempts to use a disk.

ANEW_PAUSES has the seconds, separated by spaces; if it is empty, there is one attempt.
"""

import os
from unittest.mock import patch

from anew.cli.main import main
from anew.utils import disk_errors

if __name__ == "__main__":
    pauses = tuple(float(seconds) for seconds in os.environ["ANEW_PAUSES"].split())
    with patch.object(disk_errors, "PAUSES", pauses):
        main()
