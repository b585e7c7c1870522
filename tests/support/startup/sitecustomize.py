"""Python begins with this in the processes of the tests' servers: to look for garbage among all that
SGLang's imports make takes an eighth of a server's start."""

import gc

gc.set_threshold(100_000, 20, 20)
