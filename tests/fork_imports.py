"""What `tests.forks` imports before it forks: all that runs import, of the libraries that take long."""

from eagle_train.tools import train  # noqa: F401
from eagle_train.train.zero import engine  # noqa: F401
from eagle_train.train.zero.join import import_deepspeed
from tests import runs, toys  # noqa: F401

import_deepspeed()
