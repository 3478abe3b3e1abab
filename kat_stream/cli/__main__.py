"""`python -m kat_stream.cli`: the same as the `kat-stream` script."""

from kat_stream.cli import console

console()
