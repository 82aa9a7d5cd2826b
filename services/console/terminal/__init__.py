"""The console in a terminal: the experiences of a run, for machines without a browser. It needs the extra `browse`."""
