"""Exit codes of the command, of the ranks and of the launchers."""

from __future__ import annotations

FAILED = 1  # a run that failed: launchers start it again
USER_ERROR = 2  # a mistake that the user can correct: starting again would not help
STOPPED = 75  # the run was asked to stop, saved, and can be resumed: EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # Ctrl-C
