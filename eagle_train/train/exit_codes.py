"""How a training process ends, beside 0 and 1; imports nothing, so that help can tell of it at once."""

PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: the run saved its state and wants to be started again."""
STALLED = 76
"""The run was stuck; its folder `watchdog` says where."""
