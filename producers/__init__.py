"""Services that begin a flow from outside the log: a data set, a clock, an HTTP call."""
